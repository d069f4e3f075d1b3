"""What the same operations round to on a GPU, twice: TF32, cuDNN's choice of algorithms, deterministic operations.

torch is imported inside the functions, so that a wrong configuration is answered before that costs its seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from swinv2_train.config import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""Its values under which cuBLAS repeats itself on several streams too (torch's notes on randomness)."""
_REFUSAL = re.compile(r"(\S+) does not have a deterministic implementation")


def check_workspace() -> None:
    """ConfigError where the environment keeps cuBLAS from what runtime.deterministic=true asks of it."""
    given = os.environ.get(_WORKSPACE)
    if given is not None and given not in _WORKSPACES:
        raise ConfigError(
            f"runtime.deterministic (true) needs {_WORKSPACE}={_WORKSPACES[0]} or {_WORKSPACES[1]} in the environment, "
            f"not {given!r}; unset it, or set runtime.deterministic=false"
        )


@contextlib.contextmanager
def arithmetic(deterministic: bool) -> Iterator[None]:
    """Inside, fp32 is fp32 (no TF32), and cuDNN neither tries algorithms out nor takes one that may vary.

    deterministic: operations that could sum in another order each time are taken in a form that does not, or are
    refused: a ConfigError that names the operation.  Enter it before the first product on a GPU, and after
    :func:`check_workspace`.  Afterwards all is as before, but for cuBLAS's workspace, which a process keeps.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False), (cudnn, "benchmark", False)]
    flags.append((cudnn, "deterministic", True))
    if deterministic:
        flags.append((torch.utils.deterministic, "fill_uninitialized_memory", False))  # a pass over each new tensor
        os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    before = [getattr(owner, name) for owner, name, _ in flags]
    mode = torch.get_deterministic_debug_mode()
    try:
        for owner, name, value in flags:
            setattr(owner, name, value)
        if deterministic:
            torch.use_deterministic_algorithms(True)
        yield
    except RuntimeError as error:
        refused = _REFUSAL.search(str(error))
        if not deterministic or refused is None:
            raise
        raise ConfigError(
            f"runtime.deterministic (true): {refused[1]} has no deterministic form on this device; set "
            "runtime.deterministic=false (a resume then agrees to rounding), or a model, task or probe without it"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


def arithmetic_record() -> dict[str, Any]:
    """What torch is set to now, for environment.json."""
    import torch

    cudnn = torch.backends.cudnn
    return {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": cudnn.allow_tf32,
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace": os.environ.get(_WORKSPACE),
    }
