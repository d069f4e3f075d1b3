"""The configuration: dataclasses hold the meaning, ``conf/`` holds the values, and one strict gate joins them.

``load_config`` merges a composed YAML tree into the dataclasses below.  An unknown, missing, mistyped or out-of-range
key raises :class:`ConfigError` before any process group or accelerator is touched, whether it came from the command
line, from an experiment file or from behind ``+``.  After the gate nothing is assigned to: derived numbers are
functions.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy."""


# --------------------------------------------------------------------------------------------------------------------
# The meaning of every key.  Values live in conf/.


@dataclass
class TrainConfig:
    max_steps: int | None
    """Optimizer steps of the whole run; null = as many as epochs says."""
    epochs: float | None
    """Passes over the training shards, ceil(epochs x samples / global_batch_size) steps; max_steps goes before it."""
    global_batch_size: int
    """Images per optimizer step over all ranks and accumulation steps."""
    micro_batch_size: int
    """Images per rank and forward pass."""
    log_every_steps: int
    """Steps between metric lines."""
    checkpoint_every_steps: int
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int
    """The newest complete checkpoints that are kept."""
    keep_best: str | None
    """Also keep the best checkpoint by val/top1, val/top5 or val/loss, as measured at each evaluation; null = none."""
    eval_every_steps: int | None
    """Steps between evaluations on data.eval_shards; null evaluates at the end only."""
    picture_every_steps: int
    """Steps between pictures of the task (SimMIM reconstructions)."""


@dataclass
class ModelConfig:
    name: str
    """Size: demo, tiny, small, base, large, huge or giant (arXiv:2111.09883 section 3.6)."""
    img_size: Any
    """Input size in pixels: one number, or [height, width]."""
    patch_size: int
    """Side of a patch in pixels."""
    window_size: Any
    """Attention window in tokens: one number, or [height, width]."""
    pretrained_window_sizes: list[int]
    """Window of each stage at which the log-CPB was trained; 0 = the present window (section 3.3)."""
    embed_dim: int | None
    """Channels of stage 1; null = the size's own."""
    depths: list[int] | None
    """Blocks per stage; null = the size's own."""
    num_heads: list[int] | None
    """Heads per stage; null = the size's own."""
    mlp_ratio: float
    """Hidden width of the MLP over its input width."""
    drop_path_rate: float
    """Stochastic depth rate of the last block; rises linearly from 0."""
    extra_norm_period: int | None
    """A LayerNorm on the main branch after every so many blocks; 0 = none, null = the size's own (huge, giant: 6)."""
    recompute: str
    """Activation checkpointing: none, blocks (recompute each) or offload (fairscale: block inputs in CPU memory)."""


@dataclass
class TaskConfig:
    name: str
    """simmim or classify."""


@dataclass
class SimMIMConfig(TaskConfig):
    mask_unit_px: int
    """Side of a masked square in pixels (arXiv:2111.09886 section 3.2: 32)."""
    mask_ratio: float
    """Share of squares that is hidden (0.6)."""
    norm_target: int | None
    """Side in pixels of the sliding window that normalises the target; null = plain pixels (official SwinV2: 47)."""


@dataclass
class ClassifyConfig(TaskConfig):
    num_classes: int
    """Classes; labels run from 0 to num_classes - 1."""
    label_smoothing: float
    """Mass of the target that is spread over all classes."""
    init_from: str | None
    """Run or checkpoint directory of a SimMIM run whose encoder is loaded at the start; null = from scratch."""


