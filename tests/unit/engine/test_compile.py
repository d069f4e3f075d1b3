"""model.compile=blocks: the numbers of the plain model, at sizes of map that come later too, without graph breaks."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from swinv2_train.engine import compile as compiling
from swinv2_train.engine.compile import compile_blocks, compile_choice, seconds_compiling
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.kernels import cpu_passes
from swinv2_train.models.swin_v2 import SwinBlock
from tests.support.configs import composed


@pytest.mark.parametrize(
    ("overrides", "device", "blocks", "why"),
    [
        ([], "cuda", True, "auto: CUDA"),
        ([], "cpu", False, "auto: on a CPU it gains little"),
        (["engine=zero2", "model.recompute=blocks"], "cuda", True, "auto: CUDA"),
        (["engine=local"], "cuda", True, "auto: CUDA"),
        (["engine=zero3"], "cuda", False, "auto: ZeRO-3's gathering cuts the graphs at every layer"),
        (["model.recompute=blocks@cpu"], "cuda", False, "auto: not tested with model.recompute=blocks@cpu"),
        (["engine=zero3", "model.compile=blocks"], "cuda", True, "model.compile=blocks"),
        (["model.compile=blocks"], "cpu", True, "model.compile=blocks"),
        (["model.compile=none"], "cuda", False, "model.compile=none"),
    ],
)
def test_auto_compiles_on_cuda_where_that_is_tested(overrides, device, blocks, why):
    config = composed(["run_dir=unused", "data.shards=unused", *overrides])
    assert compile_choice(config, device, here=False) == (blocks, why)


def test_auto_without_a_compiler_says_what_is_missing(monkeypatch):
    config = composed(["run_dir=unused", "data.shards=unused"])
    monkeypatch.setenv("PATH", "")
    assert compile_choice(config, "cuda") == (False, "auto: there is no C compiler (gcc, clang)")
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert str(compile_choice(config, "cuda")) == "none (auto: the package triton is missing)"


def models(backend, blocks=slice(None), **changes):
    """A plain model and one of the same weights whose blocks, or some of them, are compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 16, "depths": (3,), "num_heads": (1,), "window_size": 4, "num_classes": 3}
    settings |= {"pretrained_window_sizes": (0,), "drop_path_rate": 0.5, "fused_attention": True} | changes
    plain = SwinTransformerV2(**settings)
    for parameter in plain.parameters():  # blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    compiled = copy.deepcopy(plain)
    for block in [module for module in compiled.modules() if isinstance(module, SwinBlock)][blocks]:
        compile_blocks(block, (SwinBlock,), backend)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    return plain, compiled


def run(model, images):
    """The output and all gradients of a training step, with the same random numbers each time."""
    torch.manual_seed(1)
    model.zero_grad()
    out = model(images)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@contextmanager
def torchs_operations():
    """Compiled blocks have them in the place of a CPU's passes, whose rounding is another (test_cpu_passes.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_passes, "serves", lambda *_: False)
        yield


def same(plain, compiled, *sizes):
    """Both give the same at all sizes, to 1e-5 of the largest entry (measured 4e-6, inductor sums in another order)."""
    for size in sizes:
        images = torch.randn(4, 3, *size)
        with torchs_operations():
            outcome = run(plain, images)
        for expected, found in zip(outcome, run(compiled, images), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_sizes_that_come_later_and_stochastic_depth():
    plain, compiled = models("aot_eager")
    same(plain, compiled, (32, 32), (48, 32), (40, 40))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3 * 3  # the first block, whose rate is 0, a shifted one and one that is neither, at three sizes
    same(plain, compiled, (32, 32), (40, 40))
    assert counters["stats"]["unique_graphs"] == graphs
    compiled.eval()
    images = torch.randn(2, 3, 32, 32)
    with torchs_operations():
        expected = plain.eval()(images)
    assert torch.allclose(compiled(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_blocks_of_other_rates_share_their_graphs():
    plain, compiled = models("aot_eager", depths=(8,))
    same(plain, compiled, (32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_inductor_gives_the_same(fused, monkeypatch):
    """The real compiler, with padding: a map of 10 x 10 in windows of 4.

    Only the second block is compiled, which takes half a minute of CPU: it is shifted and may be dropped.
    """
    plain, compiled = models("inductor", slice(1, 2), fused_attention=fused, depths=(2,))
    from torch._inductor.graph import GraphLowering

    before, lower, modes = seconds_compiling(), GraphLowering.run, []

    def watched(self, *args):
        modes.append(torch._inductor.config.deterministic)
        return lower(self, *args)

    monkeypatch.setattr(GraphLowering, "run", watched)
    graphs_anew = torch._inductor.config.patch(fx_graph_cache=False)  # their kernels' libraries are kept, by source
    with graphs_anew, torch._functorch.config.patch(enable_autograd_cache=False):
        same(plain, compiled, (40, 40))
    assert seconds_compiling() > before
    assert len(modes) == 2 and all(modes), "a kernel was chosen by its time: two starts of a run sum in other orders"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_compiler_that_fails_costs_speed_and_no_run(monkeypatch):
    """fall_back, as model.compile=auto has it; model.compile=blocks ends with the compiler's error."""

    def broken(graph, inputs):
        raise RuntimeError("no ptxas")

    try:
        plain, _ = models("eager", depths=(1,))
        compiled = copy.deepcopy(plain)
        compile_blocks(compiled, (SwinBlock,), broken, fall_back=True)
        same(plain, compiled, (32, 32))
        torch._dynamo.reset()
        compile_blocks(compiled, (SwinBlock,), broken)
        with pytest.raises(Exception, match="no ptxas"):
            run(compiled, torch.randn(1, 3, 32, 32))
    finally:
        torch._dynamo.config.suppress_errors = False
