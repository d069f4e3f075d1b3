"""The rules between keys, and those of a single key that need more than a range."""

from __future__ import annotations

import math
from typing import Any

from swinv2_train.config.schema import (
    ARTIFACTS,
    PROBE_SCORES,
    SPLITS,
    ClassifyConfig,
    Config,
    ConfigError,
    SimMIMConfig,
    averaged_score,
    is_pipe,
    pair,
    parse_recompute,
)

MOST_TRACED = 20
"""Steps of the longest trace."""


ABOVE_0, BELOW_1 = math.ulp(0.0), 1.0 - math.ulp(0.5)
"""The open ends of ranges."""


def check_config(config: Config) -> None:
    """Check every range and every relation between keys that needs no file, model or process group."""
    if not config.run_dir.strip():
        raise ConfigError("run_dir is empty; name a directory: run_dir=DIR")
    train, optim, data, schedule = config.train, config.optim, config.data, config.optim.schedule
    _one_given("train.max_steps", train.max_steps, "train.epochs", train.epochs)
    _one_given(
        "optim.schedule.warmup_steps",
        schedule.warmup_steps,
        "optim.schedule.warmup_epochs",
        schedule.warmup_epochs,
    )
    _one_of("engine.name", config.engine.name, ("deepspeed", "local"))
    _one_of("engine.zero_stage", config.engine.zero_stage, (0, 1, 2, 3))
    _one_of("engine.precision", config.engine.precision, ("fp32", "bf16"))
    _one_of("engine.optimizer_states", config.engine.optimizer_states, ("fp32", "bf16"))
    _one_of("engine.offload_optimizer", config.engine.offload_optimizer, ("none", "cpu", "nvme"))
    _one_of("engine.offload_param", config.engine.offload_param, ("none", "cpu", "nvme"))
    num_stages = len(config.model.pretrained_window_sizes)
    recompute = parse_recompute(config.model.recompute, num_stages)
    if recompute.place == "partitioned" and config.engine.name != "deepspeed":
        raise ConfigError(
            f"model.recompute ({config.model.recompute}) needs engine.name=deepspeed, not {config.engine.name}; "
            "set engine.name=deepspeed, or another place of the saved inputs"
        )
    _one_of("model.attention", config.model.attention, ("reference", "fused"))
    _one_of("model.compile", config.model.compile, ("none", "blocks"))
    for stage in config.model.sequential_stages:
        _within("model.sequential_stages", stage, 1, num_stages)
    _one_of("hardware.device", config.hardware.device, (None, "cuda", "cpu"))
    _one_of("plan.scaling", config.plan.scaling, (None, "strong", "weak"))
    _one_of("train.on_bad_step", train.on_bad_step, ("stop", "skip", "rollback"))
    _one_of("optim.schedule.name", schedule.name, ("cosine", "linear", "multistep", "constant"))
    _one_of("train.loss_mean", train.loss_mean, ("local", "global"))
    _one_of("data.eval_crop", data.eval_crop, ("centre", "squash"))
    _one_of("data.interpolation", data.interpolation, ("bilinear", "bicubic"))
    _one_of("data.on_bad_sample", data.on_bad_sample, ("error", "replace"))
    _one_of("log.wandb", config.log.wandb, ("offline", "online", "disabled"))
    for artifact in config.log.wandb_artifacts:
        _one_of("log.wandb_artifacts", artifact, ARTIFACTS)
    for method in config.probe.methods:
        _one_of("probe.methods", method, tuple(PROBE_SCORES))
    _one_of("log.progress", config.log.progress, ("auto", "bar", "lines", "none"))
    _within("seed", config.seed, 0, 2**63 - 1)
    for key, value, low in (
        ("train.max_steps", train.max_steps, 1),
        ("train.epochs", train.epochs, ABOVE_0),
        ("train.global_batch_size", train.global_batch_size, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.max_bad_steps", train.max_bad_steps, 1),
        ("train.loss_spike_factor", train.loss_spike_factor, 1),
        ("train.log_every_steps", train.log_every_steps, 1),
        ("train.checkpoint_every_steps", train.checkpoint_every_steps, 1),
        ("train.keep_checkpoints", train.keep_checkpoints, 1),
        ("train.eval_every_steps", train.eval_every_steps, 1),
        ("train.picture_every_steps", train.picture_every_steps, 1),
        ("model.patch_size", config.model.patch_size, 1),
        ("model.embed_dim", config.model.embed_dim, 1),
        ("model.extra_norm_period", config.model.extra_norm_period, 0),
        ("model.mlp_ratio", config.model.mlp_ratio, ABOVE_0),
        ("model.attention_chunk_windows", config.model.attention_chunk_windows, 1),
        ("model.attention_chunk_mib", config.model.attention_chunk_mib, ABOVE_0),
        ("probe.every_steps", config.probe.every_steps, 1),
        ("probe.knn_neighbours", config.probe.knn_neighbours, 1),
        ("probe.knn_temperature", config.probe.knn_temperature, ABOVE_0),
        ("data.num_workers", data.num_workers, 0),
        ("data.prefetch_batches", data.prefetch_batches, 1),
        ("data.lanes", data.lanes, 1),
        ("data.window_shards", data.window_shards, 1),
        ("data.shuffle_buffer_images", data.shuffle_buffer_images, 1),
        ("data.cache_gib", data.cache_gib, ABOVE_0),
        ("data.fetch_ahead_shards", data.fetch_ahead_shards, 0),
        ("data.fetch_stall_sec", data.fetch_stall_sec, ABOVE_0),
        ("data.fetch_give_up_sec", data.fetch_give_up_sec, 0),
        ("optim.lr", optim.lr, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.eps", optim.eps, 0),
        ("optim.clip_grad_norm", optim.clip_grad_norm, 0),
        ("optim.schedule.warmup_steps", schedule.warmup_steps, 0),
        ("optim.schedule.warmup_epochs", schedule.warmup_epochs, 0),
        ("optim.schedule.warmup_lr", schedule.warmup_lr, 0),
        ("optim.schedule.min_lr", schedule.min_lr, 0),
        ("optim.schedule.gamma", schedule.gamma, 0),
        ("engine.reduce_bucket_size", config.engine.reduce_bucket_size, 1),
        ("engine.prefetch_bucket_size", config.engine.prefetch_bucket_size, 0),
        ("engine.persistence_threshold", config.engine.persistence_threshold, 0),
        ("engine.max_reuse_distance", config.engine.max_reuse_distance, 0),
        ("engine.max_live_parameters", config.engine.max_live_parameters, 1),
        ("hardware.memory_gib", config.hardware.memory_gib, ABOVE_0),
        ("hardware.reserved_gib", config.hardware.reserved_gib, 0),
        ("hardware.tflops_bf16", config.hardware.tflops_bf16, ABOVE_0),
        ("hardware.tflops_fp32", config.hardware.tflops_fp32, ABOVE_0),
        ("hardware.memory_gb_per_sec", config.hardware.memory_gb_per_sec, ABOVE_0),
        ("hardware.op_overhead_us", config.hardware.op_overhead_us, 0),
        ("hardware.gpus_per_node", config.hardware.gpus_per_node, 1),
        ("hardware.intra_node_gb_per_sec", config.hardware.intra_node_gb_per_sec, ABOVE_0),
        ("hardware.inter_node_gb_per_sec", config.hardware.inter_node_gb_per_sec, ABOVE_0),
        ("hardware.intra_node_latency_us", config.hardware.intra_node_latency_us, 0),
        ("hardware.inter_node_latency_us", config.hardware.inter_node_latency_us, 0),
        ("hardware.host_gb_per_sec", config.hardware.host_gb_per_sec, ABOVE_0),
        ("hardware.storage_gb_per_sec", config.hardware.storage_gb_per_sec, ABOVE_0),
        ("plan.num_gpus", config.plan.num_gpus, 1),
        ("plan.num_images", config.plan.num_images, 1),
        ("plan.step_seconds", config.plan.step_seconds, ABOVE_0),
        ("runtime.num_threads", config.runtime.num_threads, 1),
        ("runtime.stop_after_sec", config.runtime.stop_after_sec, ABOVE_0),
        ("runtime.process_group_timeout_sec", config.runtime.process_group_timeout_sec, 1),
        ("runtime.hang_timeout_sec", config.runtime.hang_timeout_sec, 1),
        ("runtime.gc_every_steps", config.runtime.gc_every_steps, 1),
    ):
        _within(key, value, low, math.inf)
    for key, value in (("data.hflip", data.hflip), ("data.max_bad_fraction", data.max_bad_fraction)):
        _within(key, value, 0, 1)
    for key, value in (
        ("model.drop_path_rate", config.model.drop_path_rate),
        ("plan.margin", config.plan.margin),
        ("optim.ema_decay", optim.ema_decay),
        *(("optim.betas", beta) for beta in optim.betas),
    ):
        _within(key, value, 0, BELOW_1)
    for key, value in (
        ("data.eval_crop_pct", data.eval_crop_pct),
        ("optim.layer_decay", optim.layer_decay),
        ("hardware.matmul_efficiency", config.hardware.matmul_efficiency),
        ("hardware.memory_efficiency", config.hardware.memory_efficiency),
    ):
        _within(key, value, ABOVE_0, 1)
    for key, values in (
        ("model.depths", config.model.depths),
        ("model.num_heads", config.model.num_heads),
    ):
        if values is not None and (not values or min(values) < 1):
            raise ConfigError(f"{key} ({values}) must hold one positive number per stage")
    traced = config.runtime.profile_steps
    if len(traced) != 2 or not 1 <= traced[0] <= traced[1] < traced[0] + MOST_TRACED:
        raise ConfigError(
            f"runtime.profile_steps ({traced}) must be [first, last] with 1 <= first <= last and at most {MOST_TRACED} "
            "steps: a trace of more is too large to open"
        )
    _range_pair("data.crop_scale", data.crop_scale, 1.0)
    _range_pair("data.crop_ratio", data.crop_ratio, math.inf)
    for key, numbers, length in (
        ("data.mean", data.mean, 3),
        ("data.std", data.std, 3),
        ("optim.betas", optim.betas, 2),
    ):
        if len(numbers) != length:
            raise ConfigError(f"{key} ({numbers}) must hold {length} numbers")
    for mean, std in zip(data.mean, data.std, strict=True):
        _within("data.mean", mean, -math.inf, math.inf)
        _within("data.std", std, ABOVE_0, math.inf)
    for milestone in schedule.milestones:
        _within("optim.schedule.milestones", milestone, 0, 1)
    pair("model.img_size", config.model.img_size)
    pair("model.window_size", config.model.window_size)
    for window in config.model.pretrained_window_sizes:
        if window != 0 or isinstance(window, bool):
            pair("model.pretrained_window_sizes", window)
    if isinstance(config.task, SimMIMConfig):
        _within("task.mask_ratio", config.task.mask_ratio, ABOVE_0, 1)
    if isinstance(config.task, ClassifyConfig):
        _within("task.num_classes", config.task.num_classes, 1, math.inf)
        for name in ("label_smoothing", "erasing_prob", "mixup_prob", "mixup_switch_prob"):
            _within(f"task.{name}", getattr(config.task, name), 0, 1)
        for name in ("color_jitter", "mixup_alpha", "cutmix_alpha"):
            _within(f"task.{name}", getattr(config.task, name), 0, math.inf)
    config.task.check(config)
    for name, split in data.eval_splits.items():
        if split.labels is not None and config.task.label_classes is None:
            raise ConfigError(
                f"{SPLITS}{name}.labels ({split.labels}) needs task=classify; task={config.task.name} uses no labels"
            )
    if is_pipe(data.shards):
        _check_pipe(config)
    hang_sec = config.runtime.hang_timeout_sec
    if hang_sec is not None and "://" in data.shards and hang_sec <= data.fetch_give_up_sec:
        raise ConfigError(
            f"runtime.hang_timeout_sec ({hang_sec:g}) must be more than data.fetch_give_up_sec "
            f"({data.fetch_give_up_sec:g}), which a shard at an address may take; raise the one or lower the other"
        )
    if config.engine.optimizer_states == "bf16" and optim.betas[1] > 0.996:  # 1 - 2^-8, bf16's step
        raise ConfigError(
            f"optim.betas ({optim.betas}) with engine.optimizer_states (bf16): a bf16 average times {optim.betas[1]:g} "
            "is rounded to what it was and never decays; set optim.betas=[0.9,0.99] or engine.optimizer_states=fp32"
        )
    _check_ema(config)
    if train.keep_best is not None:
        scores, probed = config.task.scores, [name for names in PROBE_SCORES.values() for name in names]
        _one_of("train.keep_best", train.keep_best, (*scores, *map(averaged_score, scores), *probed))
        if train.keep_best not in (*scores, *probed) and optim.ema_decay is None:
            raise ConfigError(
                f"train.keep_best ({train.keep_best}) needs optim.ema_decay; set it, or name a val/ score"
            )
    if train.keep_best is not None and not train.keep_best.startswith("probe/") and data.eval_shards is None:
        raise ConfigError(
            f"train.keep_best ({train.keep_best}) needs data.eval_shards; set it, or train.keep_best=null"
        )


def _check_ema(config: Config) -> None:
    """Averages of the weights lie beside float32 masters, in memory."""
    decay, engine = config.optim.ema_decay, config.engine
    if decay is None:
        return
    if "nvme" in (engine.offload_optimizer, engine.offload_param):
        raise ConfigError(
            f"optim.ema_decay ({decay}) with engine.offload_optimizer ({engine.offload_optimizer}) and "
            f"engine.offload_param ({engine.offload_param}): no averages are kept of weights on disk; set "
            "optim.ema_decay=null, or offload to cpu"
        )
    if engine.optimizer_states == "bf16":
        raise ConfigError(
            f"optim.ema_decay ({decay}) with engine.optimizer_states (bf16): the averages are of float32 masters; set "
            "optim.ema_decay=null or engine.optimizer_states=fp32"
        )


def _check_pipe(config: Config) -> None:
    """Images that a command prints cannot be counted beforehand, so every length must be given in steps."""
    for key, steps, epochs in (
        ("train.max_steps", config.train.max_steps, "train.epochs"),
        ("optim.schedule.warmup_steps", config.optim.schedule.warmup_steps, "optim.schedule.warmup_epochs"),
    ):
        if steps is None:
            raise ConfigError(
                f"{epochs} has no length where data.shards is a pipe ({config.data.shards}), whose images cannot be "
                f"counted beforehand; set {key}"
            )


def _one_given(key: str, value: float | None, other: str, other_value: float | None) -> None:
    if value is None and other_value is None:
        raise ConfigError(f"{key} and {other} are both null; set one of them")


def _one_of(key: str, value: Any, options: tuple[Any, ...]) -> None:
    if value not in options:
        raise ConfigError(f"{key} ({value}) is none of {', '.join(str(option) for option in options)}")


def _within(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (low <= value <= high and math.isfinite(value)):  # also refuses NaN
        least = "more than 0" if low == ABOVE_0 else f"at least {low:g}"
        most = "less than 1" if high == BELOW_1 else f"at most {high:g}"
        bounds = [text for text, bound in ((least, low), (most, high)) if math.isfinite(bound)]
        raise ConfigError(f"{key} ({value}) must be {' and '.join(bounds) or 'a finite number'}")


def _range_pair(key: str, values: list[float], high: float) -> None:
    if len(values) != 2 or not (0 < values[0] <= values[1] <= high):
        limit = "" if high == math.inf else f" <= {high:g}"
        raise ConfigError(f"{key} ({values}) must be [low, high] with 0 < low <= high{limit}")
