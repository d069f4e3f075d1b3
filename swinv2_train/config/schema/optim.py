"""optim: AdamW and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swinv2_train.config.rules import ABOVE_0, BELOW_1, at_least, between, each, length, non_empty, one_of, positive


@dataclass
class ScheduleConfig:
    name: Annotated[str, one_of("cosine", "linear", "poly", "multistep", "constant")]
    """cosine, linear, multistep or constant, after a linear warm-up; poly counts from step 0 (docs/recipes.md)."""
    warmup_steps: Annotated[int | None, at_least(0)]
    """Steps of warm-up; null = from warmup_epochs."""
    warmup_epochs: Annotated[float | None, at_least(0)]
    """Epochs of warm-up; warmup_steps takes precedence."""
    warmup_lr: Annotated[float, at_least(0)]
    """Learning rate at step 0."""
    min_lr: Annotated[float, at_least(0)]
    """Learning rate at the last step (cosine, linear, poly)."""
    milestones: Annotated[list[float], each(between(0, 1))]
    """multistep: where the rate falls, as shares of the whole run (official SimMIM: 700 of 800 epochs = 0.875)."""
    gamma: Annotated[float, at_least(0)]
    """multistep: the factor at each milestone."""
    power: Annotated[float, positive()]
    """poly: the exponent of what is left of the run (1: a straight line)."""


@dataclass
class LoraConfig:
    rank: Annotated[int, at_least(0)]
    """Rank of the adapters that are trained in place of the encoder, which task.init_from gives; 0 = none."""
    alpha: Annotated[float, positive()]
    """What they add is multiplied by alpha / rank."""
    targets: Annotated[list[str], each(one_of("qkv", "proj", "fc1", "fc2"))]
    """The linear layers of each block that have one: qkv and proj of attention, fc1 and fc2 of the MLP."""


@dataclass
class OptimConfig:
    lr: Annotated[float, at_least(0)]
    """Peak learning rate at train.global_batch_size; never rescaled implicitly."""
    weight_decay: Annotated[float, at_least(0)]
    """Decoupled weight decay (AdamW)."""
    betas: Annotated[list[float], length(2), each(between(0, BELOW_1))]
    """Decay rates of AdamW's first and second moment."""
    eps: Annotated[float, at_least(0)]
    """AdamW's epsilon."""
    clip_grad_norm: Annotated[float, at_least(0)]
    """Global gradient norm above which gradients are scaled down; 0 = no clipping."""
    no_decay: list[str]
    """Parameters without weight decay: parts of their names, or "1d" for all with at most one dimension."""
    freeze: Annotated[list[str], each(non_empty())]
    """Parameters that are not trained: parts of their names (head off: [patch_embed, layers, norm]); [] = none."""
    lora: LoraConfig
    """Adapters of low rank (arXiv:2106.09685)."""
    layer_decay: Annotated[float, between(ABOVE_0, 1)]
    """Factor of the learning rate per layer, counted from the head; 1 = none (arXiv:2111.09883 appendix A2)."""
    encoder_lr_scale: Annotated[float, positive()]
    """Factor of the encoder's learning rate, beside layer_decay; 1 = as the heads' (arXiv:2111.09883 A2.1: 0.1)."""
    ema_decay: Annotated[float | None, between(0, BELOW_1)]
    """EMA of the weights: after each step, ema = this x ema + (1 - this) x weights; null = none."""
    schedule: ScheduleConfig
    """The learning rate over the run."""
