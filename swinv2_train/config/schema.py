"""The configuration: of every key its type, what it may be (``config/rules.py``) and, below it, what it means.

Values live in ``conf/``; :mod:`swinv2_train.config.load` joins the two.  A validated configuration is never changed:
derived numbers are functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.planner import HardwareConfig, PlanConfig
from swinv2_train.config.rules import (
    ABOVE_0,
    BELOW_1,
    PATH,
    at_least,
    band_names,
    between,
    directory,
    each,
    finite,
    first_last,
    folder_names,
    folder_path,
    length,
    low_high,
    matching,
    non_empty,
    number_or_nan,
    one_of,
    one_per_stage,
    pair,
    positive,
    size,
    size_or_0,
    word_or_indices,
    zero_or_at_least,
)
from swinv2_train.config.scale import ScaleConfig

MOST_TRACED = 20
"""Steps of the longest trace."""

RAND_AUGMENT = matching(
    r"rand(-(m\d+|n\d+|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|tweights|t3a|t3aw))*",
    "rand and sections such as m9, n2, p0.5, mstd0.5, mmax10, inc1, tweights, t3a or t3aw, joined by '-'",
    "the official policy is rand-m9-mstd0.5-inc1",
)
"""What timm reads of a policy's name; it would ignore anything else silently."""


HEAD_NORMS = ("layer", "group", "batch", "sync_batch")
"""The norms of a segmentation head."""
BATCH_NORMS = ("batch", "sync_batch")
"""Those whose statistics are of several images."""

PIPE = "pipe:"
"""Begins a part of data.shards that is a shell command which prints a shard."""


def is_pipe(pattern: str) -> bool:
    """True when a part of a shard pattern is a command."""
    return any(part.startswith(PIPE) for part in pattern.split("::"))


@dataclass
class TrainConfig:
    max_steps: Annotated[int | None, at_least(1)]
    """Optimizer steps of the whole run, whatever their batches; null = from epochs."""
    epochs: Annotated[float | None, positive()]
    """Passes over the training shards, counted in images, so that the batch may change; max_steps takes precedence."""
    global_batch_size: Annotated[int, at_least(1)]
    """Images per optimizer step over all ranks and accumulation steps; may change at a resume (docs/resume.md)."""
    micro_batch_size: Annotated[int, at_least(1)]
    """Images per rank and forward pass."""
    loss_mean: Annotated[str, one_of("local", "global")]
    """local (mean of the ranks' and micro-batches' own means, as official) or global (mean of all images or pixels)."""
    on_bad_step: Annotated[str, one_of("stop", "skip", "rollback")]
    """When a step is not finite or its loss jumps: stop, skip it, or rollback (to the newest checkpoint)."""
    max_bad_steps: Annotated[int, at_least(1)]
    """Bad steps in a row (skip), or rollbacks from the same step (rollback), after which the run stops."""
    loss_spike_factor: Annotated[float | None, at_least(1)]
    """A loss above N x the median of the last 100 steps is a bad step; null = only one that is not finite."""
    log_every_steps: Annotated[int, at_least(1)]
    """Steps between metric lines."""
    checkpoint_every_steps: Annotated[int, at_least(1)]
    """Steps between checkpoints; the last step is always saved."""
    background_save: bool
    """Copy the state to CPU memory and write it while training goes on; otherwise training waits."""
    keep_checkpoints: Annotated[int, at_least(1)]
    """How many of the newest complete checkpoints are kept."""
    keep_best: str | None
    """Also keep the best checkpoint by a score that the run measures: val/top1, val_ema/loss, probe/knn_top1, ..."""
    patience: Annotated[int | None, at_least(1)]
    """Evaluations in a row without a better train.keep_best after which the run ends; null = it never ends so."""
    eval_every_steps: Annotated[int | None, at_least(1)]
    """Steps between evaluations on data.eval_shards; null evaluates at the end only."""
    picture_every_steps: Annotated[int, at_least(1)]
    """Steps between pictures of the task (SimMIM reconstructions)."""


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


@dataclass
class TaskConfig:
    name: str
    """simmim, classify, segment or detect."""
    init_from: Annotated[str | None, PATH]
    """Weights that a new run starts from: a run, checkpoint or file of any format, or hf://USER/NAME; null = fresh."""
    init_format: str | None
    """Format of init_from: microsoft, simmim, timm, huggingface, mmpretrain or torchvision; null = by its names."""
    init_head: Annotated[str, PATH]
    """auto (the file's head where it has one, by class names), fresh, or a file of class indices to take from it."""
    init_bands: Annotated[Any, word_or_indices("mean", "repeat", "fresh")]
    """For weights of other channels: mean, repeat, fresh or a list (docs/weights.md); null = they are an error."""
    init_required: bool
    """Recipes of fine-tuning: a null init_from is an error; false = it means to train from scratch by this recipe."""

    implementation: ClassVar[str]
    """MODULE:CLASS that is the task; imported when the task is built."""
    scores: ClassVar[tuple[str, ...]]
    """What it measures on the evaluation shards."""
    purpose: ClassVar[str] = "images"
    """What its models are for, as a model card says it."""
    pipeline_tag: ClassVar[str] = "image-feature-extraction"
    """What hubs call that."""
    transformers_class: ClassVar[str] = "AutoModel"
    """The class of transformers that takes its models."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of `scores` that it measures as it is configured."""
        return self.scores

    @property
    def label_kind(self) -> str | None:
        """What it takes from data.labels and its like: label, labels or values (data/sample.py); None = nothing."""
        return None

    @property
    def label_rows(self) -> int:
        """Of label_kind labels and values: how many classes there are, or numbers of an image."""
        return self.label_classes or 0

    @property
    def mixes(self) -> bool:
        """Whether the images of a micro-batch are ever mixed, in pairs."""
        return False

    @property
    def label_classes(self) -> int | None:
        """The number of classes that it names one or several of for each image; None = it names none."""
        return None

    @property
    def pixel_classes(self) -> int | None:
        """The number of classes of pixels or objects, whose numbers nobody changes; None = it has none of these."""
        return None

    @property
    def pixel_class_names(self) -> tuple[str, ...] | None:
        """What the configuration calls the classes of pixels or objects; None = it gives none, or there are none."""
        return None

    @property
    def takes_fitting_heads(self) -> bool:
        """Whether of other heads what fits is taken, and the rest starts anew; else they are taken whole or not."""
        return False

    def identity(self) -> dict[str, Any]:
        """Keys of this section that shape the weights: a run is resumed with the same values alone."""
        return {}

    def check(self, config: Config) -> None:
        """The rules between keys of this section, or with others.  Raises ConfigError naming key, value and remedy."""

    def evaluated_at_once(self, config: Config) -> tuple[int, int, int] | None:
        """Images of a forward pass of evaluation, their height and width at most; None = as many and as large as of a
        micro-batch.
        """
        return None

    def check_ranks(self, ranks: int, accumulation_steps: int) -> None:
        """What a training run asks of its number of processes, and of the micro-batches of a step on each."""

    def augmentations(self, data: DataConfig) -> list[str]:
        """What happens to a training image, in words."""
        low, high = data.crop_scale
        return [f"random crops of {low:g} to {high:g} of the area", *flips(data)]


