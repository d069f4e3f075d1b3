"""The configuration: what every key means.  Values live in ``conf/``; :mod:`swinv2_train.config.load` joins the two.

After the gate nothing is assigned to: derived numbers are functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple


class ConfigError(ValueError):
    """The user's input is wrong; the message names the key, the value and the remedy."""


PIPE = "pipe:"
"""Begins a part of data.shards that is a shell command which prints a shard."""


def is_pipe(pattern: str) -> bool:
    """True when a part of a shard pattern is a command."""
    return any(part.startswith(PIPE) for part in pattern.split("::"))


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
    loss_mean: str
    """local (the mean of each rank's and micro-batch's own mean, as official) or global (of all images or pixels)."""
    on_bad_step: str
    """A step that is not finite, or whose loss jumped: stop, skip it, or rollback (to the newest checkpoint)."""
    max_bad_steps: int
    """skip: bad steps in a row, rollback: returns from the same step, after which the run stops all the same."""
    loss_spike_factor: float | None
    """A loss above so many times the median of the last 100 steps is a bad step; null = only one that is not finite."""
    log_every_steps: int
    """Steps between metric lines."""
    checkpoint_every_steps: int
    """Steps between checkpoints; the last step is always saved."""
    background_save: bool
    """Copy the state to CPU memory and write it while training goes on; otherwise training waits."""
    keep_checkpoints: int
    """The newest complete checkpoints that are kept."""
    keep_best: str | None
    """Also keep the best checkpoint by a score of the task or a probe: val/top1, val_ema/loss, probe/knn_top1, ..."""
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
    pretrained_window_sizes: list[Any]
    """Window of each stage at which the log-CPB was trained, a number or [height, width]; 0 = this one."""
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
    clamp_to_shorter_side: bool
    """On maps that are not square: clamp windows and drop shifts by the shorter side, as the official code does."""
    extra_norm_period: int | None
    """A LayerNorm on the main branch after every so many blocks; 0 = none, null = the size's own (huge, giant: 6)."""
    recompute: str
    """Activation checkpointing: none, blocks, stages:I-J, attention or every:K; then @PLACE (docs/model.md)."""
    attention: str
    """fused: kernels without N x N scores in memory (Triton, C++), where there are any; or reference (torch)."""
    compile: str
    """none, or blocks: torch.compile each block; the first steps take longer, the others less time and memory."""
    sequential_stages: list[int]
    """Stages, from 1, that attend in a chunk of windows at a time (arXiv:2111.09883 section 3.5: [1, 2]); [] = none."""
    attention_chunk_windows: int | None
    """Windows of the whole micro-batch in one chunk; null = as many as attention_chunk_mib allows."""
    attention_chunk_mib: float
    """MiB for one chunk's tensors of tokens x tokens (models/sequential.py says which); one window always fits."""


@dataclass
class TaskConfig:
    name: str
    """simmim or classify."""
    init_from: str | None
    """Weights that a new run starts from: a run, a checkpoint or a file of any known format; null = fresh ones."""
    init_format: str | None
    """Format of init_from: microsoft, simmim, timm, huggingface or mmpretrain; null = by its names."""
    init_head: str
    """auto (the file's head where it has one), fresh, or a file of class indices to take from it (22k -> 1k)."""

    implementation: ClassVar[str]
    """MODULE:CLASS that is the task; imported when the task is built."""
    scores: ClassVar[tuple[str, ...]]
    """What it measures on the evaluation shards."""

    @property
    def mixes(self) -> bool:
        """Whether the images of a micro-batch are ever mixed, in pairs."""
        return False

    @property
    def label_classes(self) -> int | None:
        """The number of classes of which it names one for each image; None = it uses no labels."""
        return None

    def identity(self) -> dict[str, Any]:
        """Keys of this section that shape the weights: a run is resumed with the same values alone."""
        return {}

    def check(self, config: Config) -> None:
        """The rules between keys of this section, or with others.  Raises ConfigError naming key, value and remedy."""


@dataclass
class SimMIMConfig(TaskConfig):
    mask_unit_px: int
    """Side of a masked square in pixels (arXiv:2111.09886 section 3.2: 32)."""
    mask_ratio: float
    """Share of squares that is hidden (0.6)."""
    norm_target: int | None
    """Side in pixels of the sliding window that normalises the target; null = plain pixels (official SwinV2: 47)."""

    implementation: ClassVar[str] = "swinv2_train.tasks.simmim:SimMIMTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss",)

    def check(self, config: Config) -> None:
        """A mask is made of whole patches and fills the image."""
        patch_size, img_size = config.model.patch_size, pair("model.img_size", config.model.img_size)
        unit = self.mask_unit_px
        if unit < 1 or unit % patch_size or any(side % unit for side in img_size):
            raise ConfigError(
                f"task.mask_unit_px ({unit}) must be a multiple of model.patch_size ({patch_size}) and divide "
                f"model.img_size {img_size}"
            )


