"""Every command of the README and the documents is pasted into a real bash, and what would be started is checked.

Programs stand in for those of the commands and write down what they are given, so that the shell's own part (quotes,
braces, variables, line ends) is tried on every line.  What they were given is then composed and parsed as the commands
themselves do; no training, download or scheduler is started.
"""

from __future__ import annotations

import configparser
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision

from swinv2_train import embed, evaluate, export, look, make_shards, plan, predict, stats, weights
from swinv2_train.config import ConfigError
from swinv2_train.config.load import config_yaml
from swinv2_train.data.shards.pattern import expand_commands
from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.initial import on_meta
from swinv2_train.weights import save_weights
from tests.support.configs import composed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HISTORY = ("CHANGELOG.md", "LOG.md")
DOCUMENTS = [path for folder in (".", "docs") for path in (ROOT / folder).glob("*.md") if path.name not in HISTORY]
COMMAND = re.compile(
    r"(?:\$ )?(?:[A-Z_]+=\S*|first=|(?:\.venv/bin/)?python |torchrun |sbatch |srun |make |pip |git |wandb |printf "
    r"|pgrep |kill |tail |swinv2-[a-z-]+ |launch/|\$TRAIN |[\"+]*(?:data|model|train|task|plan)\.[\w.]+=)"
)
"""Begins a line that somebody pastes; other blocks show what is printed."""
CELL = re.compile(r"^\| .* \| `((?:python |torchrun |swinv2-)[^`]+)` \|$")
"""A row of a table that ends with a command alone."""
PLACEHOLDERS = {
    "experiment=NAME": "experiment=simmim_base_192",
    "experiment=...": "experiment=simmim_base_192",
    "=DIR": "=runs/new",
    "=...": "=runs/new",
    "RUN_DIR": "runs/pretrain",
    "_batch_size=M": "_batch_size=8",
    "step_seconds=X": "step_seconds=1.5",
    "URL_OF_THIS_REPOSITORY": "https://host/repository",
    "PID": "4242",
}
STAND_IN = """#!/bin/bash
printf '%s\\0' "${{0##*/bin/}}" "$@" >> '{record}'
printf '\\n\\0' >> '{record}'
echo 1
"""
NOT_A_PROGRAM = """
command_not_found_handle() {{ printf '%s\\0' "$@" >> '{record}'; printf '\\n\\0' >> '{record}'; }}
kill() {{ '{folder}/bin/kill' "$@"; }}
"""
"""What is no program is the arguments of one; kill is bash's own."""
PROGRAMS = (
    "python", ".venv/bin/python", "torchrun", "sbatch", "srun", "make", "pip", "git", "wandb", "pgrep", "kill", "tail",
    "swinv2-status", "swinv2-doctor", "swinv2-make-shards", "swinv2-predict", "swinv2-embed", "swinv2-look",
    "launch/torchrun.sh",
)  # fmt: skip


def pasted(document: Path) -> list[str]:
    """The lines of a document that are commands, continued ones with what follows them."""
    found: list[str] = []
    continued = False
    for line in document.read_text().splitlines():
        in_table = CELL.search(line)
        text = in_table[1] if in_table else line[4:] if line.startswith("    ") else ""
        if text and continued:
            found[-1] += f"\n{text}"
        elif COMMAND.match(text):
            found.append(text.removeprefix("$ "))
        else:
            continue
        continued = found[-1].endswith("\\") or found[-1].count('"') % 2 == 1
    return found


