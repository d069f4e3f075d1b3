"""Is a run the same bits when it is stopped and resumed?  And when it is simply run again?

    python scripts/resume_check.py --work DIR [--steps 20] experiment=cifar10_simmim [KEY=VALUE ...]

Trains the same configuration three times: straight, straight again, and half of the steps followed by a start that
resumes.  Every loss of every step and the tensors of the last checkpoints are compared, by hash.  Prints one JSON line;
exit code 0 when all are equal, 1 when not, 2 when a run failed.  Each run is a process of its own, forked when the
imports are done and before any device is touched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from swinv2_train import train
from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.monitoring.run_log import read_metrics

TENSORS = "*.safetensors"


def run(overrides: list[str], stdout: Path) -> int:
    """The exit code of a training in a process of its own."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = guarded(lambda: train.train(compose_overrides(overrides)))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(run_dir: Path) -> dict[str, Any]:
    """What must be equal: the loss of every step, and a hash of every file of tensors of the last checkpoint."""
    losses = {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None, f"{run_dir} has no checkpoint"
    files = sorted(path for path in checkpoint.rglob(TENSORS))
    assert files, f"{checkpoint} holds no {TENSORS}"
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            hashes[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"losses": losses, "files": hashes, "checkpoint": checkpoint.name}


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Where two runs differ: the first step whose loss does, and the files that do."""
    steps = sorted(a["losses"].keys() | b["losses"].keys())
    first = next((step for step in steps if a["losses"].get(step) != b["losses"].get(step)), None)
    names = sorted(a["files"].keys() | b["files"].keys())
    files = [name for name in names if a["files"].get(name) != b["files"].get(name)]
    same = first is None and not files and a["checkpoint"] == b["checkpoint"]
    return {"same": same, "first_step": first, "files": files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the three runs; must not hold any")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    half = options.steps // 2
    common = [
        *options.overrides,
        "train.log_every_steps=1",
        f"train.checkpoint_every_steps={half}",
        "log.wandb=disabled",
    ]
    found, spent = {}, {}
    for name in ("straight", "again", "resumed"):
        begin = time.monotonic()
        for steps in (half, options.steps) if name == "resumed" else (options.steps,):
            given = [*common, f"run_dir={options.work / name}", f"train.max_steps={steps}"]
            code = run(given, options.work / f"{name}.log")
            if code != EXIT_DONE:
                lines = (options.work / f"{name}.log").read_text().strip().splitlines()
                print("\n".join(["", *lines[-15:]]), file=sys.stderr)
                print(json.dumps({"failed": f"{name} up to step {steps} ended with exit code {code}"}))
                return 2
        spent[name] = round(time.monotonic() - begin, 1)
        found[name] = content(options.work / name)
    again, resumed = (differences(found["straight"], found[name]) for name in ("again", "resumed"))
    losses = found["straight"]["losses"]
    line = {
        "same": again["same"] and resumed["same"],
        "again": again,
        "resumed": resumed,
        "steps_compared": len(losses),
        "files_compared": len(found["straight"]["files"]),
        "last_loss": losses[max(losses)],
        "seconds": spent,
    }
    print(json.dumps(line))
    return 0 if line["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
