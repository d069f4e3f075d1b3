"""engine: how a step is computed on several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from swinv2_train.config.rules import PATH, at_least, one_of


@dataclass
class EngineConfig:
    name: Annotated[str, one_of("deepspeed", "local")]
    """deepspeed or local (plain torch on one process: the numerical reference)."""
    zero_stage: Annotated[int, one_of(0, 1, 2, 3)]
    """0, 1, 2 or 3 (DeepSpeed)."""
    precision: Annotated[str, one_of("fp32", "bf16")]
    """fp32, or bf16 weights with fp32 masters and fp32 gradient accumulation."""
    optimizer_states: Annotated[str, one_of("fp32", "bf16")]
    """fp32 masters and moments, or bf16 (ZeRO 2 and 3 with precision=bf16): 6 bytes per parameter, and less exact."""
    offload_optimizer: Annotated[str, one_of("none", "cpu", "nvme")]
    """Where masters and moments live and AdamW runs: none (the accelerator), cpu (ZeRO 1 to 3) or nvme (ZeRO-3)."""
    offload_param: Annotated[str, one_of("none", "cpu", "nvme")]
    """ZeRO-3: where a rank's share of the weights lives between uses: none (the accelerator), cpu or nvme."""
    nvme_dir: Annotated[str | None, PATH]
    """Folder on a fast local disk for what is offloaded to nvme; each run's ranks make their own files below it."""
    reduce_bucket_size: Annotated[int | None, at_least(1)]
    """Elements reduced together; null, here and below = from the model's layers (engine/deepspeed/buckets.py)."""
    prefetch_bucket_size: Annotated[int | None, at_least(0)]
    """ZeRO-3: elements gathered ahead of their use."""
    persistence_threshold: Annotated[int | None, at_least(0)]
    """ZeRO-3: parameters of at most this many elements stay gathered."""
    max_reuse_distance: Annotated[int | None, at_least(0)]
    """ZeRO-3: a parameter used again within this many elements stays gathered."""
    max_live_parameters: Annotated[int | None, at_least(1)]
    """ZeRO-3: nothing more is prefetched while this many elements are gathered."""
    overlap_comm: bool
    """Overlap the gradient reduction with the backward pass."""
    communication_data_type: Annotated[str | None, one_of("fp32")]
    """What gradients are summed over ranks in: fp32, or null = as precision says (bf16 gradients in bf16)."""
    deepspeed_overrides: dict[str, Any]
    """Any other key of DeepSpeed's own configuration; a key that is generated from ours is refused."""
