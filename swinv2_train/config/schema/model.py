"""model: the encoder and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from swinv2_train.config.rules import BELOW_1, at_least, between, each, one_of, one_per_stage, positive, size, size_or_0


@dataclass
class ModelConfig:
    name: str
    """Size: demo, tiny, small, base, large, huge or giant (arXiv:2111.09883 section 3.6)."""
    img_size: Annotated[Any, size()]
    """Input size in pixels: one number, or [height, width]."""
    patch_size: Annotated[int, at_least(1)]
    """Side of a patch in pixels."""
    in_chans: Annotated[int, at_least(1)]
    """Bands of an image; 3 without any of data.bands, data.scale and data.nodata: photographs, read as 8-bit RGB."""
    window_size: Annotated[Any, size()]
    """Attention window in tokens: one number, or [height, width]."""
    pretrained_window_sizes: Annotated[list[Any], each(size_or_0())]
    """Window at which each stage's log-CPB was trained, a number or [height, width]; 0 = model.window_size."""
    frames: Annotated[int | None, at_least(1)]
    """Frames of a clip, a multiple of model.patch_frames; null = images (docs/model.md#clips)."""
    patch_frames: Annotated[int, at_least(1)]
    """Of clips: frames of a patch (1, or 2 as in Video Swin, arXiv:2106.13230)."""
    window_frames: Annotated[int, at_least(1)]
    """Of clips: attention window along time, in tokens; clamped to the clip, and shifted where the clip is longer."""
    pretrained_window_frames: Annotated[int, at_least(0)]
    """Of clips: window along time at which the log-CPB was trained; 0 = model.window_frames."""
    embed_dim: Annotated[int | None, at_least(1)]
    """Channels of stage 1; null = the size's own."""
    depths: Annotated[list[int] | None, one_per_stage()]
    """Blocks per stage; null = the size's own."""
    num_heads: Annotated[list[int] | None, one_per_stage()]
    """Heads per stage; null = the size's own."""
    mlp_ratio: Annotated[float, positive()]
    """Hidden width of the MLP over its input width."""
    drop_path_rate: Annotated[float, between(0, BELOW_1)]
    """Stochastic depth rate of the last block; rises linearly from 0."""
    clamp_to_shorter_side: bool
    """On maps that are not square: clamp windows and drop shifts by the shorter side, as the official code does."""
    extra_norm_period: Annotated[int | None, at_least(0)]
    """A LayerNorm on the main branch after every N blocks; 0 = none, null = the size's own (huge, giant: 6)."""
    recompute: str
    """Activation checkpointing: none, blocks, stages:I-J, attention or every:K; then @PLACE (docs/model.md)."""
    attention: Annotated[str, one_of("reference", "fused")]
    """fused: kernels without N x N scores in memory (Triton, C++), where there are any; or reference (torch)."""
    compile: Annotated[str, one_of("auto", "none", "blocks")]
    """blocks: torch.compile each block, for a longer first step and shorter later ones; none; auto: blocks on CUDA."""
    sequential_stages: list[int]
    """Stages, from 1, that attend in a chunk of windows at a time (arXiv:2111.09883 section 3.5: [1, 2]); [] = none."""
    attention_chunk_windows: Annotated[int | None, at_least(1)]
    """Windows of the whole micro-batch in one chunk; null = as many as fit in attention_chunk_mib."""
    attention_chunk_mib: Annotated[float, positive()]
    """MiB for one chunk's tensors of tokens x tokens (models/sequential.py says which); one window always fits."""
