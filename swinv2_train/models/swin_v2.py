"""Swin Transformer V2 (arXiv:2111.09883), with the official code's parameter names and numerics.

Legend: B batch, H W tokens per side, C channels, nW windows per image, N tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.attention import WindowAttention, merge_windows, partition_windows, shift_mask

Size = int | Sequence[int]


def as_pair(value: Size, name: str) -> tuple[int, int]:
    """An int or a (height, width) pair as a pair of positive ints; ValueError otherwise."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in pair):
        raise ValueError(f"{name} ({value!r}) must be a positive int or a (height, width) pair of them")
    return pair[0], pair[1]


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: drop a sample's whole branch with probability rate, scale the rest by 1/(1-rate)."""
    if rate == 0.0 or not training:
        return x
    keep = 1.0 - rate
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * (kept / keep)


class Float32LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in float32 whatever the dtype of its input and weights; returns the input's dtype.

    Not only for accuracy: torch's CPU kernel sums the bias gradient of a bfloat16 norm in bfloat16, and over the 8,192
    tokens of a demo batch seven eighths of it are lost (measured with torch 2.13).
    """

    def forward(self, input: Tensor) -> Tensor:
        normed = F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(input.dtype)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwinBlock(nn.Module):
    """A res-post-norm block: x + norm1(attention(x)), then x + norm2(mlp(x)) (section 3.2).

    Per axis: a window larger than the map is clamped to it, and the shift is dropped where the map is not larger than
    the window (the official code looks at the shorter side alone; on square maps that is the same).
    extra_norm adds a LayerNorm on the main branch behind the block (section 3.6, huge and giant).
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        num_heads: int,
        window_size: tuple[int, int],
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path_rate: float,
        pretrained_window_size: int,
        extra_norm: bool,
    ) -> None:
        super().__init__()
        self.size = size
        self.window_size = (min(window_size[0], size[0]), min(window_size[1], size[1]))
        self.shift = (
            self.window_size[0] // 2 if shifted and size[0] > self.window_size[0] else 0,
            self.window_size[1] // 2 if shifted and size[1] > self.window_size[1] else 0,
        )
        self.drop_path_rate = drop_path_rate
        pretrained = (pretrained_window_size, pretrained_window_size)
        self.attn = WindowAttention(dim, self.window_size, num_heads, qkv_bias, pretrained)
        self.norm1 = Float32LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = Float32LayerNorm(dim)
        self.norm3 = Float32LayerNorm(dim) if extra_norm else None

    def attend(self, x: Tensor) -> Tensor:
        """Shifted-window attention over the whole map: (B, H*W, C) -> (B, H*W, C)."""
        batch, tokens, dim = x.shape
        maps = x.view(batch, *self.size, dim)
        shifted = self.shift != (0, 0)
        if shifted:
            maps = torch.roll(maps, shifts=(-self.shift[0], -self.shift[1]), dims=(1, 2))
        windows = partition_windows(maps, self.window_size)  # (B*nW, N, C)
        windows = self.attn(windows, shift_mask(self.size, self.window_size, self.shift, x.device))
        maps = merge_windows(windows, self.window_size, self.size)
        if shifted:
            maps = torch.roll(maps, shifts=self.shift, dims=(1, 2))
        return maps.reshape(batch, tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.norm1(self.attend(x)), self.drop_path_rate, self.training)
        x = x + drop_path(self.norm2(self.mlp(x)), self.drop_path_rate, self.training)
        return x if self.norm3 is None else self.norm3(x)


