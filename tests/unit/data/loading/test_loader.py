"""Loaders: what a rank sees depends on the position alone, never on ranks, workers or restarts; damage is handled."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.batches import BatchRequest
from swinv2_train.data.loading.loader import EvalLoader, TrainLoader, accumulation_steps
from swinv2_train.data.loading.sample_rngs import sample_rngs
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.shards.tar_writer import write_shards
from tests.support.images import image_bytes
from tests.support.loaders import CONFIG, Transform, train_loader
from tests.support.processes import forked_code


def make_shards(folder: Path, count: int, bad: dict[int, bytes] | None = None, unlabelled: int = -1) -> Manifest:
    bad = bad or {}
    rows = [
        (f"k{i:03d}", bad.get(i, image_bytes(i, size=(12, 10))), "png", None if i == unlabelled else i % 3)
        for i in range(count)
    ]
    return write_shards(rows, str(folder / "t"), samples_per_shard=7)


def fingerprint(batch: dict) -> list[tuple[str, bytes]]:
    """Per row its sample key and everything random about it."""
    return [
        (key, batch["image"][i].numpy().tobytes() + batch["mask"][i].numpy().tobytes())
        for i, key in enumerate(batch["keys"])
    ]


def step_of(loaders: list[TrainLoader], steps: int) -> list[list[tuple[str, bytes]]]:
    """Per step the rows of all ranks, sorted (a sample may come twice where two epochs meet)."""
    streams = [iter(loader) for loader in loaders]
    result = []
    for _ in range(steps):
        merged: list[tuple[str, bytes]] = []
        for loader, stream in zip(loaders, streams, strict=True):
            passes = accumulation_steps(loader.global_batch_size, loader.micro_batch_size, loader.world_size)
            for batch in islice(stream, passes):
                merged += fingerprint(batch)
        assert len(merged) == loaders[0].global_batch_size
        result.append(sorted(merged))
    for loader in loaders:
        loader.close()
    return result


def test_a_batch_holds_stacked_tensors_weights_and_keys(tmp_path):
    batch = next(iter(train_loader(make_shards(tmp_path, 20))))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 8, 8) and batch["label"].shape == (4,)
    assert batch["weight"].dtype == torch.float32 and batch["weight"].tolist() == [1.0] * 4
    assert batch["num_bad"] == 0 and batch["problems"] == [] and all(isinstance(key, str) for key in batch["keys"])
    assert [int(key[1:]) % 3 for key in batch["keys"]] == batch["label"].tolist()
    assert set(batch) == {"image", "mask", "label", "weight", "keys", "num_bad", "problems"}


def test_images_masks_and_crops_do_not_depend_on_ranks_workers_or_micro_batches(tmp_path):
    """DESIGN.md, Determinism: the same set in every step, every row a function of (seed, epoch, sample)."""
    manifest = make_shards(tmp_path, 26)
    reference = step_of([train_loader(manifest)], steps=5)  # 60 images: over the epoch border twice
    shapes = [(1, 1, 6), (1, 2, 4), (2, 0, 6), (2, 1, 3), (3, 0, 2), (3, 0, 4)]
    for world, workers, micro in shapes:
        config = replace(CONFIG, num_workers=workers)
        loaders = [
            train_loader(manifest, config, micro_batch_size=micro, rank=rank, world_size=world) for rank in range(world)
        ]
        assert step_of(loaders, steps=5) == reference, (world, workers, micro)
    assert step_of([train_loader(manifest, seed=6)], steps=5) != reference


def test_every_epoch_augments_anew(tmp_path):
    manifest = make_shards(tmp_path, 12)
    first, second = step_of([train_loader(manifest)], steps=2)
    assert [key for key, _ in first] == [key for key, _ in second]
    assert sum(one != two for one, two in zip(first, second, strict=True)) >= 11


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_resumes_at_any_step_at_another_world_size(tmp_path, workers):
    manifest = make_shards(tmp_path, 26)
    reference = step_of([train_loader(manifest)], steps=6)
    config = replace(CONFIG, num_workers=workers)
    for step, world in ((0, 1), (2, 3), (5, 1)):
        loaders = [
            train_loader(manifest, config, rank=rank, world_size=world, start_images=12 * step) for rank in range(world)
        ]
        assert step_of(loaders, steps=1) == reference[step : step + 1]


def test_the_order_of_batches_within_a_rank_does_not_depend_on_workers(tmp_path):
    manifest = make_shards(tmp_path, 26)
    runs = []
    for workers in (0, 2):
        loader = train_loader(manifest, replace(CONFIG, num_workers=workers))
        runs.append([batch["keys"] for batch in islice(loader, 9)])
        loader.close()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(tmp_path, workers):
    """The model's dropout must not depend on how the data is loaded."""
    import random

    loader = train_loader(make_shards(tmp_path, 20), replace(CONFIG, num_workers=workers))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(islice(loader, 4))
    loader.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist() and before[2] == random.getstate()