@dataclass
class DataConfig:
    shards: str
    """Training shards: a path with {00..11} braces or * wildcards; several patterns separated by ::"""
    eval_shards: str | None
    """Evaluation shards, in the same notation; null = no evaluation."""
    num_workers: int
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch_batches: int
    """Micro-batches each worker prepares ahead."""
    lanes: int
    """Streams into which an epoch is cut; ranks read whole lanes."""
    window_shards: int
    """Shards that are shuffled together in one lane."""
    crop_scale: list[float]
    """Share of the image's area that a random crop covers: [low, high]."""
    crop_ratio: list[float]
    """Width over height of a random crop: [low, high]."""
    eval_crop_pct: float
    """The evaluation's centre crop as a share of the resized shorter side."""
    interpolation: str
    """bilinear or bicubic."""
    hflip: float
    """Probability of a horizontal flip."""
    mean: list[float]
    """Mean of the normalisation per channel, pixels in 0..1."""
    std: list[float]
    """Standard deviation of the normalisation per channel."""
    on_bad_sample: str
    """error: a damaged sample stops the run, named; replace: another sample stands in with loss weight 0."""
    max_bad_fraction: float
    """replace stops the run above this share of damaged samples."""
    record_keys: bool
    """Write the sample keys of every step to RUN_DIR/sample_keys/."""
    source: str | None
    """Where the demo's images come from: a folder or archive; null = the data set's own sources."""


@dataclass
class ScheduleConfig:
    name: str
    """cosine, linear, multistep or constant, after a linear warm-up."""
    warmup_steps: int | None
    """Steps of warm-up; null = as many as warmup_epochs says."""
    warmup_epochs: float | None
    """Epochs of warm-up; warmup_steps goes before it."""
    warmup_lr: float
    """Learning rate at step 0."""
    min_lr: float
    """Learning rate at the last step (cosine, linear)."""
    milestones: list[float]
    """multistep: where the rate falls, as shares of the whole run (official SimMIM: 700 of 800 epochs = 0.875)."""
    gamma: float
    """multistep: the factor at each milestone."""


@dataclass
class OptimConfig:
    lr: float
    """Peak learning rate at train.global_batch_size; nothing scales it behind your back."""
    weight_decay: float
    """Decoupled weight decay (AdamW)."""
    betas: list[float]
    """AdamW's averaging factors."""
    eps: float
    """AdamW's epsilon."""
    clip_grad_norm: float
    """Largest global gradient norm; 0 = no clipping."""
    no_decay: list[str]
    """Parameters without weight decay: parts of their names, or "1d" for all with at most one dimension."""
    layer_decay: float
    """Factor of the learning rate per layer, counted from the head; 1 = none (arXiv:2111.09883 appendix A2)."""
    schedule: ScheduleConfig
    """How the learning rate goes over the run."""


@dataclass
class EngineConfig:
    name: str
    """deepspeed or local (plain torch on one process: the numerical reference)."""
    zero_stage: int
    """0, 1, 2 or 3 (DeepSpeed)."""
    precision: str
    """fp32, or bf16 weights with fp32 masters and fp32 gradient accumulation."""
    offload_optimizer: str
    """none or cpu: where the optimizer's state lives (ZeRO 1 to 3)."""
    reduce_bucket_size: int
    """Elements that are reduced together."""
    prefetch_bucket_size: int
    """ZeRO-3: elements gathered ahead of their use."""
    persistence_threshold: int
    """ZeRO-3: parameters smaller than this many elements stay gathered."""
    max_reuse_distance: int
    """ZeRO-3: a parameter used again within this many elements stays gathered."""
    overlap_comm: bool
    """Overlap the gradient reduction with the backward pass."""
    deepspeed_overrides: dict[str, Any]
    """Anything else for DeepSpeed's own configuration; a key that we generate is refused."""


@dataclass
class LogConfig:
    wandb: str
    """offline, online or disabled."""
    wandb_project: str
    """Project under which wandb files the run."""
    wandb_name: str | None
    """Name of the wandb run; null = the run directory's name."""
    progress: str
    """auto (a bar on a terminal, lines elsewhere), bar, lines or none."""


@dataclass
class RuntimeConfig:
    num_threads: int | None
    """CPU threads per rank; null = cores / ranks on this host."""
    process_group_timeout_sec: int
    """A collective that waits longer than this ends the run."""


@dataclass
class Config:
    seed: int
    """Seed of everything random."""
    run_dir: str
    """Where the run lives; the same command with the same run_dir resumes it."""
    train: TrainConfig
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    log: LogConfig
    runtime: RuntimeConfig


ABOVE_0, BELOW_1 = math.ulp(0.0), 1.0 - math.ulp(0.5)
"""The open ends of ranges."""

