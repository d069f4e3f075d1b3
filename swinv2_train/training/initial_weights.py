"""The weights that task.init_from names, fitted to the model of a new run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import load_run_config
from swinv2_train.config.saved import CONFIG_NAME, read_saved_config
from swinv2_train.data.class_names import are_wordnet, listed
from swinv2_train.data.sources.matched import difference
from swinv2_train.distributed import World
from swinv2_train.distributed.interruptible import on_main_unless_stopped
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.initial import on_meta
from swinv2_train.models.lora import is_adapter
from swinv2_train.models.windows import Axes
from swinv2_train.runtime import StopRequest
from swinv2_train.storage.lazy_tensors import LazyTensors
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.task import Task
from swinv2_train.weights import (
    Bands,
    ConvertedWeights,
    Head,
    LoadReport,
    match_weights,
    read_weights,
    trained_windows,
    weights_classes,
)
from swinv2_train.weights.hub import HubAddress, fetched, pinned


class Initial(NamedTuple):
    """What a new run starts from."""

    weights: LazyTensors | None
    """By the module's names, read one at a time; on rank 0 alone."""
    report: str
    not_finite_text: Callable[[], str]
    """What to warn of once the weights were read: those that hold NaN or infinity; "" for none."""


def initial_weights(
    config: Config, task: Task, world: World, classes: tuple[str, ...] | None = None, stop: StopRequest | None = None
) -> Initial | None:
    """The weights of task.init_from as the task's module wants them; nothing is read yet but names and shapes.

    classes: what the rows of the module's head are to be called; None where they have numbers alone.  Raises
    ConfigError on every rank when the weights cannot be read or do not fit.  stop: may come meanwhile; StopNow on every
    rank.
    """
    init_from, init_head = config.task.init_from, config.task.init_head
    matched: list[tuple[LazyTensors, LoadReport]] = []
    if init_from is None:
        return None

    def match() -> str:
        own = task.module.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if not is_adapter(name)}
        fixed: dict[str, Head] = {"auto": "auto", "fresh": "fresh"}
        head: Head = fixed.get(init_head, Path(init_head))
        bands: Bands | None = config.task.init_bands
        said: list[str] = []
        fetched(init_from)  # here, that an outage stays one
        try:
            source = read_weights(init_from, config.task.init_format)
            if head == "auto" and "head.weight" in source.entries and "head.weight" in shapes:
                rows = source.entries["head.weight"].shape[0], shapes["head.weight"][0]
                head, said = head_by_name(weights_classes(init_from), classes, rows)
            elif head == "auto" and config.task.takes_fitting_heads:
                source, shapes, said = fitting_heads(source, shapes)
            elif head == "auto" and config.task.pixel_classes is not None:
                head, said = pixel_head(weights_classes(init_from), classes)
            weights, report = match_weights(source, shapes, head=head, bands=bands)
        except ConfigError as error:
            raise ConfigError(f"task.init_from: {error}") from error
        matched.append((weights, report))
        return "\n".join([f"weights from {source.origin}: {report}", *said, *other_windows(config, task.encoder)])

    text = on_main_unless_stopped(world, stop, match)
    if not matched:  # another rank than 0
        return Initial(None, text, str)
    return Initial(matched[0][0], text, matched[0][1].not_finite_text)


def with_pinned_weights(config: Config, world: World, stop: StopRequest | None = None) -> Config:
    """The configuration, a hub's address in task.init_from with its commit.  Collective.

    It is the commit with which the run in run_dir began, and only where none did the one that the address means now:
    a start that comes again takes no newer weights.  Raises ConfigError and StopNow on every rank.
    """
    given = HubAddress.of(config.task.init_from)
    if given is None:
        return config

    def settle() -> str:
        run_dir = Path(config.run_dir)
        before = _began_with(run_dir)
        if before is not None and given.begins(before):
            return str(before)
        return str(given) if newest_checkpoint(run_dir) is not None else pinned(str(given))  # a resume reads none

    address = on_main_unless_stopped(world, stop, settle)
    return dataclasses.replace(config, task=dataclasses.replace(config.task, init_from=address))