def started(document: Path, folder: Path) -> list[list[str]]:
    """The words of every program that the commands of a document start, as bash makes them."""
    script = "\n".join(pasted(document))
    for placeholder, value in PLACEHOLDERS.items():
        script = script.replace(placeholder, value)
    facts = {"record": folder / "record", "folder": folder}
    for program in PROGRAMS:
        path = folder / program if "/" in program else folder / "bin" / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.format(**facts))
        path.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", NOT_A_PROGRAM.format(**facts) + script], cwd=folder, capture_output=True, text=True,
        check=False, env={"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip
    assert "syntax error" not in done.stderr and "unexpected EOF" not in done.stderr, done.stderr
    record = (folder / "record").read_text() if (folder / "record").exists() else ""
    return [words.split("\0")[:-1] for words in record.split("\n\0") if words]


def check(words: list[str], document: Path) -> None:
    """Compose and parse what a program was given, as the program would."""
    program, arguments = words[0].removeprefix("./"), [word for word in words[1:] if word != "..."]
    if "=" in program:
        program, arguments = "overrides", [words[0], *arguments]
    if "-m" in arguments and program in ("python", ".venv/bin/python", "torchrun", "srun"):
        place = arguments.index("-m")
        program, arguments = arguments[place + 1], arguments[place + 2 :]
    if program == "sbatch":
        place = next(number for number, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[place]).is_file()
        program, arguments = "swinv2_train.train", arguments[place + 1 :]
    if program.endswith("launch/torchrun.sh"):
        program = "swinv2_train.train"
    doubled = [word.partition("=")[0] for word in arguments if "=" in word]
    assert len(set(doubled)) == len(doubled), f"{document.name}: a key comes twice in {words}"
    if program in ("swinv2_train.train", "overrides"):
        defaults = ["run_dir=runs/new", "data.shards=images"]
        given = {word.partition("=")[0].lstrip("+") for word in arguments}
        config = composed([*(each for each in defaults if each.partition("=")[0] not in given), *arguments])
        if config.data.shards.startswith("pipe:"):
            assert len(expand_commands(config.data.shards)) == 1000
    elif program == "swinv2_train.plan":
        plan.parse(arguments)
    elif program == "swinv2_train.evaluate":
        evaluate.parse(arguments)
    elif program in ("swinv2_train.predict", "swinv2-predict"):
        predict.check_request(*predict.parse(arguments))
    elif program == "swinv2-embed":
        embed.parse(arguments)
    elif program == "swinv2-look":
        look.parse(arguments)
    elif program == "swinv2_train.export":
        export.parse(arguments)
    elif program == "swinv2_train.stats":
        stats.parse(arguments)
    elif program == "swinv2_train.replay":
        assert all("=" in word for word in arguments)  # of a run, which is not there
    elif program == "swinv2_train.doctor":
        assert arguments == []
    elif program in ("swinv2_train.make_shards", "swinv2-make-shards"):
        assert make_shards.run(arguments) == 2  # there are no such images
    elif program.startswith("swinv2-"):
        assert f"{program} =" in (ROOT / "setup.cfg").read_text()
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = {name for found in re.findall(r"\[([\w,]+)\]", " ".join(arguments)) for name in found.split(",")}
        assert extras <= set(setup["options.extras_require"]), words
    elif program in ("python", ".venv/bin/python"):
        text = (ROOT / arguments[0]).read_text()
        assert all(word in text for word in arguments if word.startswith("--")), words
    else:
        assert program in ("git", "wandb", "pgrep", "kill", "tail"), words


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the runs, weights and statistics that the commands name."""
    place = tmp_path_factory.mktemp("place")
    classify = ("task=classify", "model=demo", "data=cifar10", "task.num_classes=10", "data.eval_shards=val/*.tar")
    for run, settings in {
        "runs/pretrain": ("task=simmim", "model=demo", "task.mask_unit_px=4", "data.eval_shards=val/*.tar"),
        "runs/finetune": classify,
        "ft": classify,
        "runs/segment": ("task=segment", "model=tiny", "data=labelled", "data.eval_shards=val/*.tar"),
        "runs/detect": ("task=detect", "model=tiny", "data=labelled", "data.eval_shards=val/*.tar"),
        "runs/video": ("experiment=k400_tiny_256", "data.eval_shards=val/*.tar"),
    }.items():
        (place / run).mkdir(parents=True)
        text = config_yaml(composed([*settings, f"run_dir={run}", "data.shards=images/*.tar"]))
        (place / run / "config.yaml").write_text(text)
    save_weights(swin_v2("tiny"), place / "swinv2_tiny_patch4_window8_256.pth", "microsoft")
    (place / "bands.yaml").write_text(f"shards: images\nmean: {[0.5] * 12}\nstd: {[0.25] * 12}\n")  # of swinv2-stats
    return place


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_pasted_command_is_what_its_program_takes(document, place, tmp_path, monkeypatch, capsys):
    """A quote too few, and bash hands on a thousand arguments, or Hydra another key."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    lines = pasted(document)
    words = started(document, tmp_path)
    assert bool(words) == any(re.match(r"[^#]", line) for line in lines)
    for each in words:
        check(each, document)


def test_commands_are_found():
    """Or the test above would try nothing."""
    assert sum(len(pasted(document)) for document in DOCUMENTS) > 80


@pytest.mark.parametrize("size", ["demo", "tiny"])
def test_every_size_has_a_model_by_its_name_alone(size):
    """The demo's has two stages, of which the published sizes' arguments know nothing."""
    model = swin_v2(size)
    assert len(model.depths) == len(model.pretrained_window_sizes)


def test_the_launch_files_are_what_bash_reads():
    for path in ("launch/torchrun.sh", "launch/train.sbatch"):
        subprocess.run(["/bin/bash", "-n", str(ROOT / path)], check=True)


def test_the_packing_command_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    scripts = dict(line.split(" = ") for line in lines)
    assert scripts["swinv2-make-shards"] == "swinv2_train.make_shards:main"
    assert all((ROOT / f"{each.partition(':')[0].replace('.', '/')}.py").is_file() for each in scripts.values())


# --------------------------------------------------------------------------------------------------------------------
# Python


def examples(document: Path) -> list[tuple[str, str]]:
    """The lines after >>> of a document, and what it shows below each."""
    lines = [line[4:] for line in document.read_text().splitlines() if line.startswith("    ")]
    found: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith(">>> "):
            found.append((line[4:], ""))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


@pytest.mark.slow
def test_the_python_of_weights_md_does_what_it_shows(tmp_path, monkeypatch, capsys):
    """Files are written here by torchvision itself and by our own writers, which other tests hold against theirs."""
    monkeypatch.chdir(tmp_path)
    tiny = swin_v2("tiny")
    save_weights(tiny, "swinv2_tiny_patch4_window8_256.pth", "microsoft")
    encoder = swin_v2("tiny", img_size=192, window_size=12, num_classes=0)
    save_weights(SimMIM(encoder), "simmim_pretrain.pth", "microsoft")
    save_weights(tiny, "timm.safetensors", "timm")
    save_weights(tiny, "model.safetensors", "timm")
    save_weights(tiny, "swinv2-tiny-hf", "huggingface")
    torch.save(torchvision.models.swin_v2_t().state_dict(), "swin_v2_t-b137f0e2.pth")
    deepspeed = {"module": torch.load("swinv2_tiny_patch4_window8_256.pth")["model"], "optimizer": {"state": {}}}
    torch.save(deepspeed, "mp_rank_00_model_states.pt")
    torch.save(Evil(), "evil.pth")
    names = {name: getattr(weights, name) for name in ("load_weights", "read_weights", "save_weights")}

    def sized(size, **settings):
        """With values that nobody has drawn where an example shows what is refused: those of huge take seconds."""
        if size == "tiny":
            return swin_v2(size, **settings)
        with on_meta():
            model = swin_v2(size, **settings)
        return model.to_empty(device="cpu")

    scope = {"swin_v2": sized, "timm": importlib.import_module("timm"), **names}
    tried = 0
    for line, shown in examples(ROOT / "docs" / "weights.md"):
        if "mmpretrain" in line:  # nobody here writes its files
            continue
        tried += 1
        first = shown.partition("\n")[0]
        if first.startswith("ConfigError: "):
            with pytest.raises(ConfigError) as caught:
                exec(line, scope)
            told = first.removeprefix("ConfigError: ").split(": ...")[0].split(", which is")[0]
            assert str(caught.value).startswith(told[:60]), line
            continue
        exec(compile(line, "weights.md", "single"), scope)
        out = capsys.readouterr().out
        assert not first or first.split(" (")[0] in out, (line, first, out)
    assert tried > 10


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)
