"""The configuration, a file a section: of every key its type, what it may be (``config/rules.py``) and, below it, what
it means.

Values live in ``conf/``; :mod:`swinv2_train.config.load` joins the two.  A validated configuration is never changed:
derived numbers are functions.
"""

from swinv2_train.config.schema.classify import ClassifyConfig
from swinv2_train.config.schema.config import Config, TaskConfig
from swinv2_train.config.schema.data import (
    MIX,
    OWN_ENTRIES,
    PIPE,
    SPLITS,
    DataConfig,
    EvalSplitConfig,
    MixSourceConfig,
    is_pipe,
)
from swinv2_train.config.schema.detect import DetectConfig
from swinv2_train.config.schema.engine import EngineConfig
from swinv2_train.config.schema.log import ARTIFACTS, LogConfig
from swinv2_train.config.schema.model import ModelConfig
from swinv2_train.config.schema.optim import LoraConfig, OptimConfig, ScheduleConfig
from swinv2_train.config.schema.planner import HardwareConfig, PlanConfig
from swinv2_train.config.schema.probe import PROBE_SCORES, ProbeConfig
from swinv2_train.config.schema.runtime import RuntimeConfig
from swinv2_train.config.schema.scale import ScaleConfig
from swinv2_train.config.schema.score_names import averaged_score, lower_is_better
from swinv2_train.config.schema.segment import BATCH_NORMS, HEAD_NORMS, SegmentConfig
from swinv2_train.config.schema.simmim import SimMIMConfig
from swinv2_train.config.schema.tasks import TASKS
from swinv2_train.config.schema.train import TrainConfig

__all__ = [
    "ARTIFACTS",
    "BATCH_NORMS",
    "ClassifyConfig",
    "Config",
    "DataConfig",
    "DetectConfig",
    "EngineConfig",
    "EvalSplitConfig",
    "HEAD_NORMS",
    "HardwareConfig",
    "LogConfig",
    "LoraConfig",
    "MIX",
    "MixSourceConfig",
    "ModelConfig",
    "OWN_ENTRIES",
    "OptimConfig",
    "PIPE",
    "PROBE_SCORES",
    "PlanConfig",
    "ProbeConfig",
    "RuntimeConfig",
    "SPLITS",
    "ScaleConfig",
    "ScheduleConfig",
    "SegmentConfig",
    "SimMIMConfig",
    "TASKS",
    "TaskConfig",
    "TrainConfig",
    "averaged_score",
    "is_pipe",
    "lower_is_better",
]