class PatchEmbed(nn.Module):
    """Patches of pixels to tokens: (B, in_chans, H*p, W*p) -> (B, H*W, C), normed."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = Float32LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class PatchMerging(nn.Module):
    """Concatenate 2x2 neighbours, reduce 4C to 2C, norm: (B, H*W, C) -> (B, H/2*W/2, 2C)."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = Float32LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        height, width = self.size
        x = x.view(batch, height // 2, 2, width // 2, 2, dim)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * dim)  # order (0,0) (1,0) (0,1) (1,1)
        return self.norm(self.reduction(x))


class Stage(nn.Module):
    """The blocks of one resolution and, except after the last stage, the merging behind them."""

    downsample: PatchMerging | None

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformerV2(nn.Module):
    """Swin Transformer V2: images (B, in_chans, H, W) -> logits (B, num_classes).

    img_size and window_size: pixels and tokens, an int or a (height, width) pair.  num_classes 0 leaves the head out,
    and forward returns the pooled features (B, num_features).  drop_path_rate rises linearly over the blocks.
    pretrained_window_sizes: the window per stage at which the position bias was trained, 0 = this one (section 3.3).
    extra_norm_period: a LayerNorm on the main branch after every so many blocks of a stage, 0 = none (section 3.6).
    Raises ValueError when patch, merging or window do not tile the image.
    """

    def __init__(
        self,
        img_size: Size = 256,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Size = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        extra_norm_period: int = 0,
    ) -> None:
        super().__init__()
        self.img_size = as_pair(img_size, "img_size")
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.depths = tuple(depths)
        self.num_heads = tuple(num_heads)
        self.mlp_ratio = mlp_ratio
        self.window_size = as_pair(window_size, "window_size")
        self.sizes = stage_sizes(self.img_size, patch_size, self.window_size, len(self.depths))
        self.num_features = embed_dim * 2 ** (len(self.depths) - 1)
        self._check_lengths(pretrained_window_sizes)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.mask_token: nn.Parameter | None
        self.register_parameter("mask_token", None)  # SimMIM gives the encoder one
        rates = torch.linspace(0, drop_path_rate, sum(self.depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            dim, first = embed_dim * 2**i, sum(self.depths[:i])
            blocks = [
                SwinBlock(
                    dim,
                    self.sizes[i],
                    self.num_heads[i],
                    self.window_size,
                    shifted=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path_rate=rates[first + j],
                    pretrained_window_size=pretrained_window_sizes[i],
                    extra_norm=extra_norm_period > 0 and (j + 1) % extra_norm_period == 0,
                )
                for j in range(depth)
            ]
            last = i == len(self.depths) - 1
            self.layers.append(Stage(blocks, None if last else PatchMerging(dim, self.sizes[i])))
        self.norm = Float32LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, SwinBlock):  # res-post-norm: every block starts as the identity (official code)
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    def _check_lengths(self, pretrained_window_sizes: Sequence[int]) -> None:
        stages = len(self.depths)
        if len(self.num_heads) != stages or len(pretrained_window_sizes) != stages:
            raise ValueError(
                f"depths {self.depths}, num_heads {self.num_heads} and pretrained_window_sizes "
                f"{tuple(pretrained_window_sizes)} must have one entry per stage"
            )
        for i, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**i % heads:
                raise ValueError(
                    f"num_heads[{i}] ({heads}) does not divide the stage's {self.embed_dim * 2**i} channels"
                )

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Stage outputs before merging, (B, C*2^i, H_i, W_i) each, the last one normed.

        images: (B, in_chans, H, W), normalised pixels.  mask: (B, H/p, W/p) bool, True where a token is replaced by
        the mask token behind the patch norm (SimMIM); needs an encoder with a mask token.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])} px, the model was built for {self.img_size}")
        x = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))  # (B, H*W, C)
        if mask is not None:
            assert self.mask_token is not None, "only an encoder inside SimMIM has a mask token"
            hidden = mask.flatten(1).unsqueeze(-1)  # (B, H*W, 1)
            x = torch.where(hidden, self.mask_token.to(x.dtype), x)
        outputs = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = block(x)
            outputs.append(x)
            x = self.norm(x) if stage.downsample is None else stage.downsample(x)
        outputs[-1] = x
        return [
            out.transpose(1, 2).reshape(out.shape[0], out.shape[2], *size)
            for out, size in zip(outputs, self.sizes, strict=True)
        ]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images)[-1].mean(dim=(2, 3)))


def stage_sizes(
    img_size: tuple[int, int], patch_size: int, window_size: tuple[int, int], num_stages: int
) -> list[tuple[int, int]]:
    """The map (rows, cols) of every stage; ValueError when patches, merging or windows do not tile the image."""
    sizes = []
    coarsest = patch_size * 2 ** (num_stages - 1)
    for i in range(num_stages):
        stride = patch_size * 2**i
        for axis, name in ((0, "height"), (1, "width")):
            length, remainder = divmod(img_size[axis], stride)
            window = min(window_size[axis], length)
            if remainder or length == 0:
                raise ValueError(
                    f"img_size {name} {img_size[axis]} is not a multiple of patch_size {patch_size} x 2^{i} = {stride} "
                    f"(stage {i + 1} of {num_stages}); nearest: {_nearest(img_size[axis], coarsest)}"
                )
            if length % window:
                raise ValueError(
                    f"window_size {window_size[axis]} does not tile the {length} tokens of stage {i + 1} ({name}, "
                    f"img_size {img_size[axis]}); windows that do: "
                    f"{', '.join(str(w) for w in _tiling_windows(img_size[axis], patch_size, num_stages))}"
                )
        sizes.append((img_size[0] // stride, img_size[1] // stride))
    return sizes


def _nearest(value: int, step: int) -> str:
    below = value // step * step
    return ", ".join(str(v) for v in (below, below + step) if v)


def _tiling_windows(length_px: int, patch_size: int, num_stages: int) -> list[int]:
    lengths = [length_px // (patch_size * 2**i) for i in range(num_stages)]
    return [w for w in range(2, lengths[0] + 1) if all(n <= w or n % w == 0 for n in lengths)]


def _init_weights(module: nn.Module) -> None:
    """The official initialisation: truncated normal of 0.02 for every Linear, biases 0; convolutions keep torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
