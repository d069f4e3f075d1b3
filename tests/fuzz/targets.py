"""What is fuzzed: all kinds of files (target.py) but images (images.py)."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from swinv2_train import make_shards
from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.checkpoint.random_states import restore_random_states
from swinv2_train.checkpoint.saved_state import read_state
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import load_run_config
from swinv2_train.config.shown import shown
from swinv2_train.data.shards.manifest import MANIFEST_NAME, index_shard
from swinv2_train.data.shards.tar_index import load_index
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.monitoring.signs import read_ranks
from swinv2_train.report.page import page_of
from swinv2_train.report.run_record import read_run_record
from swinv2_train.status import read_status, status_text
from swinv2_train.weights import match_weights, read_weights, trained_windows
from tests.fuzz.annotations import annotation_targets
from tests.fuzz.images import image_targets, read_values
from tests.fuzz.lists import list_targets
from tests.fuzz.mutation import TEXT_TOKENS
from tests.fuzz.target import Target
from tests.support.images import encoded, image_bytes
from tests.support.one_rank import ONE
from tests.support.weights_samples import classifier, state_of

OLD_RUN = Path(__file__).parents[1] / "golden" / "old_run" / "run"
_CHECKPOINT = Path("checkpoints", "step_00000002")


def targets() -> list[Target]:
    """All of them; makes their seeds."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            *_weights(Path(folder)), *_archives(Path(folder)), *image_targets(), *_shards(Path(folder)), *_runs(),
            *_saved_data_sets(Path(folder)), *list_targets(), *annotation_targets(),
        ]  # fmt: skip


# --- weights


def _read_all(path: Path) -> None:
    weights = read_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in _model_state().items()}
    matched, report = match_weights(weights, shapes, head="auto")
    for name in matched:
        matched[name]
    assert len(str(report)) < 10_000


@functools.cache
def _model_state() -> dict[str, torch.Tensor]:
    return state_of(classifier(depths=(1, 1), num_heads=(1, 2), img_size=32, pretrained_window_sizes=(0, 0)))


