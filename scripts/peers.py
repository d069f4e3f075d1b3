"""Importing the implementations that tests and benchmarks compare with.

Each leans on torchvision, which is often absent or of another build than torch, but not for its SwinV2.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


def import_timm() -> ModuleType:
    """timm, the real one; a missing torchvision gets a stand-in while it is imported.

    timm takes image transforms, data sets and one norm from torchvision, none of which its SwinV2 uses.
    """
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    elif "timm" not in sys.modules:
        finder = _StandIns()
        sys.meta_path.append(finder)
        try:
            import timm
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]  # or others would take torchvision for installed
    import timm

    return timm


def import_transformers() -> ModuleType:
    """transformers, which imports torchvision where it is installed."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    import transformers

    return transformers


def import_torchvision() -> ModuleType:
    """torchvision, the real one, without what describes its compiled operators to torch.

    Beside another build of torch those operators cannot be loaded, and describing them fails; SwinV2 uses none.
    """
    described = "torchvision._meta_registrations"
    if "torchvision" not in sys.modules:
        sys.modules[described] = ModuleType(described)
    import torchvision

    return torchvision


class _StandIns(MetaPathFinder, Loader):
    """Finds torchvision and all below it, with every attribute that is asked for."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name) if name != "FrozenBatchNorm2d" else type(name, (), {})
