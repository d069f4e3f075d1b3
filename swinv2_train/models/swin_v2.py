"""Swin Transformer V2 (arXiv:2111.09883), with the official code's parameter names and numerics; of images and clips.

A clip's maps have the axis of time before height and width, and so have its windows; everything else is the same.

Legend: B batch, H W tokens per side, T along time, ... the axes of a map (H W or T H W), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.fused_layers import ApartLinear, ResidualLayerNorm
from swinv2_train.models.input_sizes import Size, as_pair, check_patches, map_sizes, trained_window
from swinv2_train.models.kernels import cpu_passes
from swinv2_train.models.kernels.dispatch import fused_problem
from swinv2_train.models.patch_conv import PatchConv2d, PatchConv3d
from swinv2_train.models.precision import Float32LayerNorm, at_least_float32
from swinv2_train.models.sequential import Chunks
from swinv2_train.models.windows import Axes, WindowGrid, window_grid


def drop_path_factors(x: Tensor, rate: float, training: bool) -> Tensor | None:
    """Stochastic depth: what every sample's branch is multiplied by, 0 with probability rate, otherwise 1/(1-rate).

    x: (B, ...), of whose dtype and device they are.  Returns (B, 1, ...), or None where all are 1.
    """
    if rate == 0.0 or not training:
        return None
    keep = 1.0 - rate
    return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (..., C) -> (..., C)."""

    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ApartLinear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = ApartLinear(hidden, dim)

    def forward(self, x: Tensor, passes: bool = False) -> Any:
        """passes: by cpu_passes, which has to serve; returns (the result without fc2's bias, that bias or None)."""
        if passes:
            return self.fc2(cpu_passes.gelu(*self.fc1(x, apart=True)), apart=True)
        return self.fc2(self.act(self.fc1(x)))


class SwinBlock(nn.Module):
    """A res-post-norm block: x + norm1(attention(x)), then x + norm2(mlp(x)) (section 3.2); (B, ..., C) of any size.

    window_size, shifted, clamp_to_shorter_side: what :func:`window_grid` makes of them for the map at hand.
    extra_norm adds a LayerNorm on the main branch behind the block (section 3.6, huge and giant).
    fused, chunks: how attention is computed, as :class:`WindowAttention` has it.  Where kernels attend on a CPU, what
    lies between the products goes by kernels too (kernels/cpu_passes.py).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Axes,
        pretrained_window_size: Axes,
        shifted: bool,
        clamp_to_shorter_side: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path_rate: float,
        extra_norm: bool,
        fused: bool,
        chunks: Chunks | None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.clamp_to_shorter_side = clamp_to_shorter_side
        self.drop_path_rate = drop_path_rate
        self.attn = WindowAttention(dim, num_heads, pretrained_window_size, qkv_bias, fused, chunks)
        self.norm1 = ResidualLayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = ResidualLayerNorm(dim)
        self.norm3 = Float32LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor) -> Tensor:
        factors = [drop_path_factors(x, self.drop_path_rate, self.training) for _ in range(2)]
        return self.branches(x, *factors)

    def branches(self, x: Tensor, attn_factors: Tensor | None, mlp_factors: Tensor | None) -> Tensor:
        """The block without its random numbers and its rate, so that blocks of one shape can share a compiled graph."""
        grid = window_grid(tuple(x.shape[1:-1]), self.window_size, self.shifted, self.clamp_to_shorter_side)
        if self.attn.fused and cpu_passes.serves(x, self.norm1.weight):
            branch, bias = self.attn(x, grid, True)
            x = self.norm1(branch, x, attn_factors, True, bias)
            branch, bias = self.mlp(x, True)
            x = self.norm2(branch, x, mlp_factors, True, bias)
        else:
            x = self.norm1(self.attn(x, grid), x, attn_factors)
            x = self.norm2(self.mlp(x), x, mlp_factors)
        return x if self.norm3 is None else self.norm3(x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module.compile, but of branches() alone: stochastic depth is drawn outside of the graph."""
        torch.compiler.assume_constant_result(fused_problem)  # type: ignore[no-untyped-call]
        self.branches = torch.compile(self.branches, *args, **kwargs)  # type: ignore[method-assign]