def flips(data: DataConfig) -> list[str]:
    """How training images are mirrored and turned, in words."""
    flipped = [f"flipped with probability {data.hflip:g}"] if data.hflip else []
    return [*flipped, "turned by quarters and mirrored"] if data.dihedral else flipped


@dataclass
class SimMIMConfig(TaskConfig):
    mask_unit_px: int
    """Side of a masked square in pixels (arXiv:2111.09886 section 3.2: 32)."""
    mask_ratio: Annotated[float, between(ABOVE_0, 1)]
    """Share of the squares that is hidden (0.6)."""
    norm_target: int | None
    """Side in pixels of the sliding window that normalises the target; null = plain pixels (official SwinV2: 47)."""

    implementation: ClassVar[str] = "swinv2_train.tasks.simmim:SimMIMTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss",)
    purpose: ClassVar[str] = "masked image modelling (SimMIM)"
    transformers_class: ClassVar[str] = "Swinv2ForMaskedImageModeling"

    def augmentations(self, data: DataConfig) -> list[str]:
        hidden = f"{self.mask_ratio:g} of the squares of {self.mask_unit_px} px hidden"
        return [*super().augmentations(data), hidden]

    def check(self, config: Config) -> None:
        """A mask is made of whole patches and fills the image."""
        patch_size, img_size = config.model.patch_size, pair("model.img_size", config.model.img_size)
        unit = self.mask_unit_px
        if unit < 1 or unit % patch_size or any(side % unit for side in img_size):
            raise ConfigError(
                f"task.mask_unit_px ({unit}) must be a multiple of model.patch_size ({patch_size}) and divide "
                f"model.img_size {img_size}"
            )


TARGET_LOSSES = {
    "single": ("cross_entropy", "focal"),
    "multilabel": ("bce", "asymmetric", "focal"),
    "regression": ("huber", "mse"),
}
"""What each task.target is trained by; the first is what task.loss=auto means."""
_TARGET_SCORES = {
    "single": ("val/loss", "val/top1", "val/top5"),
    "multilabel": ("val/loss", "val/map", "val/auroc", "val/f1_micro", "val/f1_macro"),
    "regression": ("val/loss", "val/mae", "val/rmse", "val/r2"),
}


