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
  engine, and to find out what it could build it runs the compiler once for every extension.  It is told that there is
  none; those that offloading needs are asked for by name and build themselves.
* On a CPU, DeepSpeed counts its devices by starting `numactl` for every bucket of gradients.  It is asked once.
* DeepSpeed's ZeRO-3 prints every parameter, values and all, twice into a line of its log that nobody is shown.
* DeepSpeed's BF16_Optimizer (stage 1) reports the memory, with a garbage collection, before and after every group.
* DeepSpeed probes for accelerators; on a machine without one it is told so.

And one thing is put in: what it page-locks for offloading is of the size that is used (host_copies.page_locked), where
torch's page-locked memory comes in powers of two, which makes 32 GiB of 20.

None of this is wanted by eager training.  With SWINV2_TRAIN_KEEP_COMPILER=1 in the environment,
torch.compile finds everything as torch ships it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from swinv2_train.engine.adamw import compiler_is_kept
from swinv2_train.engine.host_copies import page_locked


def import_deepspeed() -> types.ModuleType:
    """DeepSpeed, told what this machine has.  The only place that imports it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.13 deprecates what DeepSpeed 0.19.8 calls at every step; the rank's log would grow by 1 kB a step.
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    import deepspeed
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import numa

    module: types.ModuleType = deepspeed
    lock_what_is_used(get_accelerator())
    ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # reading it first would have every extension tried
    if not hasattr(numa.get_numa_cores, "cache_info"):
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)
    return module


def forget_process_group() -> None:
    """Drop what DeepSpeed keeps of a process group that is left, or the next engine here would speak through it."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    groups._release_process_group_references(group=None)
    comm.cdb = None


def lock_what_is_used(accelerator: Any) -> None:
    """Have an accelerator of CUDA page-lock no more of the host's memory than a tensor takes."""
    if accelerator.device_name() != "cuda":
        return

    def locked(tensor: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
        return page_locked(math.prod(shape) * tensor.element_size()).view(tensor.dtype).view(shape)

    accelerator._torch_empty_pinned = locked
    accelerator._torch_pin_memory = lambda tensor: locked(tensor, tensor.shape).copy_(tensor)


@contextlib.contextmanager
def quick_initialize() -> Iterator[None]:
    """Around deepspeed.initialize: compiling a function and forbidding to compile it both leave it as it is, parameters
    are printed without values, and memory reports (a garbage collection each) are left out."""
    from deepspeed.runtime import bf16_optimizer, compiler

    changes: list[tuple[Any, str, Any]] = [
        (bf16_optimizer, "see_memory_usage", lambda *args, **kwargs: None),
        (torch.nn.Parameter, "__repr__", object.__repr__),
    ]
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
