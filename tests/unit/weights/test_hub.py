"""Weights at hf:// addresses, from a server that speaks the hub's protocol: which commit and file, and what fails."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from swinv2_train.config import ConfigError, OutageError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import read_weights, save_weights, trained_windows, weights_classes
from swinv2_train.weights.hub import HubAddress, fetched, pinned
from tests.support.hub_server import TOKEN, serve_hub, use_hub
from tests.support.weights_samples import assert_same, classifier, state_of

REPO = "them/swin"


@pytest.fixture(scope="module")
def model() -> SwinTransformerV2:
    return classifier(depths=(1, 1), num_heads=(1, 2), pretrained_window_sizes=(2, 2))


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, bytes]:
    """What a repository holds: the model for transformers, with the names of its classes."""
    folder = tmp_path_factory.mktemp("model")
    save_weights(model, folder, "huggingface", classes=list("abcdefg"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as server:
        use_hub(monkeypatch, server, str(tmp_path / "home"), token=None)
        yield server


def with_file(content: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_weights_of_a_repository_are_those_that_were_put_there(hub, files, model):
    commit = hub.add(REPO, files)
    read = read_weights(f"hf://{REPO}")
    assert_same(state_of(model), {name: read[name] for name in read})
    assert read.origin == f"hf://{REPO}@{commit}/model.safetensors"
    assert weights_classes(f"hf://{REPO}") == tuple("abcdefg")
    assert trained_windows(fetched(f"hf://{REPO}")) == ((2, 2), (2, 2)), "config.json came along"


def test_a_pinned_address_keeps_its_commit_when_the_branch_moves(hub, files):
    """And needs the network for nothing that it has."""
    first = hub.add(REPO, files)
    address = pinned(f"hf://{REPO}")
    old = fetched(address).read_bytes()
    second = hub.add(REPO, {"model.safetensors": old[:-4] + b"\0\0\0\0"})
    assert pinned(f"hf://{REPO}") == f"hf://{REPO}@{second}/model.safetensors" != address
    hub.asked.clear()
    assert fetched(address).read_bytes() == old and first in str(address)
    assert not hub.asked, "all of it is in the cache"
    assert fetched(f"hf://{REPO}").read_bytes() != old


def test_branches_tags_and_commits_are_revisions(hub, files):
    main = hub.add(REPO, files)
    other = hub.add(REPO, files, branch="feature/x")
    assert pinned(f"hf://{REPO}@feature%2Fx") == f"hf://{REPO}@{other}/model.safetensors"
    assert pinned(f"hf://{REPO}@{main}/model.safetensors") == f"hf://{REPO}@{main}/model.safetensors"
    assert pinned(f"hf:/{REPO}@main") == f"hf://{REPO}@{main}/model.safetensors", "as pathlib leaves it"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pytorch_model.bin", "model.safetensors", "x.pth"], "model.safetensors"),
        (["pytorch_model.bin", "optimizer.pt"], "pytorch_model.bin"),
        (["README.md", "swin.pth", "old/a.pth"], "swin.pth"),
        (["a.pth", "b.safetensors"], r"several weight files \(a.pth, b.safetensors\); name one"),
        (["x/a.pth", "x/b.pth"], r"weights in folders alone \(x/a.pth, x/b.pth\)"),
        (["README.md", "modeling.py"], r"no weights among its 2 files \(README.md, modeling.py\)"),
    ],
)
def test_which_file_is_meant(hub, names, expected):
    commit = hub.add(REPO, dict.fromkeys(names, b"."))
    if "." in expected and " " not in expected:
        assert pinned(f"hf://{REPO}") == f"hf://{REPO}@{commit}/{expected}"
    else:
        with pytest.raises(ConfigError, match=expected):
            pinned(f"hf://{REPO}")


def test_a_model_in_parts_comes_whole(hub, files, model, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "all").write_bytes(files["model.safetensors"])
    tensors = sorted(load_file(tmp_path / "all").items())
    parts = {"model-1.safetensors": dict(tensors[::2]), "model-2.safetensors": dict(tensors[1::2])}
    for name, content in parts.items():
        save_file(content, tmp_path / name)
    index = {key: name for name, content in parts.items() for key in content}
    tree = {name: (tmp_path / name).read_bytes() for name in parts}
    text = str({"weight_map": index}).replace("'", '"').encode()
    hub.add(REPO, {**tree, "model.safetensors.index.json": text, "config.json": files["config.json"]})
    read = read_weights(f"hf://{REPO}")
    assert_same(state_of(model), {name: read[name] for name in read})
    for evil in ("../model-1.safetensors", "run.py"):
        hub.add(REPO, {"model.safetensors.index.json": text.replace(b"model-1.safetensors", evil.encode())})
        with pytest.raises(ConfigError, match="which is not beside it"):
            fetched(f"hf://{REPO}")


def test_nothing_of_a_repository_is_run_and_its_programs_do_not_come(hub, files, tmp_path):
    """Neither a module beside the weights, nor what a pickle asks for."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was run",))

    program = b"from pathlib import Path\nPath('was run').touch()\n"
    config = files["config.json"].replace(b"{", b'{"auto_map": {"AutoModel": "modeling.Evil"},', 1)
    hub.add(REPO, {**files, "config.json": config, "modeling.py": program})
    read_weights(f"hf://{REPO}")
    came = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert "config.json" in came and "modeling.py" not in came
    hub.add("them/evil", {"pytorch_model.bin": pickle.dumps({"a": Evil()}, protocol=2)})
    with pytest.raises(ConfigError, match="refused, nothing of it was run"):
        read_weights("hf://them/evil")
    with pytest.raises(ConfigError, match="names no file of weights"):
        fetched(f"hf://{REPO}/modeling.py")
    assert not list(tmp_path.rglob("was run")) and not Path("was run").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://swin", "is no address of weights; the form is hf://USER/NAME"),
        ("hf://datasets/them/images", "is no address of weights"),
        ("hf://them/swin@", "is no address of weights"),
        ("hf://them/a--b", "names no repository, which is called USER/NAME"),
        ("hf://them/swin@main/../x.pth", "names no file of weights"),
        ("hf://them/swin@feature/x", r"names no file of weights.*A branch whose name has a / is written with %2F"),
    ],
)
def test_addresses_that_are_none(address, message):
    with pytest.raises(ConfigError, match=message):
        HubAddress.of(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://them/nothing", r"them/nothing: there is no such repository, or it is private \(401\); log in"),
        (f"hf://{REPO}@v9", "the repository has no such revision"),
        (f"hf://{REPO}/x.pth", r"the repository has no such file; its weights are model.safetensors"),
        ("hf://them/gated", "only who has accepted its terms gets it"),
        (f"hf://{REPO}@{'0' * 40}/model.safetensors", "the repository has no such revision"),
    ],
)
def test_what_a_hub_refuses_is_one_message(hub, files, address, message):
    hub.add(REPO, files)
    hub.add("them/gated", files)
    hub.gated.add("them/gated")
    with pytest.raises(ConfigError, match=message) as caught:
        fetched(address)
    assert not isinstance(caught.value, OutageError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", "model.safetensors: came incomplete"),
        ("cut", "model.safetensors: "),
        ("wrong", "model.safetensors came with other bytes than its SHA-256 says"),
        ("other commit", "the hub answers with another commit"),
        (500, r"the hub fails \(500\)"),
        (429, r"the hub wants fewer requests \(429\)"),
    ],
)
def test_what_comes_broken_is_an_outage_and_leaves_nothing_to_be_taken_for_whole(
    hub, files, fault, message, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's retries
    hub.add(REPO, files)
    hub.faults["model.safetensors"] = fault
    with pytest.raises(OutageError, match=message):
        fetched(f"hf://{REPO}")
    hub.faults.clear()
    assert fetched(f"hf://{REPO}").read_bytes() == files["model.safetensors"]


def test_large_files_come_from_another_host_and_a_repository_may_have_moved(hub, files, monkeypatch):
    """As they do from the real hub; the token goes to the hub alone, and the commit is the hub's word."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = hub.add(REPO, files)
    hub.faults["model.safetensors"] = "elsewhere"
    hub.moved["them/before"] = REPO
    for repo in (REPO, "them/before"):
        assert pinned(f"hf://{repo}") == f"hf://{repo}@{commit}/model.safetensors"
        assert fetched(f"hf://{repo}").read_bytes() == files["model.safetensors"]
    assert hub.asked[f"GET /elsewhere/{REPO}/{commit}/model.safetensors"] == 2


def test_a_hub_that_is_down_or_away(hub, files, monkeypatch):
    hub.add(REPO, files)
    hub.down = 503
    with pytest.raises(OutageError, match=r"the hub fails \(503\)"):
        pinned(f"hf://{REPO}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutageError, match="http://127.0.0.1:9 does not answer"):
        pinned(f"hf://{REPO}")


def test_offline_the_cache_is_what_there_is(hub, files, monkeypatch):
    commit = hub.add(REPO, files)
    fetched(f"hf://{REPO}")
    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetched(f"hf://{REPO}@{commit}").read_bytes() == files["model.safetensors"]
    with pytest.raises(ConfigError, match=f"HF_HUB_OFFLINE is set.*name a commit, of which it has {commit}"):
        fetched(f"hf://{REPO}")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, and the cache .* does not have it"):
        fetched(f"hf://{REPO}@{commit}/other.pth")
    assert not hub.asked


def test_a_home_that_nobody_may_write_to(hub, files, monkeypatch, tmp_path):
    hub.add(REPO, files)
    (tmp_path / "home").write_text("a file, under which there is no folder")
    with pytest.raises(OutageError, match="set HF_HOME to a folder that you may write"):
        fetched(f"hf://{REPO}")


def test_without_the_library_one_message_names_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    with pytest.raises(ConfigError, match=r"huggingface_hub is not installed .* pip install huggingface_hub"):
        fetched(f"hf://{REPO}")