@dataclass
class ClassifyConfig(TaskConfig):
    num_classes: int
    """Classes; labels run from 0 to num_classes - 1."""
    label_smoothing: float
    """Mass of the target that is spread over all classes."""
    rand_augment: str | None
    """timm's name of a RandAugment policy, such as rand-m9-mstd0.5-inc1 (arXiv:1909.13719); null = none."""
    color_jitter: float
    """Brightness, contrast and saturation are each multiplied by 1 - this to 1 + this; 0 = not at all."""
    erasing_prob: float
    """Probability that a box of an image is filled with noise (arXiv:1708.04896)."""
    mixup_alpha: float
    """Beta(alpha, alpha) gives the share of each of two blended images (arXiv:1710.09412); 0 = no mixup."""
    cutmix_alpha: float
    """Beta(alpha, alpha) gives the area of one image pasted into another (arXiv:1905.04899); 0 = no cutmix."""
    mixup_prob: float
    """Probability that a micro-batch is mixed at all."""
    mixup_switch_prob: float
    """Probability of cutmix where both are on."""

    implementation: ClassVar[str] = "swinv2_train.tasks.classify:ClassifyTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss", "val/top1", "val/top5")

    @property
    def mixes(self) -> bool:
        """With mixup or cutmix on."""
        return self.mixup_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def label_classes(self) -> int:
        """As configured."""
        return self.num_classes

    def identity(self) -> dict[str, Any]:
        """The head has a row per class."""
        return {"task.num_classes": self.num_classes}

    def check(self, config: Config) -> None:
        """What mixup asks of the micro-batch, and timm of a policy's name."""
        if self.rand_augment is not None and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ConfigError(
                f"task.rand_augment ({self.rand_augment}) is not rand and sections such as m9, n2, p0.5, mstd0.5, "
                "mmax10, inc1, tweights, t3a or t3aw, joined by '-'; the official policy is rand-m9-mstd0.5-inc1"
            )
        if self.mixes and config.train.micro_batch_size % 2:
            raise ConfigError(
                f"train.micro_batch_size ({config.train.micro_batch_size}) must be even, for mixup pairs the images of "
                "a micro-batch; change it, or set task.mixup_alpha=0 and task.cutmix_alpha=0"
            )


RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|tweights|t3a|t3aw))*"
)
"""What timm reads of a policy's name; the rest it would pass over in silence."""


@dataclass
class EvalSplitConfig:
    """One of data.eval_splits.  It is the user's own entry, so its default is here and not in conf/."""

    shards: str
    """Its shards, in data.shards' notation."""
    labels: str | None = None
    """JSON file of right classes that goes before the shards' own labels (docs/evaluation.md); null = their own."""


@dataclass
class DataConfig:
    shards: str
    """Training shards: path or address (https://, ..) with {00..11} or *, or pipe:COMMAND, joined by ::, or a folder"""
    eval_shards: str | None
    """Evaluation shards, in the same notation; null = no evaluation."""
    eval_splits: dict[str, EvalSplitConfig]
    """Further splits by name, scored by the evaluate command alone: +data.eval_splits.NAME.shards=PATTERN"""
    num_workers: int
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch_batches: int
    """Micro-batches each worker prepares ahead."""
    lanes: int
    """Streams into which an epoch is cut; ranks read whole lanes."""
    window_shards: int
    """Shards that are shuffled together in one lane."""
    shuffle_buffer_images: int
    """Undecoded images that each loader process of a pipe mixes; other shards are mixed by lanes and window_shards."""
    crop_scale: list[float]
    """Share of the image's area that a random crop covers: [low, high]."""
    crop_ratio: list[float]
    """Width over height of a random crop: [low, high]."""
    eval_crop: str
    """centre (resize with the shape kept, cut out the centre) or squash (resize each side on its own, then cut)."""
    eval_crop_pct: float
    """The evaluation's centre crop as a share of the resized image's side (with centre: of its shorter one)."""
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
    """replace stops the run above this share of damaged samples, over all ranks and starts."""
    cache_dir: str | None
    """Local folder for shards of an address, shared by all runs of a host; null = ~/.cache/swinv2_train/shards."""
    cache_gib: float
    """GiB that the shards in cache_dir may take; what a host's ranks mix at a time must fit."""
    fetch_ahead_shards: int
    """Shards of an address that each rank fetches before its lanes come to them."""
    fetch_stall_sec: float
    """A transfer that brings no byte for so many seconds is cut off and tried again."""
    fetch_give_up_sec: float
    """Seconds, over all attempts, after which a shard that cannot be had ends the run."""
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
    ema_decay: float | None
    """Average the weights: after each step, average = this x average + (1 - this) x weights; null = no average."""
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
    optimizer_states: str
    """fp32 masters and averages, or bf16 (ZeRO 2 and 3 with precision=bf16): 6 bytes a parameter, and less exact."""
    offload_optimizer: str
    """Where masters and averages live and AdamW runs: none (the accelerator), cpu (ZeRO 1 to 3) or nvme (ZeRO-3)."""
    offload_param: str
    """ZeRO-3: where a rank's share of the weights lives between uses: none (the accelerator), cpu or nvme."""
    nvme_dir: str | None
    """Folder on a fast local disk for what is offloaded to nvme; each run's ranks make their own files below it."""
    reduce_bucket_size: int | None
    """Elements reduced together; null, here and below = by the model's layers (engine/deepspeed/buckets.py)."""
    prefetch_bucket_size: int | None
    """ZeRO-3: elements gathered ahead of their use."""
    persistence_threshold: int | None
    """ZeRO-3: parameters of at most so many elements stay gathered."""
    max_reuse_distance: int | None
    """ZeRO-3: a parameter used again within this many elements stays gathered."""
    max_live_parameters: int | None
    """ZeRO-3: no more is gathered ahead while so many elements are gathered."""
    overlap_comm: bool
    """Overlap the gradient reduction with the backward pass."""
    deepspeed_overrides: dict[str, Any]
    """Anything else for DeepSpeed's own configuration; a key that we generate is refused."""


