"""One training step of the real model on the meta device, with every allocation and every operation counted.

Whatever policy, chunk or kernel the model runs with is counted as it runs, because it does run: tensors on the meta
device have sizes and no contents, and a dispatch mode sees each one come and go.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_train.config import Config
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.engine.compile import compile_choice
from swinv2_train.models import SwinTransformerV2, count_parameters
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cache import TABLES as TABLE_CACHE
from swinv2_train.models.initial import on_meta
from swinv2_train.models.precision import Float32LayerNorm
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.planning.meta_cache import Results, signature
from swinv2_train.planning.op_cost import Operation, cost_of, fused, is_fused
from swinv2_train.tasks.task import Task
from swinv2_train.training.lora import build_trained_task

ALLOCATION_UNIT = 512
"""CUDA's caching allocator rounds every request up to a multiple of this many bytes (c10/cuda/CUDACachingAllocator)."""
CPU_ALLOCATION_UNIT = 64
"""Bytes to which torch aligns an allocation in CPU memory (c10/core/alignment.h)."""
META = torch.device("meta")
FORWARD, BACKWARD = "forward", "backward"
ENDS = "ends"
"""What is in no stage: patch embedding, head, loss."""
ATTENTION, OTHER, TABLES = "attention", "other", "tables"

aten = torch.ops.aten
_TO_HOST = aten._to_copy.default
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peak:
    """The moment of a pass, in one place of the model, at which most is alive.  All numbers in bytes of one rank."""

    place: str
    """stage 1, ..., ends: where the pass is at that moment."""
    kept: dict[str, int]
    """By part of the model (stage 1, ..., ends): what the forward pass left for the backward pass."""
    workspace: dict[str, int]
    """attention and other: everything else, such as what is recomputed and gradients of activations."""
    tables: int
    """Masks, indices and coordinates that are kept from step to step (models/cache.py)."""
    gradients: int
    """Gradients of parameters that stay until the step."""
    held_weights: int
    """Weights of which autograd has saved a view and not yet used it (which engine/deepspeed/memory.py counts)."""

    @property
    def total(self) -> int:
        """Without the weights, which are the engine's."""
        return sum(self.kept.values()) + sum(self.workspace.values()) + self.tables + self.gradients


@dataclass(frozen=True)
class Trace:
    """One micro-batch's forward and backward pass on one rank."""

    forward_peaks: list[Peak]
    """One for each place."""
    backward_peaks: list[Peak]
    gradients: list[tuple[str, int]]
    """The place in which each parameter's gradient is made and its elements, in the order of their making."""
    host_bytes: int
    """What the inputs of recomputed modules take in CPU memory, where the policy keeps them there."""
    operations: list[Operation]
    fusable: list[bool]
    """Whether torch.compile may make one of an operation and its neighbours: elementwise, and inside of a block."""
    num_parameters: int
    weight_bytes: int
    forward_operations: int
    """How many of the operations belong to the forward pass."""
    batch_bytes: int
    """Of the micro-batch as the loader makes it: pixels or values, masks, labels, weights."""
    model_flops_per_image: int
    """What the model itself needs, whatever is computed again: three forward passes (metrics.mfu)."""

    @property
    def forward(self) -> Peak:
        return max(self.forward_peaks, key=lambda peak: peak.total)

    @property
    def backward(self) -> Peak:
        return max(self.backward_peaks, key=lambda peak: peak.total)

    def compiled(self) -> Trace:
        """The same with compiled blocks: fewer operations, which move less (op_cost.fused); memory as it was."""
        n = self.forward_operations
        forward = fused(self.operations[:n], self.fusable[:n])
        operations = forward + fused(self.operations[n:], self.fusable[n:])
        fusable = [False] * len(operations)
        return replace(self, operations=operations, fusable=fusable, forward_operations=len(forward))

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)


