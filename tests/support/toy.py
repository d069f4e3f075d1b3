"""A small model with everything that makes engines differ: several groups, tiny and large parameters, drop path, a
parameter held by the block itself, a persistent buffer and a branch that can be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_train.config import Config, ScheduleConfig
from tests.support.configs import make_config

DIM = 16


class ToyBlock(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.logit_scale = nn.Parameter(torch.full((2, 1, 1), 0.5))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.down(torch.tanh(self.up(x)))) * self.logit_scale.exp().mean()
        if self.training and self.drop:
            keep = torch.rand(x.shape[0], 1) >= self.drop
            y = y * keep.to(y.dtype) / (1 - self.drop)
        return x + y


class Toy(nn.Module):
    """forward(x (B, DIM), y (B,) int64, use_extra bool) -> {"loss": ()}"""

    def __init__(self, depth: int = 2, drop: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList([ToyBlock(drop) for _ in range(depth)])})])
        self.extra = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 5)
        self.register_buffer("center", torch.linspace(-1, 1, DIM))

    def forward(self, x: Tensor, y: Tensor, use_extra: Tensor | None = None) -> dict[str, Tensor]:
        h = self.patch_embed((x - self.center).to(self.patch_embed.weight.dtype))
        for block in self.layers[0]["blocks"]:
            h = block(h)
        if use_extra is None or bool(use_extra):
            h = h + self.extra(h)
        logits = self.head(h).float()
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


def build_toy(drop: float = 0.0, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy(drop=drop)


def batches(steps: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Global batches (x (size, DIM), y (size,)), the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, DIM, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(steps)
    ]


def part(batch: tuple[Tensor, Tensor], rank: int, world_size: int, micro: int, micros: int) -> dict[str, Tensor]:
    """The micro-batch number micro of this rank."""
    x, y = batch
    size = len(x) // (world_size * micros)
    start = (micro * world_size + rank) * size
    return {"x": x[start : start + size], "y": y[start : start + size]}


def toy_config(
    name: str = "deepspeed",
    stage: int = 3,
    precision: str = "fp32",
    clip: float = 0.0,
    micro: int = 4,
    recompute: str = "none",
    weight_decay: float = 0.05,
    layer_decay: float = 0.7,
    persistence: int = 0,
    overrides: dict[str, Any] | None = None,
    **engine: Any,
) -> Config:
    """Thresholds of 0 by default: with DeepSpeed's own a toy never releases a parameter, and release bugs hide."""
    settings: dict[str, Any] = {
        "name": name,
        "zero_stage": stage,
        "precision": precision,
        "offload_optimizer": "none",
        "reduce_bucket_size": 2000,
        "prefetch_bucket_size": 500,
        "persistence_threshold": persistence,
        "max_reuse_distance": 0,
        "overlap_comm": False,
        "deepspeed_overrides": overrides or {},
    }
    schedule = ScheduleConfig("constant", 0, None, 0.0, 0.0, [], 0.1, 1.0)
    return make_config(
        train={"max_steps": 10, "global_batch_size": micro * 4, "micro_batch_size": micro},
        model={"recompute": recompute},
        optim={
            "lr": 1e-2,
            "weight_decay": weight_decay,
            "betas": [0.9, 0.99],
            "clip_grad_norm": clip,
            "no_decay": ["1d", "logit_scale"],
            "layer_decay": layer_decay,
            "schedule": schedule,
        },
        engine={**settings, **engine},
        log={"wandb": "disabled", "progress": "none"},
        runtime={"num_threads": 1, "process_group_timeout_sec": 60},
    )


def build(config: Config, world: Any, accumulation: int = 1, drop: float = 0.0, seed: int = 0) -> Any:
    """An engine around the toy."""
    from swinv2_train.engine import build_engine
    from swinv2_train.engine.activation_checkpointing import apply_recompute
    from swinv2_train.training.param_groups import build_param_groups

    module = build_toy(drop, seed)
    if config.model.recompute != "none":
        apply_recompute(module, config.model.recompute, (ToyBlock,))
        config.model.recompute = "none"
    return build_engine(module, build_param_groups(module, config.optim), config, world, accumulation, ())


def full_state(engine: Any) -> dict[str, Tensor] | None:
    """All of engine.full_tensors() on rank 0, None on the other ranks."""
    state = dict(engine.full_tensors())
    return None if any(value is None for value in state.values()) else state


def save_state(engine: Any, directory: Any) -> None:
    """Every rank's part of the engine's state in directory.  Collective."""
    from swinv2_train.distributed import barrier

    directory.mkdir(parents=True, exist_ok=True)
    engine.snapshot(copy=False).write(directory)
    barrier()


def train(engine: Any, world: Any, steps: int, micros: int = 1, first: int = 0, size: int = 16) -> list[list[float]]:
    """Steps first .. first + steps - 1; returns [mean loss over the global batch, gradient norm] of each."""
    from swinv2_train.distributed import all_reduce_sum

    history = []
    for step, batch in enumerate(batches(first + steps, size)):
        if step < first:
            continue
        loss = torch.zeros(())
        for micro in range(micros):
            outputs = engine.forward(**part(batch, world.rank, world.world_size, micro, micros))
            engine.backward(outputs["loss"])
            loss += outputs["loss"].detach().float() / micros
        norm = engine.step(1e-2 * (1 + step % 3))
        history.append([float(all_reduce_sum(loss)) / world.world_size, norm])
    return history


def save_checkpoint(run_dir: Path, engine: Any, state: dict[str, Any], world: Any, keep: int, best: Any) -> Path:
    """A checkpoint that is waited for."""
    from swinv2_train.checkpoint import Save

    return Save(run_dir, engine, state, world, keep, best, background=False).finish()
