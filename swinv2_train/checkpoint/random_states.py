"""The random states of a rank on disk, without pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from swinv2_train.config import ConfigError
from swinv2_train.distributed import World


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


def restore_random_states(folder: Path, world: World) -> BaseException | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"rank_{world.rank:04d}"
    try:
        plain = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
        version, internal, gauss = plain["python"]
        name, keys, *rest = plain["numpy"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["cuda"], world.device)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return ConfigError(f"{path}: the random state cannot be read ({error}); choose another checkpoint")
    return None