def test_sample_rngs_differ_in_every_part_of_their_identity():
    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**33), (0, 0, 0)]
    draws = [sample_rngs(seed, [place])[0].integers(2**62) for seed, *place in names]
    assert len(set(draws)) == 5 and draws[0] == draws[-1]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 3, 2**130 + 2**70 + 5])
def test_sample_rngs_are_those_of_numpys_seed_sequence(seed):
    """Which crop an image gets must not depend on how its generator is made."""
    numbers = np.random.default_rng(0).integers(0, 2**32, (40, 2)).tolist()
    for places in ([(0, 0), (1, 7), (2**32 - 1, 2**32 - 1), *map(tuple, numbers)], [(3, 2**32)] * 12, [(1, 7)], []):
        found = sample_rngs(seed, places)
        for rng, place in zip(found, places, strict=True):
            sequence = np.random.SeedSequence(seed, spawn_key=(2, *place))
            assert rng.bit_generator.state == np.random.PCG64(sequence).state


def test_samples_at_the_same_place_of_two_shards_get_different_masks(tmp_path):
    """All shards sharing one set of random numbers would not show in any other test."""
    loader = train_loader(make_shards(tmp_path, 28))
    masks = loader._fetch.batch(BatchRequest([(0, shard, 3) for shard in range(4)], 0, None))["mask"]
    assert len({mask.numpy().tobytes() for mask in masks}) == 4


def test_the_fetcher_survives_pickling_for_spawned_workers(tmp_path):
    loader = train_loader(make_shards(tmp_path, 20))
    copy = pickle.loads(pickle.dumps(loader._fetch))
    request = BatchRequest([(0, 1, 2), (3, 0, 1)], 0, None)
    assert fingerprint(copy.batch(request)) == fingerprint(loader._fetch.batch(request))


def test_accumulation_steps_names_the_nearest_sizes():
    assert accumulation_steps(96, 4, 8) == 3
    message = re.escape(
        "train.global_batch_size (4096) is not a multiple of micro_batch_size (12) x world_size (64); "
        "nearest: 3840, 4608"
    )
    with pytest.raises(ConfigError, match=message):
        accumulation_steps(4096, 12, 64)
    with pytest.raises(ConfigError, match="nearest: 16$"):
        accumulation_steps(5, 8, 2)


def test_a_loader_refuses_batches_that_do_not_divide(tmp_path):
    with pytest.raises(ConfigError, match="is not a multiple of micro_batch_size"):
        train_loader(make_shards(tmp_path, 20), world_size=2)


# --------------------------------------------------------------------------------------------------------------------
# State


def test_state_is_one_position_one_count_and_the_identity_of_the_data(tmp_path):
    loader = train_loader(make_shards(tmp_path, 20))
    state = loader.state_dict(36, 2)
    order = {"seed": 5, "lanes": 4, "window_shards": 2, "manifest": loader.manifest.digest, "num_samples": 20}
    assert state == {"images_seen": 36, "bad_images": 2, **order}
    loader.check_state(state)
    refused = r"data.shards are not the shards of the checkpoint \(.*\): 20 images now, 20 then; name the same"
    with pytest.raises(ConfigError, match=refused):
        loader.check_state({**state, "manifest": "0" * 64})
    with pytest.raises(ConfigError, match=r"data.lanes \(4\) differs from the checkpoint's \(64\)"):
        loader.check_state({**state, "lanes": 64})
    with pytest.raises(ConfigError, match=r"seed \(5\) differs from the checkpoint's \(6\)"):
        loader.check_state({**state, "seed": 6})


# --------------------------------------------------------------------------------------------------------------------
# Damaged samples


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_stops_the_run_and_is_named(tmp_path, workers):
    """One message, no traceback of a worker around it."""
    manifest = make_shards(tmp_path, 20, bad={9: image_bytes(9, size=(12, 10))[:100]})
    loader = train_loader(manifest, replace(CONFIG, num_workers=workers))
    message = r"^\S*t-000001.tar: sample 'k009': not a readable .png image .* at byte \d+; .*data.on_bad_sample=replace"
    with pytest.raises(SampleError, match=message):
        list(islice(loader, 10))


