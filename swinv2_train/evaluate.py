"""``python -m swinv2_train.evaluate run_dir=DIR [checkpoint=DIR] [KEY=VALUE ...]``: a run's metrics, as one JSON line.

The run's own configuration is taken, with the overrides on top; the weights are the float32 masters of the newest
complete checkpoint (or of ``checkpoint``), computed in float32, by any number of processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from swinv2_train import loop
from swinv2_train.checkpoint import find_checkpoint, read_weights
from swinv2_train.command_line import compose_run, guarded
from swinv2_train.config import Config, ConfigError
from swinv2_train.data.loader import EvalLoader
from swinv2_train.distributed import init_distributed, shutdown_distributed
from swinv2_train.engine.checks import check_full_state
from swinv2_train.engine.local import to_device
from swinv2_train.gate import config_yaml
from swinv2_train.runtime import EXIT_DONE, set_threads
from swinv2_train.tasks import build_task
from swinv2_train.train import on_main, open_shards

USAGE = __doc__


def evaluate(config: Config, source: Path) -> dict[str, Any]:
    """Scores of the weights at source (a run or a checkpoint) on config.data.eval_shards, over all ranks."""
    if config.data.eval_shards is None:
        raise ConfigError("data.eval_shards has no value; set it on the command line: data.eval_shards=PATTERN")
    world = init_distributed(config.runtime.process_group_timeout_sec)
    set_threads(config.runtime.num_threads, world.local_world_size)
    _, manifest = open_shards(config, world)
    assert manifest is not None
    task = build_task(config, world.device)
    checkpoint = on_main(world, lambda: find_checkpoint(source))
    weights = read_weights(checkpoint)
    check_full_state({name: tuple(value.shape) for name, value in task.module.state_dict().items()}, weights)
    task.module.load_state_dict(weights)
    module = task.module.to(world.device).eval()
    loader = EvalLoader(
        manifest, config.data, task.eval_transform, config.train.micro_batch_size, world.rank, world.world_size
    )
    with torch.no_grad():
        scores = loop.evaluate(task, lambda **inputs: module(**to_device(inputs, world.device)), loader)
    on_main(world, lambda: print(json.dumps({"checkpoint": str(checkpoint), "images": manifest.num_samples, **scores})))
    shutdown_distributed()
    return scores


def main() -> None:
    """The console script swinv2-evaluate."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        sys.exit(EXIT_DONE)

    def command() -> int:
        config, extra = compose_run([a for a in arguments if a not in ("--cfg", "job")], ("checkpoint",))
        if "--cfg" in arguments:
            print(config_yaml(config), end="")
            return EXIT_DONE
        evaluate(config, Path(extra.get("checkpoint") or config.run_dir))
        return EXIT_DONE

    sys.exit(guarded(command))


if __name__ == "__main__":
    main()
