"""A norm of bfloat16 tokens, forward and backward: torch's own kernel, by way of float32, and what the model has.

    python -m benchmarks.layer_norm [--tokens 294912] [--channels 128]

"native" is LayerNorm with weights of the tokens' dtype, "by float32" copies tokens and weights to float32 and the
result back, "the model's" is Float32LayerNorm.  Prints a Markdown table: milliseconds (medians, in turns; CUDA events
where there is a card, else CPU time), and the largest errors to float64 of output and gradients, as shares of their
largest entries.  A CPU's native kernel sums the bias' gradient in bfloat16: its last column is why the model's does not
use it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.precision import Float32LayerNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def by_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), EPS).to(x.dtype)


def the_models(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    norm = Float32LayerNorm(len(weight), EPS, device="meta")
    return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))


NORMS: dict[str, Norm] = {"native": native, "by float32": by_float32, "the model's": the_models}


def run(norm: Norm, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def milliseconds(work: Callable[[], object]) -> float:
    if DEVICE.type == "cpu":
        began = time.process_time()
        work()
        return 1000 * (time.process_time() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=294912, help="128 images of 192 px in the first stage")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shapes = ((options.tokens, options.channels), (options.channels,), (options.channels,))
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for shape in (*shapes, shapes[0])]
    leaves, grad = [x.requires_grad_() for x in drawn[:3]], drawn[3]
    exact = run(native, [x.detach().double().requires_grad_() for x in leaves], grad.double())
    times: dict[str, list[float]] = {name: [] for name in NORMS}
    worst = {}
    for name, norm in NORMS.items():
        pairs = zip(run(norm, leaves, grad), exact, strict=True)
        worst[name] = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    for _ in range(options.rounds):
        for name, norm in NORMS.items():
            times[name].append(milliseconds(lambda norm=norm: run(norm, leaves, grad)))  # type: ignore[misc]
    print(f"{options.tokens} tokens of {options.channels} channels, bfloat16, {DEVICE.type}, torch {torch.__version__}")
    print("\n| norm | ms | times by float32's speed | error: out | d tokens | d weight | d bias |")
    print("|---" * 7 + "|")
    base = statistics.median(times["by float32"])
    for name, taken in times.items():
        errors = " | ".join(f"{share:.1e}" for share in worst[name])
        print(f"| {name} | {statistics.median(taken):.3f} | {base / statistics.median(taken):.2f} | {errors} |")


if __name__ == "__main__":
    main()
