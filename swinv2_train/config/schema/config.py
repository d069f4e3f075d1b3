"""The whole configuration, and what every task has: they know each other, for a task's rules ask the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from swinv2_train.config.rules import PATH, between, directory, word_or_indices
from swinv2_train.config.schema.data import DataConfig
from swinv2_train.config.schema.engine import EngineConfig
from swinv2_train.config.schema.log import LogConfig
from swinv2_train.config.schema.model import ModelConfig
from swinv2_train.config.schema.optim import OptimConfig
from swinv2_train.config.schema.planner import HardwareConfig, PlanConfig
from swinv2_train.config.schema.probe import ProbeConfig
from swinv2_train.config.schema.runtime import RuntimeConfig
from swinv2_train.config.schema.train import TrainConfig


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
