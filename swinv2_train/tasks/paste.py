"""From the mask of a box to the pixels of an image, and to COCO's run lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.5


def pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The pixels of each mask (D, s, s) of probabilities in its box (D, 4): (H, W) bool, one at a time.

    Bilinear between the places of the mask, which are half a place within its border, at the pixels' centres; outside
    of it 0 (mmdetection).  Only the pixels that a box touches are computed.
    """
    height, width = size
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        canvas = np.zeros(size, dtype=bool)
        x0, y0, x1, y1 = box
        left, top = max(int(np.floor(x0)) - 1, 0), max(int(np.floor(y0)) - 1, 0)
        right, bottom = min(int(np.ceil(x1)) + 1, width), min(int(np.ceil(y1)) + 1, height)
        if right > left and bottom > top and x1 > x0 and y1 > y0:
            x = (torch.arange(left, right, device=mask.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
            y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
            grid = torch.stack([x.view(1, -1).expand(len(y), -1), y.view(-1, 1).expand(-1, len(x))], dim=-1)
            values = F.grid_sample(mask[None, None].float(), grid[None].float(), align_corners=False)[0, 0]
            canvas[top:bottom, left:right] = (values >= THRESHOLD).cpu().numpy()
        yield canvas


def run_lengths(pixels: np.ndarray) -> dict[str, object]:
    """COCO's compressed run lengths of (H, W) bool: columns first, 0 first, six bits a character."""
    flat = pixels.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    counts = np.diff(edges)
    if len(flat) and flat[0]:
        counts = np.concatenate([[0], counts])
    return {"size": [int(side) for side in pixels.shape], "counts": _compressed(counts.tolist())}


def _compressed(counts: list[int]) -> bytes:
    """From the third on the difference to the one two before; five bits a character, least first, +48."""
    found = bytearray()
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            found.append((bits | (0x20 if more else 0)) + 48)
    return bytes(found)
