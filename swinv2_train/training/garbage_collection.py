"""Python's garbage collector, held to the steps at which all ranks collect.

Left alone it runs whenever enough objects have been made, on each rank at another time, and every other rank waits for
the one that collects.  Reference counts free nearly everything at once in any case.
"""

from __future__ import annotations

import gc
from typing import Self


class ManualGC:
    """A context in which nothing is collected but by after_step.

    every_steps: how often; None leaves Python's collector as it is.  What exists at its beginning (modules, the model,
    the engine) is set aside and not looked at inside, but where the process has set things aside of its own: those
    could not be told apart at the end.
    """

    def __init__(self, every_steps: int | None) -> None:
        self.every_steps = every_steps
        self._was_enabled = self._freezes = True

    def __enter__(self) -> Self:
        if self.every_steps is not None:
            self._was_enabled = gc.isenabled()
            self._freezes = gc.get_freeze_count() == 0
            gc.collect()
            if self._freezes:
                gc.freeze()
            gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect, if step number `step` is a multiple of every_steps."""
        if self.every_steps is not None and step % self.every_steps == 0:
            gc.collect()

    def __exit__(self, *exc_info: object) -> None:
        if self.every_steps is not None:
            if self._freezes:
                gc.unfreeze()
            if self._was_enabled:
                gc.enable()