@pytest.mark.parametrize("workers", [0, 1])
def test_replace_counts_damaged_samples_and_gives_them_weight_zero(tmp_path, workers):
    """11 of 40 damaged: all positions present, one tensor shape, 11 counted, the rest untouched."""
    damaged = dict.fromkeys(range(0, 33, 3), b"garbage")
    healthy = step_of(
        [train_loader(make_shards(tmp_path / "healthy", 40), global_batch_size=40, micro_batch_size=10)], 1
    )
    manifest = make_shards(tmp_path / "damaged", 40, bad=damaged)
    config = replace(CONFIG, on_bad_sample="replace", num_workers=workers)
    loader = train_loader(manifest, config, global_batch_size=40, micro_batch_size=10)
    batches = list(islice(loader, 4))
    loader.close()
    assert sorted(key for batch in batches for key in batch["keys"]) == [f"k{i:03d}" for i in range(40)]
    assert sum(batch["num_bad"] for batch in batches) == 11
    assert all(batch["image"].shape == (10, 3, 8, 8) for batch in batches)
    weights = {key: weight for b in batches for key, weight in zip(b["keys"], b["weight"].tolist(), strict=True)}
    assert {key for key, weight in weights.items() if weight == 0.0} == {f"k{i:03d}" for i in damaged}
    rows = sorted(row for batch in batches for row in fingerprint(batch))
    assert [row for row in rows if weights[row[0]] == 1.0] == [row for row in healthy[0] if weights[row[0]] == 1.0]


def test_every_damaged_sample_is_listed_with_shard_key_and_cause(tmp_path):
    manifest = make_shards(tmp_path, 20, bad={3: b"garbage", 9: b""}, unlabelled=15)
    loader = train_loader(manifest, replace(CONFIG, on_bad_sample="replace"), global_batch_size=20, micro_batch_size=20)
    problems = sorted(next(iter(loader))["problems"], key=lambda problem: problem["key"])
    shards = [str(tmp_path / f"t-00000{number}.tar") for number in (0, 1, 2)]
    assert [(problem["shard"], problem["key"]) for problem in problems] == list(
        zip(shards, ["k003", "k009", "k015"], strict=True)
    )
    assert re.fullmatch(r"not a readable .png image .no known format., at byte \d+", problems[0]["cause"])
    assert [problem["cause"] for problem in problems[1:]] == ["an empty image", "no readable label (.cls)"]


def test_what_a_transform_refuses_is_named_too(tmp_path):
    """A label out of range is known to the task alone, which does not know the sample."""

    class Refusing(Transform):
        def __call__(self, image, targets, rng):
            if targets["label"] == 2:
                raise SampleError("label 2 is not within 0..1")
            return super().__call__(image, targets, rng)

    with pytest.raises(SampleError, match=r"t-00000\d.tar: sample 'k0\d\d': label 2 is not within 0..1; repair it"):
        list(islice(train_loader(make_shards(tmp_path, 20), transform=Refusing()), 5))


def test_replace_stops_above_max_bad_fraction(tmp_path):
    """0.05 of 40 samples allow two; the third ends the run, at the latest after all of them."""
    manifest = make_shards(tmp_path, 40, bad=dict.fromkeys(range(0, 33, 3), b"garbage"))
    config = replace(CONFIG, on_bad_sample="replace", max_bad_fraction=0.05)
    loader = train_loader(manifest, config, micro_batch_size=12)
    with pytest.raises(
        SampleError, match=r"data.max_bad_fraction \(0.05\) is exceeded: \d+ damaged .* among \d+ images"
    ):
        list(islice(loader, 4))
    few = make_shards(tmp_path / "few", 40, bad=dict.fromkeys(range(2), b"garbage"))
    assert (
        sum(batch["num_bad"] for batch in islice(train_loader(few, config, micro_batch_size=12), 10)) == 6
    )  # 3 epochs


