"""Ranges that only classification has, and a schedule without a warm-up."""

from __future__ import annotations

import pytest

from swinv2_train.config import ConfigError
from tests.support.configs import composed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.label_smoothing=1.5", r"task.label_smoothing \(1.5\) must be at least 0 and at most 1"),
        ("task.label_smoothing=-0.1", r"task.label_smoothing \(-0.1\) must be at least 0"),
        ("task.num_classes=0", r"task.num_classes \(0\) must be at least 1"),
        (
            "optim.schedule.warmup_epochs=null",
            r"optim.schedule.warmup_steps and .*warmup_epochs are both null; set one",
        ),
        ("train.keep_best=loss", r"train.keep_best \(loss\) is none of val/loss, val/top1, val/top5"),
    ],
)
def test_wrong_value_for_classification_is_one_message_that_names_the_key(override, message):
    """Before a process group or an accelerator is touched."""
    with pytest.raises(ConfigError, match=message) as caught:
        composed(["experiment=cifar10_finetune", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", ["finetune_base_192", "ade20k_upernet_tiny_512", "coco_htc_giant_1536"])
def test_a_recipe_of_fine_tuning_starts_without_weights_only_on_purpose(experiment):
    recipe = (f"experiment={experiment}", "run_dir=r", "data.shards=x.tar", "task.init_from=null")
    composed([*recipe, "task.init_required=false"])
    with pytest.raises(ConfigError, match=r"task.init_from \(null\): this recipe fine-tunes.*task.init_required=false"):
        composed(recipe)