def meta_task(config: Config, on_cpu: bool = False) -> Task:
    """The task of a configuration with its module on the meta device, in the engine's precision and with its policy.

    on_cpu: it stands for one on the CPU, where inputs that "@cpu" moves to CPU memory stay where they are.
    """
    with on_meta():
        task = build_trained_task(config, META)
    if config.engine.precision == "bf16":
        task.module.bfloat16()
    if on_cpu:
        for module in task.module.modules():
            if isinstance(module, Float32LayerNorm):
                module.meta_stands_for = "cpu"
            if isinstance(module, WindowAttention):
                module.meta_stands_for = "cpu"
    policy = config.model.recompute.removesuffix(
        "@partitioned"
    )  # which frees nothing (engine/activation_checkpointing.py)
    apply_recompute(task.module, policy.removesuffix("@cpu") if on_cpu else policy, task.block_types)
    return task


def trace_step(config: Config, kept_gradient_bytes: float, on_cpu: bool = False) -> Trace:
    """Run one micro-batch forward and backward on the meta device.  Seconds for giant.

    kept_gradient_bytes: what the engine keeps of each gradient element from the backward pass to the step; 0 where it
    has a buffer for them all the time.  on_cpu: the device that it stands for is a CPU.
    Raises ConfigError where the model cannot be built.
    """
    task = meta_task(config, on_cpu)
    unit = CPU_ALLOCATION_UNIT if on_cpu else ALLOCATION_UNIT
    batch = task.meta_batch(config.train.micro_batch_size)
    module = task.module.train()
    counter = _Counter([*module.parameters(), *module.buffers(), *batch.values()], unit, on_cpu)

    def take(parameter: Tensor) -> None:
        numel, parameter.grad = parameter.numel(), None
        counter.keep_gradient(numel, int(numel * kept_gradient_bytes))

    handles: list[Any] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
    on_host = not on_cpu and config.model.recompute.endswith(("@cpu", "@fairscale"))
    handles += list(_follow(task.encoder, counter, on_host))
    weights = {parameter.untyped_storage()._cdata: parameter.nbytes for parameter in module.parameters()}

    def note(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # or an operation's own result would hold itself
        key = tensor.untyped_storage()._cdata
        if key in weights and not tensor.is_leaf:
            counter.hold(key, weights[key], saved)
        return saved

    with counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved.tensor):
            loss = task.loss(module.__call__, batch)
        forward = counter.end_forward()
        torch.autograd.backward(loss)
        del loss
    backward = counter.peaks()
    for handle in handles:
        handle.remove()
    trace = Trace(
        forward_peaks=forward,
        backward_peaks=backward,
        gradients=counter.gradients,
        host_bytes=counter.host,
        operations=counter.operations,
        fusable=counter.fusable,
        num_parameters=count_parameters(module),
        weight_bytes=sum(weights.values()),
        forward_operations=counter.forward_operations,
        batch_bytes=sum(tensor.nbytes for tensor in batch.values()),
        model_flops_per_image=6 * task.multiply_adds,
    )
    return trace.compiled() if compile_choice(config, "cpu" if on_cpu else "cuda", here=False).blocks else trace


def evaluation_bytes(config: Config, on_cpu: bool = False) -> int | None:
    """The most that a forward pass of evaluation has alive beside the weights, on one rank.

    None where it is no larger than one of training, which keeps more.  Raises ConfigError as trace_step does.
    """
    seen = config.task.evaluated_at_once(config)
    if seen is None:
        return None
    task = meta_task(config, on_cpu)
    images = torch.empty(seen[0], config.model.in_chans, *seen[1:], device=META)
    outside = [*task.module.parameters(), *task.module.buffers()]
    counter = _Counter(outside, CPU_ALLOCATION_UNIT if on_cpu else ALLOCATION_UNIT, on_cpu)
    with torch.no_grad(), counter:
        task.module.eval()(images=images)
    return images.nbytes + counter.highest


def _parts(encoder: SwinTransformerV2) -> Iterator[tuple[nn.Module, str]]:
    """The modules that have a name of their own in the table."""
    for number, stage in enumerate(encoder.layers, start=1):
        yield stage, f"stage {number}"
        for block in stage.modules():
            if isinstance(block, (SwinBlock, WindowAttention)):
                yield block, f"stage {number}"


