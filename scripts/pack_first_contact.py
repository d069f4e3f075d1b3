"""What scripts/first_contact.sh needs beside the checkout: wheels of all that is pinned, and shards.

    python scripts/pack_first_contact.py [--out .first_contact] [--python 3.12] [--images 2000] [--source PATH]

Wheels are downloaded by pip, in the versions of constraints.txt, for Linux on x86-64 and the Python named: of this
project's requirements, of pytest for tests/gpu, and of what these require, as their installed metadata says.  Packages
that are published as sources alone are built here, and must come out as wheels of Python alone.  What is compiled for
the machine's CUDA (PRESENT) is never taken along.  Then every requirement of every wheel, and of this project, is
compared with the versions of the wheels and of PRESENT: one that they do not meet is an error.  The shards are the
first images of CIFAR-10 (scripts/fetch_cifar10.py, --source as there); where it cannot be had, cut-outs of the
photographs that scikit-image brings, if that is installed.

Exit code 1 where the wheels are not closed or the folder is larger than --limit-mb, 2 where there are no images.
"""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from scripts.fetch_cifar10 import CLASSES, FetchError, encode_png, find_archive, read_cifar10
from scripts.first_contact_wheels import NEEDS
from swinv2_train.data.packing import Entry, pack

ROOT = Path(__file__).resolve().parents[1]
BUILT = ("deepspeed", "fairscale", "antlr4-python3-runtime")  # published as sources
TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
NOT_NEEDED = ("wandb",)  # of this project, where log.wandb is disabled
NEVER = ("torch", "triton", "nvidia-", "cuda-")
PRESENT = {"torch": "2.11", "torchvision": "0.26", "triton": "3.6"}
"""What the machine with the card must have, and the oldest version that serves.  Its torch sees the card."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def pinned(name: str) -> str:
    """name==version, as constraints.txt has it.  Raises LookupError."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line and canonicalize_name(line.partition("==")[0]) == canonicalize_name(name):
            return line.strip()
    raise LookupError(f"constraints.txt does not pin {name}")


def own_requirements() -> list[Requirement]:
    """Those of this project, as setup.cfg has them, without NOT_NEEDED."""
    project = configparser.ConfigParser()
    project.read(ROOT / "setup.cfg")
    own = [Requirement(text) for text in project["options"]["install_requires"].split("\n") if text]
    return [requirement for requirement in own if requirement.name not in NOT_NEEDED]


def applies(requirement: Requirement, python: str) -> bool:
    """Whether it is one of that Python's on Linux, extras aside."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def needs(python: str) -> list[str]:
    """Canonical names of what is to be there with its pinned version: all requirements, PRESENT and NEVER aside."""
    found: set[str] = set()
    asked = [*(requirement.name for requirement in own_requirements()), *TESTS]
    while asked:
        name = canonicalize_name(asked.pop())
        if name in found or name in PRESENT or name.startswith(NEVER):
            continue
        found.add(name)
        requirements = map(Requirement, metadata.requires(name) or [])
        asked += [requirement.name for requirement in requirements if applies(requirement, python)]
    return sorted(found)


def fetch_wheels(folder: Path, python: str) -> list[Path]:
    """All wheels, freshly, and the list of what is to be installed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = needs(python)
    pip = [sys.executable, "-m", "pip"]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [*pip, "download", "-q", "--no-deps", *target, *platforms, "-d", str(folder)]
    subprocess.run([*command, *(pinned(name) for name in names if name not in BUILT)], check=True)
    command = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, *map(pinned, BUILT)], check=True)
    (folder / NEEDS).write_text("\n".join(map(pinned, names)) + "\n")
    return sorted(folder.glob("*.whl"))


