"""All commands on a run, shards, a cache and files whose folders have names that patterns and grammars take apart."""

from __future__ import annotations

import pytest

from swinv2_train.status import read_status
from tests.support.commands import OWN_SESSION, command, finish, losses
from tests.support.processes import forked_command
from tests.support.shard_files import ODD_NAME, ten_class_shards
from tests.support.shard_server import serve


@pytest.mark.slow
def test_every_command_takes_paths_of_any_name(tmp_path):
    """Trained from an address by way of a cache there, from a pattern and from its weights; evaluated, exported, ..."""
    folder = tmp_path / f"{ODD_NAME} [0]{{1,2}}*?"
    (folder / "shards").mkdir(parents=True)
    shards = ten_class_shards(folder / "shards")

    def done(module: str, *words: str) -> str:
        home = {"HOME": str(tmp_path)}
        code, output = finish(forked_command(f"swinv2_train.{module}", *words, environment=home, **OWN_SESSION))
        assert code == 0, (module, output)
        return output

    common = (
        "engine=local", "data.num_workers=0", "train.max_steps=1", "log.progress=none",
        f"data.cache_dir={folder / 'cache'}",
    )  # fmt: skip
    with serve(folder / "shards") as server:
        address = f"data.shards={server.url}/train-{{000000..000002}}.tar"
        done("train", *command(folder / "far", address, "data.eval_shards=null", *common))
    assert any((folder / "cache").rglob("*.shard"))
    finetune = ("experiment=cifar10_finetune", f"task.init_from={folder / 'far'}", f"run_dir={folder / 'run'}")
    done("train", *command(folder / "run", *shards, *common, *finetune))
    assert list(losses(folder / "run")) == [1] and read_status(folder / "run")["state"] == "done"
    said = done("evaluate", f"run_dir={folder / 'run'}", shards[1], f"out={folder / 'scores'}")
    assert "val/top1" in said and (folder / "scores" / "evaluation.json").exists()
    weights = folder / "weights.safetensors"
    done("export", f"run_dir={folder / 'run'}", "format=microsoft", f"out={weights}")
    done("evaluate", f"run_dir={folder / 'run'}", f"weights={weights}", shards[1])
    done(
        "plan", f"run_dir={folder / 'run'}", f"plan.json={folder / 'plan.json'}", f"plan.picture={folder / 'plan.png'}"
    )
    assert "holds no run yet" not in done("plan", f"run_dir=~/{folder.name}/run")
    done("stats", shards[0], f"out={folder / 'stats.yaml'}", f"json={folder / 'stats.json'}")
    done("status", str(folder / "run"))
    assert {path.name for path in folder.iterdir()} == {
        "shards", "cache", "far", "run", "scores", "weights.safetensors", "plan.json", "plan.png", "stats.yaml",
        "stats.json", "stats.png",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, ".cache"}
