"""Checks that all engines make before they take somebody's tensors or files."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.lazy import LazyTensor, LazyTensors


class NonFiniteError(RuntimeError):
    """The gradient norm is not finite.  Raised on every rank, before any weight has moved."""


FACTS = "engine.json"
"""The file beside an engine's state that says what wrote it."""


def check_fit(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a name in state that shapes lacks or has in another shape.  Reads no lazy tensor."""
    known: Mapping[str, Tensor | LazyTensor] = state.entries if isinstance(state, LazyTensors) else state
    problems = []
    for name, tensor in known.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            problems.append(f"{name} is not in the model" + (f" (near: {near[0]})" if near else ""))
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model {shapes[name]}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(f"the weights do not fit the model: {shown}{more}; build the model that they belong to")


def read_tensor(
    state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor of state, contiguous.  Raises ConfigError whatever goes wrong: other ranks are waiting for it."""
    try:
        return state[name].to(device, dtype).view(shape).contiguous()
    except Exception as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{name}: cannot be read ({reason}); some weights are already replaced and some are not, so mend the file "
            "and start again"
        ) from error


def groups_text(param_groups: list[dict[str, Any]], names: Mapping[int, str]) -> list[str]:
    """Each parameter group in a word, with a digest of its members: flat buffers are laid out by them.

    names: parameter name by id.
    """
    texts = []
    for group in param_groups:
        members = " ".join(names[id(parameter)] for parameter in group["params"])
        digest = hashlib.sha256(members.encode()).hexdigest()[:8]
        texts.append(f"{group['name']} ({len(group['params'])} parameters, {digest})")
    return texts


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write beside an engine's state what wrote it."""
    (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def check_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Raise ConfigError when the state in directory was written by another engine, world size or model."""
    path = directory / FACTS
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{directory}: no engine state here ({FACTS} is missing); is the path right?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); resume from another checkpoint") from error
    if saved.get("world_size") != facts["world_size"]:
        raise ConfigError(
            f"{directory} was saved by {saved.get('world_size')} ranks, this run has {facts['world_size']}; "
            f"start {saved.get('world_size')} ranks to resume it"
        )
    for key, value in facts.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"{directory}: saved with {key}={saved.get(key)}, this run has {key}={value}; resume with the same"
            )