@dataclass
class ClassifyConfig(TaskConfig):
    target: Annotated[str, one_of(*TARGET_LOSSES)]
    """single (one class of an image), multilabel (any number of classes) or regression (numbers of an image)."""
    num_classes: Annotated[int, at_least(1)]
    """Classes, whose labels run from 0 to num_classes - 1; with target=regression how many numbers an image has."""
    loss: Annotated[str, one_of("auto", *dict.fromkeys(name for names in TARGET_LOSSES.values() for name in names))]
    """cross_entropy, focal, bce, asymmetric, huber or mse (docs/evaluation.md#targets); auto = its target's first."""
    focal_gamma: Annotated[float, zero_or_at_least(1)]
    """loss=focal: how much less what is right already counts (arXiv:1708.02002: 2)."""
    asymmetric_gamma: Annotated[list[float], length(2), each(zero_or_at_least(1))]
    """loss=asymmetric: the same of classes that apply, and of those that do not (arXiv:2009.14119)."""
    asymmetric_clip: Annotated[float, between(0, BELOW_1)]
    """loss=asymmetric: probability below which a class that does not apply costs nothing (0.05)."""
    huber_delta: Annotated[float, positive()]
    """loss=huber: error in standard deviations (value_std) from which on it counts linearly."""
    class_weights: Annotated[str, PATH]
    """none; balanced (rare classes of the training images count more); or a JSON file (docs/evaluation.md#targets)."""
    threshold: Annotated[float, between(ABOVE_0, BELOW_1)]
    """target=multilabel: the probability above which a class is said to apply (F1, predictions)."""
    value_mean: Annotated[list[float] | None, each(finite())]
    """target=regression: mean of each number; the model learns (value - mean) / std.  null = 0."""
    value_std: Annotated[list[float] | None, each(positive())]
    """target=regression: standard deviation of each number; null = 1."""
    label_smoothing: Annotated[float, between(0, 1)]
    """Mass of the target that is spread over all classes; target=multilabel: over applying and not."""
    dropout: Annotated[float, between(0, BELOW_1)]
    """Share of the pooled features that is dropped before the classes, in training."""
    rand_augment: Annotated[str | None, RAND_AUGMENT]
    """timm's name of a RandAugment policy, such as rand-m9-mstd0.5-inc1 (arXiv:1909.13719); null = none."""
    color_jitter: Annotated[float, at_least(0)]
    """Brightness, contrast and saturation are each multiplied by a factor in 1 - this to 1 + this; 0 = off."""
    erasing_prob: Annotated[float, between(0, 1)]
    """Probability that a box of an image is filled with noise (arXiv:1708.04896)."""
    mixup_alpha: Annotated[float, at_least(0)]
    """Beta(alpha, alpha) gives the share of each of two blended images (arXiv:1710.09412); 0 = no mixup."""
    cutmix_alpha: Annotated[float, at_least(0)]
    """Beta(alpha, alpha) gives the area of one image pasted into another (arXiv:1905.04899); 0 = no cutmix."""
    mixup_prob: Annotated[float, between(0, 1)]
    """Probability that a micro-batch is mixed at all."""
    mixup_switch_prob: Annotated[float, between(0, 1)]
    """Probability of cutmix where both are on."""
    eval_scales: Annotated[list[float], each(at_least(1))]
    """Evaluation: average the probabilities of centre crops of the image enlarged by each factor ([1.0] = one crop)."""
    eval_flip: bool
    """Evaluation: average those of the mirrored image too."""
    eval_views: Annotated[int, at_least(1)]
    """Of clips: evaluation sees so many of a file, evenly from its start to its end; 1 = its middle (published: 4)."""
    eval_crops: Annotated[int, at_least(1)]
    """Of clips: and so many crops of each, evenly along the longer side; 1 = the centre (published: 3)."""

    implementation: ClassVar[str] = "swinv2_train.tasks.classify:ClassifyTask"
    scores: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(each for own in _TARGET_SCORES.values() for each in own))
    purpose: ClassVar[str] = "image classification"
    pipeline_tag: ClassVar[str] = "image-classification"
    transformers_class: ClassVar[str] = "AutoModelForImageClassification"

    def augmentations(self, data: DataConfig) -> list[str]:
        words = {
            f"RandAugment {self.rand_augment}": self.rand_augment,
            f"colours jittered by {self.color_jitter:g}": self.color_jitter,
            f"a box erased with probability {self.erasing_prob:g}": self.erasing_prob,
            f"mixup {self.mixup_alpha:g}": self.mixup_alpha,
            f"CutMix {self.cutmix_alpha:g}": self.cutmix_alpha,
            f"labels smoothed by {self.label_smoothing:g}": self.label_smoothing,
        }
        return [*super().augmentations(data), *(text for text, used in words.items() if used)]

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of the target."""
        return _TARGET_SCORES[self.target]

    @property
    def label_kind(self) -> str:
        """By the target."""
        return {"single": "label", "multilabel": "labels", "regression": "values"}[self.target]

    @property
    def label_rows(self) -> int:
        """As configured."""
        return self.num_classes

    @property
    def loss_name(self) -> str:
        """What it is trained by."""
        return TARGET_LOSSES[self.target][0] if self.loss == "auto" else self.loss

    @property
    def mixes(self) -> bool:
        """With mixup or cutmix on."""
        return self.mixup_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def label_classes(self) -> int | None:
        """As configured; numbers are no classes."""
        return None if self.target == "regression" else self.num_classes

    def identity(self) -> dict[str, Any]:
        """The head has a row per class or number, which means what the target says."""
        shaping = {"task.num_classes": self.num_classes, "task.target": self.target}
        if self.target == "regression":
            shaping |= {"task.value_mean": self.value_mean, "task.value_std": self.value_std}
        return shaping

    def check(self, config: Config) -> None:
        """There is something to tell apart, the target has what is asked for; mixup pairs the images of a batch."""
        if self.target == "single" and self.num_classes < 2:
            raise ConfigError(
                f"task.num_classes ({self.num_classes}) leaves nothing to tell apart: every image is right and the "
                "loss is 0; set it to the number of class folders, or choose task=simmim"
            )
        self._check_target(config)
        if not self.eval_scales:
            raise ConfigError("task.eval_scales is empty; name a scale: task.eval_scales=[1.0]")
        for key, value in (("rand_augment", self.rand_augment), ("color_jitter", self.color_jitter or None)):
            if value is not None and config.reads_values:
                raise ConfigError(
                    f"task.{key} ({value}) changes the colours of photographs of 3 x 8 bits, and images are values of "
                    f"{config.model.in_chans} bands here; set task.rand_augment=null task.color_jitter=0 (flips, "
                    "data.dihedral, crops, erasing, mixup and cutmix work for any)"
                )
        for key, does, off in (
            ("rand_augment", "is drawn for each image", "null"),
            ("color_jitter", "is drawn for each image", "0"),
            ("cutmix_alpha", "takes boxes out of images", "0"),
            ("erasing_prob", "takes boxes out of images", "0"),
        ):
            if getattr(self, key) and config.model.frames is not None:
                raise ConfigError(
                    f"task.{key} ({getattr(self, key)}) {does}, and model.frames ({config.model.frames}) asks for "
                    f"clips; set task.{key}={off}"
                )
        if self.eval_scales != [1.0] and config.model.frames is not None:
            raise ConfigError(
                f"task.eval_scales ({self.eval_scales}) is of images, and model.frames ({config.model.frames}) asks "
                "for clips; set task.eval_scales=[1.0], and task.eval_views or task.eval_crops for several views"
            )
        for key, count in (("eval_views", self.eval_views), ("eval_crops", self.eval_crops)):
            if count > 1 and config.model.frames is None:
                raise ConfigError(f"task.{key} ({count}) is of clips, and model.frames is null; set task.{key}=1")
        if self.mixes and config.train.micro_batch_size % 2:
            raise ConfigError(
                f"train.micro_batch_size ({config.train.micro_batch_size}) must be even, for mixup pairs the images of "
                "a micro-batch; change it, or set task.mixup_alpha=0 and task.cutmix_alpha=0"
            )

    def _check_target(self, config: Config) -> None:
        """What is set is of this target."""
        losses = TARGET_LOSSES[self.target]
        if self.loss_name not in losses:
            raise ConfigError(
                f"task.loss ({self.loss}) is not of task.target={self.target}, which is trained by "
                f"{', '.join(losses)}; set one of these, or auto"
            )
        if self.class_weights != "none" and self.target == "regression":
            raise ConfigError(
                f"task.class_weights ({self.class_weights}): numbers have no classes (task.target=regression); set "
                "task.class_weights=none"
            )
        if self.class_weights == "balanced" and is_pipe(config.data.shards):
            raise ConfigError(
                f"task.class_weights=balanced counts classes before the first step, and data.shards is a pipe "
                f"({config.data.shards}); name shards or a folder, or a file of weights"
            )
        if config.data.balanced and self.target != "single":
            raise ConfigError(
                f"data.balanced (true) gives each image's one class its share, and task.target is {self.target}; set "
                "data.balanced=false"
                + (", or task.class_weights=balanced in its place" if self.target == "multilabel" else "")
            )
        if self.target != "single" and config.probe.methods:
            raise ConfigError(
                f"probe.methods ({', '.join(config.probe.methods)}) compare single classes, and task.target is "
                f"{self.target}; set probe.methods=[]"
            )
        if self.target == "regression":
            wrong = {"task.label_smoothing": self.label_smoothing, "task.cutmix_alpha": self.cutmix_alpha}
            if given := {key: value for key, value in wrong.items() if value}:
                raise ConfigError(
                    f"{' and '.join(f'{key} ({value:g})' for key, value in given.items())}: numbers have no classes to "
                    "smooth over, and a part of an image has not a part of its numbers; with task.target=regression "
                    f"set {' '.join(f'{key}=0' for key in given)}"
                )
            if config.data.labels_columns is not None and len(config.data.labels_columns) != self.num_classes:
                raise ConfigError(
                    f"task.num_classes ({self.num_classes}) is the number of values, and data.labels_columns names "
                    f"{len(config.data.labels_columns)}; set task.num_classes={len(config.data.labels_columns)}"
                )
        for key in ("value_mean", "value_std"):
            values = getattr(self, key)
            if values is not None and self.target != "regression":
                raise ConfigError(f"task.{key} ({values}) is of task.target=regression alone; set task.{key}=null")
            if values is not None and len(values) != self.num_classes:
                raise ConfigError(
                    f"task.{key} has {len(values)} numbers for task.num_classes ({self.num_classes}); give one for each"
                )


@dataclass
class SegmentConfig(TaskConfig):
    num_classes: Annotated[int, at_least(2)]
    """Classes; labels of pixels run from 0 to num_classes - 1, behind reduce_zero_label."""
    ignore_index: Annotated[int, between(0, 65535)]
    """The label of pixels that neither train nor count."""
    reduce_zero_label: bool
    """Read 0 of the label images as ignore_index, and k as class k - 1 (ADE20K as downloaded)."""
    class_names: list[str] | None
    """What the classes are called in pictures, tables and exports, a name per class; null = by their numbers."""
    head_norm: Annotated[str, one_of(*HEAD_NORMS)]
    """Norm of the heads: layer (over channels), group, batch (one process) or sync_batch (of all ranks; published)."""
    map_norms: bool
    """Norms of the encoder's maps before the heads (published); false = raw maps, as transformers' UPerNet takes."""
    head_channels: Annotated[int, at_least(1)]
    """Channels of the UPerNet head (arXiv:1807.10221; published with Swin: 512)."""
    aux_channels: Annotated[int, at_least(0)]
    """Channels of the auxiliary head on the last map but one (256); 0 = no such head."""
    aux_weight: Annotated[float, positive()]
    """Weight of the auxiliary head's loss (0.4)."""
    dropout: Annotated[float, between(0, BELOW_1)]
    """Share of channels that is dropped before the classes, in both heads."""
    loss_denominator: Annotated[str, one_of("all", "valid")]
    """A loss is divided by all pixels (published; each image counts the same), or by those that are not ignored."""
    class_weights: Annotated[list[float] | None, each(at_least(0))]
    """What a pixel of each class counts in the loss, a number per class; null = 1."""
    resize_long_px: Annotated[int, at_least(1)]
    """Images are resized, their shape kept, to fit into resize_long_px x resize_short_px, in either direction."""
    resize_short_px: Annotated[int, at_least(1)]
    """The shorter of these two sides."""
    resize_scale: Annotated[list[float], low_high(math.inf)]
    """Training: both sides are multiplied by a number drawn between these; then model.img_size is cut out."""
    resize: Annotated[str, one_of("opencv", "antialias")]
    """Bilinear resize of images: opencv (published; no antialiasing) or antialias; labels take the nearest pixel's."""
    crop_max_category_share: Annotated[float, between(ABOVE_0, 1)]
    """Training: a crop of whose labelled pixels one class has this share (0.75) is drawn again, up to 10 times."""
    photometric: bool
    """Training: random brightness, contrast, saturation and hue, as published."""
    eval_mode: Annotated[str, one_of("whole", "slide")]
    """Evaluation: the whole resized image at once, or tiles of it, whose scores are averaged where they overlap."""
    eval_crop: Annotated[Any, size()]
    """slide: side of a tile in pixels, one number or [height, width]; null = model.img_size."""
    eval_stride: Annotated[Any, size()]
    """slide: pixels from one tile to the next, one number or [height, width]; null = two thirds of the tile."""
    eval_scales: Annotated[list[float], each(positive())]
    """Evaluation: sizes that are averaged, as factors of resize_long_px and resize_short_px ([1.0] = one)."""
    eval_flip: bool
    """Evaluation: average with the mirrored image too."""

    implementation: ClassVar[str] = "swinv2_train.tasks.segment:SegmentTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss", "val/miou", "val/macc", "val/aacc")
    purpose: ClassVar[str] = "semantic segmentation"
    pipeline_tag: ClassVar[str] = "image-segmentation"
    transformers_class: ClassVar[str] = "UperNetForSemanticSegmentation"

    def augmentations(self, data: DataConfig) -> list[str]:
        low, high = self.resize_scale
        sides = f"resized into {self.resize_long_px} x {self.resize_short_px} px times {low:g} to {high:g}, then cut"
        return [sides, *flips(data), *(["colours changed at random"] if self.photometric else [])]

    @property
    def pixel_classes(self) -> int:
        """As configured."""
        return self.num_classes

    @property
    def pixel_class_names(self) -> tuple[str, ...] | None:
        """As configured."""
        return None if self.class_names is None else tuple(self.class_names)

    def identity(self) -> dict[str, Any]:
        """What shapes the heads."""
        shaping = ("num_classes", "head_norm", "map_norms", "head_channels", "aux_channels")
        return {f"task.{key}": getattr(self, key) for key in shaping}

    def check(self, config: Config) -> None:
        """Labels, weights and tiles fit each other; batch statistics are of whole batches."""
        if self.ignore_index < self.num_classes:
            raise ConfigError(
                f"task.ignore_index ({self.ignore_index}) is one of the classes 0 to {self.num_classes - 1}; choose "
                f"{255 if self.num_classes <= 255 else 65535}"
            )
        if self.class_weights is not None and len(self.class_weights) != self.num_classes:
            raise ConfigError(
                f"task.class_weights has {len(self.class_weights)} numbers for task.num_classes ({self.num_classes}); "
                "give one per class, or null"
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"task.class_names has {len(self.class_names)} names for task.num_classes ({self.num_classes}); give "
                "one per class, or null"
            )
        if self.class_weights is not None and not any(self.class_weights):
            raise ConfigError("task.class_weights are all 0, which leaves nothing to learn; give one above 0, or null")
        if self.resize_short_px > self.resize_long_px:
            raise ConfigError(
                f"task.resize_short_px ({self.resize_short_px}) is more than task.resize_long_px "
                f"({self.resize_long_px}); exchange them"
            )
        if not self.eval_scales:
            raise ConfigError("task.eval_scales is empty; name a scale: task.eval_scales=[1.0]")
        tile, stride = self.tile_and_stride(config)
        if any(step > side for step, side in zip(stride, tile, strict=True)):
            raise ConfigError(
                f"task.eval_stride {stride} is more than the tile {tile} (task.eval_crop), which leaves gaps; lower it"
            )
        if self.photometric and config.reads_values:
            raise ConfigError(
                "task.photometric (true) changes the colours of photographs of 3 x 8 bits, and images are values of "
                f"{config.model.in_chans} bands here; set task.photometric=false"
            )
        if self.head_norm in BATCH_NORMS:
            self._check_batch_norm(config)

    def evaluated_at_once(self, config: Config) -> tuple[int, int, int]:
        """Tiles of one image, or all of the largest one."""
        if self.eval_mode == "slide":
            return config.train.micro_batch_size, *self.tile_and_stride(config)[0]
        scale = max(self.eval_scales)
        return 1, int(self.resize_short_px * scale), int(self.resize_long_px * scale)

    def check_ranks(self, ranks: int, accumulation_steps: int) -> None:
        """Batch statistics are of all images of a step, the same on every rank."""
        other = "choose task.head_norm=layer or group, which look at one image at a time"
        if self.head_norm == "batch" and ranks > 1:
            raise ConfigError(
                f"task.head_norm (batch) on {ranks} processes: each would keep statistics of its own images; set "
                f"task.head_norm=sync_batch, or {other}"
            )
        if self.head_norm in BATCH_NORMS and accumulation_steps > 1:
            raise ConfigError(
                f"task.head_norm ({self.head_norm}) with {accumulation_steps} micro-batches per step: statistics would "
                "be of one micro-batch alone; set train.micro_batch_size so that a step has one, or "
                f"{other}"
            )

    def tile_and_stride(self, config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (height, width) of a tile of the sliding window, and the steps between tiles, in pixels."""
        given = config.model.img_size if self.eval_crop is None else self.eval_crop
        tile = pair("task.eval_crop", given)
        third = (max(1, tile[0] * 2 // 3), max(1, tile[1] * 2 // 3))
        return tile, third if self.eval_stride is None else pair("task.eval_stride", self.eval_stride)

    def _check_batch_norm(self, config: Config) -> None:
        """Statistics are of images that count, and enough of them."""
        other = "choose task.head_norm=layer or group, which look at one image at a time"
        size = "micro_batch_size" if self.head_norm == "batch" else "global_batch_size"
        images = getattr(config.train, size)
        if images < 2:
            raise ConfigError(
                f"task.head_norm ({self.head_norm}) with train.{size} ({images}): the pooled map of one image has no "
                f"variance; raise it, or {other}"
            )
        if config.data.on_bad_sample == "replace":
            raise ConfigError(
                f"task.head_norm ({self.head_norm}) with data.on_bad_sample (replace): an image that stands in for a "
                f"damaged one would count in the statistics; set data.on_bad_sample=error, or {other}"
            )


COCO_SCORES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""COCO's twelve numbers: average precision and recall, in percent."""


@dataclass
class DetectConfig(TaskConfig):
    head: Annotated[str, one_of("mask_rcnn", "cascade_mask_rcnn")]
    """mask_rcnn (arXiv:1703.06870), or cascade_mask_rcnn: three stages that refine boxes (arXiv:1906.09756)."""
    masks: bool
    """Also find the mask of each object; False: boxes alone."""
    num_classes: Annotated[int, at_least(1)]
    """Classes of objects; background is none of them."""
    class_names: list[str] | None
    """What the classes are called in pictures, tables and exports, a name per class; null = by their numbers."""
    max_objects: Annotated[int, at_least(1)]
    """Objects of a training crop that are learnt from; of more, the largest (COCO has at most about 93 an image)."""
    box_head: Annotated[str | None, one_of("fc", "conv")]
    """fc (two fully connected layers) or conv (four convolutions and one); null = the published one of task.head."""
    head_norm: Annotated[str, one_of("layer", "group", "none")]
    """Norm behind the convolutions of box heads: layer (over channels), group or none."""
    head_channels: Annotated[int, at_least(1)]
    """Channels of the pyramid and of all heads (256)."""
    head_width: Annotated[int, at_least(1)]
    """Width of the fully connected layers (1024)."""
    class_agnostic: bool
    """A box is refined in the same way for every class; otherwise for each class in its own."""
    box_loss: Annotated[str | None, one_of("l1", "smooth_l1", "giou")]
    """Loss of refined boxes: l1, smooth_l1 or giou (arXiv:1902.09630); null = l1 of mask_rcnn, giou of the cascade."""
    interleaved: bool
    """HTC: a mask stage sees the boxes that the box stage before it has refined (arXiv:1901.07518)."""
    mask_flow: bool
    """HTC: a mask head takes the features of the one before it."""
    semantic_classes: Annotated[int, between(0, 255)]
    """HTC: a semantic branch of so many classes of pixels, learnt from label images (COCO-stuff: 183); 0 = none."""
    semantic_weight: Annotated[float, positive()]
    """Weight of its loss (0.2)."""
    level_proposals: Annotated[int, at_least(1)]
    """Training: the best anchors of each map that are thinned out to proposals (2000)."""
    proposals: Annotated[int, at_least(1)]
    """Training: boxes of an image that the heads choose from (mask_rcnn 1000, cascades 2000)."""
    eval_proposals: Annotated[int, at_least(1)]
    """Evaluation: both of these (1000)."""
    box_samples: Annotated[int, at_least(4)]
    """Boxes of an image that each box head learns from, at most a quarter of which hold an object (512)."""
    mask_samples: Annotated[int, at_least(1)]
    """Boxes of an image that each mask head learns from (128)."""
    detections: Annotated[int, at_least(1)]
    """Objects that are found in an image, at most (100)."""
    score_threshold: Annotated[float, between(0, 1)]
    """A detection has a higher score than this (0.05; HTC 0.001)."""
    nms_iou: Annotated[float, between(0, 1)]
    """Of detections of one class that overlap by a higher IoU, the best is left (0.5)."""
    soft_nms: Annotated[str, one_of("none", "linear", "gaussian")]
    """Or their scores are lowered (arXiv:1704.04503), by 1 - IoU or exp(-IoU^2 / 0.5); none = they are removed."""
    resize: Annotated[str, one_of("opencv", "antialias")]
    """Bilinear resize of images: antialias (as Pillow) or opencv (no antialiasing)."""
    min_object_px: Annotated[float, positive()]
    """Training: an object of which less than this is left in a crop, in either direction, is left out (1)."""
    resize_scale: Annotated[list[float], low_high(math.inf)]
    """Training: an image is fitted into model.img_size, times a number drawn between these; then that size is cut."""
    eval_long_px: Annotated[int, at_least(1)]
    """Evaluation: images are resized, their shape kept, to fit into eval_long_px x eval_short_px, either way round."""
    eval_short_px: Annotated[int, at_least(1)]
    """The shorter of these two sides."""
    eval_scales: Annotated[list[float], each(positive())]
    """Evaluation: sizes whose detections are joined, as factors of eval_long_px and eval_short_px ([1.0] = one)."""
    eval_flip: bool
    """Evaluation: join those of the mirrored image too."""

    implementation: ClassVar[str] = "swinv2_train.tasks.detect:DetectTask"
    takes_fitting_heads: ClassVar[bool] = True
    scores: ClassVar[tuple[str, ...]] = tuple(f"val/{kind}_{name}" for kind in ("box", "mask") for name in COCO_SCORES)

    @property
    def pixel_classes(self) -> int:
        """As configured: objects hold the numbers of their classes as label images do."""
        return self.num_classes

    @property
    def pixel_class_names(self) -> tuple[str, ...] | None:
        """As configured."""
        return None if self.class_names is None else tuple(self.class_names)

    def identity(self) -> dict[str, Any]:
        """What shapes the heads."""
        heads = ("head", "masks", "num_classes", "class_agnostic", "mask_flow", "semantic_classes")
        shaping = (*heads, "box_head", "head_norm", "head_channels", "head_width")
        return {f"task.{key}": getattr(self, key) for key in shaping}

    def check(self, config: Config) -> None:
        """Names, sizes and switches fit each other."""
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"task.class_names has {len(self.class_names)} names for task.num_classes ({self.num_classes}); give "
                "one per class, or null"
            )
        if not self.masks and (config.train.keep_best or "").startswith("val/mask_"):
            raise ConfigError(
                f"train.keep_best ({config.train.keep_best}) is of masks, and task.masks is false; set "
                "train.keep_best=val/box_ap, or task.masks=true"
            )
        if self.eval_short_px > self.eval_long_px:
            raise ConfigError(
                f"task.eval_short_px ({self.eval_short_px}) is more than task.eval_long_px ({self.eval_long_px}); "
                "exchange them"
            )
        if not self.eval_scales:
            raise ConfigError("task.eval_scales is empty; name a scale: task.eval_scales=[1.0]")
        if self.mask_samples > self.box_samples:
            raise ConfigError(
                f"task.mask_samples ({self.mask_samples}) is more than task.box_samples ({self.box_samples}), of which "
                "they are a part; lower it to a quarter of them"
            )
        for key in ("interleaved", "mask_flow"):
            if getattr(self, key) and not (self.masks and self.head == "cascade_mask_rcnn"):
                raise ConfigError(
                    f"task.{key} (true) is between the stages of masks: set task.head=cascade_mask_rcnn and "
                    f"task.masks=true, or task.{key}=false"
                )

    def evaluated_at_once(self, config: Config) -> tuple[int, int, int]:
        """One image, the largest."""
        scale = max(self.eval_scales)
        return 1, int(self.eval_short_px * scale), int(self.eval_long_px * scale)


@dataclass
class EvalSplitConfig:
    """One of data.eval_splits.  It is the user's own entry, so its default is here and not in conf/."""

    shards: Annotated[str, PATH]
    """Its shards, in data.shards' notation."""
    labels: Annotated[str | None, PATH] = None
    """JSON file of labels that takes precedence over the shards' own (docs/evaluation.md); null = their own."""


@dataclass
class MixSourceConfig:
    """One of data.mix.  It is the user's own entry, so its default is here and not in conf/."""

    shards: Annotated[str, PATH]
    """Its shards, in data.shards' notation; no pipe."""
    weight: Annotated[float, positive()] = 1.0
    """Its share of every batch is this over the sum of all sources'."""


@dataclass
class DataConfig:
    shards: Annotated[str, PATH]
    """Training shards: path or address (https://, ..) with {00..11} or *, or pipe:COMMAND, joined by ::, or a folder"""
    eval_shards: Annotated[str | None, PATH]
    """Evaluation shards, in the same notation; null = no evaluation."""
    eval_splits: dict[str, EvalSplitConfig]
    """Further splits by name, scored only by the evaluate command: +data.eval_splits.NAME.shards=PATTERN"""
    mix: dict[str, MixSourceConfig]
    """Sources in place of data.shards: +data.mix.NAME.shards=PATTERN +data.mix.NAME.weight=0.7 (docs/data.md)"""
    num_workers: Annotated[int | None, at_least(0)]
    """Loader processes per rank; 0 decodes in the training process; null: one fewer than the rank has cores, 1 to 8."""
    prefetch_batches: Annotated[int, at_least(1)]
    """Micro-batches each worker prepares ahead."""
    lanes: Annotated[int, at_least(1)]
    """Streams into which an epoch is cut; ranks read whole lanes."""
    window_shards: Annotated[int, at_least(1)]
    """Shards that are shuffled together in one lane."""
    balanced: bool
    """Give every class the same share of each epoch: images of rare ones come again (docs/data.md#balanced-classes)"""
    shuffle_buffer_images: Annotated[int, at_least(1)]
    """Undecoded images that each loader process of a pipe mixes; other shards are mixed by lanes and window_shards."""
    crop_scale: Annotated[list[float], low_high(1)]
    """Share of the image's area that a random crop covers: [low, high]."""
    crop_ratio: Annotated[list[float], low_high(math.inf)]
    """Width over height of a random crop: [low, high]."""
    eval_crop: Annotated[str, one_of("centre", "squash")]
    """centre (resize with the shape kept, cut out the centre) or squash (resize each side on its own, then cut)."""
    eval_crop_pct: Annotated[float, between(ABOVE_0, 1)]
    """The evaluation's centre crop as a share of the resized image's side (with centre: of its shorter one)."""
    interpolation: Annotated[str, one_of("bilinear", "bicubic")]
    """bilinear or bicubic."""
    hflip: Annotated[float, between(0, 1)]
    """Probability of a horizontal flip."""
    dihedral: bool
    """Turn each training image by 0, 90, 180 or 270 degrees and mirror half of them (no side is up, as from space)."""
    frame_stride: Annotated[int, at_least(1)]
    """Of clips (model.frames): frames of the file from one frame of a clip to the next (arXiv:2106.13230: 2)."""
    video_decoder: Annotated[str, one_of("pyav", "torchcodec")]
    """pyav, or torchcodec, which needs FFmpeg on the machine and does not tell damaged frames; both give the same."""
    mean: Annotated[list[float], each(finite())]
    """Mean of the normalisation per band, of scaled values (data.scale; photographs: pixels in 0..1)."""
    std: Annotated[list[float], each(positive())]
    """Standard deviation of the normalisation per band."""
    bands: Annotated[list[Any] | None, band_names()]
    """Bands of the files that the model sees, in its order: indices, or names (docs/data.md); null = all there are."""
    image_member: str | None
    """What follows KEY. in the name of the image, where that has several dots: input.npy; null = by its ending."""
    labels: Annotated[str | None, PATH]
    """CSV or Parquet file with the labels of the images, in place of their own (docs/data.md#labels-in-a-table)"""
    eval_labels: Annotated[str | None, PATH]
    """The same for data.eval_shards; null = data.labels."""
    labels_key: str | None
    """Column of data.labels that names the images, with or without their endings; null = the first."""
    labels_columns: list[str] | None
    """Columns of data.labels with the labels, in the order of the model's outputs; null = all others."""
    labels_separator: Annotated[str, non_empty()]
    """What stands between the classes of a cell where an image has several."""
    label_folders: Annotated[list[str] | None, folder_names()]
    """[images, annotations]: images/a/b.jpg has annotations/a/b.png (or columns called so); null = a/b.seg.png."""
    annotations: Annotated[str | None, folder_path()]
    """Objects of a folder's images, from that folder on: COCO json, or a folder of others' files; {name} = its name."""
    array_layout: Annotated[str, one_of("hwc", "chw")]
    """Axes of .npy and .npz arrays: hwc (height, width, bands) or chw."""
    scale: ScaleConfig
    """From the files' numbers to the values that mean and std are of."""
    nodata: Annotated[list[float] | None, each(number_or_nan())]
    """Numbers of the files that mean that nothing was measured, nan among them; null = every pixel counts."""
    max_nodata_fraction: Annotated[float, between(0, 1)]
    """An image of which a larger share (of all bands' pixels) is no data is a damaged sample (data.on_bad_sample)."""
    picture_bands: list[int] | None
    """Places in data.bands of the three bands that pictures show as RGB, or of one, as grey; null = the first three."""
    picture_all_bands: bool
    """SimMIM's pictures have a row for each band of the first image in place of a row for each image."""
    on_bad_sample: Annotated[str, one_of("error", "replace")]
    """error: a damaged sample stops the run and is named; replace: it is replaced, with loss weight 0."""
    max_bad_fraction: Annotated[float, between(0, 1)]
    """replace stops the run above this share of damaged samples, over all ranks and starts."""
    verify: bool
    """Compare every image that is read with its checksum in the shard's index: a flipped bit is a damaged sample."""
    cache_dir: Annotated[str | None, PATH]
    """Local folder for shards of an address, shared by all runs of a host; null = ~/.cache/swinv2_train/shards."""
    cache_gib: Annotated[float, positive()]
    """GiB that the shards in cache_dir may take; all shards that a host's ranks mix at a time must fit."""
    fetch_ahead_shards: Annotated[int, at_least(0)]
    """Shards of an address that each rank fetches before its lanes reach them."""
    fetch_stall_sec: Annotated[float, positive()]
    """A transfer without a byte for this many seconds is cut off and retried."""
    fetch_give_up_sec: Annotated[float, at_least(0)]
    """Seconds, over all attempts, after which a shard that cannot be fetched ends the run."""
    record_keys: bool
    """Write the sample keys of every step to RUN_DIR/sample_keys/."""
    source: Annotated[str | None, PATH]
    """Folder or archive of the demo's images; null = the data set's own sources."""


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


