"""Installs what a card's machine lacks of the checkout's pinned needs, or has in another version, beside its own.

    python scripts/first_contact_wheels.py WHEELS SITE

WHEELS is the folder of scripts/pack_first_contact.py, SITE a folder that then comes first in PYTHONPATH.  What is
compiled for the machine's CUDA (KEPT) is never replaced: its versions must lie within the ranges of setup.cfg.  Prints
one JSON line.  Exit code 1 where something that is needed stays missing, or in a version that is not meant.

Needs Python and pip alone.
"""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("torch", "torchvision")
NEEDS = "needs.txt"  # name==version, one a line, of all that the packer wants installed


def wheel_of(folder: Path, name: str) -> Path | None:
    """The wheel of a package, whose file name may write it otherwise."""
    plain = name.lower().replace("-", "_").replace(".", "_")
    found = (path for path in folder.glob("*.whl") if path.name.partition("-")[0].lower().replace(".", "_") == plain)
    return next(found, None)


def version_here(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def kept_ranges() -> dict[str, str]:
    """The version ranges of KEPT in setup.cfg, by name."""
    project = configparser.ConfigParser()
    project.read(ROOT / "setup.cfg")
    requires = project["options"]["install_requires"].split()
    return {name: next(each for each in requires if each.startswith(f"{name}>="))[len(name) :] for name in KEPT}


def install(folder: Path, site: Path) -> dict[str, Any]:
    """What was there, what is now, and what is wrong."""
    needs = dict(line.split("==") for line in (folder / NEEDS).read_text().split())
    here = {name: version_here(name) for name in (*needs, *KEPT)}
    if version_here("packaging") is None and (wheel := wheel_of(folder, "packaging")) is not None:
        sys.path.insert(0, str(wheel))  # Python alone: a wheel can be imported as it lies
    from packaging.specifiers import SpecifierSet
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    problems, wheels, replaced, tags = [], [], {}, set(sys_tags())
    for name, allowed in kept_ranges().items():
        if here[name] is None or not SpecifierSet(allowed).contains(here[name] or "", prereleases=True):
            problems.append(f"{name} is {here[name] or 'missing'}, setup.cfg wants {allowed}; it is not replaced")
    for name, version in needs.items():
        if here[name] == version:
            continue
        wheel = wheel_of(folder, name)
        if wheel is None:
            problems.append(f"{name} is {here[name] or 'missing'}, and {folder} has no wheel of {version}")
        elif not parse_wheel_filename(wheel.name)[3] & tags:
            problems.append(f"{name} is {here[name] or 'missing'}, and {wheel.name} is for another Python or machine")
        else:
            wheels.append(str(wheel))
            replaced[name] = [here[name], version]
    if wheels:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
        ]
        done = subprocess.run([*pip, "--target", str(site), *wheels], check=False, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"pip: {done.stderr.strip()[-1000:]}")
    kept = {name: here[name] for name in KEPT}
    as_pinned = len(needs) - sum(here[name] != version for name, version in needs.items())
    return {"good": not problems, "problems": problems, "kept": kept, "as_pinned": as_pinned, "installed": replaced}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder, site = map(Path, arguments)
    if not (folder / NEEDS).is_file():
        print(
            f"{folder} has no {NEEDS}: run scripts/pack_first_contact.py, and name its folder as PACK", file=sys.stderr
        )
        return 1
    found = install(folder, site)
    print(json.dumps(found))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