SCORES = {"simmim": ("val/loss",), "classify": ("val/loss", "val/top1", "val/top5")}
"""What each task measures on the evaluation shards."""

TASKS: dict[str, type[TaskConfig]] = {"simmim": SimMIMConfig, "classify": ClassifyConfig}


# --------------------------------------------------------------------------------------------------------------------
# The gate.


def load_config(composed: DictConfig) -> Config:
    """Merge a composed tree strictly into the dataclasses and check every range; the only way to make a Config.

    Raises ConfigError naming the key, what is wrong with its value and the remedy.
    """
    task_name = OmegaConf.select(composed, "task.name")
    if task_name not in TASKS:
        raise ConfigError(f"task.name ({task_name}) is none of {', '.join(TASKS)}; choose task=simmim or task=classify")
    schema = OmegaConf.structured(Config)
    schema.task = OmegaConf.structured(TASKS[task_name])
    _check_keys(composed, TASKS[task_name])
    try:
        merged = OmegaConf.merge(schema, composed)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=VALUE")
        config = typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_merge_error(error)) from error
    check_config(config)
    return config


def known_keys(task: type[TaskConfig] | None = None) -> list[str]:
    """Every dotted key of the configuration (of all tasks, or of one)."""
    return list(_keys(Config, "", task))


def near_names(key: str, names: typing.Iterable[str]) -> str:
    """A remedy for an unknown dotted key: its nearest known names, by the whole path or by the last part alone."""
    names = list(names)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    leaf = key.rsplit(".", 1)[-1]
    near += [name for name in names if name.rsplit(".", 1)[-1] == leaf and name not in near]
    return f"did you mean {' or '.join(near[:3])}?" if near else "`--cfg job` prints every key"


def _keys(cls: type, prefix: str, task: type[TaskConfig] | None) -> typing.Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if kind is TaskConfig:
            for option in TASKS.values() if task is None else (task,):
                yield from _keys(option, f"{name}.", task)
        elif dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{name}.", task)
        else:
            yield name


def _check_keys(composed: DictConfig, task: type[TaskConfig]) -> None:
    """Name the first key that no dataclass has, before OmegaConf does it without a remedy."""
    known = known_keys(task)
    sections = {key[: i + 1] for key in (k + "." for k in known) for i, char in enumerate(key) if char == "."}
    for key in _leaves(OmegaConf.to_container(composed, resolve=False), ""):
        if key in known or key.startswith("engine.deepspeed_overrides."):
            continue
        if key + "." in sections:
            raise ConfigError(
                f"{key} is a section, not a value; set one of its keys, such as {_first_below(key, known)}"
            )
        raise ConfigError(unknown_key(key, task))


def unknown_key(key: str, task: type[TaskConfig] | None = None) -> str:
    """The message about a dotted key that the configuration (of one task, or of any) does not have."""
    if key.startswith("engine.deepspeed_overrides."):
        return f"{key} is not among our own keys; add it with a plus: +{key}=VALUE"
    owners = [name for name, cls in TASKS.items() if cls is not task and key in known_keys(cls)]
    if owners:
        return f"unknown key {key}: it belongs to task={owners[0]}"
    return f"unknown key {key}: {near_names(key, known_keys(task))}"


def _first_below(section: str, known: list[str]) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _leaves(tree: Any, prefix: str) -> typing.Iterator[str]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, path + ".")
        elif not (isinstance(value, dict) and path == "engine.deepspeed_overrides"):
            yield path


