"""What the label images of a set hold: their values counted, and what cannot be classes refused with the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.sources.base import Source
from swinv2_train.data.transforms.decode import DecodeError
from swinv2_train.data.transforms.image_sizes import image_sizes
from swinv2_train.data.transforms.label_image import check_sizes, read_label_image

_BARS, _LISTED = 30, 12
_LOOKED_AT = 16
_DIVIDE = "divide them by 255 (0 stays the one class, 1 is the other)"


def check_pair(image: bytes, label_image: bytes) -> np.ndarray:
    """The values of a label image that has its image's size, (H, W).

    Raises SampleError where it has another one, DecodeError where it cannot be read.  What is no photograph is compared
    where its file says its sides without being decoded.
    """
    values = read_label_image(label_image)
    sizes = image_sizes(image)
    if sizes and values.shape not in sizes:
        check_sizes((values.shape[0], values.shape[1]), sizes[0])
    return values


def check_source_values(source: Source, key: str, num_classes: int, reduce_zero_label: bool, ignore_index: int) -> None:
    """What check_values asks, before the first step.  Raises ShardError.  key: the config key that named the source.

    All values where they were counted when the images were packed; else of a few label images on this machine whether
    they are masks of 0 and 255: what is wrong with single ones is told when they are read.
    """
    if source.label_values is not None:
        check_values(source.label_values, key, num_classes, reduce_zero_label, ignore_index)
    elif source.cache is None:
        check_values(_some_values(source), key, None, reduce_zero_label, ignore_index)


def _some_values(source: Source) -> dict[int, int]:
    """Pixels by value of up to _LOOKED_AT readable label images, from all over the source."""
    found: Counter[int] = Counter()
    reader = source.open_reader(1)
    try:
        for place in np.unique(np.linspace(0, source.num_samples - 1, _LOOKED_AT).round().astype(int)).tolist():
            shard = int(np.searchsorted(np.cumsum(source.counts), place, side="right"))
            try:
                content = reader.read(shard, place - sum(source.counts[:shard])).targets.get("segmentation")
                found.update({} if content is None else count_values(read_label_image(content)))
            except (SampleError, DecodeError):  # the policy for damaged samples decides when it comes up
                continue
    finally:
        reader.close()
    return found


def count_values(values: np.ndarray) -> dict[int, int]:
    """How many pixels have each of the values."""
    counts = np.bincount(values.reshape(-1))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def check_values(
    values: Mapping[int, int], whose: str, num_classes: int | None, reduce_zero_label: bool, ignore_index: int
) -> None:
    """Raises ShardError where the values of a set's label images, pixels by value, cannot be those of its classes.

    whose: what errors call the set.  num_classes: None = as many as there are.  The other two: as the task's.
    """
    found = set(values)
    if found == {ignore_index}:
        raise ShardError(
            f"{whose}: all pixels of its label images are {ignore_index}, which is ignored, so there is nothing to "
            "learn or to score; save the numbers of the classes, or set task.ignore_index"
        )
    if 255 in found and found <= {0, 255}:
        raise ShardError(
            f"{whose}: all pixels of its label images are 0 or 255, a mask as programs draw it, and 255 is no class: "
            f"{_DIVIDE}"
        )
    if num_classes is None:
        return
    last = num_classes if reduce_zero_label else num_classes - 1
    wrong = sorted(value for value in found if value > last and value != ignore_index)
    if wrong:
        listed = ", ".join(f"{value} ({values[value]} pixels)" for value in wrong[:_LISTED])
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        highest = wrong[-1]
        remedies = [f"raise task.num_classes to {highest if reduce_zero_label else highest + 1}"]
        if not reduce_zero_label and wrong == [num_classes]:
            remedies.insert(0, "set task.reduce_zero_label=true where 0 is no class of its own")
        if len(wrong) == 1:
            remedies.append(f"set task.ignore_index={highest} where that is what is ignored")
        first, classes = ("1", "0 and ") if reduce_zero_label else ("0", "")
        raise ShardError(
            f"{whose}: its label images have the values {listed}{more}, but {first} to {last} are classes and "
            f"{classes}{ignore_index} ignored (task.num_classes, task.reduce_zero_label, task.ignore_index); "
            f"{', or '.join(remedies)}"
        )


def values_text(values: Mapping[int, int], names: Mapping[int, str]) -> str:
    """A line for each value: its share of the pixels, a bar, and its name where it has one."""
    total, most = sum(values.values()), max(values.values())
    width = len(str(max(values)))
    lines = []
    for value in sorted(values):
        bar = "#" * max(1, round(_BARS * values[value] / most))
        share = f"{100 * values[value] / total:.2f}"
        lines.append(f"  {value:>{width}}  {share:>6} %  {bar:<{_BARS}}  {names.get(value, '')}".rstrip())
    return "\n".join(lines)