def _weights(folder: Path) -> list[Target]:
    state = _model_state()
    save_file(state, folder / "a.safetensors")
    safe = (folder / "a.safetensors").read_bytes()
    save_file({f"net.{name}": value for name, value in state.items()}, folder / "b.safetensors")
    pickles = []
    for content, zipped in (({"model": state}, True), (state, False), ({"state_dict": state, "epoch": 3}, True)):
        torch.save(content, folder / "a.pth", _use_new_zipfile_serialization=zipped)
        pickles.append((folder / "a.pth").read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-1.safetensors")}
    config = {"model_type": "swinv2", "image_size": 32, "patch_size": 4, "window_size": 4, "depths": [1, 1],
              "pretrained_window_sizes": [0, 0]}  # fmt: skip

    def in_file(name: str) -> Callable[[bytes, Path], None]:
        def run(data: bytes, place: Path) -> None:
            (place / name).write_bytes(data)
            _read_all(place / name)

        return run

    def in_index(data: bytes, place: Path) -> None:
        (place / "model-1.safetensors").write_bytes(safe)
        (place / "model.safetensors.index.json").write_bytes(data)
        _read_all(place)

    def in_config(data: bytes, place: Path) -> None:
        (place / "config.json").write_bytes(data)
        trained_windows(place)

    names = tuple(name.encode() for name in list(state)[:20])
    return [
        Target("weights: safetensors", [safe, (folder / "b.safetensors").read_bytes()], in_file("a.safetensors"),
               (*TEXT_TOKENS, *names)),
        Target("weights: torch files", pickles, in_file("a.pth"), names),
        Target("weights: index", [json.dumps(index).encode()], in_index, TEXT_TOKENS),
        Target("weights: config.json", [json.dumps(config).encode()], in_config, TEXT_TOKENS),
    ]  # fmt: skip


# --- archives


def _archives(folder: Path) -> list[Target]:
    images = {f"{name}/{i}.png": image_bytes(i, size=(8, 8)) for name in ("ape", "cat") for i in range(2)}
    classes = encoded(np.arange(64, dtype=np.uint8).reshape(8, 8))
    pairs = {
        name: content for i in range(2)
        for name, content in ((f"k{i}.cls", b"1"), (f"k{i}.png", images["ape/0.png"]), (f"k{i}.seg.png", classes))
    }  # fmt: skip
    zips, tars = [], []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in images.items():
                archive.writestr(name, data)
        zips.append(buffer.getvalue())
    for kind, before, members in (
        (tarfile.USTAR_FORMAT, "", images), (tarfile.GNU_FORMAT, f"{'é' * 60}/", images),
        (tarfile.PAX_FORMAT, f"{'é' * 60}/", images), (tarfile.USTAR_FORMAT, "", pairs),
    ):  # fmt: skip
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(before + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        tars.append(buffer.getvalue())

    def pack(ending: str) -> Callable[[bytes, Path], None]:
        def run(data: bytes, place: Path) -> None:
            (place / f"a.{ending}").write_bytes(data)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                code = make_shards.run([str(place / f"a.{ending}"), str(place / "out" / "t")])
            assert code in (0, 2) and len(said.getvalue()) < 10_000, (code, said.getvalue()[:1000])
            if code:
                raise ConfigError(said.getvalue())

        return run

    def read_tar(data: bytes, place: Path) -> None:
        (place / "t-000000.tar").write_bytes(data)
        manifest = open_manifest(str(place / "t-*.tar"))
        reader = manifest.open_reader()
        for index in range(manifest.counts[0]):
            with contextlib.suppress(ConfigError):
                reader.read(0, index)
        reader.close()

    tokens = (b"ustar\x0000", b"ustar  \x00", b"L", b"x", b"30 path=../../%OUTSIDE%\n", b"\x00" * 512, b"../")
    return [
        Target("archives: zip, packed", zips, pack("zip"), (b"PK\x01\x02", b"PK\x03\x04", b"../", b"..\\")),
        Target("archives: tar, packed", tars, pack("tar"), tokens),
        Target("archives: tar, read", tars, read_tar, tokens),
    ]


# --- shards


def _shards(folder: Path) -> list[Target]:
    samples = [(f"k{i}", image_bytes(i, size=(8, 8)), "png", i % 2) for i in range(4)]
    write_shards(samples, str(folder / "s" / "t"), 2)
    files = {path.name: path.read_bytes() for path in (folder / "s").iterdir()}
    index_name = next(name for name in files if name.endswith("000000.tar.idx.npy"))

    def placed(name: str) -> Callable[[bytes, Path], None]:
        def run(data: bytes, place: Path) -> None:
            for each, content in files.items():
                (place / each).write_bytes(content)
            (place / name).write_bytes(data)
            manifest = open_manifest(str(place / "t-*.tar"))
            reader = manifest.open_reader()
            for shard, count in enumerate(manifest.counts):
                for index in range(count):
                    with contextlib.suppress(ConfigError):
                        reader.read(shard, index)
            reader.close()

        return run

    def index_alone(data: bytes, place: Path) -> None:
        (place / "a.npy").write_bytes(data)
        try:
            load_index(str(place / "a.npy"), 10_240).tolist()
        except ValueError as error:
            raise ConfigError(error) from error

    index_shard(str(folder / "s" / "t-000000.tar"), folder / "a.npy")
    return [
        Target("manifests", [files[MANIFEST_NAME]], placed(MANIFEST_NAME), TEXT_TOKENS),
        Target("indexes", [files[index_name]], placed(index_name), (b"'descr'", b"|O", b"<i8", b"(", b"True")),
        Target("indexes alone", [(folder / "a.npy").read_bytes()], index_alone, (b"|O", b"S9", b"(", b"fortran")),
    ]


# --- runs


def _runs() -> list[Target]:
    def replaced(name: Path, read: Callable[[Path], object]) -> Callable[[bytes, Path], None]:
        def run(data: bytes, place: Path) -> None:
            run_dir = Path(shutil.copytree(OLD_RUN, place / "run"))
            (run_dir / name).parent.mkdir(exist_ok=True)
            (run_dir / name).write_bytes(data)
            read(run_dir)

        return run

    def weights(run_dir: Path) -> None:
        read_state(find_checkpoint(run_dir))
        found = read_weights(run_dir)
        for name in found:
            found[name]

    def engine(run_dir: Path) -> None:  # as one does who made the sizes in COMPLETE agree
        found = read_weights_of(run_dir / _CHECKPOINT)
        for name in found:
            found[name]

    def rng(run_dir: Path) -> None:
        problem = restore_random_states(run_dir / _CHECKPOINT / "rng", ONE, 0)
        if problem is not None:
            raise problem

    def status(run_dir: Path) -> None:
        text = status_text(read_status(run_dir))
        assert shown(text, len(text), lines=True) == text

    def page(run_dir: Path) -> None:  # without the picture of the curves, which takes a second
        assert "\x1b" not in page_of(read_run_record(run_dir))

    def state(run_dir: Path) -> None:
        read_state(run_dir / _CHECKPOINT)

    def seed(name: Path) -> list[bytes]:
        return [(OLD_RUN / name).read_bytes()]

    sign = {"host": "h", "pid": 1, "state": "failed", "reason": "x", "doing": "y", "doing_since": 1.0, "step": 1,
            "updated_at": 2.0}  # fmt: skip
    whole = json.dumps({**sign, "world_size": 1, "heartbeat_sec": 1.0, "total_steps": 5, "loss": 1.5}).encode()
    rank = json.dumps({**sign, "rank": 0, "moves": 1, "place": None}).encode()
    json_files = {
        "checkpoints: COMPLETE": (_CHECKPOINT / "COMPLETE", weights),
        "checkpoints: state.json": (_CHECKPOINT / "state.json", state),
        "checkpoints: engine.json": (_CHECKPOINT / "engine" / "engine.json", engine),
        "checkpoints: a rank's file": (_CHECKPOINT / "engine" / "rank_0000.safetensors", engine),
        "checkpoints: random states": (_CHECKPOINT / "rng" / "rank_0000.json", rng),
        "checkpoints: generators": (_CHECKPOINT / "rng" / "rank_0000.safetensors", rng),
        "configs": (Path("config.yaml"), lambda run_dir: load_run_config(run_dir, ["seed=3"])),
        "runs: environment.json": (Path("environment.json"), page),
        "runs: metrics.jsonl": (Path("metrics.jsonl"), page),
    }
    made = [Target(name, seed(path), replaced(path, read), TEXT_TOKENS) for name, (path, read) in json_files.items()]
    made.append(Target("runs: status.json", [whole], replaced(Path("status.json"), status), TEXT_TOKENS))
    made.append(Target("runs: a sign", [rank], replaced(Path("health", "rank_00000.json"), read_ranks), TEXT_TOKENS))
    return made


def read_weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from swinv2_train.checkpoint import read_checkpoint_weights

    return read_checkpoint_weights(checkpoint)


# --- saved data sets


def _saved_data_sets(folder: Path) -> list[Target]:
    from datasets import Array3D, ClassLabel, Dataset, Features, Image

    columns = {
        "images": (Image(), [{"bytes": image_bytes(i, size=(8, 8)), "path": f"{i}.png"} for i in range(8)]),
        "arrays": (Array3D((8, 6, 4), "int16"), [[[[i, 0, -i, 9]] * 6] * 8 for i in range(8)]),
    }
    files = {}
    for kind, (feature, cells) in columns.items():
        features = Features({"img": feature, "class": ClassLabel(names=["ape", "cat"])})
        made = Dataset.from_dict({"img": cells, "class": [i % 2 for i in range(8)]}, features=features)
        made.save_to_disk(str(folder / kind))
        files[kind] = {path.name: path.read_bytes() for path in (folder / kind).iterdir()}

    def placed(kind: str, name: str) -> Callable[[bytes, Path], None]:
        def run(data: bytes, place: Path) -> None:
            for each, content in files[kind].items():
                (place / each).write_bytes(content)
            (place / name).write_bytes(data)
            source = open_source(str(place))
            reader = source.open_reader()
            for index in range(source.num_samples):
                with contextlib.suppress(ConfigError):
                    sample = reader.read(0, index)
                    if sample.extension == "npy":
                        read_values(sample.image)
            reader.close()

        return run

    def target(title: str, kind: str, name: str, tokens: tuple[bytes, ...] = TEXT_TOKENS) -> Target:
        return Target(f"data sets: {title}", [files[kind][name]], placed(kind, name), tokens)

    (arrow,) = (name for name in files["images"] if name.endswith(".arrow"))
    return [
        target("Arrow", "images", arrow, (b"%OUTSIDE%", b"bytes", b"path")),
        target("Arrow, arrays", "arrays", arrow, (b"halffloat", b"int16", b"list", b"arrow.extension")),
        target("state.json", "images", "state.json"),
        target("info", "images", "dataset_info.json"),
        target("info of arrays", "arrays", "dataset_info.json"),
    ]
