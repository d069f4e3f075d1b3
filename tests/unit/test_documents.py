"""What people read first is true: links lead somewhere, named files exist, the README's Python runs as pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from swinv2_train.models import swin_v2
from swinv2_train.weights import save_weights

ROOT = Path(__file__).parents[2]
MAX_WIDTH = 160
DOCUMENTS = sorted(path for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md"))
HISTORY = {"CHANGELOG.md", "LOG.md"}
"""They name files as they were called then."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(
    r"`((?:swinv2_train|conf|scripts|tests|launch|benchmarks|docs)/[\w/.-]+\.(?:py|cpp|yaml|sh|sbatch|md))`"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_line_outside_of_a_table_is_too_long(document):
    """A terminal and a diff show it whole."""
    lines = document.read_text().splitlines()
    too_long = [n for n, line in enumerate(lines, 1) if len(line) > MAX_WIDTH and not line.startswith("|")]
    assert not too_long, f"{name(document)}: lines {too_long} are longer than {MAX_WIDTH} characters"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_mark_of_a_merge_is_left(document):
    assert not re.findall(r"^(?:<{7}|>{7}|\|{7}) .*$", document.read_text(), re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{name(document)} links to {target}"
        assert not anchor or anchor in anchors_of(linked), f"{name(document)} links to {target}: no such heading"


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name not in HISTORY], ids=name)
def test_files_that_are_named_exist(document):
    """A file that moves takes its mentions along."""
    missing = [
        path for path in NAMED_FILE.findall(document.read_text()) if "NAME" not in path and not (ROOT / path).exists()
    ]
    assert not missing, f"{name(document)} names {missing}"


def test_the_readmes_python_runs_as_pasted(tmp_path, monkeypatch, capsys):
    """In an empty folder that holds nothing but the file of weights that it names."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (weights,) = re.findall(r'"(\w+\.pth)"', block)
    save_weights(swin_v2("tiny"), tmp_path / weights, "microsoft")
    monkeypatch.chdir(tmp_path)
    results: dict = {}
    exec(compile(block, "README.md", "exec"), results)
    assert [tuple(each.shape) for each in results["features"]] == [
        (1, 96, 64, 64), (1, 192, 32, 32), (1, 384, 16, 16), (1, 768, 8, 8)
    ]  # fmt: skip
    assert "weights loaded (microsoft" in capsys.readouterr().out


@pytest.mark.slow
def test_the_python_of_python_md_runs_as_pasted(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    save_weights(swin_v2("tiny", num_classes=10), tmp_path / "swinv2_tiny_patch4_window8_256.pth", "microsoft")
    Image.new("RGB", (40, 30), (9, 90, 200)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    results: dict = {}
    exec(compile(block, "python.md", "exec"), results)
    assert results["answer"].label.isdigit() and [len(each.classes) for each in results["answers"]] == [3, 3]
    assert results["features"].shape == (2, 768)


def test_the_readme_names_the_test_command_that_ci_runs():
    assert "`make test`" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_nobody_is_told_to_install_the_package_from_an_index():
    """No index has it: what is named by pip install is a folder, or somebody else's package."""
    sources = [*DOCUMENTS, *ROOT.glob("swinv2_train/**/*.py"), *ROOT.glob("scripts/**/*.py"), ROOT / "Makefile"]
    for path in sources:
        assert not re.search(r"pip install [^\n`]*swinv2_train", path.read_text()), name(path)
