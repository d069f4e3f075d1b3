"""Images per second of swinv2-predict and swinv2-embed, beside plain timm loops at the same work, in one run.

    python -m benchmarks.predict_throughput [--images 64] [--rounds 5] [--size tiny] [--batch 16]

The same weights, folder of JPEGs (500 x 375 pixels), crop and batches, float32, as many threads.  timm's
loop is what its users write: create_transform for the evaluation, a DataLoader, the model, softmax and topk, a row an
image in a list; for features forward_features and the pooled vector into one array.  Ours are the commands' own parts:
loader, model, rows in the journal, array on disk.  Images are decoded in the process of the model on both sides, so its
CPU time holds all of the work.  The four take turns; what counts is the median over the rounds of the ratio within a
round, by the clock and by CPU time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform

from swinv2_train import embed
from swinv2_train.data.loading.listed import ListedLoader
from swinv2_train.data.sources.base import open_unlabelled
from swinv2_train.inference import LoadedModel, load
from swinv2_train.inference.journal import Journal
from swinv2_train.inference.sweep import ModelRequest
from swinv2_train.inference.vectors import Vectors
from swinv2_train.predict import PredictRequest, RowWriter
from swinv2_train.weights import save_weights

SIZE_PX, WINDOW = 256, 8
Turn = Callable[[], None]


def write_images(folder: Path, count: int) -> None:
    """JPEGs with detail at every scale, as photographs have."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image = np.zeros((375, 500, 3))
        for cells in (4, 16, 64):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((500, 375))
            image += np.asarray(coarse) / 3
        content = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(content, "JPEG", quality=90)
        (folder / f"{number:05d}.jpg").write_bytes(content.getvalue())


class Files(torch.utils.data.Dataset[Any]):
    """What a user of timm writes for a folder without labels."""

    def __init__(self, folder: Path, transform: Any) -> None:
        self.paths, self.transform = sorted(folder.iterdir()), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        return self.transform(Image.open(self.paths[number]).convert("RGB"))


def timm_turns(folder: Path, model: Any, data: Any, batch: int) -> dict[str, Turn]:
    """Its classes and its features of all images."""
    transform = create_transform(
        SIZE_PX, is_training=False, interpolation=data.interpolation, mean=data.mean, std=data.std,
        crop_pct=data.eval_crop_pct,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Files(folder, transform), batch)

    @torch.inference_mode()
    def predict() -> None:
        rows = []
        for images in loader:
            best = model(images).softmax(dim=1).topk(5)
            rows += list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    @torch.inference_mode()
    def features() -> None:
        np.concatenate([model.forward_head(model.forward_features(i), pre_logits=True).numpy() for i in loader])

    return {"predict": predict, "embed": features}


def our_turns(folder: Path, scratch: Path, model: LoadedModel, batch: int) -> dict[str, Turn]:
    """The commands' passes over all images."""
    source, turns = open_unlabelled(str(folder), "images"), iter(range(1_000_000))

    def swept(transform: Any, rows: Callable[[Any], Any], journal: Journal) -> None:
        loader = ListedLoader(source, model.config.data, transform, batch, [(0, source.num_samples)])
        with torch.no_grad():
            for each in loader:
                journal.add(each.first, rows(each))
        journal.close()

    def begun(name: str) -> Journal:
        journal = Journal(scratch / f"{name}{next(turns)}")
        journal.begin({}, "out")
        journal.open(0, 0)
        return journal

    request = PredictRequest(ModelRequest(str(folder), str(scratch / "a.csv")))
    predictions = RowWriter(model, model.ask(5), request, source)
    vectors = Vectors.build("pooled", model.config)
    arrays = embed.EmbedRequest(ModelRequest(str(folder), str(scratch)))
    shapes = vectors.shapes(model.task)
    embed.make_arrays(arrays, Journal(scratch), shapes, source.num_samples)
    writer = embed.VectorWriter(model, vectors, arrays, shapes, source.num_samples)
    return {
        "predict": lambda: swept(model.transform, predictions.rows, begun("p")),
        "embed": lambda: swept(vectors, writer.rows, begun("e")),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    theirs = timm.create_model(f"swinv2_{given.size}_window{WINDOW}_{SIZE_PX}", num_classes=1000).eval()
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "images"), Path(name, "scratch")
        folder.mkdir()
        scratch.mkdir()
        write_images(folder, given.images)
        weights = scratch / f"swinv2_{given.size}_patch4_window{WINDOW}_{SIZE_PX}.pth"
        ours = swin_v2_of(theirs, weights, given.size)
        turns = {
            "timm": timm_turns(folder, theirs, ours.config.data, given.batch),
            "ours": our_turns(folder, scratch, ours, given.batch),
        }
        check_alike(folder, theirs, ours)
        report(turns, given)


def swin_v2_of(theirs: Any, path: Path, size: str) -> LoadedModel:
    """Ours with timm's weights, by way of a file."""
    from swinv2_train.models import swin_v2
    from swinv2_train.weights import load_weights

    timm_file = path.with_name("timm.safetensors")
    torch.save({"state_dict": theirs.state_dict()}, timm_file.with_suffix(".pth"))
    model = swin_v2(size, num_classes=1000, img_size=SIZE_PX, window_size=WINDOW)
    load_weights(model, timm_file.with_suffix(".pth"))
    save_weights(model, path, "microsoft")
    return load(path, "data.num_workers=0", "data.interpolation=bicubic", device="cpu")


@torch.inference_mode()
def check_alike(folder: Path, theirs: Any, ours: LoadedModel) -> None:
    """Both say the same of one input."""
    images = torch.randn(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(images), ours.module(images), rtol=1e-3, atol=1e-4)


def report(turns: dict[str, dict[str, Turn]], given: argparse.Namespace) -> None:
    """Take turns and print a line of each kind of work."""
    for kinds in turns.values():
        for turn in kinds.values():
            turn()  # compiles, and reads the files once
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        for kind in ("predict", "embed"):
            for side in ("timm", "ours"):
                started, used = time.perf_counter(), time.process_time()
                turns[side][kind]()
                spent = (time.perf_counter() - started, time.process_time() - used)
                seen.setdefault((kind, side), []).append(spent)
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, SwinV2 {given.size} "
        f"{SIZE_PX} px, {given.images} images a turn in batches of {given.batch}, {given.rounds} rounds\n"
    )
    print("| work | timm, images/s | ours, images/s | ratio by the clock | ratio by CPU time |\n|---|---|---|---|---|")
    for kind in ("predict", "embed"):
        speeds = [given.images / statistics.median(wall for wall, _ in seen[kind, side]) for side in ("timm", "ours")]
        ratios = [
            statistics.median(
                theirs[place] / ours[place] for theirs, ours in zip(seen[kind, "timm"], seen[kind, "ours"], strict=True)
            )
            for place in (0, 1)
        ]
        print(f"| {kind} | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
