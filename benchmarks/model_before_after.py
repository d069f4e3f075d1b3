"""The image model of two checkouts in one run: whether their results are the same bits, and the ratio of CPU time.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.model_before_after /tmp/before [--rounds 20] [--cases SimMIM]

Each checkout runs in a process of its own on one thread; the two take turns at a forward and backward pass.  CPU time
and not the clock, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.two_checkouts import in_turns

CASES = {
    "reference, 64 px, window 8": {"img_size": 64, "window_size": 8},
    "reference, padded 13x19 maps": {"img_size": (52, 76), "window_size": 5},
    "sequential, 64 px, window 8": {"img_size": 64, "window_size": 8, "sequential_stages": (1, 2)},
    "C++ fused, 64 px, window 8": {"img_size": 64, "window_size": 8, "fused_attention": True},
    "C++ fused, padded 13x19 maps": {"img_size": (52, 76), "window_size": 5, "fused_attention": True},
    "SimMIM, 64 px, window 8": {"img_size": 64, "window_size": 8, "simmim": True},
}
CHILD = """
import hashlib, json, sys, time
import torch
from swinv2_train.models import SimMIM, swin_v2
torch.set_num_threads(1)
models = {}
for name, settings in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    masked = settings.pop("simmim", False)
    model = swin_v2("tiny", num_classes=0 if masked else 10, **settings)
    images = torch.randn(2, 3, *model.img_size)
    inputs = [images]
    if masked:
        model = SimMIM(model, 32)
        inputs.append(torch.rand(2, *(side // 4 for side in images.shape[2:])) < 0.6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    models[name] = model, inputs
print("ready", flush=True)
for line in sys.stdin:
    turn = {}
    for name, (model, inputs) in models.items():
        model.zero_grad()
        torch.manual_seed(1)  # of stochastic depth
        begin = time.process_time()
        out = model(*inputs)
        out = out["loss"] if isinstance(out, dict) else out.square().sum()
        out.backward()
        seconds = time.process_time() - begin
        digest = hashlib.sha256(out.detach().numpy().tobytes())
        for parameter in model.parameters():
            digest.update(parameter.grad.numpy().tobytes())
        turn[name] = seconds, digest.hexdigest()
    print(json.dumps(turn), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", default="", help="those whose names have this in them")
    options = parser.parse_args()
    cases = {name: settings for name, settings in CASES.items() if options.cases in name}
    turns = in_turns(options.before, CHILD, [json.dumps(cases)], options.rounds + 2)
    print("| image model, forward and backward of 2 images | same bits | CPU time, now / before | quartiles |")
    print("|---|---|---|---|")
    for case in cases:
        pairs = [(old[case], new[case]) for old, new in turns]
        same = all(old[1] == new[1] for old, new in pairs)
        low, middle, high = statistics.quantiles([new[0] / old[0] for old, new in pairs[2:]], n=4)
        print(f"| {case} | {'yes' if same else 'NO'} | {middle:.3f} | {low:.3f} - {high:.3f} |")


if __name__ == "__main__":
    main()
