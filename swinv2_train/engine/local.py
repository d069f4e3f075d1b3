"""Plain torch on one process in float32: what every other engine is compared with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.config import Config, ConfigError
from swinv2_train.distributed import World
from swinv2_train.distributed.interruptible import unless_stopped
from swinv2_train.engine.adamw import adamw
from swinv2_train.engine.checks import NonFiniteError, check_fit, read_tensor
from swinv2_train.engine.materialize import Initializer, allocate, fill_weights, is_meta
from swinv2_train.engine.state.ema import WeightEMA
from swinv2_train.engine.state.files import (
    HostMemory,
    Snapshot,
    StateFiles,
    TensorSpec,
    restore,
    snapshot,
    tensor_specs,
)
from swinv2_train.engine.state.pieces import Piece, plain_pieces, whole_pieces
from swinv2_train.runtime import StopRequest


class LocalEngine:
    """The engine protocol with nothing between the module and torch.optim.AdamW.

    block_types is nothing to it: it gathers no weights.
    """

    def __init__(
        self,
        module: nn.Module,
        param_groups: list[dict[str, Any]],
        config: Config,
        world: World,
        accumulation_steps: int,
        block_types: tuple[type[nn.Module], ...],
    ) -> None:
        if world.world_size != 1:
            raise ConfigError(
                f"engine.name=local runs on one process, but there are {world.world_size}; set engine.name=deepspeed"
            )
        if is_meta(module):
            allocate(module)
        self.module = module.to(world.device)
        self.optimizer = adamw(
            param_groups,
            lr=0.0,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
        )
        trained = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        self._ema = WeightEMA(trained, config.optim.ema_decay)
        self._clip_grad_norm = config.optim.clip_grad_norm
        self._accumulation_steps = accumulation_steps
        self._num_backward = 0
        self._host_memory = HostMemory()
        self._world = world

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.module.train()
        outputs: dict[str, Tensor] = self.module(**to_device(inputs, self._world.device))
        return outputs

    def backward(self, loss: Tensor) -> None:
        assert self._num_backward < self._accumulation_steps, "step() is due"
        torch.autograd.backward(loss / self._accumulation_steps)
        self._num_backward += 1

    def step(self, lr: float) -> float:
        assert self._num_backward == self._accumulation_steps, "backward() is due"
        self._num_backward = 0
        self._host_memory.wait()
        # A parameter that had no part in the loss takes part in the step with a gradient of zero, as in ZeRO.
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        grad_norm = clip_(
            [p.grad for group in self.optimizer.param_groups for p in group["params"]], self._clip_grad_norm
        )
        if not math.isfinite(grad_norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the global gradient norm is {grad_norm}")
        self.optimizer.step()
        self._ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    @torch.no_grad()
    def evaluate(self, **inputs: Tensor | bool) -> dict[str, Tensor]:
        self.module.eval()
        try:
            outputs: dict[str, Tensor] = self.module(**to_device(inputs, self._world.device))
        finally:
            self.module.train()
        return outputs

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        self._host_memory.wait()
        self._ema.swap()
        try:
            yield
        finally:
            self._ema.swap()

    def snapshot(self, copy: bool) -> Snapshot:
        settings = {"engine": "local", "precision": "fp32", "ema_decay": self._ema.decay}
        return snapshot(
            self._pieces(), self._tensor_specs(), settings, self._world, self._host_memory if copy else None
        )

    def load(self, directory: Path, stop: StopRequest | None = None) -> None:
        self._host_memory.wait()
        unless_stopped(stop, lambda: restore(StateFiles(directory), self._pieces(), self._tensor_specs()))

    def _pieces(self) -> list[Piece]:
        return plain_pieces(self.module, self.optimizer, self._ema) + whole_pieces(persistent_buffers(self.module))

    def _tensor_specs(self) -> dict[str, TensorSpec]:
        return tensor_specs({name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in self._tensors().items()})

    def initialise(self, values: Initializer, stop: StopRequest | None = None) -> None:
        unless_stopped(stop, lambda: fill_weights(plain_pieces(self.module, self.optimizer, self._ema), values))
        self._ema.restart()

    def full_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, tensor in self._tensors().items():
            yield name, tensor.detach().to("cpu", copy=True)

    def load_full(self, state: Mapping[str, Tensor] | None, stop: StopRequest | None = None) -> None:
        assert state is not None, "the only rank has the tensors"
        self._host_memory.wait()
        tensors = self._tensors()
        check_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, state)
        with torch.no_grad():
            for name in state:
                tensor = tensors[name]
                like = tuple(tensor.shape), tensor.dtype, tensor.device
                tensor.copy_(unless_stopped(stop, partial(read_tensor, state, name, *like)))
        self._ema.restart()

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters, then persistent buffers."""
        return dict(self.module.named_parameters()) | persistent_buffers(self.module)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state, by name."""
    parameters = {name for name, _ in module.named_parameters()}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs with their tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """() float64, on the gradients' device; 0 where there are none."""
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2 for gradient in gradients]
    return torch.stack(squares).sum() if squares else torch.zeros(())


def clip_(gradients: list[Tensor], max_norm: float) -> float:
    """Scale the gradients in place so that their joint 2-norm is at most max_norm (0 = leave them).

    Returns the norm before, accumulated in float64.  The factor is max_norm / (norm + 1e-6), as torch and DeepSpeed.
    """
    norm = math.sqrt(float(sum_of_squares(gradients)))
    if max_norm > 0 and math.isfinite(norm) and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm
