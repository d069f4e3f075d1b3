"""task=classify: one class, several, or numbers of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.rules import (
    ABOVE_0,
    BELOW_1,
    PATH,
    at_least,
    between,
    each,
    finite,
    length,
    matching,
    one_of,
    positive,
    zero_or_at_least,
)
from swinv2_train.config.schema.config import Config, TaskConfig
from swinv2_train.config.schema.data import DataConfig, is_pipe

RAND_AUGMENT = matching(
    r"rand(-(m\d+|n\d+|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|tweights|t3a|t3aw))*",
    "rand and sections such as m9, n2, p0.5, mstd0.5, mmax10, inc1, tweights, t3a or t3aw, joined by '-'",
    "the official policy is rand-m9-mstd0.5-inc1",
)
"""What timm reads of a policy's name; it would ignore anything else silently."""

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
