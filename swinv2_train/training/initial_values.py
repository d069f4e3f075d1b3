"""The initial values of a seed, any part of any parameter at a time.

Every element is a function of (seed, name, position): so all engines, ZeRO stages, precisions and numbers of ranks
start from the same float32 values, and a rank makes only those of its own share.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from swinv2_train.models.initial import initial_rule
from swinv2_train.models.initial_rules import Constant, Normal

BLOCK = 2**16
"""Elements that are drawn together; a part of them costs as much as all."""


class InitialValues:
    """What the parameters of a model start from (models/initial.py); seed: of the run."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model = model
        self._seed = seed

    def fill(self, target: Tensor, name: str, start: int) -> None:
        """Put the elements from start on of a parameter into target, which has one dimension, any dtype and device."""
        rule = initial_rule(self._model, name)
        if isinstance(rule, Constant):
            target.fill_(rule.value)
            return
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest())
        key = np.random.SeedSequence([self._seed, digest]).generate_state(2, np.uint64)
        end = start + target.numel()
        for block in range(start // BLOCK, -(-end // BLOCK)):
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, block, 0, 0]))
            if isinstance(rule, Normal):
                values = generator.standard_normal(BLOCK, np.float32) * np.float32(rule.std)
            else:
                values = (2 * generator.random(BLOCK, np.float32) - 1) * np.float32(rule.bound)
            first, last = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            drawn = torch.from_numpy(values)[first - block * BLOCK : last - block * BLOCK]
            target[first - start : last - start].copy_(drawn)
