"""Checks that all engines make before they take somebody's tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from swinv2_train.config import ConfigError, did_you_mean
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors


class NonFiniteError(RuntimeError):
    """The gradient norm is not finite.  Raised on every rank, before any weight has moved."""


def check_fit(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a name in state that shapes lacks or has in another shape.  Reads no lazy tensor."""
    known: Mapping[str, Tensor | LazyTensor] = state.entries if isinstance(state, LazyTensors) else state
    problems = []
    for name, tensor in known.items():
        if name not in shapes:
            hint = did_you_mean(name, shapes)
            problems.append(f"{name} is not in the model" + (f" ({hint})" if hint else ""))
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model {shapes[name]}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(f"the weights do not fit the model: {shown}{more}; build the model that they belong to")


def read_tensor(
    state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor of state, contiguous.  Raises ConfigError whatever goes wrong: other ranks are waiting for it."""
    try:
        return state[name].to(device, dtype).view(shape).contiguous()
    except Exception as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{name}: cannot be read ({reason}); some weights are already replaced and some are not, so mend the file "
            "and start again"
        ) from error
