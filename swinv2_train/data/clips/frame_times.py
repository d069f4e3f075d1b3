"""When the frames of a video are shown and where decoding may begin, found once by reading its packets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class FrameTimes:
    """The frames of a video in the order in which they are shown.  Decoding begins at a key frame."""

    shown: np.ndarray
    """int64 (frames,): the time stamp of each, in the video's own unit, rising; all NO_TIME where it does not say them,
    so that frames can be counted from the first on alone.
    """
    keys: np.ndarray
    """int64 (key frames,): the time stamps of those at which decoding may begin, rising; of some that are not shown
    too.
    """

    @property
    def known(self) -> bool:
        """Whether the video says when its frames are shown."""
        return bool(self.shown[0] != NO_TIME)

    def key_before(self, position: int) -> int:
        """The time stamp of the last key frame that is not behind this frame; the first one where there is none."""
        number = int(np.searchsorted(self.keys, self.shown[position], side="right")) - 1
        return int(self.keys[max(number, 0)])


NO_TIME = -(2**63)
"""FFmpeg's word for a time stamp that is not there."""
