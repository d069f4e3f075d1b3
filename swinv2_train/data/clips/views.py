"""Which frames of a clip are read, and what is cut out of them.

The published way (arXiv:2106.13230 section 4.1): frames a fixed stride apart, from a random one on for training; one
box and one flip for all frames of a clip; for tests several clips, evenly from the first to the last that there is, and
three crops of each.  A clip that is shorter begins again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import Config, DataConfig
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.clips.torchcodec_video import check_torchcodec
from swinv2_train.data.transforms.crop import (
    eval_crops,
    random_box,
    resize,
    turned,
)

Look = Callable[[Tensor], Sequence[Tensor]]
"""The crops of one frame: uint8 (3, H, W) to one or several (3, h, w)."""


@dataclass(frozen=True)
class ClipViews:
    """Clips of `frames` frames, `stride` apart.  Evaluation sees `views` of them in a file, with `crops` crops each."""

    frames: int
    stride: int
    views: int = 1
    """Evaluation: clips, whose first frames lie evenly from the file's first on; 1 = the one in the middle."""
    crops: int = 1
    """Evaluation: crops, evenly along the frames' longer side; 1 = the centre."""
    decoder: str = "pyav"
    """Of videos: pyav or torchcodec."""

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """What the configuration says of clips; None = images.  ConfigError where the decoder is not there."""
        if config.model.frames is None:
            return None
        if config.data.video_decoder == "torchcodec":
            check_torchcodec()
        return cls(config.model.frames, config.data.frame_stride, decoder=config.data.video_decoder)

    @property
    def span(self) -> int:
        """Frames of a file from a clip's first to its last."""
        return (self.frames - 1) * self.stride + 1

    def starts(self, num_frames: int) -> list[int]:
        """The first frame of each clip of an evaluation, of a file with so many frames."""
        last = max(num_frames - self.span, 0)
        return [last // 2] if self.views == 1 else [round(each) for each in np.linspace(0, last, self.views)]

    def positions(self, start: int, num_frames: int) -> np.ndarray:
        """int64 (frames,): the frames of the clip that begins at start; behind a file's end it begins again."""
        positions: np.ndarray = (start + np.arange(self.frames) * self.stride) % num_frames
        return positions

    def train(self, clip: Clip, size: tuple[int, int], data: DataConfig, rng: np.random.Generator) -> Tensor:
        """A random clip, one box and one flip for all of its frames: uint8 (3, frames, *size).  Raises DecodeError."""
        start = int(rng.integers(max(clip.num_frames - self.span, 0) + 1))

        def look(first: Tensor) -> Look:
            turn = int(rng.integers(8)) if data.dihedral else 0
            height, width = turned(first, turn).shape[-2:]
            top, left, rows, columns = random_box(height, width, data.crop_scale, data.crop_ratio, rng)
            flip = rng.random() < data.hflip

            def cut(frame: Tensor) -> list[Tensor]:
                box = turned(frame, turn)[:, top : top + rows, left : left + columns]
                resized = resize(box, size, data.interpolation)
                return [resized.flip(-1) if flip else resized]

            return cut

        return self._seen(clip, [start], 1, size, look)[0, 0]

    def evaluate(self, clip: Clip, size: tuple[int, int], data: DataConfig) -> Tensor:
        """uint8 (views * crops, 3, frames, *size), the crops of the first clip first; without that axis where there is
        one view and one crop.  Raises DecodeError.
        """
        seen = self._seen(
            clip, self.starts(clip.num_frames), self.crops, size,
            lambda _: lambda frame: eval_crops(frame, size, data, self.crops),
        )  # fmt: skip
        return seen[0, 0] if self.views * self.crops == 1 else seen.flatten(0, 1)

    def _seen(
        self, clip: Clip, starts: Sequence[int], crops: int, size: tuple[int, int], look: Callable[[Tensor], Look]
    ) -> Tensor:
        """uint8 (clips, crops, 3, frames, *size).  look: what cuts crops out of frames, given the first one."""
        wanted = np.stack([self.positions(start, clip.num_frames) for start in starts])  # (clips, frames)
        seen = torch.empty(len(starts), crops, 3, self.frames, *size, dtype=torch.uint8)
        positions = np.unique(wanted).tolist()
        cut: Look | None = None
        for position, frame in zip(positions, clip.frames(positions), strict=True):
            cut = cut or look(frame)
            cropped = cut(frame)
            for view, place in np.argwhere(wanted == position).tolist():
                for number, crop in enumerate(cropped):
                    seen[view, number, :, place] = crop
        return seen