@dataclass
class LogConfig:
    wandb: Annotated[str, one_of("offline", "online", "disabled")]
    """offline (files, for wandb sync), online (offline where the server does not answer) or disabled."""
    wandb_project: str
    """Project under which wandb files the run."""
    wandb_name: str | None
    """Name of the wandb run; null = the run directory's name."""
    wandb_artifacts: Annotated[list[str], each(one_of(*ARTIFACTS))]
    """What wandb keeps as artifacts at the run's end: pictures (the task's), weights (of the last step)."""
    tensorboard: bool
    """Write TensorBoard event files to RUN_DIR/tensorboard/."""
    progress: Annotated[str, one_of("auto", "bar", "lines", "none")]
    """auto (a bar on a terminal, lines elsewhere), bar, lines or none."""


@dataclass
class RuntimeConfig:
    num_threads: Annotated[int | None, at_least(1)]
    """CPU threads per rank; null = cores / ranks on this host."""
    stop_after_sec: Annotated[float | None, positive()]
    """Seconds after which the run saves, ends with exit code 3 and can be resumed; null = no limit."""
    process_group_timeout_sec: Annotated[int, at_least(1)]
    """A collective that waits longer than this ends the run."""
    hang_timeout_sec: Annotated[float | None, at_least(1)]
    """A micro-batch, optimizer step or wait for data longer than this ends the run, with all stacks; null = never."""
    gc_every_steps: Annotated[int | None, at_least(1)]
    """Steps between Python's garbage collections, on all ranks at the same step; null = left to Python."""
    deterministic: bool
    """Refuse GPU operations that may sum in another order each time (docs/resume.md); slower where others stand in."""
    profile: bool
    """Write a trace of a few steps to RUN_DIR/profile/ (docs/profiling.md)."""
    profile_steps: Annotated[list[int], first_last(MOST_TRACED, "a trace of more is too large to open")]
    """[first, last] step to trace, counted from this start; the very first steps allocate and compile."""
    profile_all_ranks: bool
    """Trace every rank; otherwise rank 0 alone."""


@dataclass
class ProbeConfig:
    methods: Annotated[list[str], each(one_of(*PROBE_SCORES))]
    """Probes of the frozen encoder's mean-pooled features: knn, linear, both, or [] = none."""
    every_steps: Annotated[int | None, at_least(1)]
    """Steps between probes during training, and one at the end; null = at the end only."""
    before_first_step: bool
    """Also probe the weights that a new run starts from; the report sets these scores beside the last ones."""
    shards: Annotated[str | None, PATH]
    """Labelled images that the probes are fitted on, in data.shards' notation; null = data.shards."""
    eval_shards: Annotated[str | None, PATH]
    """Labelled images that the probes are scored on; null = data.eval_shards."""
    knn_neighbours: Annotated[int, at_least(1)]
    """Neighbours that vote (arXiv:1805.01978; DINO's usual choice: 20)."""
    knn_temperature: Annotated[float, positive()]
    """A neighbour's vote is exp(cosine similarity / this)."""


@dataclass
class Config:
    seed: Annotated[int, between(0, 2**63 - 1)]
    """Seed of everything random."""
    run_dir: Annotated[str, directory(), PATH]
    """Directory of the run; the same command with the same run_dir resumes it."""
    train: TrainConfig
    """Length of the run, batches, and what happens between steps."""
    model: ModelConfig
    """The encoder and how it computes."""
    task: TaskConfig
    """What is trained; task=NAME chooses the keys."""
    data: DataConfig
    """Images: where they are, in which order they are read, how they are cropped."""
    optim: OptimConfig
    """AdamW and the learning rate."""
    engine: EngineConfig
    """How a step is computed on several ranks."""
    probe: ProbeConfig
    """Quality of the frozen encoder's features, without fine-tuning."""
    log: LogConfig
    """What is told, and to whom."""
    runtime: RuntimeConfig
    """The processes: threads, time limits, traces."""
    hardware: HardwareConfig
    """Used by the planner and by the memory warning at the start of training."""
    plan: PlanConfig
    """The plan command alone."""

    @property
    def reads_values(self) -> bool:
        """Whether images are arrays of the files' own numbers; otherwise they are photographs of 3 x 8 bits."""
        data, scale = self.data, self.data.scale
        scaled = scale.factor is not None or scale.offset != 0 or scale.clip is not None
        return self.model.in_chans != 3 or data.bands is not None or data.nodata is not None or scaled


