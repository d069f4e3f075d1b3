"""SimMIM: predict the pixels of masked patches (arXiv:2111.09886), with the official code's numerics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.cache import cached_table
from swinv2_train.models.patch_conv import PatchConv2d
from swinv2_train.models.precision import at_least_float32
from swinv2_train.models.swin_v2 import SwinTransformerV2


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over masked pixels (SimMIM eq. 1, arXiv:2111.09886).

    prediction, target: (B, C, H, W), normalised pixels.  mask: (B, 1, H, W), 1 (or a weight) where the pixel was
    hidden, or (B, C, H, W) where that differs by channel.  Returns a scalar in at least float32, normalised over the
    hidden pixels of this batch (by channel: over its hidden values); 0 when nothing is hidden.
    """
    error = (at_least_float32(prediction) - at_least_float32(target)).abs() * mask
    return error.sum() / (mask.sum() / mask.shape[1] + 1e-5) / target.shape[1]


def target_weights(
    mask: Tensor, patch_size: int, weight: Tensor | None, measured: Tensor | None, window_px: int | None
) -> Tensor:
    """How much each value counts in the loss: (B, 1, H, W) float32, or (B, C, H, W) where some were not measured.

    Arguments as SimMIM.forward's, and its norm_target: a window with one measured value alone has no variance.
    """
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    hidden = pixels.unsqueeze(1).to(torch.float32)
    if measured is not None:
        usable = measured if window_px is None else measured & (_window_sums(measured.float(), window_px) > 1.5)
        hidden = hidden * usable
    return hidden if weight is None else hidden * weight.view(-1, 1, 1, 1)


def norm_target(images: Tensor, window_px: int, measured: Tensor | None = None) -> Tensor:
    """Normalise every pixel by mean and unbiased variance of the odd square window around it, per channel.

    images: (B, C, H, W) -> the same shape.  The official SwinV2 pre-training uses a window of 47 px.
    """
    mean, std = local_statistics(images, window_px, measured)
    return (images - mean) / std


def local_statistics(images: Tensor, window_px: int, measured: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, never 0) of the square window around every pixel, per channel.

    images: (B, C, H, W) -> two of the same shape.  Border windows hold fewer pixels, as do those with values that were
    not measured (False in measured, bool (B, C, H, W)).
    """
    if measured is not None:
        counts = _window_sums(measured.to(images.dtype), window_px)
        known = images * measured
        mean = _window_sums(known, window_px) / counts.clamp(min=1)
        square = _window_sums(known**2, window_px) / counts.clamp(min=1)
        variance = ((square - mean**2) * (counts / (counts - 1).clamp(min=1))).clamp(min=0)
        return mean, (variance + 1e-6) ** 0.5
    mean, square = (_box_mean(x, window_px) for x in (images, images**2))
    height, width = images.shape[-2:]
    count = _pixels_in_window((height, width), window_px, images.dtype, images.device)
    variance = ((square - mean**2) * (count / (count - 1))).clamp(min=0)
    return mean, (variance + 1e-6) ** 0.5


def _box_mean(values: Tensor, window_px: int) -> Tensor:
    """Mean of the square window around every pixel, along rows and then along columns: 2 x window_px reads a pixel.

    All rows of a window are equally long, at a border too, so the mean of their means is the window's.  A difference of
    cumulative sums would read two, and lose the digits of a sum over the whole image.
    """
    return _along_both_sides(values, window_px, count_include_pad=False)


def _window_sums(values: Tensor, window_px: int) -> Tensor:
    """(B, C, H, W) -> the same shape: the sum over the window around every pixel."""
    return _along_both_sides(values, window_px, divisor_override=1)


def _along_both_sides(values: Tensor, window_px: int, **pool: Any) -> Tensor:
    for kernel, padding in (((1, window_px), (0, window_px // 2)), ((window_px, 1), (window_px // 2, 0))):
        values = F.avg_pool2d(values, kernel, stride=1, padding=padding, **pool)
    return values


@cached_table
def _pixels_in_window(size: tuple[int, int], window_px: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many pixels of a map of this size are in the window around each: (H, W)."""
    reach = window_px // 2
    sides = []
    for length in size:
        at = torch.arange(length, device=device)
        sides.append((at + reach + 1).clamp(max=length) - (at - reach).clamp(min=0))
    return torch.outer(*sides).to(dtype)


