"""From the mask of a box to the pixels of an image."""

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
