"""A directory sent to a hub: in one commit, by whom the hub knows, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from swinv2_train.config import ConfigError, OutageError
from swinv2_train.weights.export import ExportRequest, check_request
from swinv2_train.weights.hub_push import push
from tests.support.hub_server import TOKEN, serve_hub, use_hub

REPO = "me/small"
FILES = {"README.md": b"---\nlicense: mit\n---\n", "model.safetensors": b"weights", "config.json": b"{}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as server:
        use_hub(monkeypatch, server, str(tmp_path / "home"))
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    return path


def test_all_files_go_in_one_commit_and_again_on_top_of_it(hub, folder):
    first = push(folder, REPO)
    assert hub.files(REPO) == {".gitattributes": b"", **FILES} and len(hub.repositories[REPO].commits) == 2
    assert first["address"] == f"hf://{REPO}@{first['commit']}" and first["hub"] == f"{hub.url}/{REPO}"
    (folder / "config.json").write_bytes(b"[]")
    second = push(folder, REPO)
    assert second["commit"] != first["commit"] and hub.files(REPO)["config.json"] == b"[]"
    assert not hub.repositories[REPO].private


def test_a_private_repository_and_a_branch_of_its_own(hub, folder):
    push(folder, REPO, private=True, revision="trial")
    assert hub.repositories[REPO].private
    assert list(hub.files(REPO)) == [".gitattributes"] and FILES.items() <= hub.files(REPO, "trial").items()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("no token", ConfigError, r"the hub does not know who asks \(401\); log in by `hf auth login`"),
        ("not mine", ConfigError, r"whose token this is may not do that \(403: .*rights"),
        ("down", OutageError, r"the hub fails \(503\)"),
        ("no upload", OutageError, r"the hub fails \(507\)"),
        ("bad card", ConfigError, "license is not one of ours"),
        ("public", ConfigError, "is there and public"),
        ("away", OutageError, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_fails_is_one_message_and_leaves_no_half_of_a_commit(how, kind, message, hub, folder, monkeypatch):
    repo = "them/small" if how == "not mine" else REPO
    if how == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif how == "down":
        hub.down = 503
    elif how == "no upload":
        hub.faults["upload"] = 507
    elif how == "bad card":
        hub.bad_card = "license is not one of ours"
    elif how == "public":
        hub.add(REPO, {"LICENSE": b"mine"})
    elif how == "away":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=message) as caught:
        push(folder, repo, private=how == "public")
    text = str(caught.value)
    assert type(caught.value) is kind and "\n" not in text and TOKEN not in text
    assert text.endswith(f"{folder} is whole: `hf upload {repo} {folder}` sends it")
    assert repo not in hub.repositories or "model.safetensors" not in hub.files(repo)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        ({"hub": "small"}, r"hub \(small\) names no repository"),
        ({"hub": "me/a--b"}, r"hub \(me/a--b\) names no repository"),
        ({"hub": REPO, "format": "timm", "out": Path("x.pth")}, "takes a directory; choose format=huggingface, or f"),
        ({"hub": REPO, "format": "microsoft"}, "takes a directory; choose"),
        ({"hub_private": True}, r"hub_private is of hub=USER/NAME, which is not given"),
        ({"hub_revision": "x"}, r"hub_revision is of hub=USER/NAME"),
        ({"license": "My Own"}, r"license \(My Own\) is no identifier"),
        ({"license": "mit", "format": "microsoft"}, r"license \(mit\) is for the model card of a directory"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_read(request_of, message):
    with pytest.raises(ConfigError, match=message):
        check_request(ExportRequest(**{"format": "huggingface", "out": Path("out"), **request_of}))
