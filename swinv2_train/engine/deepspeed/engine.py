"""DeepSpeed's ZeRO stages behind the engine protocol, with the precautions that 0.19.8 needs.

Every comment that begins with "Trap" names something that was measured; tests/distributed/test_traps.py fails without
the line below it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.config import Config, ConfigError
from swinv2_train.distributed import World, broadcast_object, raise_together
from swinv2_train.distributed.interruptible import main_alone, unless_stopped
from swinv2_train.engine.adamw import adamw, avoid_compiler
from swinv2_train.engine.checks import NonFiniteError, check_fit, read_tensor
from swinv2_train.engine.deepspeed.config import deepspeed_json
from swinv2_train.engine.deepspeed.frozen import follow_inputs
from swinv2_train.engine.deepspeed.grad_norm import norm_read_once, skip_overflow_scan
from swinv2_train.engine.deepspeed.pieces import swapped_pieces, zero_1_2_pieces, zero_3_pieces
from swinv2_train.engine.deepspeed.startup import import_deepspeed, quick_initialize
from swinv2_train.engine.local import persistent_buffers, sum_of_squares, to_device
from swinv2_train.engine.materialize import Initializer, allocate, allocate_partitions, fill_weights, is_meta
from swinv2_train.engine.model_sizes import layer_sizes
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
from swinv2_train.engine.state.pieces import Piece, in_memory, plain_pieces, whole_pieces
from swinv2_train.runtime import StopRequest


class ZeroEngine:
    """A DeepSpeed engine of any stage; its optimizer is torch.optim.AdamW, its learning rate ours."""

    def __init__(
        self,
        module: nn.Module,
        param_groups: list[dict[str, Any]],
        config: Config,
        world: World,
        accumulation_steps: int,
        block_types: tuple[type[nn.Module], ...],
    ) -> None:
        sizes = layer_sizes(module, block_types)
        settings = deepspeed_json(
            config, world.world_size, accumulation_steps, sizes, pin_memory=world.device.type != "cpu"
        )
        deepspeed = import_deepspeed()
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed looks for it there
        deepspeed.init_distributed(auto_mpi_discovery=False)
        if config.engine.zero_stage == 3:
            # Gather and release a block at a time: hooks on each of its 15 modules cost more than a small block itself.
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(module, list(block_types), raise_if_not_found=False)
            follow_inputs(module, block_types)
        if is_meta(module):
            if config.engine.zero_stage == 3:
                dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
                allocate_partitions(module, settings, dtype, world.device)
            else:
                allocate(module)
        with quick_initialize():
            optimizer = adamw(
                param_groups,
                lr=0.0,  # step() sets it
                betas=(config.optim.betas[0], config.optim.betas[1]),
                eps=config.optim.eps,
            )
            self._ds, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        avoid_compiler()  # again: DeepSpeed's coordinator is imported now
        skip_overflow_scan(self._ds.optimizer)
        self.module: nn.Module = self._ds.module
        self._groups: list[dict[str, Any]] = self._ds.optimizer.param_groups
        self._stage = config.engine.zero_stage
        self._on_disk = "nvme" in (config.engine.offload_optimizer, config.engine.offload_param)
        self._world = world
        self._accumulation_steps = accumulation_steps
        self._num_backward = 0
        self._stale = False  # True while the weights are still the averages, after an error in ema_weights()
        self._host_memory = HostMemory()
        self._ema = WeightEMA(self._masters(), config.optim.ema_decay)
        self._settings = {
            "engine": "deepspeed",
            "zero_stage": self._stage,
            "precision": config.engine.precision,
            "offload_optimizer": config.engine.offload_optimizer,
            "ema_decay": config.optim.ema_decay,
        }

    # ---------------------------------------------------------------------------------------------------------------
    # One step

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        self._renew_stale_weights()
        self._ds.train()
        outputs: dict[str, Tensor] = self._ds(**to_device(inputs, self._world.device))
        return outputs

    def backward(self, loss: Tensor) -> None:
        assert self._num_backward < self._accumulation_steps, "step() is due"
        if self._num_backward == 0:
            self._forget_gradients()
        self._ds.backward(loss)  # divides by the accumulation steps itself
        self._num_backward += 1
        if self._num_backward < self._accumulation_steps:
            self._ds.step()  # inside the window it only counts

    def step(self, lr: float) -> float:
        assert self._num_backward == self._accumulation_steps, "backward() is due"
        self._num_backward = 0
        self._host_memory.wait()
        for group in self._groups:
            group["lr"] = lr * group["lr_scale"]
        if self._stage == 0:
            grad_norm = self._stage_0_norm()
            if not math.isfinite(grad_norm):
                self._ds.optimizer.zero_grad(set_to_none=True)
                self._ds.micro_steps += 1  # as its step() would have counted, so that the next window starts in time
                raise NonFiniteError(f"the global gradient norm is {grad_norm}")
            self._ds.step()
            self._ema.update()
            return grad_norm
        # DeepSpeed's stages 1 to 3 look at the norm over all ranks first and do not take a step that is not finite.
        with norm_read_once() as norm:
            self._ds.step()
        if not self._ds.was_step_applied():
            self._forget_refused_gradients()
            raise NonFiniteError(f"the global gradient norm is {float(self._ds.get_global_grad_norm())}")
        assert math.isfinite(norm.value), "a step was taken whose norm DeepSpeed never looked at"
        self._ema.update()
        return norm.value

    @torch.no_grad()
    def evaluate(self, **inputs: Tensor | bool) -> dict[str, Tensor]:
        self._renew_stale_weights()
        self._ds.eval()
        try:
            outputs: dict[str, Tensor] = self._ds(**to_device(inputs, self._world.device))
        finally:
            self._ds.train()
        return outputs

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        assert self._num_backward == 0, "between steps only"
        self._host_memory.wait()
        self._ds.empty_partition_cache()  # under ZeRO-3, what is gathered now would hide the averages
        self._ema.swap()
        self._renew_weights()
        try:
            yield
        except BaseException:
            self._ema.swap()
            self._stale = True  # to be renewed by the next forward pass: other ranks may be elsewhere now
            raise
        self._ema.swap()
        self._ds.empty_partition_cache()
        self._renew_weights()

    def _renew_stale_weights(self) -> None:
        """What ema_weights() leaves to do where it failed.  Collective then."""
        if self._stale:
            self._stale = False
            self._ds.empty_partition_cache()
            self._renew_weights()

    def _masters(self) -> list[Tensor]:
        """What the optimizer steps, of which the weights are made; under stage 0 the weights themselves."""
        if self._stage == 3:
            return list(self._ds.optimizer.fp32_partitioned_groups_flat)
        inner = self._ds.optimizer if self._stage == 0 else self._ds.optimizer.optimizer
        return [master for group in inner.param_groups for master in group["params"]]

    def _forget_gradients(self) -> None:
        """Clear what the last window left in the persistent gradient buffers."""
        optimizer = self._ds.optimizer
        if self._stage == 3:
            # Trap 4: the buffer is written only for parameters that got a gradient; the others would be trained with
            # their last one again.
            optimizer.grad_partitions_flat_buffer.zero_()
            masters = optimizer.fp32_partitioned_groups_flat
        elif self._stage in (1, 2):
            masters = getattr(optimizer, "single_partition_of_fp32_groups", [])
        else:
            masters = []
        for master in masters:  # with the optimizer on the CPU the masters' gradients persist too
            if master.grad is not None:
                master.grad.zero_()

    def _forget_refused_gradients(self) -> None:
        """Let go of what a refused step leaves behind.

        With the optimizer on the CPU and bf16, stages 1 and 2 keep these gradients and add all later ones to them, so
        that no step would be taken any more (tests/distributed/test_offload.py).
        """
        if self._stage in (1, 2):
            gradients = getattr(self._ds.optimizer, "averaged_gradients", {})  # not in the one of stage 1 on its device
            for group in gradients:
                gradients[group] = None

    def _stage_0_norm(self) -> float:
        """2-norm over all gradients, which stage 0 has already averaged over ranks; accumulated in float64."""
        return math.sqrt(float(sum_of_squares([p.grad for p in self.module.parameters() if p.grad is not None])))

    # ---------------------------------------------------------------------------------------------------------------
    # Sharded state

    # Not DeepSpeed's own files: they bind a state to its number of ranks, stage and precision, hold code, are written
    # in place (trap 2), and a wrong path or a damaged part is no error on every rank (trap 8).  Parameter groups are
    # not in ours at all: their rate and decay are the configuration's (trap 3).

    def snapshot(self, copy: bool) -> Snapshot:
        memory = self._host_memory if copy else None
        pieces = map(in_memory, self._pieces()) if self._on_disk else self._pieces()
        return snapshot(pieces, self._tensor_specs(), self._settings, self._world, memory)

    def load(self, directory: Path, stop: StopRequest | None = None) -> None:
        assert self._num_backward == 0, "load between steps only"
        self._host_memory.wait()
        self._ds.empty_partition_cache()  # under ZeRO-3, what is gathered now would hide what is loaded

        def restored() -> ConfigError | None:
            try:
                restore(StateFiles(directory, self._world.rank), self._pieces(), self._tensor_specs())
            except ConfigError as caught:
                return caught
            return None

        raise_together(unless_stopped(self._harmless(stop), restored))
        self._renew_weights()

    def initialise(self, values: Initializer, stop: StopRequest | None = None) -> None:
        assert self._ds.global_steps == 0 == self._num_backward, "before the first step only"
        unless_stopped(self._harmless(stop), lambda: fill_weights(self._parameter_pieces(), values))
        self._ema.restart()
        self._renew_weights()

    def _harmless(self, stop: StopRequest | None) -> StopRequest | None:
        """No stop ends what DeepSpeed's threads may be writing to a disk."""
        return None if self._on_disk else stop

    def _pieces(self) -> Iterator[Piece]:
        """What this rank holds.  Of what is on disk, each piece is in memory until the next one is asked for."""
        yield from self._parameter_pieces()
        yield from whole_pieces(persistent_buffers(self.module))

    def _parameter_pieces(self) -> Iterator[Piece]:
        optimizer = self._ds.optimizer
        if self._on_disk:
            yield from swapped_pieces(self.module, optimizer, self._world.rank, self._ema)
        elif self._stage == 3:
            yield from zero_3_pieces(self.module, optimizer, self._world.rank, self._ema)
        elif self._stage > 0:
            yield from zero_1_2_pieces(self.module, optimizer, self._ema)
        else:
            yield from plain_pieces(self.module, optimizer, self._ema)

    def _tensor_specs(self) -> dict[str, TensorSpec]:
        tensors = {name: (_shape(p), p.dtype, p.requires_grad) for name, p in self.module.named_parameters()}
        buffers = {name: (tuple(b.shape), b.dtype, False) for name, b in persistent_buffers(self.module).items()}
        return tensor_specs(tensors | buffers)

    def _renew_weights(self) -> None:
        """Make the weights that the model computes with from the masters, as a step does."""
        optimizer = self._ds.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._on_disk:
            pass  # swapped_pieces has done it
        elif self._stage == 3:
            for weights, master in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                weights.data.copy_(master.data)
            optimizer.invalidate_secondary_tensor()
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)  # DeepSpeed gathers by a stream that waits for no other

    # ---------------------------------------------------------------------------------------------------------------
    # Whole tensors

    def full_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self.module.named_parameters():
            yield name, self._full_value(parameter)
        for name, buffer in persistent_buffers(self.module).items():
            yield name, buffer.detach().to("cpu", copy=True) if self._world.is_main else None

    def load_full(self, state: Mapping[str, Tensor] | None, stop: StopRequest | None = None) -> None:
        assert (state is not None) == self._world.is_main, "rank 0 gives the tensors"
        self._host_memory.wait()
        parameters, buffers = dict(self.module.named_parameters()), persistent_buffers(self.module)
        shapes = {name: _shape(p) for name, p in parameters.items()} | {n: tuple(b.shape) for n, b in buffers.items()}
        raise_together(None if state is None else _caught(check_fit, shapes, state))
        with torch.no_grad():
            for name in broadcast_object(None if state is None else list(state)):
                if name in parameters:
                    value = self._from_main(state, name, shapes[name], torch.float32, stop)
                    self._set_full_value(parameters[name], value)
                else:
                    value = self._from_main(state, name, shapes[name], buffers[name].dtype, stop)
                    buffers[name].copy_(value)
                del value  # before the next one is read
        self._ema.restart()

    def _from_main(
        self,
        state: Mapping[str, Tensor] | None,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        stop: StopRequest | None,
    ) -> Tensor:
        """One of rank 0's tensors on every rank's device; ConfigError on every rank when rank 0 cannot read it."""
        device = self._world.device
        value = main_alone(self._world, stop, lambda: read_tensor(state or {}, name, shape, dtype, device))
        if value is None:
            value = torch.empty(shape, dtype=dtype, device=device)
        torch.distributed.broadcast(value, src=0)
        return value

    def _full_value(self, parameter: nn.Parameter) -> Tensor | None:
        """The float32 value of one parameter in CPU memory on rank 0; every rank takes part."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        # Trap 9: outside of forward a ZeRO-3 parameter is an empty tensor, and using it is no error.
        if parameter.requires_grad and self._stage > 0:
            value: Tensor | None = safe_get_full_fp32_param(parameter)
            assert value is not None, "DeepSpeed holds no master of this parameter"
            return value.detach().to("cpu", torch.float32).view(_shape(parameter)) if self._world.is_main else None
        with GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().to("cpu", torch.float32, copy=True) if self._world.is_main else None

    def _set_full_value(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write one parameter: the weights in their own dtype, the master unrounded."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        with GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
            if self._stage < 3 or self._world.is_main:
                parameter.copy_(value)
        if not parameter.requires_grad or self._stage == 0:
            return
        if self._stage < 3:
            safe_set_full_fp32_param(parameter, value)
            return
        # Not safe_set_full_fp32_param: it fails where the elements do not divide evenly among the ranks.  Nor
        # safe_set_local_fp32_param: of weights on disk it sets all elements to the first one.
        optimizer = self._ds.optimizer
        size: int = vars(parameter)["ds_tensor"].ds_numel
        own = value.flatten()[size * self._world.rank :][:size]
        master, group = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
        master.data.copy_(nn.functional.pad(own, (0, size - own.numel())))
        if optimizer._swappable_optimizer_subgroup(group):
            optimizer._optimizer_states_and_gradient_swap_out(group)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _caught(function: Any, *args: Any) -> ConfigError | None:
    """The ConfigError that the call raises, or None."""
    try:
        function(*args)
    except ConfigError as error:
        return error
    return None