def _merge_error(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or "the configuration"
    reason = str(getattr(error, "msg", None) or error).split("\n")[0]
    return f"{key}: {reason}"


def check_config(config: Config) -> None:
    """Check every range and every relation between keys that needs no file, model or process group."""
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
    _one_of("engine.offload_optimizer", config.engine.offload_optimizer, ("none", "cpu"))
    _one_of("model.recompute", config.model.recompute, ("none", "blocks", "offload"))
    _one_of("optim.schedule.name", schedule.name, ("cosine", "linear", "multistep", "constant"))
    _one_of("data.interpolation", data.interpolation, ("bilinear", "bicubic"))
    _one_of("data.on_bad_sample", data.on_bad_sample, ("error", "replace"))
    _one_of("log.wandb", config.log.wandb, ("offline", "online", "disabled"))
    _one_of("log.progress", config.log.progress, ("auto", "bar", "lines", "none"))
    _within("seed", config.seed, 0, 2**63 - 1)
    for key, value, low in (
        ("train.max_steps", train.max_steps, 1),
        ("train.epochs", train.epochs, ABOVE_0),
        ("train.global_batch_size", train.global_batch_size, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.log_every_steps", train.log_every_steps, 1),
        ("train.checkpoint_every_steps", train.checkpoint_every_steps, 1),
        ("train.keep_checkpoints", train.keep_checkpoints, 1),
        ("train.eval_every_steps", train.eval_every_steps, 1),
        ("train.picture_every_steps", train.picture_every_steps, 1),
        ("model.patch_size", config.model.patch_size, 1),
        ("model.embed_dim", config.model.embed_dim, 1),
        ("model.extra_norm_period", config.model.extra_norm_period, 0),
        ("model.mlp_ratio", config.model.mlp_ratio, ABOVE_0),
        ("data.num_workers", data.num_workers, 0),
        ("data.prefetch_batches", data.prefetch_batches, 1),
        ("data.lanes", data.lanes, 1),
        ("data.window_shards", data.window_shards, 1),
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
        ("runtime.num_threads", config.runtime.num_threads, 1),
        ("runtime.process_group_timeout_sec", config.runtime.process_group_timeout_sec, 1),
    ):
        _within(key, value, low, math.inf)
    for key, value in (("data.hflip", data.hflip), ("data.max_bad_fraction", data.max_bad_fraction)):
        _within(key, value, 0, 1)
    for key, value in (
        ("model.drop_path_rate", config.model.drop_path_rate),
        *(("optim.betas", beta) for beta in optim.betas),
    ):
        _within(key, value, 0, BELOW_1)
    for key, value in (("data.eval_crop_pct", data.eval_crop_pct), ("optim.layer_decay", optim.layer_decay)):
        _within(key, value, ABOVE_0, 1)
    for key, values in (
        ("model.depths", config.model.depths),
        ("model.num_heads", config.model.num_heads),
    ):
        if values is not None and (not values or min(values) < 1):
            raise ConfigError(f"{key} ({values}) must hold one positive number per stage")
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
    img_size = pair("model.img_size", config.model.img_size)
    pair("model.window_size", config.model.window_size)
    if isinstance(config.task, SimMIMConfig):
        _within("task.mask_ratio", config.task.mask_ratio, ABOVE_0, 1)
        unit = config.task.mask_unit_px
        if unit < 1 or unit % config.model.patch_size or any(side % unit for side in img_size):
            raise ConfigError(
                f"task.mask_unit_px ({unit}) must be a multiple of model.patch_size ({config.model.patch_size}) and "
                f"divide model.img_size {img_size}"
            )
    if isinstance(config.task, ClassifyConfig):
        _within("task.num_classes", config.task.num_classes, 1, math.inf)
        _within("task.label_smoothing", config.task.label_smoothing, 0, 1)
    if train.keep_best is not None:
        _one_of("train.keep_best", train.keep_best, SCORES[config.task.name])
    if train.keep_best is not None and data.eval_shards is None:
        raise ConfigError(
            f"train.keep_best ({train.keep_best}) needs data.eval_shards; set it, or train.keep_best=null"
        )


def pair(key: str, value: Any) -> tuple[int, int]:
    """A key that takes an int or a [height, width] pair, as a pair; ConfigError otherwise."""
    values = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ConfigError(f"{key} ({value!r}) must be a positive whole number or a pair [height, width] of them")
    return values[0], values[1]


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


def config_yaml(config: Config) -> str:
    """The validated configuration as YAML, loadable by the same gate."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_config(path: Path) -> Config:
    """Read a configuration written as :func:`config_yaml` through the gate."""
    if not path.is_file():
        raise ConfigError(f"{path} is not there; run_dir must be the directory of a run")
    try:
        return load_config(typing.cast(DictConfig, OmegaConf.load(path)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
