"""What the machine lacks is no damage: it stops a run whatever data.on_bad_sample says, and names what was lacking.

Each test takes something away from a process of its own: memory, open files, a permission.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from swinv2_train import make_shards
from swinv2_train.config import MachineError
from swinv2_train.config.command_line import guarded
from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.sample import again, lacking
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.folder import open_folder
from swinv2_train.data.sources.pipe import open_stream
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from tests.support.images import encoded, image_bytes
from tests.support.loaders import CONFIG, PixelsAndDraw, Transform, train_loader
from tests.support.processes import printed_by
from tests.support.shard_files import samples

SIDE = 2000
LARGE = Image.fromarray(
    np.kron(np.random.default_rng(0).integers(1, 255, (SIDE // 20, SIDE // 20, 3)), np.ones((20, 20, 1))).astype("u1")
)
REPLACE = replace(CONFIG, on_bad_sample="replace", max_bad_fraction=1.0)


def short_of_memory() -> list[bytearray]:
    """From now on this process can have 6 MiB more, and no 11 in one piece; what it holds for that is returned."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (10 << 20),) * 2)
    spare, held, size = mmap.mmap(-1, 6 << 20), list[bytearray](), 64 << 20
    while size >= 4 << 20:
        try:
            held.append(bytearray(size))  # also what was freed and not given back
        except MemoryError:
            size //= 2
    spare.close()  # not by free(), which may keep it for itself, where files are to be mapped
    return held


def outcome(read: Callable[[], object]) -> str:
    try:
        read()
    except Exception as error:  # noqa: BLE001  the kind of error is what is asked for
        return f"{type(error).__name__}: {error}"
    return "read"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_process_short_of_memory_calls_no_healthy_image_damaged(kind):
    """12 MB of pixels where no 11 are left; each decoder says so in its own way, some as if it were damage."""
    picture = LARGE.quantize(16, dither=Image.Dither.NONE) if kind == "GIF" else LARGE
    data = encoded(picture, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    decode_image(image_bytes(0, kind), "x")  # what is imported late is there

    def body() -> None:
        held = short_of_memory()
        print(outcome(lambda: decode_image(data, "x")))
        held.clear()

    said = printed_by(body)
    assert said.startswith("MachineError: ") and "no memory is left; give the run more memory" in said


def test_damage_stays_damage_where_there_is_room():
    data = encoded(LARGE, "PNG")
    with pytest.raises(DecodeError):
        decode_image(data[:-1000], "png")


def test_the_policy_for_damaged_samples_does_not_take_a_lack_of_memory(tmp_path):
    """With `replace` the run went on without the images, and said nothing of the memory."""
    write_shards([(f"k{i}", encoded(LARGE, "PNG"), "png", 0) for i in range(4)], str(tmp_path / "t"), 4)
    loader = train_loader(open_manifest(f"{tmp_path}/t-*.tar"), REPLACE, global_batch_size=4)

    def body() -> None:
        held = short_of_memory()
        print(outcome(lambda: next(iter(loader))))
        held.clear()

    said = printed_by(body)
    # of the index where a worker's heap leaves even that nothing
    assert said.startswith(
        (f"MachineError: {tmp_path}/t-000000.tar: sample 'k", f"MachineError: {tmp_path}/t-000000.tar.idx")
    )
    assert "give the run more memory" in said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_open_files_that_run_out_are_no_damage(tmp_path, workers):
    """A folder's images were replaced one after the other: "cannot be read: Too many open files"."""
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    source = open_folder(str(tmp_path))

    class Greedy(Transform):
        """Takes every file that may still be open, as something else in the process would."""

        def __call__(self, image, targets, rng):
            row = super().__call__(image, targets, rng)
            if not workers or get_worker_info() is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            return row

    def body() -> None:
        loader = train_loader(
            source, replace(REPLACE, num_workers=workers), transform=Greedy(False), global_batch_size=4
        )
        print(outcome(lambda: next(iter(loader))), flush=True)
        os._exit(0)  # there are no files left to end in an orderly way

    said = printed_by(body)
    assert said.startswith(f"MachineError: {tmp_path}/") and "Too many open files; raise the limit (ulimit -n)" in said


def test_a_folder_that_cannot_be_listed_for_want_of_files_is_not_to_be_mended(tmp_path):
    (tmp_path / "1.png").write_bytes(image_bytes(0))

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        print(outcome(lambda: open_folder(str(tmp_path))), flush=True)
        os._exit(0)

    assert printed_by(body).startswith(f"MachineError: {tmp_path}/ cannot be listed: Too many open files")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take a permission from itself and give it back")
def test_a_permission_that_is_missing_is_no_damage(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
        (tmp_path / f"{i}.png").chmod(0o600)
    source = open_folder(str(tmp_path))

    def body() -> None:
        loader = train_loader(source, REPLACE, transform=Transform(False), global_batch_size=4)
        os.seteuid(65534)
        print(outcome(lambda: next(iter(loader))))

    said = printed_by(body)
    assert "MachineError: " in said and "Permission denied; give this user the permission to read it" in said


def test_a_pipe_that_cannot_be_started_is_the_machines_fault(tmp_path):
    write_shards(samples(8), str(tmp_path / "t"), 8)
    stream = open_stream(f"pipe:cat {tmp_path}/t-000000.tar")
    loader = build_train_loader(stream, REPLACE, PixelsAndDraw(), 0, 4, 4, 0, 1, 0)

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
        print(outcome(lambda: next(iter(loader))), flush=True)
        os._exit(0)

    assert printed_by(body).startswith("MachineError: a batch cannot be made: Too many open files")


def test_a_file_is_tried_again_where_the_machine_could_not_just_now(tmp_path):
    """All files of the process are open for a moment: what gives one back is another thread."""
    path = tmp_path / "x"
    path.write_bytes(b"content")

    def body() -> None:
        path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        threading.Timer(0.3, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))).start()
        print(again(path.read_bytes))

    assert printed_by(body) == "b'content'\n"