def _follow(encoder: SwinTransformerV2, counter: _Counter, inputs_on_host: bool) -> Iterator[Any]:
    """Tell the counter where in the model the passes are; yields the hooks' handles.

    The backward pass comes to a stage when the gradient of its output is known.
    """

    def enter(child: nn.Module, part: str) -> Callable[..., None]:
        kind = ATTENTION if isinstance(child, WindowAttention) else OTHER
        recomputed = inputs_on_host and "forward" in vars(child)

        def hook(_module: nn.Module, inputs: Any) -> None:
            counter.where.append((part, kind))
            if recomputed and counter.phase == FORWARD:
                counter.host += inputs[0].nbytes

        return hook

    def leave(part: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            counter.where.pop()
            if isinstance(output, Tensor) and output.requires_grad and counter.phase == FORWARD:
                output.register_hook(lambda _: counter.come_to(part))  # type: ignore[no-untyped-call]

        return hook

    for child, part in _parts(encoder):
        yield child.register_forward_pre_hook(enter(child, part))
        yield child.register_forward_hook(leave(part))


class _Saved:
    """What autograd keeps of a tensor; it dies when the backward pass has used it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Moment(NamedTuple):
    """What is alive when a place's peak is reached."""

    owners: Counter[tuple[str, str, str]]
    gradients: int
    births: int
    held_weights: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation; knows which storages are alive and what they belong to."""

    def __init__(self, outside: list[Tensor], unit: int, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unit = unit
        self.on_cpu = on_cpu
        self.phase = FORWARD
        self.where: list[tuple[str, str]] = [(ENDS, OTHER)]
        self.operations: list[Operation] = []
        self.fusable: list[bool] = []
        self.forward_operations = 0
        self.host = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in outside}  # the engine's, not ours
        self._alive: dict[int, tuple[Any, int, tuple[str, str, str], int]] = {}  # weak storage, bytes, owner, birth
        self._by_owner: Counter[tuple[str, str, str]] = Counter()  # (phase, part, kind) -> bytes
        self._gradients = self._live = self._births = 0
        self._results = Results()
        self._costs: dict[Any, Operation] = {}
        self.gradients: list[tuple[str, int]] = []
        self._views: Counter[int] = Counter()  # how many of a weight are saved
        self._held_weights = 0
        self._highest: Counter[str] = Counter()  # by place
        self._at_peak: dict[str, _Moment] = {}

    @property
    def highest(self) -> int:
        """The most that was alive so far in this pass."""
        return max(self._highest.values(), default=0)

    def come_to(self, part: str) -> None:
        """The backward pass comes to a part of the model."""
        self.where[:] = [(part, OTHER)]

    def keep_gradient(self, numel: int, nbytes: int) -> None:
        """A parameter's gradient is complete, and `nbytes` of it stay."""
        self.gradients.append((self.where[-1][0], numel))
        self._gradients += nbytes
        self._live += nbytes
        self._look()

    def hold(self, key: int, nbytes: int, saved: _Saved) -> None:
        """Autograd saved a view of a weight, which it holds until it has used it."""

        def used() -> None:
            self._views[key] -= 1
            self._held_weights -= 0 if self._views[key] else nbytes

        self._held_weights += 0 if self._views[key] else nbytes
        self._views[key] += 1
        weakref.finalize(saved, used)

    def end_forward(self) -> list[Peak]:
        """The forward pass's peaks; what lives now is kept for the backward pass."""
        self._find_tables()
        peaks = [self._forward_peak(place, moment) for place, moment in self._at_peak.items()]
        self.phase, self.forward_operations = BACKWARD, len(self.operations)
        self.where[:] = [(ENDS, OTHER)]
        self._highest.clear()
        self._at_peak.clear()
        self._look()
        return peaks

    def _forward_peak(self, place: str, moment: _Moment) -> Peak:
        owners, gradients, births, held_weights = moment
        survivors: Counter[tuple[str, str, str]] = Counter()
        for _, nbytes, owner, birth in self._alive.values():
            if birth <= births:
                survivors[owner] += nbytes
        tables = sum(n for (_, _, kind), n in survivors.items() if kind == TABLES)
        kept = _by(1, {owner: n for owner, n in survivors.items() if owner[2] != TABLES})
        workspace = _by(2, {owner: n for owner, n in owners.items() if owner[2] != TABLES})
        for (_, _, kind), nbytes in survivors.items():
            if kind != TABLES:
                workspace[kind] -= nbytes
        workspace = {kind: n for kind, n in workspace.items() if n > 0}
        return Peak(place, kept, workspace, tables, gradients, held_weights)

    def peaks(self) -> list[Peak]:
        """The backward pass's peaks."""
        return [self._backward_peak(place, moment) for place, moment in self._at_peak.items()]

    def _backward_peak(self, place: str, moment: _Moment) -> Peak:
        owners, gradients, _, held_weights = moment
        parts = {owner: n for owner, n in owners.items() if owner[2] != TABLES}
        return Peak(
            place=place,
            kept=_by(1, {owner: n for owner, n in parts.items() if owner[0] == FORWARD}),
            workspace=_by(2, {owner: n for owner, n in parts.items() if owner[0] == BACKWARD}),
            tables=sum(n for owner, n in owners.items() if owner[2] == TABLES),
            gradients=gradients,
            held_weights=held_weights,
        )

    def _find_tables(self) -> None:
        """What was made in the forward pass and is now in the cache of tables stays there for all steps."""
        cached = {table.untyped_storage()._cdata for table in TABLE_CACHE.tensors()}
        for key in cached & self._alive.keys():
            weak, nbytes, owner, birth = self._alive[key]
            if owner[2] != TABLES:
                table = (owner[0], owner[1], TABLES)
                self._alive[key] = (weak, nbytes, table, birth)
                moments = [moment.owners for moment in self._at_peak.values() if birth <= moment.births]
                for owners in (self._by_owner, *moments):
                    owners[owner] -= nbytes
                    owners[table] += nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs: list[Tensor] = []
        key = (func, signature(args, inputs), signature(tuple(kwargs.items()), inputs))
        for tensor in inputs:  # a table that was made before
            self._add(tensor, TABLES)
        if func is _TO_HOST and kwargs.get("device") == _CPU and inputs[0].is_meta:
            if self.on_cpu:  # it is there already
                return inputs[0]
            on_host = torch.empty_like(inputs[0], dtype=kwargs.get("dtype") or inputs[0].dtype)
            self._add(on_host, on_host=True)
            return on_host
        result = self._results.call(func, args, kwargs, key)
        outputs: list[Tensor] = []
        signature(result, outputs)
        for tensor in outputs:
            self._add(tensor)
        if not (func.is_view or func is aten._unsafe_view.default):
            self._count(key, args, inputs, outputs)
        return result

    def _add(self, tensor: Tensor, kind: str | None = None, on_host: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        nbytes = 0 if on_host or not tensor.is_meta else -(-storage.nbytes() // self.unit) * self.unit
        part, own_kind = self.where[-1]
        owner = (self.phase, part, kind or own_kind)
        self._births += 1

        def gone(_: Any) -> None:
            _, nbytes, owner, _ = self._alive.pop(key)
            self._live -= nbytes
            self._by_owner[owner] -= nbytes

        self._alive[key] = (weakref.ref(storage, gone), nbytes, owner, self._births)
        self._live += nbytes
        self._by_owner[owner] += nbytes
        self._look()

    def _look(self) -> None:
        place = self.where[-1][0]
        if self._live > self._highest[place]:
            self._highest[place] = self._live
            self._at_peak[place] = _Moment(Counter(self._by_owner), self._gradients, self._births, self._held_weights)

    def _count(self, key: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if key not in self._costs:
            self._costs[key] = cost_of(key[0], args, inputs, outputs)
        self.operations.append(self._costs[key])
        self.fusable.append(self.where[-1][0] != ENDS and is_fused(key[0]))


def _by(place: int, owners: dict[tuple[str, str, str], int]) -> dict[str, int]:
    """Bytes by one entry of their owners."""
    total: Counter[str] = Counter()
    for owner, nbytes in owners.items():
        total[owner[place]] += nbytes
    return {name: nbytes for name, nbytes in total.items() if nbytes}
