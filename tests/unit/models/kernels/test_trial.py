"""The fused kernels' trial before they serve, what is kept of it, and a kernel that fails while it serves.

The kernels are real: the compiled one of CPUs, whose library is made to raise at its C functions.
"""

from __future__ import annotations

import threading

import pytest
import torch

from swinv2_train.models.kernels import cpu_attention, dispatch, failures, trial
from swinv2_train.models.kernels.failures import Case, case_of
from swinv2_train.models.windows import WindowGrid, window_grid
from tests.support.kernel_faults import break_library

CPU = torch.device("cpu")
GRID = window_grid((10, 7), (4, 4), shifted=True)
pytestmark = pytest.mark.skipif(cpu_attention.problem() is not None, reason="there is no compiled kernel here")


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    """Nothing was tried before, in this process or another; afterwards nothing is left of it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    trial.forget()
    yield
    trial.forget()


def inputs(grid: WindowGrid = GRID, heads: int = 2, dim: int = 16, dtype=torch.float32):
    torch.manual_seed(0)
    rows, cols = grid.window
    qkv = torch.randn(2, *grid.size, 3 * heads * dim).to(dtype).requires_grad_()
    scale = torch.full((heads, 1, 1), 8.0, requires_grad=True)
    return qkv, scale, torch.randn((2 * rows - 1) * (2 * cols - 1), heads, requires_grad=True)


@pytest.mark.parametrize(
    ("size", "window", "shifted", "reduced"),
    [
        ((48, 48), 12, True, (24, 24)),
        ((48, 50), 12, False, (24, 14)),
        ((6, 6), 12, True, (6, 6)),
        ((13, 12), 12, True, (13, 12)),
    ],
)
def test_a_case_is_the_smallest_map_that_asks_the_same_of_a_kernel(size, window, shifted, reduced):
    grid = window_grid(size, (window, window), shifted)
    case = case_of(torch.bfloat16, grid, 32)
    assert case.grid.size == reduced
    assert (case.grid.window, case.grid.shift) == (grid.window, grid.shift)
    padding = [[p - n for p, n in zip(each.padded, each.size, strict=True)] for each in (grid, case.grid)]
    assert padding[0] == padding[1] and case_of(torch.bfloat16, case.grid, 32) == case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "window"), [((8, 8), 4), ((10, 7), 4), ((5, 5), 8), ((9, 24), 12), ((1, 1), 4), ((3, 1), 1)]
)
def test_good_kernels_pass_and_draw_no_random_numbers(size, window, dtype):
    cases = [case_of(dtype, window_grid(size, (window, window), shifted), dim) for shifted in (0, 1) for dim in (8, 32)]
    state = torch.random.get_rng_state()
    assert dispatch.tried(cases, CPU) == {}
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_kernel_that_raises_at_one_window_is_found_there_alone(which, monkeypatch):
    """In the backward pass too, which runs later than the forward pass of step 1."""
    cases = [case_of(torch.float32, window_grid((8, 8), (side, side), shifted=True), 16) for side in (2, 4)]
    break_library(monkeypatch, which, window=(4, 4))
    found = dispatch.tried(cases, CPU)
    assert list(found) == [cases[1]] and found[cases[1]] == "RuntimeError: no such instruction"
    qkv = inputs(window_grid((8, 8), (4, 4), shifted=True))[0]
    assert not dispatch.fused_available(qkv, window_grid((8, 8), (4, 4), shifted=True), 2)
    assert dispatch.fused_available(qkv, window_grid((8, 8), (2, 2), shifted=True), 2)


def test_kernels_that_are_wrong_are_found():
    wrong = trial.problems_of(
        [case_of(torch.float32, GRID, 16)], CPU, lambda *a: dispatch.fused_window_attention(*a) * 1.01
    )
    assert "from the reference" in next(iter(wrong.values()))


def test_what_was_good_is_kept_for_this_host_and_these_sources_and_what_failed_is_tried_again(monkeypatch, tmp_path):
    case, tries = case_of(torch.float32, GRID, 16), []

    def counted(*arguments):
        tries.append(1)
        return dispatch.fused_window_attention(*arguments)

    def at_a_start() -> dict[Case, str]:
        trial.forget()
        tries.clear()
        return trial.problems_of([case], CPU, counted)

    assert at_a_start() == {} and tries == [1]
    assert at_a_start() == {} and tries == [], "kept"
    (kept,) = (tmp_path / "cache" / "swinv2_train").iterdir()
    assert kept.stat().st_mode & 0o022 == 0
    for target, name, value in (
        (trial.socket, "gethostname", lambda: "another"),
        (trial, "_card", lambda device: "another"),
        (trial, "_triton", lambda: "0.0"),
        (trial, "_sources", lambda: "changed"),
        (torch, "__version__", "0.0"),
    ):
        with monkeypatch.context() as other:
            other.setattr(target, name, value)
            assert at_a_start() == {} and tries == [1], name
    break_library(monkeypatch, "forward", window=GRID.window)
    kept.unlink()
    assert at_a_start() and tries == [1]
    assert at_a_start() and tries == [1], "a failure is not kept: a compiler may be there by now"


def test_a_trial_that_hangs_is_given_up():
    """And what was done before it counts."""
    cases, release = (
        [case_of(torch.float32, window_grid((8, 8), (side, side), False), 16) for side in (2, 4)],
        threading.Event(),
    )

    def hang(qkv, scale, table, grid, heads):
        if grid.window == (4, 4):
            release.wait(60)
        return dispatch.fused_window_attention(qkv, scale, table, grid, heads)

    assert trial.problems_of(cases, CPU, hang, 0.5) == {cases[1]: "the trial was not done within 0.5 s"}
    (left,) = (thread for thread in threading.enumerate() if thread.name == "kernel trial")
    release.set()
    left.join(60)
    assert not left.is_alive()


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_outside_of_a_run_a_failure_is_raised(which, monkeypatch):
    break_library(monkeypatch, which, window=GRID.window)
    with pytest.raises(RuntimeError, match="no such instruction"):
        dispatch.fused_window_attention(*inputs(), GRID, 2).sum().backward()
    assert not failures.pending()


def test_a_failing_forward_pass_gives_the_references_result_and_serves_no_more(monkeypatch):
    told, arguments = [], inputs()
    good = dispatch.fused_window_attention(*arguments, GRID, 2)
    assert dispatch.fused_available(arguments[0], GRID, 2)
    break_library(monkeypatch, "forward", window=GRID.window)
    with failures.surviving(lambda *what: told.append(what)):
        for _ in range(2):
            with torch.no_grad():
                out = dispatch.fused_window_attention(*arguments, GRID, 2)
            torch.testing.assert_close(out, good, rtol=1e-4, atol=1e-5)
        case = case_of(torch.float32, GRID, 16)
        assert told == [(case, "RuntimeError: no such instruction")] and list(failures.pending()) == [case]
        assert not dispatch.fused_available(arguments[0], GRID, 2)
        failures.agreed()
        assert not failures.pending() and failures.failed(case)
    assert not failures.failed(case)


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("through", ["function", "operation"])
def test_no_step_can_be_taken_with_the_gradients_of_a_failure(which, through, monkeypatch):
    """Half a gradient would be the worst: none is finite, also where a compiler sees one operation."""
    if through == "operation":
        monkeypatch.setattr(dispatch, "traced", lambda qkv: True)
    arguments = inputs()
    break_library(monkeypatch, which, window=GRID.window)
    with failures.surviving(lambda *what: None):
        out = dispatch.fused_window_attention(*arguments, GRID, 2)
        assert torch.isfinite(out).all() and bool(failures.pending()) == (which == "forward")
        gradients = torch.autograd.grad(out.square().sum(), arguments)
        assert failures.pending()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_too_little_memory_is_no_failure_of_a_kernel(monkeypatch):
    break_library(monkeypatch, "forward", window=GRID.window, error=torch.OutOfMemoryError("no room"))
    with failures.surviving(lambda *what: None), pytest.raises(torch.OutOfMemoryError, match="no room"):
        dispatch.fused_window_attention(*inputs(), GRID, 2)