def test_the_bound_on_damaged_samples_holds_over_restarts_and_ranks(tmp_path):
    """A run that is killed every hour would otherwise never reach it; neither would one rank of many by itself."""
    manifest = make_shards(tmp_path, 40, bad={5: b"garbage"})
    config = replace(CONFIG, on_bad_sample="replace", max_bad_fraction=0.05)  # two per epoch
    loader = train_loader(manifest, config, rank=1, world_size=3)
    loader.check_bad_images(2, 12)
    with pytest.raises(SampleError, match="3 damaged samples among 12 images"):
        loader.check_bad_images(3, 12)
    loader.check_bad_images(6, 81)  # the share counts, not the number
    resumed = train_loader(manifest, config, global_batch_size=40, start_images=40)
    resumed.check_state({**resumed.state_dict(40, 1), "bad_images": 4})
    assert resumed.bad_images_before == 4
    with pytest.raises(SampleError, match=r"5 damaged samples among \d\d images"):  # four were two epochs' worth
        list(islice(resumed, 10))
    fresh = train_loader(manifest, config, global_batch_size=40, start_images=40)
    fresh.check_state(fresh.state_dict(40, 1))
    assert sum(batch["num_bad"] for batch in islice(fresh, 10)) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_with_nothing_readable_gets_stand_ins_of_weight_zero(tmp_path, workers):
    """At the largest sizes a micro-batch is one image; replacing must work there too."""
    manifest = make_shards(tmp_path, 20, bad=dict.fromkeys(range(14), b"garbage"))
    config = replace(CONFIG, on_bad_sample="replace", max_bad_fraction=1.0, num_workers=workers)
    loader = train_loader(manifest, config, global_batch_size=20, micro_batch_size=1)
    batches = list(islice(loader, 20))
    loader.close()
    assert sorted(batch["keys"][0] for batch in batches) == [f"k{i:03d}" for i in range(20)]
    assert {batch["keys"][0] for batch in batches if batch["weight"] == 0} == {f"k{i:03d}" for i in range(14)}
    assert all(batch["image"].shape == (1, 3, 8, 8) for batch in batches)


def test_replace_stops_when_nothing_is_readable_at_all(tmp_path):
    manifest = make_shards(tmp_path, 20, bad=dict.fromkeys(range(20), b"garbage"))
    loader = train_loader(manifest, replace(CONFIG, on_bad_sample="replace", max_bad_fraction=1.0))
    with pytest.raises(ShardError, match=r"t-00000\d.tar and its like hold no readable sample"):
        next(iter(loader))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_damage_leaves_every_position_in_its_place_on_every_rank_count(tmp_path, world):
    damaged = dict.fromkeys(range(0, 26, 5), b"garbage")
    config = replace(CONFIG, on_bad_sample="replace")
    reference = step_of([train_loader(make_shards(tmp_path / "healthy", 26))], steps=5)
    manifest = make_shards(tmp_path / "damaged", 26, bad=damaged)
    ranks = [train_loader(manifest, config, micro_batch_size=2, rank=rank, world_size=world) for rank in range(world)]
    found = step_of(ranks, steps=5)
    assert [[key for key, _ in step] for step in found] == [[key for key, _ in step] for step in reference]


def test_a_shard_fault_is_not_replaced(tmp_path):
    """The first prototype swallowed it as a damaged sample."""
    manifest = make_shards(tmp_path, 20)
    loader = train_loader(manifest, replace(CONFIG, on_bad_sample="replace", max_bad_fraction=1.0))
    stream = iter(loader)
    list(islice(stream, 5))  # every shard is open now
    os.truncate(manifest.paths[1], 1000)
    with pytest.raises(ShardError, match="t-000001.tar: ends before byte"):
        list(islice(stream, 5))


