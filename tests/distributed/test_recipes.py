"""The recipes of docs/recipes.md from a folder to the end: their commands run as pasted, on a toy of a model."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from swinv2_train.config.command_line import compose_source
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.commands import OWN_SESSION, finish
from tests.support.images import tiff
from tests.support.processes import forked_command

RECIPES = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
WRITTEN_DOWN = r"""
said() { printf '%s\0' "$@"; printf '\n\0'; }
python() { said "$@"; }
torchrun() { said "$@"; }
"""


def commands(heading: str) -> list[list[str]]:
    """The words of each command below a heading, as bash makes them, with the page's own lines for a toy."""
    toy = re.search(r'^    GPUS=1 MORE="[^"]*"', RECIPES, re.MULTILINE)
    section = re.search(rf"^## {re.escape(heading)}$(.*?)^## ", RECIPES, re.MULTILINE | re.DOTALL)
    assert toy is not None and section is not None
    block = re.search(r"    GPUS=8 MORE=\n\n((?:    .*\n)+)", section[1])
    assert block is not None
    script = re.sub("^    ", "", f"{toy[0]}\n{block[1]}", flags=re.MULTILINE)
    done = subprocess.run(["/bin/bash", "-c", WRITTEN_DOWN + script], capture_output=True, text=True, check=True)
    return [words.split("\0")[:-1] for words in done.stdout.split("\n\0") if words]


def run(words: list[str]) -> str:
    """A command of one process in this directory; its output."""
    place = words.index("-m")
    code, output = finish(forked_command(words[place + 1], *words[place + 2 :], **OWN_SESSION))
    assert code == 0, output
    return output


def test_a_folder_of_12_band_tiffs_becomes_a_classifier_in_five_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    level = np.linspace(300, 9000, 12)

    def write(path: Path, brightness: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = (brightness * level * rng.uniform(0.5, 1.5, (40, 48, 12))).astype(np.uint16)
        image[:8, :8] = 0  # not measured
        path.write_bytes(tiff(image, compression="zlib"))

    for number in range(8):
        write(Path("chips", f"{number % 2}", f"{number}.tif"), 1.0)
    for split in ("train", "val"):
        for number in range(8):
            write(Path("labelled", split, ("forest", "water")[number % 2], f"{number}.tif"), (0.5, 2.0)[number % 2])
    five = commands("From a folder of 12-band TIFFs to a fine-tuned classifier, in five commands")
    assert len(five) == 5
    for words in five[:4]:
        run(words)
    line = json.loads(run(five[4]).strip().splitlines()[-1])
    assert line["images"] == 8 and 0 <= line["val/top1"] <= 100
    pretrained, finetuned = (compose_source([f"run_dir=runs/{name}"], ())[0] for name in ("pretrain", "finetune"))
    for config in (pretrained, finetuned):
        assert config.data.nodata == [0] and config.model.in_chans == 12
        # 0.5 to 1.5 times each band's level, evenly; the zeros in the corner are not measured
        assert config.data.mean == pytest.approx(level, rel=0.02)
        assert config.data.std == pytest.approx(level * np.sqrt(1 / 12), rel=0.05)
    assert read_metrics(Path("runs/pretrain"))[-1]["step"] == 4
    assert finetuned.task.init_from == "runs/pretrain"
