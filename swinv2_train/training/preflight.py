"""What a command asks of a configuration beyond its keys' own rules, before a file or a process group is touched."""

from __future__ import annotations

from swinv2_train.config import ClassifyConfig, Config
from swinv2_train.data.transforms.augment import check_augment
from swinv2_train.engine.deepspeed.config import check_engine
from swinv2_train.evaluation.probe import check_probe


def preflight(config: Config, *, training: bool) -> None:
    """Raise ConfigError for what the engine, the augmentation or the probes cannot do; every command calls it first.

    training: for a run, or its plan, which has an engine, an augmentation and a schedule.  Otherwise weights are only
    read: they may come from a run whose engine this machine could not even load.
    """
    if training:
        check_engine(config.engine)
    check_probe(config, training)
    if training and isinstance(config.task, ClassifyConfig):
        check_augment(config.task)