@dataclass
class LogConfig:
    wandb: str
    """offline (files, for wandb sync), online (offline where the server does not answer) or disabled."""
    wandb_project: str
    """Project under which wandb files the run."""
    wandb_name: str | None
    """Name of the wandb run; null = the run directory's name."""
    wandb_artifacts: list[str]
    """What wandb keeps as artifacts at the run's end: pictures (the task's), weights (of the last step)."""
    progress: str
    """auto (a bar on a terminal, lines elsewhere), bar, lines or none."""


@dataclass
class RuntimeConfig:
    num_threads: int | None
    """CPU threads per rank; null = cores / ranks on this host."""
    stop_after_sec: float | None
    """Seconds after which the run saves, ends with exit code 3 and can be resumed; null = no limit."""
    process_group_timeout_sec: int
    """A collective that waits longer than this ends the run."""
    hang_timeout_sec: float | None
    """A micro-batch, optimizer step or wait for data longer than this ends the run, with all stacks; null = never."""
    gc_every_steps: int | None
    """Steps between Python's garbage collections, on all ranks at the same step; null = whenever Python likes."""
    profile: bool
    """Write a trace of a few steps to RUN_DIR/profile/ (docs/profiling.md)."""
    profile_steps: list[int]
    """[first, last] step that is traced, counted from this start; the first ones allocate and compile."""
    profile_all_ranks: bool
    """Trace every rank; else rank 0 alone."""


@dataclass
class HardwareConfig:
    name: str
    """What the plan calls it."""
    device: str | None
    """cuda or cpu; null, here and below = as this machine is found to be."""
    memory_gib: float | None
    """Memory of one accelerator as torch reports it; of a CPU, what its ranks share."""
    reserved_gib: float | None
    """Of it, what never holds a tensor: CUDA's context, libraries' workspaces, NCCL's buffers, lost fragments."""
    tflops_bf16: float | None
    """Dense peak of matrix products with fp32 accumulation."""
    tflops_fp32: float | None
    """The same in fp32, as torch computes it by default (without TF32)."""
    matmul_efficiency: float | None
    """Share of the peak that this model's products reach."""
    memory_gb_per_sec: float | None
    """Bandwidth of the accelerator's memory, peak."""
    memory_efficiency: float | None
    """Share of that bandwidth that elementwise operations reach."""
    op_overhead_us: float | None
    """Microseconds of host time to start one operation; small models wait for it."""
    gpus_per_node: int | None
    """Ranks that share the fast fabric."""
    intra_node_gb_per_sec: float | None
    """What one rank sends inside a node while all do, one way."""
    inter_node_gb_per_sec: float | None
    """What one rank sends between nodes while all do, one way."""
    intra_node_latency_us: float | None
    """Of a short message's hop from one rank to the next inside a node."""
    inter_node_latency_us: float | None
    """The same between nodes."""
    host_gb_per_sec: float | None
    """Between one accelerator and CPU memory, one way."""
    storage_gb_per_sec: float | None
    """What all ranks together write to the run directory."""