def _began_with(run_dir: Path) -> HubAddress | None:
    """The hub's address in the saved configuration of a run; None where there is none that can be read."""
    try:
        saved = OmegaConf.select(read_saved_config(run_dir / CONFIG_NAME), "task.init_from")
        return HubAddress.of(saved) if isinstance(saved, str) else None
    except (ConfigError, OmegaConfBaseException):
        return None


def head_by_name(
    theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None, rows: tuple[int, int]
) -> tuple[Head, list[str]]:
    """How the head of weights with these classes serves a model with these, and what to say of it.

    rows: of their head, and of ours.
    """
    if theirs is None and ours is None:
        return "auto", []
    if theirs is None or ours is None:
        unnamed = "their classes have" if theirs is None else "the training images' classes have"
        return "auto", [f"note: {unnamed} no names: the head's rows are taken by their numbers"]
    if theirs == ours or (are_wordnet(ours) and len(theirs) == len(ours) and not are_wordnet(theirs[:1])):
        return "auto", []
    place = {name: number for number, name in enumerate(theirs)}
    order = [*(place.get(name, -1) for name in ours), *range(len(theirs), rows[0])][: rows[1]]
    if -1 in order or len(order) < rows[1]:
        return "fresh", [f"note: the head starts anew, for theirs is of other classes ({difference(theirs, ours)})"]
    how = difference(theirs, ours)
    return order, [f"note: their head has these classes {how}: its rows are put into our order, by name"]


def pixel_head(theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None) -> tuple[Head, list[str]]:
    """As head_by_name, of the heads that name each pixel's class: taken where both lists say the same."""
    if theirs is None or ours is None or theirs == ours:
        return "auto", []
    return "fresh", [f"note: the heads start anew, for theirs are of other classes ({difference(theirs, ours)})"]


def fitting_heads(
    source: ConvertedWeights, shapes: dict[str, tuple[int, ...]]
) -> tuple[ConvertedWeights, dict[str, tuple[int, ...]], list[str]]:
    """Both without the parts of the heads that are not in the other in the same shape, and what is to be said of it.

    So of a detector of other classes, or without masks, everything else is taken (arXiv:2111.09883 appendix A2.2).
    """
    theirs, ours = ({name for name in each if name.startswith("decoder.")} for each in (source.entries, shapes))
    same = {name for name in theirs & ours if tuple(source.entries[name].shape) == tuple(shapes[name])}
    if not theirs & ours or same == theirs == ours:
        return source, shapes, []
    kept = {name: entry for name, entry in source.entries.items() if name not in theirs - same}
    fresh = sorted(ours - same)
    said = f"note: {len(fresh)} tensors of the heads start anew, for theirs have another shape or are not there"
    wanted = {name: shape for name, shape in shapes.items() if name not in ours - same}
    found = ConvertedWeights(kept, source.origin, source.format, source.sources, source.left_out, source.prefix)
    return found, wanted, [f"{said} ({listed(fresh)})"] if fresh else []


def other_windows(config: Config, encoder: SwinTransformerV2) -> list[str]:
    """A warning where the position bias of task.init_from belongs to other windows than this model assumes.

    Known of our own runs and of Hugging Face directories; other files do not tell.
    """
    source = fetched(str(config.task.init_from))
    theirs: Sequence[Axes] | None = trained_windows(source)
    runs = [folder for folder in (source, source.parent.parent) if (folder / "config.yaml").is_file()]
    if runs:
        with on_meta():
            theirs = build_model(load_run_config(runs[0]).model, num_classes=0).pretrained_window_sizes
    if theirs is None:
        return []
    axes = min(len(theirs[0]), len(encoder.pretrained_window_sizes[0]))  # of images in a model of clips, the sides
    if [window[-axes:] for window in theirs] == [window[-axes:] for window in encoder.pretrained_window_sizes]:
        return []
    value = ",".join(str(rows) if rows == cols else f"[{rows},{cols}]" for *_, rows, cols in theirs)
    time = f" model.pretrained_window_frames={theirs[0][0]}" if axes > 2 else ""
    return [
        f"warning: their position bias was trained at other windows than this model assumes; "
        f"model.pretrained_window_sizes=[{value}]{time} keeps its meaning (arXiv:2111.09883 section 3.3)"
    ]
