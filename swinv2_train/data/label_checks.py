"""What make_shards looks at while it packs images with their label images, before a run finds it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swinv2_train.config.shown import shown, tell
from swinv2_train.data.label_values import check_pair, check_values, count_values, values_text
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.manifest import merge_entries, read_entries
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.transforms.decode import DecodeError

Overlay = Callable[[str, bytes, str, np.ndarray], None]
"""Is given a key, the image's bytes, its extension and the values of its label image (H, W)."""


@dataclass
class LabelImageChecks:
    """Every pair is looked at as it is packed, and their values are counted.  The first that is wrong ends it."""

    source: str
    """What errors call the images."""
    samples_per_shard: int
    num_classes: int | None
    """None = as many as there are."""
    reduce_zero_label: bool
    ignore_index: int
    names: tuple[str, ...] | None
    """Of the classes."""
    overlay: Overlay | None
    num_overlays: int
    counted: list[Counter[int]] = field(default_factory=list)
    """Pixels by value, shard by shard."""
    _looked_at: int = 0

    @property
    def values(self) -> Counter[int]:
        """Pixels of all label images by value."""
        total: Counter[int] = Counter()
        for counts in self.counted:
            total.update(counts)
        return total

    def look(self, key: str, image: bytes, extension: str, label_image: bytes) -> None:
        """Raises ShardError, naming the image, for a label image that is damaged, or of another size or classes."""
        whose = f"{self.source}: the label image of '{shown(key)}'"
        try:
            values = check_pair(image, label_image)
        except (DecodeError, SampleError) as error:
            raise ShardError(f"{whose} cannot be packed: {error}; mend it, or move the pair away") from error
        counts = count_values(values)
        if not counts.keys() <= {0, 255, self.ignore_index}:  # masks of 0 and 255 are told when all have been seen
            self._check(counts, whose)
        if self._looked_at % self.samples_per_shard == 0:
            self.counted.append(Counter())
        self.counted[-1].update(counts)
        if self.overlay is not None and self._looked_at < self.num_overlays:
            self.overlay(key, image, extension, values)
        self._looked_at += 1

    def finish(self) -> None:
        """Say what the label images hold.  Raises ShardError where that cannot be classes."""
        if not self.counted:
            return
        values = self.values
        self._check(values, self.source)
        classes = {value: count for value, count in values.items() if value != self.ignore_index}
        first = 1 if self.reduce_zero_label else 0
        named = {number + first: name for number, name in enumerate(self.names or ())}
        named[self.ignore_index] = "(ignored)"
        if self.reduce_zero_label:
            named[0] = "(ignored)"
        tell(
            f"the values of {self._looked_at} label images, in per cent of their pixels:\n{values_text(values, named)}"
        )
        if self.num_classes is None and classes:
            highest = max(classes)
            reduced = f", else task.num_classes={highest} task.reduce_zero_label=true" if highest > 1 else ""
            tell(f"task.num_classes={max(highest + 1, 2)} if 0 is a class{reduced}")

    def keep(self, manifest: Manifest) -> None:
        """Write the counts into the shards' manifest."""
        if self.counted:
            folder = Path(manifest.paths[0]).parent
            entries = read_entries(folder)
            kept = {}
            for path, counts in zip(manifest.paths, self.counted, strict=True):
                values = {str(value): counts[value] for value in sorted(counts)}
                kept[Path(path).name] = {**entries[Path(path).name], "label_values": values}
            merge_entries(folder, kept)

    def _check(self, values: dict[int, int] | Counter[int], whose: str) -> None:
        check_values(values, whose, self.num_classes, self.reduce_zero_label, self.ignore_index)
