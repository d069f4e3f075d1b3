"""The random states of a rank on disk, without pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from swinv2_train.config import ConfigError
from swinv2_train.distributed import World
from swinv2_train.storage.json_files import choice, listing, number, optional, read_json, record, row, whole

_MOST_BYTES = 2**20
"""The most that either file of a rank may hold; ours have 20 kB."""
_WORD = whole(0, 2**32 - 1)
_PLAIN = record(
    {
        "python": row(whole(3, 3), listing(_WORD, 625, 625), optional(number())),
        "numpy": row(choice("MT19937"), listing(_WORD, 624, 624), whole(0, 624), whole(0, 1), number()),
    }
)
"""numpy takes any position, and would read beyond its numbers."""


def random_states(world: World) -> dict[str, bytes]:
    """This rank's random states as the contents of files, by name."""
    from safetensors.torch import save

    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    tensors = {"torch": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    path = f"rank_{world.rank:04d}"
    return {f"{path}.json": (json.dumps(plain) + "\n").encode(), f"{path}.safetensors": save(tensors)}


def derived_seed(seed: int, step: int) -> int:
    """What stands for a run's seed where a resume after this step begins random numbers anew."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def has_gpu_state(folder: Path) -> bool | None:
    """Whether rank 0's random states are those of a rank on a GPU; None where they cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "rank_0000.safetensors", "pt") as file:
            return "cuda" in file.keys()  # noqa: SIM118  no mapping
    except (OSError, SafetensorError):
        return None


def restore_random_states(folder: Path, world: World, seed: int) -> BaseException | None:
    """Set this rank's random states to the saved ones; returns what is wrong with the files, or None.

    seed: for the numbers of a GPU where the run was saved on a CPU, which has none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"rank_{world.rank:04d}"
    try:
        plain = read_json(path.with_suffix(".json"), _MOST_BYTES, _PLAIN)
        if path.with_suffix(".safetensors").stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.name}.safetensors holds more than {_MOST_BYTES:,} bytes")
        tensors = load_file(path.with_suffix(".safetensors"))
        version, internal, gauss = plain["python"]
        name, keys, *rest = plain["numpy"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
        if world.device.type == "cuda":
            if "cuda" in tensors:
                torch.cuda.set_rng_state(tensors["cuda"], world.device)
            else:
                torch.cuda.manual_seed(int(np.random.SeedSequence([seed, world.rank]).generate_state(1)[0]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        return ConfigError(f"{path}: the random state cannot be read ({error}); choose another checkpoint")
    return None
