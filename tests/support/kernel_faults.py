"""The compiled kernel of CPUs with a fault: at chosen windows its C functions raise, as compilers and drivers do."""

from __future__ import annotations

import ctypes
from typing import Any

from swinv2_train.models.kernels import cpu_attention


class BrokenLibrary:
    """Stands where the kernel's library stood, and calls it everywhere but at the fault."""

    def __init__(self, library: Any, which: str, window: tuple[int, int], error: Exception, first: int) -> None:
        self._library, self._which, self._window, self._error = library, which, window, error
        self._left = first
        """Calls at the fault's place that are still good."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(kind: int, sizes: Any, *rest: Any) -> Any:
            given = ctypes.cast(sizes, ctypes.POINTER(cpu_attention._Sizes)).contents
            if name.endswith(self._which) and (given.rows, given.cols) == self._window:
                self._left -= 1
                if self._left < 0:
                    raise self._error
            return function(kind, sizes, *rest)

        return call


def break_library(
    monkeypatch: Any, which: str, window: tuple[int, int], error: Exception | None = None, first: int = 0
) -> None:
    """From now on the C function of which ("forward", "backward") raises for this window, after first good calls."""
    library, problem = cpu_attention._load()
    broken = BrokenLibrary(library, which, window, error or RuntimeError("no such instruction"), first)
    monkeypatch.setattr(cpu_attention, "_load", lambda: (broken, problem))
