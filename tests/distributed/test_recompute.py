"""Recomputation policies and sequential attention in the real engines: they change memory, and no loss or gradient."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.distributed import all_reduce_sum
from swinv2_train.engine import build as engines
from swinv2_train.engine import build_engine
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.engine.compile import compile_blocks
from swinv2_train.engine.deepspeed.startup import import_deepspeed
from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.kernels import cpu_attention, cpu_passes, cpu_products
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.training.param_groups import build_param_groups
from tests.support.harness import run_distributed
from tests.support.one_rank import ONE
from tests.support.toy import DIM, Toy, ToyBlock, build, full_state, toy_config, train

WHAT = ("blocks", "stages:2", "attention", "every:3")
WHERE = ("stay", "cpu", "fairscale", "partitioned")


def steps(world, stage, precision, policy, sequential_stages=(), compile="none", depths=(2, 2), fused=False):
    """[mean loss, gradient norm] of 2 steps, and the weights that they end with (on rank 0)."""
    config = toy_config(stage=stage, precision=precision)
    config.optim.no_decay = ["1d", ".bias", "cpb_mlp", "logit_scale", "mask_token"]
    config.model.recompute, config.model.compile = policy, compile
    torch.manual_seed(0)
    encoder = swin_v2(
        "demo", img_size=32, window_size=4, num_classes=0, embed_dim=16, depths=depths, num_heads=(1, 2)[: len(depths)],
        pretrained_window_sizes=(0, 0)[: len(depths)], drop_path_rate=0.5, extra_norm_period=2,
        sequential_stages=sequential_stages, attention_chunk_windows=3, fused_attention=fused,
    )  # fmt: skip
    with torch.no_grad():  # every block starts as the identity, whose attention has a gradient of 0
        for name, parameter in encoder.named_parameters():
            if "norm1" in name or "norm2" in name:
                parameter.add_(0.5)
    module = SimMIM(encoder, 4 * 2 ** (len(depths) - 1))
    engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, (SwinBlock,))
    torch.manual_seed(world.rank)
    history = []
    for _ in range(2):
        images, mask = torch.randn(4, 3, 32, 32), torch.rand(4, 8, 8) < 0.6
        loss = engine.forward(images=images, mask=mask)["loss"]
        engine.backward(loss)
        norm = engine.step(1e-3)
        history.append((float(all_reduce_sum(loss.detach())) / world.world_size, norm))
    return history, full_state(engine)


def same_as_none(stage, precision, policies, sequential_stages=()):
    """Every policy gives the bits of none, on 2 ranks one after the other."""

    def run(world):
        return [steps(world, stage, precision, policy, sequential_stages) for policy in ("none", *policies)]

    expected, *others = run_distributed(run, 2, timeout_sec=300)[0]
    assert expected[0][0][0] != expected[0][1][0]
    for policy, (history, weights) in zip(policies, others, strict=True):
        assert history == expected[0], policy
        assert all(torch.equal(weights[name], value) for name, value in expected[1].items()), policy


@pytest.mark.slow
def test_no_policy_changes_a_bit_under_zero_3():
    """Losses, norms and weights after 2 steps, with drop path, all parameters released between uses (thresholds 0)."""
    same_as_none(3, "fp32", [f"{what}@{where}" for what in WHAT for where in WHERE])


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_no_policy_changes_a_bit_under_the_other_stages_and_precisions(stage, precision):
    """Each part and each place once."""
    same_as_none(stage, precision, ["blocks@cpu", "stages:2@fairscale", "attention", "every:3@partitioned"])


@pytest.mark.skipif(cpu_attention.problem() is not None, reason="there are no compiled kernels")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "fp32"), (3, "bf16")])
def test_no_policy_changes_a_bit_of_what_a_cpus_passes_and_products_compute(stage, precision):
    """Nor does gathering: each layer's pass is inside its own forward.  Beside torch's operations losses agree to 1e-6
    and norms to 1e-5, which are rounding (measured: 0 and 1e-6), in bf16 to 1e-3 and 1e-2."""

    def run(world):
        calls, call, apply = [], cpu_passes._call, cpu_products._Linear.apply
        cpu_passes._call = lambda name, *rest: (calls.append(name), call(name, *rest))
        cpu_products._Linear.apply = lambda *given: (calls.append("linear"), apply(*given))[1]
        cpu_products.mkl_is_slow, cpu_products.LEAST = lambda: False, 1
        plain = steps(world, stage, precision, "none")
        assert not calls
        cpu_products.mkl_is_slow = lambda: True
        policies = ("none", "blocks@cpu", "blocks@fairscale", "attention", "attention@partitioned")
        found = [steps(world, stage, precision, policy, fused=True) for policy in policies]
        return plain, found, calls

    plain, (expected, *others), calls = run_distributed(run, 2, timeout_sec=300)[0]
    assert {"add_norm_backward", "gelu_backward", *(["linear"] if precision == "fp32" else [])} <= set(calls)
    of_loss, of_norm = (1e-6, 1e-5) if precision == "fp32" else (1e-3, 1e-2)
    for (loss, norm), (plain_loss, plain_norm) in zip(expected[0], plain[0], strict=True):
        assert loss == pytest.approx(plain_loss, rel=of_loss) and norm == pytest.approx(plain_norm, rel=of_norm)
    for history, weights in others:
        assert history == expected[0]
        assert all(torch.equal(weights[name], value) for name, value in expected[1].items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sequential_attention_inside_recomputation_under_zero_3(precision):
    """Recomputation around it changes no bit; it itself changes rounding alone."""
    same_as_none(3, precision, ["blocks", "attention@cpu", "blocks@fairscale", "attention@partitioned"], [1, 2])


@pytest.mark.parametrize(
    ("stage", "precision", "loss_rtol", "norm_rtol"),
    # Measured worst: fp32 losses 0, norms 5e-7; bf16 losses 3e-4, the first norm 2e-3, where those of the batched path
    # are 5e-4 and 1e-2 away from fp32.
    [(stage, "fp32", 1e-6, 5e-6) for stage in (0, 1, 2, 3)] + [(3, "bf16", 2e-3, 1e-2)],
)
def test_sequential_attention_equals_the_batched_path_under_every_stage(stage, precision, loss_rtol, norm_rtol):
    def run(world):
        return [steps(world, stage, precision, "none", stages)[0] for stages in ((), (1, 2))]

    batched, sequential = run_distributed(run, 2)[0]
    assert [loss for loss, _ in sequential] == pytest.approx([loss for loss, _ in batched], rel=loss_rtol)
    assert sequential[0][1] == pytest.approx(batched[0][1], rel=norm_rtol)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("what", ["blocks", "attention"])
def test_what_is_recomputed_really_runs_again_and_only_when_gradients_are_wanted(what, where):
    calls = []

    class Counted(torch.nn.Linear):
        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Counted(DIM, DIM)

        def forward(self, x):
            return x + self.attn(x)

    def run(world):
        if where == "partitioned":
            import_deepspeed().init_distributed(auto_mpi_discovery=False)
        module = torch.nn.Sequential(Block(), Block())
        assert apply_recompute(module, f"{what}@{where}", (Block,)) == 2
        x = torch.randn(2, DIM)  # needs no gradient itself: what is below the first block may be frozen
        module(x).sum().backward()
        assert calls == [where == "stay" or where == "cpu"] * 2 + [True] * 2
        expected = torch.nn.Sequential(Block(), Block())
        expected.load_state_dict(module.state_dict())
        expected(x).sum().backward()
        for p, q in zip(module.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        del calls[:]
        with torch.no_grad():
            module(x)
        assert len(calls) == 2

    run_distributed(run, 1) if where == "partitioned" else run(ONE)


def test_policies_choose_the_blocks_that_they_name():
    """Two stages of two blocks; every:K counts over the whole model."""

    def recomputed(policy):
        model = swin_v2(
            "demo", img_size=32, window_size=4, depths=(3, 2), num_classes=0, pretrained_window_sizes=(0, 0)
        )
        count = apply_recompute(SimMIM(model, 8), policy, (SwinBlock,))
        wrapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert len(wrapped) == count
        return [name.removeprefix("layers.").replace(".blocks", "") for name in wrapped]

    blocks = ["0.0", "0.1", "0.2", "1.0", "1.1"]
    assert recomputed("none") == []
    assert recomputed("blocks") == blocks
    assert recomputed("attention") == [f"{block}.attn" for block in blocks]
    assert recomputed("stages:1") == blocks[:3]
    assert recomputed("stages:2-2") == blocks[3:]
    assert recomputed("stages:1-2@cpu") == blocks
    assert recomputed("every:2") == ["0.0", "0.2", "1.1"]
    assert recomputed("every:9@fairscale") == blocks


def test_a_policy_that_finds_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"model\.recompute \(blocks\): .*0 ToyBlock.* leave nothing to recompute"):
        apply_recompute(torch.nn.Linear(1, 1), "blocks", (ToyBlock,))
    with pytest.raises(ConfigError, match=r"model\.recompute \(attention\): .*leave nothing"):
        apply_recompute(Toy(), "attention", (ToyBlock,))
    with pytest.raises(ConfigError, match=r"model\.recompute \(stages:2\): the model has the stages 1 to 1"):
        apply_recompute(Toy(), "stages:2", (ToyBlock,))


@pytest.mark.parametrize("policy", ["blocks", "blocks@cpu", "blocks@fairscale"])
def test_recomputation_changes_no_bit_and_no_name_in_the_local_engine(policy):
    def run(policy):
        engine = build(toy_config("local", recompute=policy, micro=16), ONE, drop=0.5)
        torch.manual_seed(0)
        return train(engine, ONE, 3), list(engine.module.state_dict()), full_state(engine)

    plain, recomputed = run("none"), run(policy)
    assert plain[0] == recomputed[0]
    assert plain[1] == recomputed[1] == list(Toy().state_dict())
    assert all(torch.equal(plain[2][key], recomputed[2][key]) for key in plain[2])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "blocks"])
def test_compiled_blocks_train_as_plain_ones_under_every_stage(policy):
    """Losses, norms and weights of 2 steps are the same to the bit: aot_eager runs the graphs operation by operation.

    Under ZeRO-3 with recomputation too, where the hooks that gather weights run between graphs.  One stage of the
    model: compiling takes the time, and the second one's blocks are compiled the same way.
    """

    importlib.import_module("torch._dynamo")  # once here, not in each rank: 2 s

    def run(world):
        results = {}
        for stage in (0, 1, 2, 3):
            plain = steps(world, stage, "fp32", policy, depths=(2,))
            engines.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")
            try:
                compiled = steps(world, stage, "fp32", policy, compile="blocks", depths=(2,))
            finally:
                engines.compile_blocks = compile_blocks
            results[stage] = plain, compiled
        return results, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    results, graphs = run_distributed(run, 2, timeout_sec=300)[0]
    assert graphs > 0
    for stage, (plain, compiled) in results.items():
        assert compiled[0] == plain[0], stage
        assert all(torch.equal(compiled[1][name], value) for name, value in plain[1].items()), stage
