"""What a command asks before anything else is done; and what it leaves alone because it does not use it."""

from __future__ import annotations

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.training.preflight import preflight
from tests.support.configs import composed

REFUSED_TO_TRAIN = {
    "engine": (("engine=zero0", "engine.precision=bf16"), r"engine.zero_stage \(0\) with engine.precision \(bf16\)"),
    "probe": (("probe.every_steps=3",), r"probe.every_steps \(3\) is given, but probe.methods is empty"),
    "task": (
        ("task.rand_augment=rand-n16-t3aw",),
        r"task.rand_augment \(rand-n16-t3aw\) draws 16 different",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TO_TRAIN)
def test_a_run_is_refused_for_what_reading_its_weights_does_not_need(case):
    """An evaluation may be on a machine that has neither the engine nor the augmentation of the run."""
    overrides, message = REFUSED_TO_TRAIN[case]
    config = composed(["experiment=cifar10_finetune", *overrides])
    with pytest.raises(ConfigError, match=message) as caught:
        preflight(config, training=True)
    assert "\n" not in str(caught.value)
    preflight(config, training=False)


def test_probes_without_images_are_refused_for_every_command():
    config = composed(
        ["experiment=cifar10_finetune", "probe.methods=[knn]", "data.eval_shards=null", "train.keep_best=null"]
    )
    for training in (True, False):
        with pytest.raises(ConfigError, match=r"probe.methods \(knn\) needs labelled images to be scored on"):
            preflight(config, training=training)