def open_requirements(wheels: list[Path], python: str) -> list[str]:
    """What is wrong with this set for that Python: wheels of another, requirements that its versions do not meet."""
    found: dict[str, str] = {}
    wanted: list[tuple[str, Requirement]] = []
    problems = []
    version = tuple(map(int, python.split(".")))
    served = {*cpython_tags(version, platforms=PLATFORMS), *compatible_tags(version, platforms=PLATFORMS)}
    for wheel in wheels:
        name, exact, _, tags = parse_wheel_filename(wheel.name)
        found[name] = str(exact)
        if not tags & served:
            problems.append(f"{wheel.name} is not for Python {python}")
        if name.startswith(NEVER):
            problems.append(f"{wheel.name} must not be taken along")
        with zipfile.ZipFile(wheel) as file:
            headers = next(each for each in file.namelist() if each.endswith(".dist-info/METADATA"))
            requires = HeaderParser().parsestr(file.read(headers).decode()).get_all("Requires-Dist")
        wanted += [(name, Requirement(text)) for text in requires or []]
    wanted += [("swinv2_train", requirement) for requirement in own_requirements()]
    for name, requirement in wanted:
        needed = canonicalize_name(requirement.name)
        if not applies(requirement, python):
            continue
        there = found.get(needed, PRESENT.get(needed))
        if there is None:
            problems.append(f"{name} needs {requirement}, which is neither among the wheels nor present")
        elif not requirement.specifier.contains(there, prereleases=True):
            whose = "the wheel is" if needed in found else "the machine may have"
            problems.append(f"{name} needs {requirement}, {whose} {there}")
    return problems


def photographs() -> list[tuple[str, np.ndarray]]:
    """Cut-outs of 32 px of scikit-image's own photographs, named by picture.  Raises FetchError."""
    if importlib.util.find_spec("skimage") is None:
        raise FetchError(
            "CIFAR-10 could not be fetched, and scikit-image, whose photographs would do, is not installed"
        )
    from skimage import data

    cut = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = getattr(data, name)()
        for top in range(0, picture.shape[0] - 63, 16):
            for left in range(0, picture.shape[1] - 63, 16):
                cut.append((name, picture[top : top + 64 : 2, left : left + 64 : 2, :3]))
    return cut


def write_shards(folder: Path, images: int, raw: Path, source: Path | None) -> str:
    """Training and test images; returns what they are.  Raises FetchError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    counts = {"train": images, "test": max(1, images // 5)}
    try:
        splits = read_cifar10(find_archive(raw, source))
        classes: list[str] = list(CLASSES)
        what = "CIFAR-10"
    except FetchError as error:
        if source is not None:
            raise
        print(error, file=sys.stderr)
        cut = photographs()
        classes, what = sorted({name for name, _ in cut}), "scikit-image's photographs, cut"
        order = np.random.default_rng(0).permutation(len(cut))
        pixels, labels = np.stack([cut[i][1] for i in order]), [classes.index(cut[i][0]) for i in order]
        share = len(cut) // 6
        splits = {"train": (pixels[share:], labels[share:]), "test": (pixels[:share], labels[:share])}
    for split, count in counts.items():
        entries = [
            Entry(f"{split}_{number:05d}", "png", int(label), partial(encode_png, image))
            for number, (image, label) in enumerate(zip(*(each[:count] for each in splits[split]), strict=True))
        ]
        pack(entries, str(folder / split), 1_000, 0, classes)
    return what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".first_contact")
    parser.add_argument("--python", default="3.12", help="of the machine with the card")
    parser.add_argument("--images", type=int, default=2_000, help="of training; a fifth as many of test")
    parser.add_argument("--source", type=Path, help="file or folder that holds CIFAR-10")
    parser.add_argument("--raw", type=Path, default=ROOT / "data" / "cifar10" / "raw", help="where archives are kept")
    parser.add_argument("--limit-mb", type=float, default=60)
    options = parser.parse_args()
    wheels = fetch_wheels(options.out / "wheels", options.python)
    problems = open_requirements(wheels, options.python)
    try:
        what = write_shards(options.out / "shards", options.images, options.raw, options.source)
    except FetchError as error:
        print(f"pack_first_contact: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file()) / 1e6
    if size > options.limit_mb:
        problems.append(f"{size:.1f} MB are more than {options.limit_mb:g}; take fewer --images")
    for problem in problems:
        print(f"pack_first_contact: {problem}", file=sys.stderr)
    print(f"{options.out}: {len(wheels)} wheels for Python {options.python}, shards of {what}, {size:.1f} MB in all")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
