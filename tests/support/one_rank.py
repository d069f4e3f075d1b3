"""The world of a process that is alone."""

from __future__ import annotations

import torch

from swinv2_train.distributed import World

ONE = World(0, 0, 1, 1, torch.device("cpu"))