def frames_of(clips: Tensor) -> Tensor:
    """Clips (B, C, T, H, W) as images (B*T, C, H, W); images as they are."""
    return clips if clips.ndim == 4 else clips.movedim(2, 1).flatten(0, 1)


def _frame(images: Tensor) -> tuple[int, ...]:
    """The shape of an image, or of a clip's frame: (C, H, W)."""
    return images.shape[1], *images.shape[-2:]


class SimMIM(nn.Module):
    """An encoder that sees mask tokens, and one linear layer that predicts the hidden pixels.

    Clips are hidden by tubes: the same patches in every frame; a token predicts all frames of its patch.
    encoder_stride: pixels per side of one token of the encoder's last map (32 with patches of 4 px and 4 stages).
    norm_target: side in pixels of the window that normalises the target, None for plain pixels.
    Raises ValueError when the stride does not fit the encoder or the window is even.
    """

    def __init__(self, encoder: SwinTransformerV2, encoder_stride: int = 32, norm_target: int | None = None) -> None:
        super().__init__()
        stride = encoder.patch_size * 2 ** (len(encoder.depths) - 1)
        if encoder_stride != stride:
            raise ValueError(f"encoder_stride ({encoder_stride}) must be the encoder's {stride} px per last token")
        if norm_target is not None and (norm_target < 3 or norm_target % 2 == 0):
            raise ValueError(f"norm_target ({norm_target}) must be an odd number of pixels, 3 or more (official: 47)")
        self.encoder = encoder
        self.encoder_stride = encoder_stride
        self.norm_target = norm_target
        encoder.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        nn.init.trunc_normal_(encoder.mask_token, std=0.02)
        of_a_token = encoder_stride**2 * encoder.in_chans * (1 if encoder.frames is None else encoder.patch_frames)
        self.decoder = nn.Sequential(
            PatchConv2d(encoder.num_features, of_a_token, 1),
            nn.PixelShuffle(encoder_stride),
        )

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        measured: Tensor | None = None,
        by_image: bool = False,
    ) -> dict[str, Tensor]:
        """images: (B, C, H, W), of clips (B, C, T, H, W), normalised pixels, whole patches.  mask: (B, H/p, W/p) bool,
        True where hidden.  weight: (B,), how much each image counts in the loss; None = 1.  measured: bool as images,
        False for values that are no target (images has any finite number there); None = all are.

        Returns {"loss": (), "reconstruction": as images}, both at least float32; by_image adds each image's (clip's)
        own "image_losses" and what it counts, "image_counts", (B,) each, without gradients.

        Where the encoder padded odd maps
        before merging, what the decoder says beyond the image is cut off.  Without a mask nothing is hidden or
        predicted: {"features": (B, num_features)}, the encoder's pooled_features.  Raises ValueError for other shapes.
        """
        if mask is None:
            return {"features": self.encoder.pooled_features(images)}
        features = self.encoder.forward_features(images, mask)[-1]
        decoded = at_least_float32(self.decoder(frames_of(features)))
        reconstruction = decoded[:, :, : images.shape[-2], : images.shape[-1]].reshape(-1, *_frame(images))
        frames = len(reconstruction) // len(images)
        if images.ndim == 5:
            mask = mask.repeat_interleave(frames, 0)
            weight = None if weight is None else weight.repeat_interleave(frames)
            measured = None if measured is None else frames_of(measured)
        target = at_least_float32(frames_of(images))
        if self.norm_target is not None:
            target = norm_target(target, self.norm_target, measured)
        hidden = target_weights(mask, self.encoder.patch_size, weight, measured, self.norm_target).to(target.dtype)
        outputs = {"loss": masked_l1(reconstruction, target, hidden), "reconstruction": reconstruction}
        if by_image:
            with torch.no_grad():
                whole = hidden.expand_as(target).reshape(len(images), -1)
                outputs["image_counts"] = whole.sum(1)
                errors = ((reconstruction - target).abs().reshape(len(images), -1) * whole).sum(1)
                outputs["image_losses"] = errors / outputs["image_counts"].clamp(min=1e-12)
        if images.ndim == 5:
            outputs["reconstruction"] = reconstruction.view(-1, frames, *_frame(images)).movedim(1, 2)
        return outputs


def encoder_of(model: SwinTransformerV2 | SimMIM) -> SwinTransformerV2:
    """The encoder of either model; without SimMIM around it, it is the model itself."""
    return model.encoder if isinstance(model, SimMIM) else model
