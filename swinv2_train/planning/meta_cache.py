"""What operations return on the meta device, computed once for equal arguments.

Many operations work out their result's shape in Python there (0.3 to 1 ms); a chunked attention calls the same few tens
of thousands of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def signature(value: Any, tensors: list[Tensor]) -> Any:
    """What decides on an operation's result, hashable; the tensors found on the way are appended to tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.is_meta)
    if isinstance(value, (list, tuple)):
        return tuple([signature(each, tensors) for each in value])
    return (type(value), value)  # 1, 1.0 and True are equal


class Results:
    """Calls operations on meta tensors, or makes again what an equal call returned."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._writes: dict[Any, bool | None] = {}

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], key: Any) -> Any:
        """func(*args, **kwargs), where key is the signature of all three."""
        writes = self._kind(func)
        if writes is None:
            return func(*args, **kwargs)
        if key in self._known:
            return args[0] if writes else _make(self._known[key])
        result = func(*args, **kwargs)
        description = _describe(result)
        if func is torch.ops.aten._unsafe_view.default:  # its schema does not say that it is a view
            self._writes[func] = None
        elif description is not None:
            self._known[key] = description
        return result

    def _kind(self, func: Any) -> bool | None:
        """False for an operation with results of its own, True for one that writes into its first argument and returns
        that, None for views and others, which are always called."""
        if func not in self._writes:
            schema = func._schema
            aliases = [result.alias_info for result in schema.returns]
            if not schema.is_mutable:
                self._writes[func] = False if not any(aliases) else None
            else:
                first = schema.arguments[0].alias_info
                self._writes[func] = True if len(aliases) == 1 and first and first.is_write and aliases[0] else None
        return self._writes[func]


def _describe(result: Any) -> Any:
    """Enough to make the result again; None where it has contents."""
    if isinstance(result, Tensor):
        return (result.shape, result.stride(), result.dtype) if result.is_meta else None
    if isinstance(result, (list, tuple)):
        parts = [None if each is None else _describe(each) for each in result]
        lost = any(part is None and each is not None for part, each in zip(parts, result, strict=True))
        return None if lost else parts
    return None


def _make(description: Any) -> Any:
    if isinstance(description, list):
        return tuple(None if part is None else _make(part) for part in description)
    shape, stride, dtype = description
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
