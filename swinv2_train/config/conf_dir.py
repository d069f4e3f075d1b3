"""Where the YAML files of conf/ are, for those who read them with Hydra and without."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """The configuration tree: conf/ beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
