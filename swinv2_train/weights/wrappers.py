"""What programs put around a model's names, taken off again: module., _orig_mod., model., net., backbone., teacher.

A prefix is taken off when what is left is a Swin V2, whatever it is called; what a file holds beside (a loss's own
weights, a second copy of the model) is left out by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from swinv2_train.config import ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.storage.lazy_tensors import LazyTensor

_INSIDE = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch's and DeepSpeed's wrappers add anywhere in a name, once for each wrapped part."""
_BLOCK = re.compile(
    r"(?:^|\.)(?:"
    r"(?:swinv2\.)?encoder\.layers\.[0-9]+\.blocks\.[0-9]+\.attention\.self\."
    r"|(?:backbone\.)?stages\.[0-9]+\.blocks\.[0-9]+\.attn\.w_msa\."
    r"|features\.[0-9]+\.[0-9]+\.attn\."
    r"|(?:encoder\.)?layers\.[0-9]+\.blocks\.[0-9]+\.(?:attn|mlp|norm)"
    r")"
)
"""What tells a Swin V2 of any naming; whatever stands before it is a prefix."""
_NUMBERED = re.compile(r"(?:^|\.)(?:layers|stages|blocks|features)\.([0-9]+)(?:\.([0-9]+))?(?=\.|$)")
_FIRST = ("", "model.", "net.", "backbone.", "encoder.", "teacher.", "student.")
"""Which copy of the model is taken where there are several: the plain one, then a teacher, which is a student's EMA."""
_AT_LEAST = 100
"""Numbers that no file is too small for: it may hold a part of a model."""


class Unwrapped(NamedTuple):
    """The tensors of a Swin V2 by the names that its own implementation gives them."""

    entries: dict[str, LazyTensor]
    sources: dict[str, str]
    """The name in the file of each."""
    prefix: str
    """What stood before all names."""
    left_out: tuple[str, ...]
    """Names beside the model, as one pattern for each beginning."""


def unwrap(entries: Mapping[str, LazyTensor], known_outside: Iterable[str], origin: str) -> Unwrapped:
    """The Swin V2 in a file, without what programs put before or into its names.

    known_outside: beginnings of names that are a model's own though they have no block in them (a head).  A file
    without any Swin V2 is given as it is.  Raises ConfigError where two names become one, or where a number in a name
    is larger than the file holds tensors.
    """
    check_numbers(entries, origin)
    plain: dict[str, str] = {}
    for source in entries:
        name = _INSIDE.sub("", source)
        if name in plain:
            raise ConfigError(f"{origin}: {shown(plain[name])} and {shown(source)} are the same weight; keep one")
        plain[name] = source
    roots = {name[: match.start() + (name[match.start()] == ".")] for name in plain if (match := _BLOCK.search(name))}
    prefix = min(roots, key=_rank, default="")
    if prefix:
        kept = {name[len(prefix) :]: source for name, source in plain.items() if name.startswith(prefix)}
        heads, around = tuple(known_outside), prefix.removesuffix("backbone.")  # of a backbone, beside it
        found = {name: name.removeprefix(around) for name in plain if not name.startswith(prefix)}
        beside = [name for name, bare in found.items() if bare in kept or not bare.startswith(heads)]
        told = set(beside)
        kept |= {bare: plain[name] for name, bare in found.items() if name not in told}
    else:
        beside = [name for name in plain if _below(name, roots)]
        told = set(beside)
        kept = {name: source for name, source in plain.items() if name not in told}
    return Unwrapped({name: entries[source] for name, source in kept.items()}, kept, prefix, _patterns(beside))


def check_numbers(names: Iterable[str], origin: str) -> None:
    """Refuse a number of a stage or block that a model of as many tensors as the file has cannot have."""
    names = list(names)
    most = max(_AT_LEAST, len(names))
    for name in names:
        for digits in filter(None, (number for found in _NUMBERED.findall(name) for number in found)):
            if len(digits) > 9 or int(digits) >= most:
                raise ConfigError(
                    f"{origin}: {shown(name)} has the number {shown(digits, 30)}, but the file holds {len(names)} "
                    "tensors; fetch or save it again"
                )


def _rank(root: str) -> tuple[int, int, str]:
    return (_FIRST.index(root) if root in _FIRST else len(_FIRST), len(root), root)


def _below(name: str, roots: set[str]) -> bool:
    """Whether a name is of a copy of the model that has a prefix, beside one that has none."""
    return any(char == "." and name[: i + 1] in roots for i, char in enumerate(name))


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """loss.* for all names that begin so."""
    return tuple(dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in names))
