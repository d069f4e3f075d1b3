"""What the fused kernels' trial takes of a start: the first on a host, and when what was good is remembered.

    python -m benchmarks.kernel_trial

Prints a Markdown table in seconds, in bfloat16, on this machine's GPU or else its CPU.
"""

from __future__ import annotations

import os
import tempfile
import time

import torch

from swinv2_train.models import swin_v2
from swinv2_train.models.initial import on_meta
from swinv2_train.models.kernels import dispatch, trial
from swinv2_train.models.kernels.failures import case_of
from swinv2_train.models.windows import window_grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = (("base", 192, 12), ("base", 256, 16), ("giant", 1536, 32))


def main() -> None:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    assert dispatch.fused_problem(DEVICE) is None, dispatch.fused_problem(DEVICE)  # compiles the CPU's kernel
    print("| model | image, px | window | cases | first | remembered |\n|---|---|---|---|---|---|")
    for name, img_size, window in MODELS:
        with on_meta():
            model = swin_v2(name, img_size=img_size, window_size=window)
        cases = {
            case_of(torch.bfloat16, window_grid(size, (window, window), shifted), model.embed_dim * 2**i // heads)
            for i, (size, heads) in enumerate(zip(model.sizes, model.num_heads, strict=True))
            for shifted in (False, True)
        }
        times = []
        for _ in range(2):
            trial.forget()  # as another process
            began = time.perf_counter()
            assert not dispatch.tried(cases, DEVICE)
            times.append(time.perf_counter() - began)
        print(f"| {name} | {img_size} | {window} | {len(cases)} | {times[0]:.2f} | {times[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
