"""Labels are numbers, classes are names: a source's labels in a model's numbering, by name where both have names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import are_wordnet, is_number, listed
from swinv2_train.data.sample import ShardError
from swinv2_train.data.sources.base import Source

Say = Callable[[str], None]
MODELS_CLASSES = "the model's classes"


def matched(source: Source, key: str, names: tuple[str, ...] | None, count: int | None, whose: str, say: Say) -> Source:
    """The source with its labels as the numbers of these classes.

    key: what named the source.  names: of the classes; None where they are known by number alone.  count: how many
    numbers there are; None = as many as there are names.  whose: what messages call the classes.  say: receives a line
    where numbers had to be taken for want of names.

    By name a class that the source lacks is fine.  Folders that are called by numbers are the classes of these numbers
    where the classes have other names or none (ImageNet-V2's 0 to 999).  Raises ShardError, naming them, for classes
    with images that are none of these.
    """
    theirs, given = source.classes, source.label_range
    if given is None:
        return source
    if theirs is None:
        labels = f"its labels {given[0]}..{given[1]}"
        say(f"note: {key} names no classes: {labels} are taken as the numbers of {whose}")
        return source
    if names is not None and theirs == names[: len(theirs)]:
        return source if theirs == names else source.relabelled(range(len(theirs)), names)
    place = {} if names is None else {name: number for number, name in enumerate(names)}
    numbers = [place.get(name, -1) for name in theirs]
    count = len(names or ()) if count is None else count
    used = source.used_labels
    unknown = [theirs[label] for label in sorted(used) if numbers[label] < 0]
    if names is not None and not unknown:
        return source.relabelled(numbers, names)
    if all(map(is_number, theirs)) and not (names and all(map(is_number, names))):
        return _by_number(source, key, names, count, whose, say)
    if names is None or (are_wordnet(theirs) and not any(map(_is_wordnet, names)) and len(theirs) == len(names)):
        how = "no" if names is None else "other"
        fewer = f", which is wrong unless the last of the {count} are those that are not among these {len(theirs)}"
        say(
            f"{'note' if len(theirs) == count else 'warning'}: {whose} have {how} names: those of {key} "
            f"({listed(theirs)}) are taken as their numbers, in order{'' if len(theirs) == count else fewer}"
        )
        return source if names is None else source.relabelled(range(len(theirs)), names)
    raise ShardError(
        f"{key} has {len(unknown)} classes that are none of {whose} ({listed(unknown)}); there are "
        f"{listed(names)}: name images of these classes, or rename the folders"
    )


def _is_wordnet(name: str) -> bool:
    return are_wordnet([name])


def _by_number(
    source: Source, key: str, names: tuple[str, ...] | None, count: int, whose: str, say: Say
) -> Source:  # fmt: skip
    theirs = source.classes
    assert theirs is not None, key
    values = [int(name) for name in theirs]
    beyond = [theirs[label] for label in sorted(source.used_labels) if count and values[label] >= count]
    if beyond and len(theirs) <= count and names is None and values == list(range(1, len(values) + 1)):
        values, beyond = list(range(len(theirs))), []  # counted from 1
    if beyond:
        raise ShardError(
            f"{key}: its class folders are numbers, and {listed(beyond)} is none of the {count} of {whose}, which are "
            f"0 to {count - 1}; name images of these classes"
        )
    taken = f"{key} calls its classes by numbers ({listed(theirs)}): they are taken as the numbers of {whose}"
    from_one = ", of which 0 is the first: rename the folders where they count from 1" if values[0] == 1 else ""
    say(f"{'warning' if from_one else 'note'}: {taken}{from_one}")
    return source.relabelled(values, names)


def check_pixel_classes(theirs: tuple[str, ...] | None, names: tuple[str, ...] | None, key: str, whose: str) -> None:
    """Label images and objects hold numbers that nobody puts into another order, so both lists must call one alike.

    theirs: the names of a source, or of weights, that key named; names: those of the classes, and whose they are.
    Either may be None, or end earlier.  Raises ShardError.
    """
    for number, (their, ours) in enumerate(zip(theirs or (), names or (), strict=False)):
        if their != ours:
            raise ShardError(
                f"{key} calls class {number} of its pixels or objects '{shown(their)}', which is '{shown(ours)}' among "
                f"{whose}: the same number would mean two things; renumber its label images, pack its objects beside "
                "the shards that have the right classes.txt, or mend the list of names that is wrong (classes.txt, "
                "which may also lie above the folder; task.class_names)"
            )


def difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """How one list of classes differs from another, in a few words."""
    missing = [name for name in theirs if name not in set(ours)]
    added = [name for name in ours if name not in set(theirs)]
    parts = [f"without {listed(missing)}"] * bool(missing) + [f"with {listed(added)}"] * bool(added)
    return " and ".join(parts) or "in another order"
