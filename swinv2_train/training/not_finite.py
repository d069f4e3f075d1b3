"""Which layer's output, and which gradient, is the first of a step that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class FirstNotFinite:
    """What the hooks of :func:`watching` have seen on this rank, in words; None while everything was finite."""

    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self.images: list[str] = []
        """Keys of the images whose rows of that output are not finite; empty where its rows are not images."""
        self._batch: dict[str, Any] = {}
        self._number = 0

    def marked(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches as they are; what is seen until the next is asked for belongs to this one."""
        for self._number, self._batch in enumerate(batches, start=1):
            yield self._batch

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.forward is None and any(map(_not_finite, _tensors((args, kwargs)))):
            within = name.rpartition(".")[0]
            what = f"what {within or 'the model'} computes before {name}" if name else "the input of the model"
            self._note(what, _tensors((args, kwargs)))

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, name))  # type: ignore[no-untyped-call]
        if self.forward is None and any(map(_not_finite, _tensors(output))):
            self._note(f"the output of {name or 'the model'} ({type(module).__name__})", _tensors(output))

    def _note(self, what: str, tensors: Iterator[Tensor]) -> None:
        self.forward = f"micro-batch {self._number}: {what}"
        keys = self._batch.get("keys", [])
        for tensor in tensors:
            if _not_finite(tensor) and tensor.ndim and len(tensor) == len(keys):
                bad = ~tensor.detach().flatten(1).isfinite().all(1) if tensor.ndim > 1 else ~tensor.detach().isfinite()
                self.images = [key for key, is_bad in zip(keys, bad.tolist(), strict=True) if is_bad]
                return

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if self.backward is None and _not_finite(gradient):
            self.backward = f"micro-batch {self._number}: the gradient of the output of {name or 'the model'}"


@contextmanager
def watching(module: nn.Module) -> Iterator[FirstNotFinite]:
    """Look at every input, output and output's gradient of every layer of a module, in the order of their making.

    Each look waits for the device: for a step that is repeated, not for training.
    """
    found, handles = FirstNotFinite(), []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(partial(found._before, name), with_kwargs=True))
        handles.append(child.register_forward_hook(partial(found._after, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _not_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.detach().isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
