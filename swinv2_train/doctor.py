"""``python -m swinv2_train.doctor``: does this machine have what training needs?  Once on a node of every kind."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import stoppable
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED
from swinv2_train.models.kernels import cpu_attention
from swinv2_train.models.kernels.requirements import REQUIREMENTS
from swinv2_train.runtime.environment import GIB, version_of

USAGE = """swinv2-doctor

What this machine has of what training needs, a line each; exit code 1 where something is missing, with the remedy.
"""
_PACKAGES = ("torch", "torchvision", "triton", "deepspeed")


class Finding(NamedTuple):
    """One thing that is needed here, or only good to know."""

    name: str
    text: str
    missing: bool = False


def findings() -> Iterator[Finding]:
    """What is here and what is missing, in the order in which it would be met."""
    yield Finding("Python", platform.python_version())
    for name in _PACKAGES:
        version = version_of(name)
        needed = name != "triton" or torch.version.cuda is not None
        yield Finding(name, version or ("not installed; make setup" if needed else "none"), needed and version is None)
    yield Finding("videos (av)", version_of("av") or "none; for clips other than .frames: the extra 'video'")
    if torch.cuda.is_available():
        yield from _gpus()
        for name, check in REQUIREMENTS.items():
            problem = check()
            yield Finding(f"GPU kernels: {name}", problem or "there", problem is not None)
    else:
        yield Finding("GPUs", f"none that torch sees (it is built for CUDA {torch.version.cuda or '- no CUDA at all'})")
    if cpu_attention.will_compile():
        print("compiling the attention kernel for this processor, once: 10 s to some minutes", file=sys.stderr)
    problem = cpu_attention.problem()
    note = "" if problem is None else f"{problem}; on a CPU the slower reference would serve"
    yield Finding("CPU kernel", note or "compiled", problem is not None and not torch.cuda.is_available())


def _gpus() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = f"{card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
        yield Finding(f"GPU {index}", f"{card.name}, {size}, CUDA {torch.version.cuda}")


def run(arguments: list[str]) -> int:
    """Print what is here; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return EXIT_DONE
    if arguments:
        raise ConfigError(f"takes no arguments\n{USAGE.rstrip()}")
    missing = 0
    for finding in findings():
        missing += finding.missing
        print(f"{'MISSING' if finding.missing else 'ok':7}  {finding.name}: {finding.text}")
    return EXIT_FAILED if missing else EXIT_DONE


def main() -> None:
    """The console script swinv2-doctor."""
    sys.exit(stoppable(lambda: run(sys.argv[1:])))


if __name__ == "__main__":
    main()
