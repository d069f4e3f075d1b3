"""Triton's interpreter without what it does over and over: half to two thirds of its time.

It carries a kernel out by numpy, operation by operation, and none of that is changed here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def quicken(monkeypatch: pytest.MonkeyPatch, overflows: bool) -> None:
    """For the length of a test.

    overflows: whether every sum and product of whole numbers is also taken in 64 bits, to see that it is no other one:
    a third of the time.  A kernel on a card knows nothing of the kind.
    """
    monkeypatch.setattr(interpreter, "_patch_lang", _Once(interpreter._patch_lang))
    monkeypatch.setattr(interpreter, "_get_np_dtype", _Kept(interpreter._get_np_dtype))
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=overflows))


class _Kept:
    """numpy's dtype of a Triton type, which is otherwise looked up in a table made anew for each question."""

    def __init__(self, look_up: Any) -> None:
        self.look_up, self.found = look_up, {}  # type: ignore[var-annotated]

    def __call__(self, kind: Any) -> Any:
        name = kind.scalar.name
        if name not in self.found:
            self.found[name] = self.look_up(kind)
        return self.found[name]


class _Once:
    """Puts the interpreter's functions into the language's modules once a launch, not once a function that is called
    in it: a thousand times a launch, each time over all names of these modules."""

    def __init__(self, patch: Any) -> None:
        self.patch = patch
        self.in_force: set[int] = set()

    def __call__(self, function: Any) -> Any:
        modules = {id(each) for each in function.__globals__.values() if each is tl or each is tl.core}
        if modules <= self.in_force:  # called by a kernel, which nobody asks to put anything back
            return None
        scope = self.patch(function)
        self.in_force |= modules
        restore = scope.restore

        def ended() -> None:
            restore()
            self.in_force.clear()

        scope.restore = ended
        return scope
