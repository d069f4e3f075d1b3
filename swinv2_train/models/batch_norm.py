"""A BatchNorm whose statistics may be of the images of all ranks, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.precision import at_least_float32

Total = Callable[[Tensor], Tensor]
"""Adds up a tensor over all ranks, its gradient too: (...) -> (...)."""


class BatchNorm(nn.Module):
    """Normalises each channel of maps (B, C, H, W) over the batch and all places, in at least float32.

    total: what adds up statistics over ranks (torch's SyncBatchNorm takes no CPU tensors); None = those of this rank's
    maps alone.  Every rank must have equally large maps, or the mean of a place would depend on its rank.
    Evaluation uses running averages, float32 buffers: average = (1 - momentum) x average + momentum x batch's.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, total: Total | None = None, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.total, self.momentum, self.eps = total, momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        # on the CPU even where parameters are on the meta device: nothing else would give them their values
        self.register_buffer("running_mean", torch.zeros(channels, device="cpu"))
        self.register_buffer("running_var", torch.ones(channels, device="cpu"))

    def _apply(self, *args: Any, **kwargs: Any) -> BatchNorm:
        """As nn.Module's, but the averages stay float32 where an engine makes the model bfloat16."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        x = input.to(weight.dtype)
        if not self.training:
            averages = self.running_mean.to(x.device), self.running_var.to(x.device)  # where x is on the meta device
            normed = F.batch_norm(x, *averages, weight, bias, False, 0.0, self.eps)
        elif self.total is None:
            kept = (None, None) if x.is_meta else (self.running_mean, self.running_var)
            normed = F.batch_norm(x, kept[0], kept[1], weight, bias, True, self.momentum, self.eps)
        else:
            normed = self._over_ranks(x, _itself if x.is_meta else self.total, weight, bias)
        return normed.to(self.weight.dtype)

    def _over_ranks(self, x: Tensor, total: Total, weight: Tensor, bias: Tensor) -> Tensor:
        places = total(x.new_tensor(x.numel() / x.shape[1]))
        mean = (total(x.sum(dim=(0, 2, 3))) / places).view(1, -1, 1, 1)
        centred = x - mean
        var = total(centred.square().sum(dim=(0, 2, 3))) / places
        if not x.is_meta:
            with torch.no_grad():
                self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), self.momentum)
                unbiased = var * places / (places - 1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _itself(values: Tensor) -> Tensor:
    """The sum over ranks of what has no values: a model on the meta device is of one rank."""
    return values