def test_missing_labels_are_reported_before_the_first_step_unless_not_needed(tmp_path):
    manifest = make_shards(tmp_path, 20, unlabelled=8)
    with pytest.raises(ShardError, match=r"data.shards: 1 of 20 samples have no readable label .*t-000001.tar"):
        train_loader(manifest)
    with pytest.raises(ShardError, match=r"data.eval_shards: 1 of 20 samples have no readable label"):
        EvalLoader(manifest, CONFIG, Transform(), 4, 0, 1)
    assert len(next(iter(train_loader(manifest, transform=Transform(needs_label=False))))["keys"]) == 4
    loader = train_loader(manifest, replace(CONFIG, on_bad_sample="replace"), global_batch_size=20, micro_batch_size=20)
    batch = next(iter(loader))
    assert batch["num_bad"] == 1 and batch["weight"][batch["keys"].index("k008")] == 0


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize(("count", "world", "micro"), [(10, 3, 4), (10, 1, 3), (2, 4, 3), (26, 2, 5), (12, 3, 4)])
def test_evaluation_counts_every_sample_once_with_equal_batches_on_all_ranks(tmp_path, count, world, micro):
    """A rank with fewer batches would leave the others waiting in a collective."""
    manifest = make_shards(tmp_path, count)
    seen: Counter[str] = Counter()
    lengths = set()
    for rank in range(world):
        loader = EvalLoader(manifest, CONFIG, Transform(), micro, rank, world)
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (micro, 3, 8, 8)
            seen.update(key for key, weight in zip(batch["keys"], batch["weight"].tolist(), strict=True) if weight)
            assert [key == "" for key in batch["keys"]] == (batch["weight"] == 0).tolist()
    assert len(lengths) == 1
    assert seen == Counter(f"k{i:03d}" for i in range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_repeats_exactly(tmp_path, workers):
    """Also after a pass that was left half-way."""
    loader = EvalLoader(make_shards(tmp_path, 10), replace(CONFIG, num_workers=workers), Transform(), 3, 0, 1)
    first = [fingerprint(batch) for batch in loader]
    next(iter(loader))
    assert [fingerprint(batch) for batch in loader] == first
    loader.close()


def test_evaluation_stands_in_for_damaged_samples_too(tmp_path):
    manifest = make_shards(tmp_path, 10, bad={0: b"x", 8: b"x", 9: b"x"})
    loader = EvalLoader(manifest, replace(CONFIG, on_bad_sample="replace"), Transform(), 2, 0, 1)
    batches = list(loader)  # the last batch holds nothing readable
    assert sum(batch["num_bad"] for batch in batches) == 3
    assert torch.cat([batch["weight"] for batch in batches]).tolist() == [0.0, *[1.0] * 7, 0.0, 0.0]


# --------------------------------------------------------------------------------------------------------------------
# Worker processes

_SCRIPT = """
import sys, time
from itertools import islice
from tests.unit.data.loading.test_loader import *
from swinv2_train.data.shards.tar_reader import open_manifest
loader = train_loader(open_manifest({pattern!r}), replace(CONFIG, num_workers=2))
stream = iter(loader)
batch = next(stream)
print("pids", *[w.pid for w in loader._workers._running["loader"]._iterator._workers], flush=True)
{then}
"""


def _start(tmp_path: Path, then: str) -> tuple[subprocess.Popen, list[int]]:
    make_shards(tmp_path, 20)
    script = _SCRIPT.format(pattern=f"{tmp_path}/*.tar", then=then)
    process = forked_code(script, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()[1:]]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _all_end(pids: list[int], within: float = 20) -> bool:
    """Whether they are gone soon: one that is killed with its parent dies a moment after the parent is waited for."""
    deadline = time.monotonic() + within
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(_alive(pid) for pid in pids)


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_main_process(tmp_path):
    """Ctrl-C and SIGTERM reach every process of the group; the main one must still be able to finish its step."""
    then = """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
print("ready", flush=True)
time.sleep(0.5)
print(sum(len(b["keys"]) for b in islice(stream, 40)), flush=True)
"""
    process, pids = _start(tmp_path, then)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)
    assert process.communicate(timeout=240)[0].strip() == "160"
    assert process.returncode == 0 and _all_end(pids)


@pytest.mark.slow
def test_workers_end_with_the_main_process_even_when_it_is_killed_or_exits_in_mid_stream(tmp_path):
    """Leaving with live workers must neither hang (they ignore SIGTERM) nor leave orphans."""
    process, pids = _start(tmp_path / "exits", "sys.exit(3)")
    assert process.wait(timeout=240) == 3
    assert _all_end(pids)
    process, pids = _start(tmp_path / "killed", "time.sleep(60)")
    process.kill()
    process.wait()
    assert _all_end(pids)


def test_a_killed_worker_is_named(tmp_path):
    """The out-of-memory killer takes data workers first; to wait for its batches would be to wait for ever."""
    loader = train_loader(make_shards(tmp_path, 20), replace(CONFIG, num_workers=1))
    stream = iter(loader)
    next(stream)
    (worker,) = loader._workers._running["loader"]._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match=rf"worker .*{worker.pid}.* (is killed by signal: Killed|exited unexpectedly)"
    ):
        for _ in stream:
            pass
    loader.close()


def test_a_dropped_loader_ends_its_workers(tmp_path):
    loader = train_loader(make_shards(tmp_path, 20), replace(CONFIG, num_workers=1))
    stream = iter(loader)
    next(stream)
    pids = [worker.pid for worker in loader._workers._running["loader"]._iterator._workers]
    assert all(_alive(pid) for pid in pids)
    del loader, stream
    assert not any(_alive(pid) for pid in pids)
