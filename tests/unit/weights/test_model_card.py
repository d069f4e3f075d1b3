"""The model card: metadata that the hub's own classes read, and texts of strangers that stay texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from swinv2_train.config import Config, ConfigError
from swinv2_train.report.run_record import RunRecord
from swinv2_train.weights.card_facts import RunFacts, Scores, _evaluated
from swinv2_train.weights.model_card import Exported, check_license, code, model_card
from tests.support.configs import composed
from tests.support.weights_samples import classifier

EVIL = "`` </details><script>alert(1)</script>|![x](http://x/y) \n---\nlicense: mit"
COMMIT = "a" * 40


def config_of(*overrides: str) -> Config:
    return composed(["task=classify", "data=cifar10", "run_dir=run", "model.img_size=64", "model.window_size=4",
                     "task.num_classes=7", "task.init_from=null", *overrides])  # fmt: skip


def facts(*scores: Scores, starts: tuple[dict[str, Any], ...] = ()) -> RunFacts:
    return RunFacts(RunRecord(Path("run"), {}, "", starts, [], {}, {}), 5, 320, False, scores)


def card(config: Config, **changed: Any) -> str:
    given: dict[str, Any] = {
        "module": classifier(), "format": "huggingface", "origin": "w.pth", "classes": None, "facts": facts(),
        "license": None, "name": "swin",
    }  # fmt: skip
    return model_card(Exported(config, **{**given, **changed}))


def test_the_metadata_is_what_the_hub_reads():
    scores = Scores("evaluation", "data/birds/val-*.tar", 500, {"top1": 81.25, "top5": 95.0, "loss": 0.8})
    config = config_of(f"task.init_from=hf://them/base@{COMMIT}/model.safetensors",
                       "data.shards=hf://datasets/them/birds/train-*.tar")  # fmt: skip
    read = ModelCard(card(config, facts=facts(scores), license="apache-2.0", name="me/birds"))
    data = read.data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "them/base", ["them/birds"])
    assert [(each.dataset_name, each.dataset_split, each.metric_type, each.metric_value)
            for each in data.eval_results] == [("birds", "evaluation", "accuracy", 81.25),
                                               ("birds", "evaluation", "accuracy", 95.0)]  # fmt: skip
    assert "| `evaluation` | `loss` | 0.8 | 500 |" in read.text
    assert 's2.load("hf://me/birds")' in read.text and 'from_pretrained("me/birds")' in read.text
    for word in ("RandAugment rand-m9-mstd0.5-inc1", "mixup 0.8", "CutMix 1", "labels smoothed by 0.1"):
        assert word in read.text, word


def test_what_is_not_known_is_not_said():
    """Weights without a run: no training, no scores, no licence."""
    read = ModelCard(card(config_of(), facts=None))
    assert read.data.license is None and read.data.eval_results is None and read.data.base_model is None
    for text in ("the weights were converted from `w.pth`", "None of these weights are known", "None is stated here"):
        assert text in read.text
    assert "AdamW: learning rate" not in read.text


def test_texts_of_strangers_are_shown_and_mean_nothing():
    """Names of classes, addresses, the configuration: neither HTML nor pictures nor metadata come of them."""
    config = config_of()
    config.data.shards = EVIL
    config.task.init_from = EVIL
    scores = Scores(EVIL, EVIL, 3, {"top1": 1.0, EVIL: 2.0})
    starts = ({"versions": {"python": EVIL}, "gpus": [{"name": EVIL}]},)
    text = card(config, classes=[EVIL] * 7, facts=facts(scores, starts=starts), origin=EVIL, name=EVIL)
    read = ModelCard(text)
    assert read.data.license is None and read.text.count(f"{EVIL.splitlines()[0][:10]}") >= 5
    page = MarkdownIt("commonmark").enable("table").render(read.text)
    assert "<script" not in page and "<img" not in page and "<hr" not in page
    assert page.count("</details>") == 1 and page.rstrip().endswith("</p>")


def test_secrets_are_left_out(monkeypatch):
    from swinv2_train.config import secret_texts

    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    secret_texts.secret_values.cache_clear()
    config = config_of("data.shards='https://me:pw@host/a.tar?X-Amz-Signature=abc'")
    scores = Scores("evaluation", "https://me:pw@host/token/abcdef/v.tar", None, {"top1": 1.0})
    text = card(config, facts=facts(scores), classes=["hf_secret_value"], name="hf_secret_value")
    secret_texts.secret_values.cache_clear()
    for secret in ("hf_secret_value", "me:pw", "X-Amz", "abcdef"):
        assert secret not in text, secret
    assert "REDACTED" in text


@pytest.mark.parametrize("text", ["", " ", "`", "a`b``c", "`a`"])
def test_code_is_one_span_that_holds_the_text(text):
    assert MarkdownIt("commonmark").render(code(text) + "\n").count("<code>") == 1


@pytest.mark.parametrize("license", ["Apache 2.0", "", "mit\ntags: [x]", "MIT"])
def test_a_licence_is_an_identifier(license):
    with pytest.raises(ConfigError, match="no identifier such as apache-2.0"):
        check_license(license)


def test_scores_of_other_weights_are_not_taken(tmp_path):
    """An evaluation of an earlier checkpoint, or of the averages."""
    (tmp_path / "evaluation").mkdir()
    found = {"checkpoint": "somewhere/step_00000004", "ema": False, "images": 6, "val/top1": 50.0,
             "data": {"eval_shards": "v.tar"}, "splits": {"far": {"shards": "f.tar", "val/top1": 10.0}}}  # fmt: skip
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    expected = (Scores("evaluation", "v.tar", 6, {"top1": 50.0}), Scores("far", "f.tar", None, {"top1": 10.0}))
    assert _evaluated(tmp_path, Path("run/checkpoints/step_00000004"), False) == expected
    assert _evaluated(tmp_path, Path("run/checkpoints/step_00000005"), False) == ()
    assert _evaluated(tmp_path, Path("run/checkpoints/step_00000004"), True) == ()
