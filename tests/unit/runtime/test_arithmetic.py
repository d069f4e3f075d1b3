"""fp32 is fp32, cuDNN chooses nothing, and what cannot repeat itself is refused where that is asked for."""

from __future__ import annotations

import json

import pytest
import torch

from swinv2_train.config import EXIT_DONE, EXIT_USER_ERROR, ConfigError
from swinv2_train.runtime import arithmetic, arithmetic_record, check_workspace
from swinv2_train.tasks.simmim import SimMIMTask
from tests.support.shard_files import noise_shards
from tests.support.small_run import run_alone
from tests.unit.training.test_step import six_steps

EXACT = {"matmul_tf32": False, "cudnn_tf32": False, "cudnn_benchmark": False, "cudnn_deterministic": True}


@pytest.fixture
def workspace(monkeypatch):
    """The environment without cuBLAS's variable, and again afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def vary(x: torch.Tensor) -> torch.Tensor:
    """An operation of which torch knows no deterministic form, on any device: places may be written twice."""
    return x.clone().put_(torch.zeros(1, dtype=torch.int64, device=x.device), x.flatten()[:1])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("workspace")
def test_products_are_exact_inside_and_all_is_as_before_afterwards(deterministic):
    """Though torch lets cuDNN use TF32 by default, and a user may have let all products."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = arithmetic_record()
        assert before["matmul_tf32"] and before["cudnn_tf32"]
        with arithmetic(deterministic):
            inside = arithmetic_record()
        after = arithmetic_record()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    workspace = ":4096:8" if deterministic else None
    assert inside == {**EXACT, "deterministic": deterministic, "cublas_workspace": workspace}
    assert after == before | {"cublas_workspace": workspace}, "a process keeps cuBLAS's"


@pytest.mark.usefixtures("workspace")
def test_what_cannot_repeat_itself_is_refused_by_name():
    refusal = r"runtime\.deterministic \(true\): put_ has no .*deterministic=false"
    with pytest.raises(ConfigError, match=refusal), arithmetic(True):
        vary(torch.randn(3))
    with arithmetic(False):
        vary(torch.randn(3))
    with pytest.raises(RuntimeError, match="another matter"), arithmetic(True):
        raise RuntimeError("another matter")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_varies_is_refused(monkeypatch):
    for good in (":16:8", ":4096:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", good)
        check_workspace()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(
        ConfigError, match=r"runtime\.deterministic \(true\) needs CUBLAS_WORKSPACE_CONFIG=:4096:8 .*':0:0'"
    ):
        check_workspace()


@pytest.mark.slow
def test_a_run_writes_its_arithmetic_down_and_ends_with_the_key_where_it_cannot_hold(tmp_path, capfd):
    """Exit code 2, and no weight has moved."""
    shards = noise_shards(tmp_path / "shards")
    own = ("runtime.deterministic=true", "train.max_steps=1")
    assert run_alone(six_steps("local", "simmim", tmp_path / "good", shards, *own)) == EXIT_DONE
    (start,) = json.loads((tmp_path / "good" / "environment.json").read_text())
    found = start["start"]["arithmetic"]
    assert found.pop("cublas_workspace") in (":4096:8", ":16:8") and found == {**EXACT, "deterministic": True}

    def break_loss() -> None:  # in the fork alone
        true_loss = SimMIMTask.loss
        SimMIMTask.loss = lambda self, forward, batch: vary(true_loss(self, forward, batch).view(1)).sum()

    assert run_alone(six_steps("local", "simmim", tmp_path / "bad", shards, *own), break_loss) == EXIT_USER_ERROR
    assert "error: runtime.deterministic (true): put_ has no deterministic form" in capfd.readouterr().err
    assert not list((tmp_path / "bad").glob("checkpoints/step_*"))
