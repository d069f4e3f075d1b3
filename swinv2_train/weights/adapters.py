"""Weights of a run with LoRA, as if it had none: adapters are added to the weights beside which they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from swinv2_train.checkpoint import SCALE, read_state
from swinv2_train.config import ConfigError
from swinv2_train.models.lora import A, B, is_adapter, merged_weight
from swinv2_train.storage.lazy_tensors import LazyTensor


def with_adapters_merged(entries: Mapping[str, LazyTensor], checkpoint: Path) -> dict[str, LazyTensor]:
    """The weights of a checkpoint without adapters, W + scale B A where there was one.

    Raises ConfigError where the checkpoint does not say the scale, or has a part of an adapter alone.
    """
    layers = {name.rpartition(".")[0] for name in entries if is_adapter(name)}
    if not layers:
        return dict(entries)
    state = read_state(checkpoint)
    parts = [f"{layer}.{part}" for layer in sorted(layers) for part in ("weight", A, B)]
    lacking = [name for name in parts if name not in entries] + [name for name in (SCALE,) if name not in state]
    if lacking:
        raise ConfigError(f"{checkpoint}: has adapters (LoRA) but no {lacking[0]}; choose another checkpoint")
    scale: float = state[SCALE]
    found = {name: entry for name, entry in entries.items() if not is_adapter(name)}
    for layer in layers:
        weight, a, b = (entries[f"{layer}.{part}"] for part in ("weight", A, B))
        found[f"{layer}.weight"] = _merged(weight, a, b, scale)
    return found


def _merged(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    def read() -> Tensor:
        return merged_weight(weight.read(), a.read(), b.read(), scale)

    return LazyTensor(weight.shape, weight.dtype, read)