def test_what_is_gone_is_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        again((tmp_path / "nowhere").read_bytes)
    assert lacking(FileNotFoundError(errno.ENOENT, "gone")) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "no memory is left"),
        (OSError("out of memory error when reading image file"), "no memory is left"),
        (ValueError("Insufficient memory (case 4)"), "no memory is left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "no memory is left"),
        (OSError(errno.ENOSPC, "full"), "make room on the disk"),
        (OSError(errno.EIO, "bad"), "look to the disk or the network behind it"),
        (OSError(errno.ESTALE, "stale"), "look to the disk or the network behind it"),
        (OSError("image file is truncated"), None),
        (ValueError("no known format"), None),
        (IsADirectoryError(errno.EISDIR, "a folder"), None),
    ],
)  # fmt: skip
def test_what_was_lacking_is_told_from_damage(error, said):
    found = lacking(error)
    assert found is None if said is None else said in (found or "")


def test_a_full_disk_ends_packing_with_one_message_and_leaves_nothing(tmp_path):
    """Exit code 1, not 2: the input is right."""
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for i in range(40):
        (source / f"{i}.png").write_bytes(image_bytes(i, size=(64, 64)))

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # EFBIG where a full disk gives ENOSPC
        print(make_shards.run([str(source), str(out / "t")]))

    assert printed_by(body).endswith("1\n") and not out.exists()


def test_a_command_ends_with_one_line_and_exit_code_1(capsys):
    def command() -> int:
        raise MachineError("x.png cannot be read: Too many open files; raise the limit (ulimit -n)")

    assert guarded(command) == 1
    assert capsys.readouterr().err == "error: x.png cannot be read: Too many open files; raise the limit (ulimit -n)\n"


def test_the_error_passes_between_processes():
    assert str(pickle.loads(pickle.dumps(MachineError("x: no memory is left")))) == "x: no memory is left"
