"""The planner's keys: a kind of machine, and what to plan for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swinv2_train.config.rules import ABOVE_0, BELOW_1, PATH, at_least, between, one_of, positive


@dataclass
class HardwareConfig:
    name: str
    """Name in the plan's output."""
    device: Annotated[str | None, one_of(None, "cuda", "cpu")]
    """Kind of accelerator; null, here and below = detected on this machine."""
    memory_gib: Annotated[float | None, positive()]
    """Memory of one accelerator as torch reports it; of a CPU, what its ranks share."""
    reserved_gib: Annotated[float | None, at_least(0)]
    """Part of memory_gib that never holds a tensor: CUDA's context, workspaces, NCCL's buffers, fragmentation."""
    tflops_bf16: Annotated[float | None, positive()]
    """Dense peak of bf16 matrix products with fp32 accumulation, in TFLOP/s."""
    tflops_fp32: Annotated[float | None, positive()]
    """Peak of fp32 matrix products as torch computes them by default (without TF32), in TFLOP/s."""
    matmul_efficiency: Annotated[float | None, between(ABOVE_0, 1)]
    """Share of the peak that this model's matrix products reach."""
    memory_gb_per_sec: Annotated[float | None, positive()]
    """Peak bandwidth of the accelerator's memory."""
    memory_efficiency: Annotated[float | None, between(ABOVE_0, 1)]
    """Share of memory_gb_per_sec that elementwise operations reach."""
    op_overhead_us: Annotated[float | None, at_least(0)]
    """Microseconds of host time to start one operation; small models wait for it."""
    gpus_per_node: Annotated[int | None, at_least(1)]
    """Ranks that share the fast fabric."""
    intra_node_gb_per_sec: Annotated[float | None, positive()]
    """Bandwidth of one rank inside a node while all ranks send, one way."""
    inter_node_gb_per_sec: Annotated[float | None, positive()]
    """Bandwidth of one rank between nodes while all ranks send, one way."""
    intra_node_latency_us: Annotated[float | None, at_least(0)]
    """Latency of a short message from one rank to the next inside a node."""
    inter_node_latency_us: Annotated[float | None, at_least(0)]
    """Latency of a short message from one rank to the next between nodes."""
    host_gb_per_sec: Annotated[float | None, positive()]
    """Bandwidth between one accelerator and CPU memory, one way."""
    storage_gb_per_sec: Annotated[float | None, positive()]
    """Bandwidth at which all ranks together write to the run directory."""


@dataclass
class PlanConfig:
    num_gpus: Annotated[int | None, at_least(1)]
    """Ranks to plan for; null = those of the launcher, else one node's."""
    num_images: Annotated[int | None, at_least(1)]
    """Images of the training shards, for the length of the run; null = from their manifest, where there is one."""
    margin: Annotated[float, between(0, BELOW_1)]
    """Share of the memory that must stay free."""
    recommend: bool
    """Search for the fastest setting that fits (--recommend)."""
    scaling: Annotated[str | None, one_of(None, "strong", "weak")]
    """Plan for 8 to 1,024 GPUs: strong (fixed train.global_batch_size) or weak (fixed images per rank and step)."""
    step_seconds: Annotated[float | None, positive()]
    """Measured seconds of a step of one micro-batch on one rank; null = estimated by the hardware's rates."""
    picture: Annotated[str | None, PATH]
    """PNG file to draw: where the bytes go over a step, or with plan.scaling the curve."""
    json: Annotated[str | None, PATH]
    """JSON file to write with the plan's numbers."""
