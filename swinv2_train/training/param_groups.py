"""Parameter groups: which parameters decay, and with what share of the learning rate each one is trained.

Works on official SwinV2 parameter names (``patch_embed.*``, ``layers.I.blocks.J.*``, ``layers.I.downsample.*``,
``norm.*``, ``head.*``), alone or behind ``encoder.``, as a module around an encoder names it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from swinv2_train.config import ConfigError, OptimConfig

ONE_D = "1d"
"""The no-decay pattern that stands for every parameter with at most one dimension."""

ENCODER = "encoder."
"""What the names of an encoder's parameters begin with in a module that has more."""
HEAD = "head."
"""What those begin with that a classifier has beside its encoder's, which there have no name in front."""

_LAYER = re.compile(r"layers\.(\d+)\.(?:blocks\.(\d+)\.)?")


def build_param_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups of equal weight decay and learning-rate scale.

    Those that optim.freeze names are trainable no more.
    Returns a list of {"params": [Parameter, ...], "weight_decay": float, "lr_scale": float, "name": str}; every
    trainable parameter is in exactly one group, in the order of module.named_parameters().  Group names are decay and
    no_decay, or layer_3_decay and so on with layer decay; encoder_decay and so on with another rate for the encoder.
    Raises ConfigError for a freeze or no_decay pattern that matches nothing, for layer decay on a module without
    layers, and for an encoder's own rate without an encoder beside other parameters.
    """
    freeze(module, config.freeze)
    everything = dict(module.named_parameters())  # what is frozen counts as a layer, and patterns may match it
    parameters = [(name, parameter) for name, parameter in everything.items() if parameter.requires_grad]
    assert parameters, "the module has no trainable parameter"
    num_dims = {name: len(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in everything.items()}
    without_decay = no_decay_names(num_dims, config.no_decay)
    scales = lr_scales(everything, config.layer_decay)
    of_encoder = encoder_names(num_dims)
    if config.encoder_lr_scale != 1.0 and not of_encoder:
        raise ConfigError(
            f"optim.encoder_lr_scale ({config.encoder_lr_scale}) is for an encoder with heads beside it; set it to 1, "
            "or use optim.layer_decay"
        )
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters:
        layer, lr_scale = scales[name]
        group_name = "no_decay" if name in without_decay else "decay"
        if config.layer_decay != 1.0:
            group_name = f"layer_{layer}_{group_name}"
        if config.encoder_lr_scale != 1.0 and name in of_encoder:
            group_name, lr_scale = f"{ENCODER[:-1]}_{group_name}", lr_scale * config.encoder_lr_scale
        weight_decay = 0.0 if name in without_decay else config.weight_decay
        group = groups.setdefault(
            group_name, {"params": [], "weight_decay": weight_decay, "lr_scale": lr_scale, "name": group_name}
        )
        group["params"].append(parameter)
    return list(groups.values())


def encoder_names(names: Iterable[str]) -> set[str]:
    """Those of an encoder with something beside it: a classifier's head, or what else the module has; else none."""
    names = set(names)
    found = {name for name in names if name.startswith(ENCODER)}
    heads = {name for name in names if name.startswith(HEAD)}
    return found or (names - heads if heads else set())


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters of whose names any pattern is a part are trained no more: they get no gradient, decay or moments.

    Raises ConfigError for a pattern that matches no parameter, and where all would be frozen.
    """
    names = dict(module.named_parameters())
    for pattern in patterns:
        matches = [name for name in names if pattern in name]
        if not matches:
            raise ConfigError(
                f"optim.freeze pattern '{pattern}' matches no parameter; names end in: "
                f"{', '.join(_near_names(pattern, names))}"
            )
        for name in matches:
            names[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError(f"optim.freeze ({', '.join(patterns)}) leaves nothing to train; leave a pattern out")


def trained_note(module: nn.Module) -> str | None:
    """How many of a module's parameters are trained, in words; None where all are."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in module.parameters()]
    whole, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    if trained == whole:
        return None
    return f"note: {trained:,} of {whole:,} parameters are trained ({100 * trained / whole:.2g} %)"


def no_decay_names(num_dims: dict[str, int], patterns: Iterable[str]) -> set[str]:
    """Names of the parameters without weight decay.

    num_dims: parameter name -> number of dimensions (as built: ZeRO-3 leaves shape == (0,)).  patterns: parts of names,
    or "1d".  Raises ConfigError for a pattern that matches no parameter: it would silently decay what it was to spare.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ONE_D:
            matches = {name for name, dims in num_dims.items() if dims <= 1}
        else:
            matches = {name for name in num_dims if pattern in name}
        if not matches:
            raise ConfigError(
                f"optim.no_decay pattern '{pattern}' matches no parameter; names end in: "
                f"{', '.join(_near_names(pattern, num_dims))}"
            )
        chosen |= matches
    return chosen


def lr_scales(names: Iterable[str], layer_decay: float) -> dict[str, tuple[int, float]]:
    """Name -> (layer, lr_scale) with lr_scale = layer_decay ** (n - 1 - layer) and n = sum(depths) + 2.

    Layer 0: patch_embed and mask_token.  Block (l, b): sum(depths[:l]) + b + 1.  What else stands in layers.l
    (downsample, extra norms): the layer of the last block of l.  All the rest (norm, head, decoder): n - 1.
    Source: microsoft/Swin-Transformer optimizer.py get_swin_layer.
    """
    names = list(names)
    matches = {name: _LAYER.match(name.removeprefix(ENCODER)) for name in names}
    depths: dict[int, int] = {}
    for match in matches.values():
        if match and match[2] is not None:
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    if layer_decay != 1.0 and not depths:
        raise ConfigError(
            f"optim.layer_decay ({layer_decay}) needs parameters named layers.I.blocks.J, but finds none; set it to 1"
        )
    last = sum(depths.values()) + 1
    scales = {}
    for name in names:
        match = matches[name]
        short = name.removeprefix(ENCODER)
        if match:
            before = sum(depth for stage, depth in depths.items() if stage < int(match[1]))
            layer = before + (int(match[2]) + 1 if match[2] is not None else depths.get(int(match[1]), 0))
        elif short.startswith("patch_embed.") or short == "mask_token":
            layer = 0
        else:
            layer = last
        scales[name] = (layer, layer_decay ** (last - layer))
    return scales


def _near_names(pattern: str, names: Iterable[str], limit: int = 6) -> list[str]:
    """The ends of parameter names, the ones nearest to the pattern first."""
    ends = dict.fromkeys(re.sub(r"^.*?(\w+\.\d+\.\w+|\w+\.\w+|\w+)$", r"\1", name) for name in names)
    parts = {part for end in ends for part in end.split(".")}
    near = set(difflib.get_close_matches(pattern.split(".")[-1] or pattern, parts, n=3, cutoff=0.5))
    return sorted(ends, key=lambda end: not near & set(end.split(".")))[:limit]
