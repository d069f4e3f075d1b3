"""Tasks whose classes are of pixels or objects: what their keys num_classes and class_names say."""

from __future__ import annotations

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.schema.config import Config, TaskConfig


class PixelTaskConfig(TaskConfig):
    """No dataclass itself: both keys stand at their place among those of each task, with its own range and meaning."""

    num_classes: int
    class_names: list[str] | None

    @property
    def pixel_classes(self) -> int:
        """As configured: objects hold the numbers of their classes as label images do."""
        return self.num_classes

    @property
    def pixel_class_names(self) -> tuple[str, ...] | None:
        """As configured."""
        return None if self.class_names is None else tuple(self.class_names)

    def check(self, config: Config) -> None:
        """A name for each class."""
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"task.class_names has {len(self.class_names)} names for task.num_classes ({self.num_classes}); give "
                "one per class, or null"
            )