class PatchEmbed(nn.Module):
    """Patches of pixels to tokens: (B, in_chans, H*p, W*p) -> (B, H, W, C), normed.

    patch_frames: None for images; of clips t, (B, in_chans, T*t, H*p, W*p) -> (B, T, H, W, C).
    """

    proj: PatchConv2d | PatchConv3d

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, patch_frames: int | None = None) -> None:
        super().__init__()
        if patch_frames is None:
            self.proj = PatchConv2d(in_chans, embed_dim, patch_size)
        else:
            self.proj = PatchConv3d(in_chans, embed_dim, (patch_frames, patch_size, patch_size))
        self.norm = Float32LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).movedim(1, -1))


class PatchMerging(nn.Module):
    """Concatenate 2x2 neighbours, reduce 4C to 2C, norm: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C).

    An odd side gets a row or column of zeros at the bottom or the right, as in timm.  A clip's frames are merged each
    for itself: (B, T, H, W, C) -> (B, T, ceil(H/2), ceil(W/2), 2C).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = ApartLinear(4 * dim, 2 * dim, bias=False)
        self.norm = Float32LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-3] % 2 or x.shape[-2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
        *frames, height, width, dim = x.shape
        x = x.view(*frames, height // 2, 2, width // 2, 2, dim).transpose(-4, -3)
        return self.norm(self.reduction(x.transpose(-3, -2).flatten(-3)))  # (0,0) (1,0) (0,1) (1,1)


class Stage(nn.Module):
    """The blocks of one resolution and, except after the last stage, the merging behind them."""

    downsample: PatchMerging | None

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformerV2(nn.Module):
    """Swin Transformer V2: images (B, in_chans, H, W) or clips (B, in_chans, T, H, W) -> logits (B, num_classes).

    img_size and window_size: pixels and tokens, an int or a (height, width) pair.  A forward pass takes its sizes from
    the images, whose sides are any multiples of patch_size; img_size is what the model is counted and exported for.
    Odd maps are padded before merging, and maps that the window does not tile before attention, where padding gets no
    weight; see :func:`window_grid` for the clamping of windows and clamp_to_shorter_side (a square window only).
    frames: of the clips that the model is counted for, a multiple of patch_frames, the frames of a patch; None = a
    model of images.  A forward pass takes any number of whole patches.  window_frames: tokens of a window along time,
    clamped and shifted as along the sides; pretrained_window_frames is to it what pretrained_window_sizes are to
    window_size, for all stages, because time is never merged.
    num_classes 0 leaves the head out, and forward returns the pooled features (B, num_features).
    drop_path_rate rises linearly over the blocks; head_dropout is the share of the pooled features that is dropped
    before the classes, in training.
    pretrained_window_sizes: per stage the window at which the position bias was trained, an int or a (height, width)
    pair; it normalises the bias's coordinates (section 3.3).  0 = the window really used at this img_size and
    window_size.  The attribute holds what that came to, one pair per stage, of clips (frames, rows, cols), and stays
    what it is when inputs or windows of other sizes come: so the model keeps the meaning of its weights.
    extra_norm_period: blocks from one extra LayerNorm on a stage's main branch to the next, 0 = none (section 3.6).
    fused_attention: attend by fused kernels (models/kernels/), which hold no N x N scores; where there is none, the
    next rule applies.
    sequential_stages: stages, counted from 1, whose attention takes its windows a chunk at a time and computes each
    again in the backward pass (section 3.5: the first two): attention_chunk_windows windows of the whole batch, None =
    as many as attention_chunk_mib MiB allow; see :class:`Chunks`.
    Raises ValueError when numbers do not fit together.
    """

    img_size: tuple[int, int]
    frames: int | None
    window_size: tuple[int, int]
    window_frames: int

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
        pretrained_window_sizes: Sequence[Size] = (0, 0, 0, 0),
        extra_norm_period: int = 0,
        clamp_to_shorter_side: bool = False,
        fused_attention: bool = False,
        sequential_stages: Sequence[int] = (),
        attention_chunk_windows: int | None = None,
        attention_chunk_mib: float = 256.0,
        frames: int | None = None,
        patch_frames: int = 1,
        window_frames: int = 8,
        pretrained_window_frames: int = 0,
        head_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_frames = patch_frames
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.depths = tuple(depths)
        self.num_heads = tuple(num_heads)
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.drop_path_rate = drop_path_rate
        self.head_dropout = head_dropout
        self.extra_norm_period = extra_norm_period
        self.clamp_to_shorter_side = clamp_to_shorter_side
        self.fused_attention = fused_attention
        self.sequential_stages = tuple(sequential_stages)
        self.num_features = embed_dim * 2 ** (len(self.depths) - 1)
        chunks = Chunks(attention_chunk_windows, attention_chunk_mib)
        self.frames, self.window_frames = frames, window_frames
        self._check_numbers(pretrained_window_sizes, pretrained_window_frames, chunks)
        self.set_input_size(img_size, window_size)
        self.pretrained_window_sizes = tuple(
            trained_window(given, grid.window, pretrained_window_frames)
            for given, grid in zip(pretrained_window_sizes, self.grids, strict=True)
        )

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, None if frames is None else patch_frames)
        self.mask_token: nn.Parameter | None
        self.register_parameter("mask_token", None)  # SimMIM gives the encoder one
        rates = torch.linspace(0, drop_path_rate, sum(self.depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            dim, first = embed_dim * 2**i, sum(self.depths[:i])
            blocks = [
                SwinBlock(
                    dim,
                    self.num_heads[i],
                    self.window,
                    self.pretrained_window_sizes[i],
                    shifted=j % 2 == 1,
                    clamp_to_shorter_side=clamp_to_shorter_side,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path_rate=rates[first + j],
                    extra_norm=extra_norm_period > 0 and (j + 1) % extra_norm_period == 0,
                    fused=fused_attention,
                    chunks=chunks if i + 1 in self.sequential_stages else None,
                )
                for j in range(depth)
            ]
            last = i == len(self.depths) - 1
            self.layers.append(Stage(blocks, None if last else PatchMerging(dim)))
        self.norm: nn.Module = Float32LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, SwinBlock):  # res-post-norm: every block starts as the identity (official code)
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    def _check_numbers(self, pretrained_window_sizes: Sequence[Size], trained_frames: int, chunks: Chunks) -> None:
        stages = len(self.depths)
        for name, numbers in (
            ("depths", self.depths),
            ("num_heads", self.num_heads),
            ("patch_size", [self.patch_size]),
            ("patch_frames", [self.patch_frames]),
            ("window_frames", [self.window_frames]),
        ):
            if not numbers or min(numbers) < 1:
                raise ValueError(f"{name} ({numbers}) must be 1 or more")
        if trained_frames < 0:
            raise ValueError(f"pretrained_window_frames ({trained_frames}) must be 1 or more, or 0 for the window used")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate ({self.drop_path_rate}) must be at least 0 and less than 1")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout ({self.head_dropout}) must be at least 0 and less than 1")
        if len(self.num_heads) != stages or len(pretrained_window_sizes) != stages:
            raise ValueError(
                f"depths {self.depths}, num_heads {self.num_heads} and pretrained_window_sizes "
                f"{tuple(pretrained_window_sizes)} must have one entry per stage"
            )
        if not all(1 <= stage <= stages for stage in self.sequential_stages):
            raise ValueError(f"sequential_stages {self.sequential_stages} must be among the stages 1 to {stages}")
        if chunks.mib <= 0 or (chunks.windows is not None and chunks.windows < 1):
            raise ValueError(
                f"attention_chunk_windows ({chunks.windows}) must be 1 or more, and attention_chunk_mib ({chunks.mib}) "
                "more than 0"
            )
        for i, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**i % heads:
                raise ValueError(
                    f"num_heads[{i}] ({heads}) does not divide the stage's {self.embed_dim * 2**i} channels"
                )

    def set_input_size(
        self,
        img_size: Size | None = None,
        window_size: Size | None = None,
        frames: int | None = None,
        window_frames: int | None = None,
    ) -> None:
        """Use other windows from the next forward pass on, and count and export for other inputs; None = as it is.

        No parameter changes, and the position bias keeps the coordinates it was trained with
        (pretrained_window_sizes).  Raises ValueError, and changes nothing, when a size does not fit.
        """
        new_img_size = self.img_size if img_size is None else as_pair(img_size, "img_size")
        new_window_size = self.window_size if window_size is None else as_pair(window_size, "window_size")
        if frames is not None and self.frames is None:
            raise ValueError(f"frames ({frames}): this is a model of images; build one of clips")
        new_frames = self.frames if frames is None else frames
        new_window_frames = self.window_frames if window_frames is None else window_frames
        check_patches(new_img_size, self.patch[-2:], "img_size")
        if new_frames is not None:
            check_patches((new_frames, *new_img_size), self.patch, "a clip's")
        if new_window_frames < 1:
            raise ValueError(f"window_frames ({new_window_frames}) must be 1 or more")
        if self.clamp_to_shorter_side and new_window_size[0] != new_window_size[1]:
            raise ValueError(f"window_size {new_window_size} must be square with clamp_to_shorter_side")
        self.img_size, self.window_size = new_img_size, new_window_size
        self.frames, self.window_frames = new_frames, new_window_frames
        for module in self.modules():
            if isinstance(module, SwinBlock):
                module.window_size = self.window

    @property
    def input_size(self) -> Axes:
        """An image's (height, width) in pixels, or a clip's (frames, height, width)."""
        return self.img_size if self.frames is None else (self.frames, *self.img_size)

    @property
    def patch(self) -> Axes:
        """What a token of the first map stands for, by the axes of input_size."""
        sides = (self.patch_size, self.patch_size)
        return sides if self.frames is None else (self.patch_frames, *sides)

    @property
    def window(self) -> Axes:
        """The window, not clamped to any map, by the axes of input_size."""
        return self.window_size if self.frames is None else (self.window_frames, *self.window_size)

    @property
    def sizes(self) -> list[Axes]:
        """The map (rows, cols), of clips (frames, rows, cols), of every stage at input_size."""
        return map_sizes(self.input_size, self.patch, len(self.depths))

    @property
    def grids(self) -> list[WindowGrid]:
        """The windows of every stage's shifted blocks at input_size."""
        return [window_grid(size, self.window, True, self.clamp_to_shorter_side) for size in self.sizes]

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Stage outputs before merging, the last one normed: (B, C*2^i, H_i, W_i), of clips (B, C*2^i, T', H_i, W_i).

        images: (B, in_chans, H, W), of clips (B, in_chans, T, H, W), normalised pixels, H and W multiples of patch_size
        p and T one of patch_frames; T' = T/patch_frames, H_0 = H/p, and H_{i+1} = ceil(H_i / 2).
        mask: (B, H/p, W/p) bool, True where a token is replaced by the mask token behind the patch norm (SimMIM), in
        all of a clip's frames; needs an encoder with a mask token.  Raises ValueError for other shapes.
        """
        if images.ndim != 2 + len(self.patch) or images.shape[1] != self.in_chans:
            form = f"(B, {self.in_chans}, H, W)" if self.frames is None else f"(B, {self.in_chans}, T, H, W)"
            raise ValueError(f"images have shape {tuple(images.shape)}, not {form}")
        check_patches(tuple(images.shape[2:]), self.patch, "images'")
        x = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))  # (B, ..., C)
        if mask is not None:
            assert self.mask_token is not None, "only an encoder inside SimMIM has a mask token"
            patches = (x.shape[0], *x.shape[-3:-1])
            if mask.shape != patches or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask is {mask.dtype} of shape {tuple(mask.shape)}, the images have {patches} patches; "
                    "it must be bool and say of each whether it is hidden"
                )
            hidden = mask if self.frames is None else mask.unsqueeze(1)  # one tube through all frames
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        outputs = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = block(x)
            outputs.append(x)
            x = self.norm(x) if stage.downsample is None else stage.downsample(x)
        outputs[-1] = x
        return [out.movedim(-1, 1) for out in outputs]

    def forward(self, images: Tensor, features: bool = False) -> Tensor:
        """images: as forward_features takes them.  Returns (B, num_classes); with features, pooled_features."""
        if features:
            return self.pooled_features(images)
        means = _token_means(self.forward_features(images)[-1])
        return self.head(F.dropout(means, self.head_dropout, self.training) if self.head_dropout else means)

    def pooled_features(self, images: Tensor) -> Tensor:
        """The normed last map's mean over its tokens, (B, num_features), in at least float32."""
        return _token_means(at_least_float32(self.forward_features(images)[-1]))


def _token_means(features: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C)."""
    return features.mean(dim=tuple(range(2, features.ndim)))


def _init_weights(module: nn.Module) -> None:
    """The official initialisation: truncated normal of 0.02 for every Linear, biases 0; convolutions keep torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
