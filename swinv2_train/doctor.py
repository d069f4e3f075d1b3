"""``python -m swinv2_train.doctor``: does this machine have what training needs?  Once on a node of every kind."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from swinv2_train.config.standard_streams import hold_standard_streams
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


def main() -> None:
    """The console script swinv2-doctor."""
    hold_standard_streams()
    if arguments := sys.argv[1:]:
        helped = bool({"-h", "--help"} & set(arguments))
        print(USAGE if helped else f"error: takes no arguments\n{USAGE}", end="", file=None if helped else sys.stderr)
        sys.exit(EXIT_DONE if helped else EXIT_USER_ERROR)
    missing = 0
    for finding in findings():
        missing += finding.missing
        print(f"{'MISSING' if finding.missing else 'ok':7}  {finding.name}: {finding.text}")
    sys.exit(EXIT_FAILED if missing else EXIT_DONE)


if __name__ == "__main__":
    main()
