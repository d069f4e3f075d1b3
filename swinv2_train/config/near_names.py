"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: "did you mean NAME?", or otherwise where none is near."""
    names = list(names)
    near = [name for name in names if given and name.startswith(given)][:3]  # a100 of a100_40gb, a100_80gb
    near = near or difflib.get_close_matches(given, names, n=1)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


OTHER_NAMES = {
    "learning_rate": "lr", "base_lr": "lr", "batch_size": "global_batch_size", "per_device_batch_size":
    "micro_batch_size", "wd": "weight_decay", "grad_clip": "clip_grad_norm", "clip_grad": "clip_grad_norm",
    "num_epochs": "epochs", "steps": "max_steps", "workers": "num_workers", "output_dir": "run_dir",
    "pretrained": "init_from", "drop_path": "drop_path_rate", "image_size": "img_size", "nb_classes": "num_classes",
    "dtype": "precision", "min_learning_rate": "min_lr", "data_path": "shards", "train_shards": "shards",
}  # fmt: skip
"""What other trainers call a key of ours, by the last part of its name."""


def did_you_mean_key(given: str, keys: Iterable[str], otherwise: str) -> str:
    """The same about a dotted key: near is the most similar one, and every one that ends in the same part."""
    keys = list(keys)
    leaf = given.rsplit(".", 1)[-1]
    if leaf in OTHER_NAMES and not any(key.rsplit(".", 1)[-1] == leaf for key in keys):
        leaf = OTHER_NAMES[leaf]
        given = ".".join([*given.split(".")[:-1], leaf])
    near = difflib.get_close_matches(given, keys, n=1, cutoff=0.7)  # keys of one section are similar by that alone
    near += [key for key in keys if key.rsplit(".", 1)[-1] == leaf and key not in near]
    return f"did you mean {' or '.join(near[:3])}?" if near else otherwise
