"""The tasks by name."""

from __future__ import annotations

from swinv2_train.config.schema.classify import ClassifyConfig
from swinv2_train.config.schema.config import TaskConfig
from swinv2_train.config.schema.detect import DetectConfig
from swinv2_train.config.schema.segment import SegmentConfig
from swinv2_train.config.schema.simmim import SimMIMConfig

TASKS: dict[str, type[TaskConfig]] = {
    "simmim": SimMIMConfig,
    "classify": ClassifyConfig,
    "segment": SegmentConfig,
    "detect": DetectConfig,
}
"""The tasks by name: a line each.  What else is known of one stands in its class and in its implementation."""
