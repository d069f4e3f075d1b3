"""torch.compile, block by block (regional compilation): blocks of one shape share their graphs."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from typing import NamedTuple

from torch import nn

from swinv2_train.config import Config

GRAPHS = 64  # of one function: per stage, shifted or not, with factors of stochastic depth or without, and per map size
TESTED_POLICIES = ("none", "blocks", "blocks@stay")
"""Values of model.recompute that tests/distributed/test_recompute.py trains with compiled blocks, under every stage."""


class Compiled(NamedTuple):
    """What model.compile comes to on a device."""

    blocks: bool
    why: str
    """In a few words, for people."""

    def __str__(self) -> str:
        return f"{'blocks' if self.blocks else 'none'} ({self.why})"


def compile_choice(config: Config, device_type: str, here: bool = True) -> Compiled:
    """Whether blocks are compiled where model.compile=auto leaves it open: on CUDA, where it gains and is tested.

    here: the device is this machine's, so what the compiler needs is looked for too.
    """
    asked, stage, policy = config.model.compile, config.engine.zero_stage, config.model.recompute
    if asked != "auto":
        return Compiled(asked == "blocks", f"model.compile={asked}")
    missing = _missing() if here and device_type == "cuda" else None
    if device_type != "cuda":
        why: str | None = "auto: on a CPU it gains little"
    elif config.engine.name == "deepspeed" and stage == 3:
        why = "auto: ZeRO-3's gathering cuts the graphs at every layer"
    elif policy not in TESTED_POLICIES:
        why = f"auto: not tested with model.recompute={policy}"
    else:
        why = None if missing is None else f"auto: {missing}"
    return Compiled(why is None, why or "auto: CUDA")


def _missing() -> str | None:
    """What torch's compiler needs on CUDA and does not find here; None where it is complete."""
    if sys.platform == "win32" or find_spec("triton") is None:
        return "the package triton is missing"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "there is no C compiler (gcc, clang)"


def seconds_compiling() -> float:
    """What compiling has taken in this process so far; 0.0 where nothing was compiled."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0.0 if utils is None else float(utils.calculate_time_spent()["total_wall_time"])


def compile_blocks(
    module: nn.Module, block_types: tuple[type[nn.Module], ...], backend: str = "inductor", fall_back: bool = False
) -> None:
    """Compile every block of a module, at its first call; each size of map gets graphs of its own.

    Each block's own compile() does it, so parameters, their names and the random numbers drawn stay what they are.
    Under ZeRO-3 the gathering of weights cuts the graphs at every layer; what is between is still compiled.
    inductor picks no kernel by timing it, or two starts of a run could sum in another order.
    fall_back: where the compiler fails the block runs plainly, and torch says so in the rank's log.
    """
    import torch._dynamo  # here: it takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.suppress_errors = fall_back
    # Not by torch._inductor.config: torch.compile itself sets it back when it restores the state of the process.
    options = {"deterministic": True} if backend == "inductor" else None
    for block in module.modules():
        if isinstance(block, block_types):
            block.compile(dynamic=False, backend=backend, options=options)