PROBE_SCORES = {
    "knn": ("probe/knn_top1", "probe/knn_top5"),
    "linear": ("probe/linear_top1", "probe/linear_top5"),
}
"""What each of probe.methods measures of the encoder's features, in percent."""


def averaged_score(name: str) -> str:
    """The name of a score for the EMA of the weights (optim.ema_decay): val_ema/top1 for val/top1."""
    return name.replace("val/", "val_ema/", 1)


def lower_is_better(name: str) -> bool:
    """Whether a score is a loss or an error."""
    return name.endswith(("loss", "mae", "rmse"))


ARTIFACTS = ("pictures", "weights")
"""What wandb may keep besides the numbers."""

TASKS: dict[str, type[TaskConfig]] = {
    "simmim": SimMIMConfig,
    "classify": ClassifyConfig,
    "segment": SegmentConfig,
    "detect": DetectConfig,
}
"""The tasks by name: a line each.  What else is known of one stands in its class and in its implementation."""


SPLITS, MIX = "data.eval_splits.", "data.mix."
"""Below them the user's own names begin."""
OWN_ENTRIES: dict[str, tuple[str, type]] = {SPLITS: ("split", EvalSplitConfig), MIX: ("source", MixSourceConfig)}
"""What is below each: what it is called, and its keys."""
