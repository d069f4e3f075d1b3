"""What is left out of the start of a run, and why that is safe.

An untouched 2-rank ZeRO-3 start takes 34 s on 2 cores, nearly all of it imports and builds that training never uses:

* torch's optimizers import torch._dynamo when the first parameter group is added, and so does the first call of an
  operation of our own, only to mark functions as "not to be compiled".  The mark is cached in an attribute; we set it
  to the function itself.
* DeepSpeed imports its Muon optimizer to compare types, and that import compiles three functions with torch.compile,
  i.e. imports inductor; its ZeRO-3 hooks are marked as "not to be compiled".  During deepspeed.initialize both
  decorators return the function as it is.
* DeepSpeed imports triton for fused kernels of its mixture of experts.  During deepspeed.initialize it is not found.
* DeepSpeed builds the shm_comm extension with the C++ compiler (78 s when cold) for an operation of its inference
  engine.  We tell it that the extension is not available.
* DeepSpeed's BF16_Optimizer (stage 1) reports the memory, with a garbage collection, before and after every group.
* DeepSpeed probes for accelerators; on a machine without one it is told so.

None of this is wanted by eager training.  With SWINV2_TRAIN_KEEP_COMPILER=1 in the environment,
torch.compile finds everything as torch ships it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS

_MARK = "__dynamo_disable"
"""The attribute in which torch._disable_dynamo caches the marked function."""


def compiler_is_kept() -> bool:
    """True when the user wants torch.compile and pays for its import."""
    return os.environ.get("SWINV2_TRAIN_KEEP_COMPILER", "0") == "1"


def avoid_compiler() -> None:
    """Keep torch._dynamo out of the optimizers' bookkeeping, recomputation and DeepSpeed's coordinator."""
    if compiler_is_kept():
        return
    for function in _marked_functions():
        vars(function).setdefault(_MARK, function)


def adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """torch.optim.AdamW, fused: one pass over weights, averages and gradients (benchmarks/optimizer_cpu_202611.md).

    settings: further ones, such as lr.  Its step does not import torch._dynamo (6.5 s) for a graph break that nobody
    compiles.  The type stays AdamW itself: DeepSpeed compares types exactly.
    """
    avoid_compiler()
    optimizer = torch.optim.AdamW(groups, **{"fused": True, **settings})
    if not compiler_is_kept():
        plain_step = inspect.unwrap(torch.optim.AdamW.step)

        def step(self: torch.optim.AdamW, closure: Callable[[], float] | None = None) -> Any:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return plain_step(self, closure)

        hooked: Any = torch.optim.Optimizer.profile_hook_step(step)
        vars(optimizer)["step"] = types.MethodType(hooked, optimizer)
    return optimizer


def import_deepspeed() -> types.ModuleType:
    """DeepSpeed, told what this machine has.  The only place that imports it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.13 deprecates what DeepSpeed 0.19.8 calls at every step; the rank's log would grow by 1 kB a step.
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    import deepspeed
    from deepspeed import ops

    module: types.ModuleType = deepspeed

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module


@contextlib.contextmanager
def quick_initialize() -> Iterator[None]:
    """Around deepspeed.initialize: compiling a function and forbidding to compile it both leave it as it is, and
    memory reports (a garbage collection each) are left out."""
    from deepspeed.runtime import bf16_optimizer, compiler

    changes: list[tuple[Any, str, Any]] = [(bf16_optimizer, "see_memory_usage", lambda *args, **kwargs: None)]
    if not compiler_is_kept():
        changes.append((compiler, "compile", lambda *args, **kwargs: lambda function: function))
        changes.append((torch.compiler, "disable", _as_it_is))
    originals = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, replacement in changes:
        setattr(owner, name, replacement)
    modules: dict[str, Any] = sys.modules
    without_triton = not compiler_is_kept() and modules.setdefault("triton", None) is None
    try:
        yield
    finally:
        if without_triton:
            del modules["triton"]
        for (owner, name, _), original in zip(changes, originals, strict=True):
            setattr(owner, name, original)


def _as_it_is(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return (lambda inner: inner) if function is None else function


def _marked_functions() -> list[Any]:
    """The functions inside torch._disable_dynamo's wrappers that an eager ZeRO run calls."""
    from torch.utils import checkpoint

    optimizer = torch.optim.Optimizer
    operations = []
    if "torch._dynamo" not in sys.modules:  # else model.compile is set, and the mark is to mean what it says
        operations = [made for name, made in OPDEFS.items() if name.startswith("swinv2_train::")]
    wrappers: list[Any] = [
        optimizer.add_param_group,
        optimizer.state_dict,
        optimizer.load_state_dict,
        optimizer.zero_grad,
        checkpoint.checkpoint,
        vars(checkpoint).get("_run_fn_with_dynamo_disabled"),
        *(function for operation in operations for function in operation._backend_fns.values()),
    ]
    coordinator = sys.modules.get("deepspeed.runtime.zero.partitioned_param_coordinator")
    if coordinator is not None:
        owners = [coordinator, coordinator.PartitionedParameterCoordinator]
        wrappers += [value for owner in owners for value in vars(owner).values()]
    return [w.__wrapped__ for w in wrappers if inspect.isfunction(w) and hasattr(w, "__wrapped__")]
