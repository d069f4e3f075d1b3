"""What a command asks of a configuration beyond its keys' own rules, before a file or a process group is touched."""

from __future__ import annotations

from swinv2_train.config import Config
from swinv2_train.engine.deepspeed.config import check_engine
from swinv2_train.evaluation.probe import check_probe
from swinv2_train.monitoring.tensorboard_sink import check_tensorboard
from swinv2_train.runtime import check_workspace
from swinv2_train.tasks import task_class


def preflight(config: Config, *, training: bool) -> None:
    """Raise ConfigError for what engine, probes, log or task cannot do here; every command calls it first.

    training: for a run, or its plan.  Otherwise weights are only read, and the engine of their run may be one that this
    machine could not even load.
    """
    if training:
        check_engine(config.engine)
    check_probe(config, training)
    if config.runtime.deterministic:
        check_workspace()
    if training:
        check_tensorboard(config.log)
        task_class(config.task).preflight(config.task)
