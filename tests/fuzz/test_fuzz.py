"""A minute of the fuzz campaign, and hypothesis on what has a grammar: strangers' files get one message, or are read.

`make fuzz` runs the campaign for an hour; benchmarks/fuzz_cpu_202611.md keeps what it tried.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swinv2_train.config import ConfigError
from swinv2_train.config.load import config_yaml, load_config
from swinv2_train.config.saved import literal, parse_saved_config
from swinv2_train.config.shown import shown
from swinv2_train.data.shards.manifest import parse_entries
from swinv2_train.status import read_status, status_text
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.weights.names import to_official
from tests.fuzz.campaign import campaign, table
from tests.fuzz.targets import targets
from tests.support.configs import composed

SECONDS = float(os.environ.get("FUZZ_SECONDS", "12"))
settings.register_profile(
    "ours", max_examples=200, deadline=5000, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
settings.load_profile("ours")


@pytest.mark.slow
def test_mutated_files_of_strangers_are_read_or_refused_in_one_message(record_property):
    """Never another exception, a dead process, ten seconds, a gigabyte, or a file outside.  Prints what was tried."""
    counts = campaign(targets(), SECONDS, seed=0)
    record_property("tried", table(counts))
    assert not [problem for count in counts.values() for problem in count.failures]
    assert all(count.tried >= 64 and count.accepted for count in counts.values())


# --- what has a grammar

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def changed(document: object, path: list[int], value: object) -> object:
    """The document with another value at a place that the numbers lead to."""
    if path and isinstance(document, dict) and document:
        key = sorted(document, key=str)[path[0] % len(document)]
        return {**document, key: changed(document[key], path[1:], value)}
    if path and isinstance(document, list) and document:
        place = path[0] % len(document)
        return [changed(each, path[1:], value) if i == place else each for i, each in enumerate(document)]
    return value


def refused_or_read(read: object) -> None:
    try:
        read()
    except ConfigError as error:
        assert len(str(error)) <= 6000
        assert shown(error, 6000, lines=True) == str(error)


CONFIG = yaml.safe_load(config_yaml(composed(["run_dir=x", "data.shards=y.tar", "task=classify"])))
places = st.lists(st.integers(0, 30), min_size=1, max_size=4)


@settings(max_examples=40)  # 0.2 s each
@pytest.mark.slow
@given(places, values)
def test_any_value_anywhere_in_a_saved_config(path, value):
    text = yaml.safe_dump(changed(CONFIG, path, value), allow_unicode=True)
    refused_or_read(lambda: load_config(parse_saved_config(text, "config.yaml")))


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60))  # YAML folds those
def test_any_text_survives_a_saved_config_or_is_refused(value):
    """What was written is what is read: nothing in it is an interpolation."""
    text = yaml.safe_dump({"a": literal(value)}, allow_unicode=True)
    refused_or_read(lambda: _same(parse_saved_config(text, "config.yaml")["a"], value))


def _same(read: object, written: str) -> None:
    assert read == written


@given(st.text(max_size=400), st.integers(60, 300), st.booleans())
def test_shown_text_is_visible_bounded_and_final(text, most, lines):
    once = shown(text, most, lines)
    assert len(once) <= most
    assert shown(once, most, lines) == once
    assert all(char.isprintable() or char == " " or (lines and char in "\n\t") or char.isspace() for char in once)
    assert not set(once) & set("\x1b\x07\r\x7f\x9b\u202e\u2066\u200b")


STATUS = {
    "host": "h", "pid": 1, "state": "running", "reason": None, "doing": "training", "doing_since": 1.0, "step": 3,
    "updated_at": 2.0, "world_size": 2, "heartbeat_sec": 10.0, "total_steps": 9, "loss": 1.5, "seconds_left": 3.0,
    "slowest_rank": {"rank": 1, "own_sec": 1.0, "data_wait_sec": 0.5, "median_sec": 0.9},
}  # fmt: skip


@given(places, values)
def test_any_value_anywhere_in_a_status(path, value):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "status.json").write_text(json.dumps(changed(STATUS, path, value)))
        refused_or_read(lambda: status_text(read_status(Path(folder))))


ENTRY = {"samples": 3, "bytes": 10_240, "sha256": "0" * 64, "unlabelled": 0, "label_range": [0, 2]}


@given(places, values)
def test_any_value_anywhere_in_a_manifest(path, value):
    document = {"version": 1, "shards": {"t-000000.tar": ENTRY, "t-000001.tar": ENTRY}}
    refused_or_read(lambda: parse_entries(json.dumps(changed(document, path, value)), "manifest.json"))


part = st.sampled_from(
    ["norm", "mlp", "layers", "stages", "blocks", "encoder", "backbone", "module", "_orig_mod", "model", "swinv2",
     "attn", "qkv", "w_msa", "weight", "bias", "head", "decoder", "mask_token", "downsample", "reduction",
     "attention", "self", "query", "key", "value", "0", "1", "99", "2000000000", "9" * 400, "", "..", "\x1b[2J", "é",
     "patch_embed", "proj"]
)  # fmt: skip


@given(st.lists(st.lists(part, min_size=1, max_size=9).map(".".join), max_size=12, unique=True), st.integers(0, 5))
def test_any_names_in_a_weights_file(names, size):
    tensor = torch.ones(size, 4)
    entries = {name: LazyTensor((size, 4), torch.float32, tensor.clone) for name in names}
    refused_or_read(lambda: list(to_official(entries, None, "a.safetensors", ()).sources))
