"""What one step of AdamW costs: a loop over tensors, foreach and fused, in turn, on the tensors that engines hold.

    python benchmarks/optimizer_step.py [--size tiny] [--rounds 9]

"each": one tensor per parameter (engine=local, ZeRO-0); "flat": one per parameter group (ZeRO-1 to 3).  Prints a
Markdown table for each number of threads: medians of the time on a GPU, or of CPU seconds of all threads, so that
other load on the machine hardly counts, with the ratio to the loop; and the largest difference of a weight from the
loop's after all steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from swinv2_train.config.command_line import compose_overrides
from swinv2_train.engine.adamw import adamw
from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.training.param_groups import build_param_groups

KINDS = {"loop": {"fused": False, "foreach": False}, "foreach": {"fused": False, "foreach": True}, "fused": {}}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Groups = list[tuple[list[Tensor], float]]
"""The tensors and the weight decay of each parameter group."""


def groups_of(size: str, flat: bool) -> Groups:
    """Parameter groups of SimMIM around a SwinV2 of that size."""
    config = compose_overrides(["run_dir=unused", "data.shards=unused"])
    found = []
    for group in build_param_groups(SimMIM(swin_v2(size, num_classes=0)), config.optim):
        tensors = [parameter.detach().to(DEVICE) for parameter in group["params"]]
        found.append(([torch.cat([t.flatten() for t in tensors])] if flat else tensors, group["weight_decay"]))
    return found


def build(groups: Groups, settings: dict[str, bool]) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    """Weights of their own with gradients, and the optimizer."""
    trained = [([nn.Parameter(tensor.clone()) for tensor in tensors], decay) for tensors, decay in groups]
    weights = [weight for group, _ in trained for weight in group]
    for weight in weights:
        weight.grad = torch.sin(1e3 * weight.detach())
    listed = [{"params": group, "weight_decay": decay} for group, decay in trained]
    return weights, adamw(listed, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, **settings)


def seconds_of(optimizer: torch.optim.AdamW) -> float:
    """One step."""
    if DEVICE.type == "cpu":
        started = time.process_time()
        optimizer.step()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"\n{options.size}, {DEVICE.type}, {threads} thread{'s' if threads > 1 else ''}\n")
        print("| tensors | AdamW | ms a step (median) | min | ratio | largest difference |\n|---|---|---|---|---|---|")
        for shape in ("each", "flat"):
            groups = groups_of(options.size, shape == "flat")
            built = {kind: build(groups, settings) for kind, settings in KINDS.items()}
            taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for number in range(options.rounds + 1):
                for kind, (_, optimizer) in built.items():
                    seconds = seconds_of(optimizer)
                    if number:  # the first makes AdamW's moments
                        taken[kind].append(1e3 * seconds)
            loop = statistics.median(taken["loop"])
            for kind, times in taken.items():
                pairs = zip(built[kind][0], built["loop"][0], strict=True)
                worst = max(float((weight - of_loop).detach().abs().max()) for weight, of_loop in pairs)
                median = statistics.median(times)
                print(f"| {shape} | {kind} | {median:.1f} | {min(times):.1f} | {median / loop:.2f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