@dataclass
class ProbeConfig:
    methods: list[str]
    """How to judge the frozen encoder by its mean-pooled features: knn, linear, both, or [] = not at all."""
    every_steps: int | None
    """Steps between probes during training, and one at the end; null = at the end only."""
    shards: str | None
    """Labelled images that the probes learn from, in data.shards' notation; null = data.shards."""
    eval_shards: str | None
    """Labelled images that they are scored on; null = data.eval_shards."""
    knn_neighbours: int
    """Neighbours that vote (arXiv:1805.01978; DINO's usual choice: 20)."""
    knn_temperature: float
    """A neighbour's vote is exp(cosine similarity / this)."""


@dataclass
class PlanConfig:
    num_gpus: int | None
    """Ranks to plan for; null = those of the launcher, else one node's."""
    num_images: int | None
    """Images of the training shards, for the length of the run; null = what their manifest says, where there is one."""
    margin: float
    """Share of the memory that must stay free."""
    recommend: bool
    """Search for the fastest setting that fits (--recommend)."""
    scaling: str | None
    """strong (train.global_batch_size stays) or weak (a rank's images of a step stay): plan for 8 to 1,024 GPUs."""
    step_seconds: float | None
    """Measured seconds of a step of one micro-batch on one rank; null = estimated by the hardware's rates."""
    picture: str | None
    """PNG file to draw: where the bytes go over a step, or with plan.scaling the curve."""
    json: str | None
    """JSON file to write: the same numbers."""


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
    probe: ProbeConfig
    """What the frozen encoder's features are worth, without fine-tuning."""
    log: LogConfig
    runtime: RuntimeConfig
    hardware: HardwareConfig
    """Used by the planner alone, here and in the train command's warning at its start."""
    plan: PlanConfig


PROBE_SCORES = {
    "knn": ("probe/knn_top1", "probe/knn_top5"),
    "linear": ("probe/linear_top1", "probe/linear_top5"),
}
"""What each of probe.methods measures of the encoder's features, in percent."""


def averaged_score(name: str) -> str:
    """What a score of the weights is called for their averages (optim.ema_decay): val_ema/top1 for val/top1."""
    return name.replace("val/", "val_ema/", 1)


ARTIFACTS = ("pictures", "weights")
"""What wandb may keep besides the numbers."""

TASKS: dict[str, type[TaskConfig]] = {
    "simmim": SimMIMConfig,
    "classify": ClassifyConfig,
}
"""The tasks by name: a line each.  What else is known of one stands in its class and in its implementation."""


RECOMPUTE_PLACES = ("stay", "cpu", "fairscale", "partitioned")


class Recompute(NamedTuple):
    """What model.recompute says."""

    part: str | None
    """blocks or attention; None = nothing is computed again."""
    stages: tuple[int, int] | None
    """First and last stage, from 1, whose blocks are; None = all."""
    keep_every: int | None
    """Every so many-th block keeps its activations all the same."""
    place: str
    """Where the saved inputs wait: stay (as they are), cpu, fairscale (cpu too) or partitioned (DeepSpeed)."""


def parse_recompute(text: str, num_stages: int) -> Recompute:
    """The one reader of model.recompute: WHAT or WHAT@PLACE.  num_stages: of the model.

    Raises ConfigError naming the key, the value and the remedy.
    """
    what, at, place = text.partition("@")
    if text == "offload":
        raise ConfigError("model.recompute (offload) is now spelled blocks@fairscale; or blocks@cpu, torch's own way")
    if (at and place not in RECOMPUTE_PLACES) or (at and what == "none"):
        raise ConfigError(
            f"model.recompute ({text}): the saved inputs of a policy other than none go to one of "
            f"{', '.join('@' + name for name in RECOMPUTE_PLACES)}"
        )
    place = place or "stay"
    if what == "none":
        return Recompute(None, None, None, place)
    if what in ("blocks", "attention"):
        return Recompute(what, None, None, place)
    if match := re.fullmatch(r"every:(\d+)", what):
        if int(match[1]) < 2:
            raise ConfigError(f"model.recompute ({text}) would keep every block; set 2 or more, or none")
        return Recompute("blocks", None, int(match[1]), place)
    if match := re.fullmatch(r"stages:(\d+)(?:-(\d+))?", what):
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= num_stages:
            raise ConfigError(f"model.recompute ({text}): the model has the stages 1 to {num_stages}")
        return Recompute("blocks", (first, last), None, place)
    raise ConfigError(
        f"model.recompute ({text}) is none of none, blocks, attention, stages:I-J (such as stages:1-2) and every:K "
        "(every:3 keeps one block in 3)"
    )


def pair(key: str, value: Any) -> tuple[int, int]:
    """A key that takes an int or a [height, width] pair, as a pair; ConfigError otherwise."""
    values = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ConfigError(f"{key} ({value!r}) must be a positive whole number or a pair [height, width] of them")
    return values[0], values[1]


SPLITS = "data.eval_splits."
"""Below it the user's own names begin."""
