"""torch's fused AdamW without the import of a compiler that eager training never uses."""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable
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
    from torch.utils import checkpoint

    if compiler_is_kept():
        return
    for function in _marked_functions():
        vars(function).setdefault(_MARK, function)
    vars(checkpoint)["torch"] = _EagerTorch("torch")


def adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """torch.optim.AdamW, fused: one pass over weights, moments and gradients (benchmarks/optimizer_cpu_202611.md).

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


class _EagerTorch(types.ModuleType):
    """torch as torch.utils.checkpoint sees it, which asks torch._dynamo at every call for a mark and a setting.

    Both mean something to a program that is compiled or traced, for which the compiler has been imported already.
    """

    _no_compiler = types.SimpleNamespace(
        disable=lambda function: function, config=types.SimpleNamespace(error_on_nested_fx_trace=True)
    )

    @property
    def _dynamo(self) -> Any:
        return sys.modules.get("torch._dynamo", self._no_compiler)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _marked_functions() -> list[Any]:
    """The functions inside torch._disable_dynamo's wrappers that an eager ZeRO run calls."""
    from torch.utils import checkpoint

    optimizer = torch.optim.Optimizer
    operations = []
    if "torch._dynamo" not in sys.modules:  # else model.compile is set, and the mark is to mean what it says
        operations = list(OPDEFS.values())  # every operation that was made in Python
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
