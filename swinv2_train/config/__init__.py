"""What a run may be told: keys, rules and the command line.

Knows nothing else of the project, and is the only package that knows Hydra.
"""

from swinv2_train.config.errors import ConfigError, MachineError, OutageError
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from swinv2_train.config.near_names import did_you_mean
from swinv2_train.config.pixels import per_band
from swinv2_train.config.planner import HardwareConfig, PlanConfig
from swinv2_train.config.recompute import RECOMPUTE_PLACES, Recompute, parse_recompute
from swinv2_train.config.rules import pair
from swinv2_train.config.scale import ScaleConfig
from swinv2_train.config.schema import (
    ARTIFACTS,
    BATCH_NORMS,
    HEAD_NORMS,
    PIPE,
    PROBE_SCORES,
    SPLITS,
    TASKS,
    ClassifyConfig,
    Config,
    DataConfig,
    DetectConfig,
    EngineConfig,
    EvalSplitConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RuntimeConfig,
    ScheduleConfig,
    SegmentConfig,
    SimMIMConfig,
    TaskConfig,
    TrainConfig,
    averaged_score,
    is_pipe,
    lower_is_better,
)

__all__ = [
    "ARTIFACTS",
    "BATCH_NORMS",
    "ClassifyConfig",
    "Config",
    "ConfigError",
    "MachineError",
    "DataConfig",
    "DetectConfig",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_STOPPED",
    "EXIT_USER_ERROR",
    "EngineConfig",
    "EvalSplitConfig",
    "HEAD_NORMS",
    "HardwareConfig",
    "LogConfig",
    "MachineError",
    "ModelConfig",
    "OptimConfig",
    "OutageError",
    "PIPE",
    "PROBE_SCORES",
    "PlanConfig",
    "ProbeConfig",
    "RECOMPUTE_PLACES",
    "Recompute",
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
    "did_you_mean",
    "is_pipe",
    "lower_is_better",
    "pair",
    "parse_recompute",
    "per_band",
]
