"""scripts/ablation*.py: what our model is compared with is what it is said to be, and the comparison is drawn right."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts import ablations
from scripts.ablation_models import PreNormBlock, TableBiasAttention, resized_table, with_parts
from scripts.ablation_results import blocks_section, differences, final_loss, mean_of, worsening
from scripts.ablation_training import Recipe, Run, amplitudes, batches, fit, score
from scripts.fetch_cifar10 import encode_png
from swinv2_train.config import ConfigError
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.cosine import split_heads, window_bias
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.models.windows import attention_mask, cut_windows, join_windows, window_grid

OURS = ("res-post-norm", "cosine", "log")
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


def model_of(norm: str, attention: str, bias: str) -> SwinTransformerV2:
    """In float64, with every parameter away from its start: res-post-norm blocks begin as the identity."""
    torch.manual_seed(0)
    model = SwinTransformerV2(num_classes=10, pretrained_window_sizes=(0, 0), drop_path_rate=0.0, **SIZES)
    model = with_parts(model, norm, attention, bias)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def blocks_of(model: SwinTransformerV2) -> list[SwinBlock]:
    return [block for stage in model.layers for block in stage.blocks]


def a_map(dim: int, side: int = 8) -> torch.Tensor:
    return torch.randn(2, side, side, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_replacing_nothing_leaves_our_model():
    """The subject of the comparison is the package's own model, class by class and number by number."""
    model = model_of(*OURS)
    original = SwinTransformerV2(num_classes=10, pretrained_window_sizes=(0, 0), drop_path_rate=0.0, **SIZES).double()
    original.load_state_dict(model.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(model(images), original(images))


def test_pre_norm_block_is_v1s():
    """Swin V1, equation 3; and its norms start at 1, where those of ours start at 0."""
    block = blocks_of(model_of("pre-norm", "cosine", "log"))[1]
    x = a_map(16)
    grid = window_grid((8, 8), (4, 4), True)
    middle = x + block.attn(F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias), grid)
    expected = middle + block.mlp(F.layer_norm(middle, (16,), block.norm2.weight, block.norm2.bias))
    assert torch.equal(block(x), expected)
    fresh = with_parts(SwinTransformerV2(**SIZES, pretrained_window_sizes=(0, 0)), "pre-norm", "cosine", "log")
    assert all((norm.weight == 1).all() for block in blocks_of(fresh) for norm in (block.norm1, block.norm2))


@pytest.mark.parametrize("shifted", [False, True])
def test_dot_product_attention_is_torchs(shifted):
    """Against scaled_dot_product_attention with bias and mask added; float64, worst seen 0 of entries up to 4.6."""
    attention = blocks_of(model_of("res-post-norm", "dot product", "log"))[1].attn
    grid = window_grid((8, 8), (4, 4), shifted)
    x = a_map(16)
    bias = torch.cat((attention.q_bias, torch.zeros(16), attention.v_bias))
    q, k, v = split_heads(cut_windows(F.linear(x, attention.qkv.weight, bias), grid), attention.num_heads)
    added = window_bias(attention.position_table((4, 4), x.device), (4, 4))[None]  # (1, h, N, N)
    if shifted:
        added = added + attention_mask(grid, x.device).repeat(2, 1, 1)[:, None]  # (B*nW, h, N, N)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    expected = attention.proj(join_windows(out.transpose(1, 2).flatten(2), grid))
    assert (attention(x, grid) - expected).abs().max() <= 1e-13


def test_dot_product_attention_does_not_know_a_bias_of_the_keys():
    """V1 has one and the variant has none: it adds the same to a whole row of logits.  float64, worst seen 2e-16."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 4, 16, 8, dtype=torch.float64, generator=generator)
    with_bias = F.scaled_dot_product_attention(q, k + torch.randn(8, dtype=torch.float64, generator=generator), v)
    assert (with_bias - F.scaled_dot_product_attention(q, k, v)).abs().max() <= 1e-14


def test_linear_bias_is_the_mlp_of_even_offsets():
    """Even steps from -1 to 1 at the trained window, and beyond it at a larger one; ours are spaced by logarithms."""
    attention = blocks_of(model_of("res-post-norm", "cosine", "linear"))[0].attn
    for window, reach in ((4, 1.0), (8, 7 / 3)):
        rows = torch.linspace(-reach, reach, 2 * window - 1, dtype=torch.float64)
        coordinates = torch.tensor(list(itertools.product(rows.tolist(), rows.tolist())), dtype=torch.float64)
        expected = attention.cpb_mlp(coordinates)
        difference = (attention.position_table((window, window), rows.device) - expected).abs().max()
        assert difference <= 1e-12  # worst seen 4e-15


def test_table_bias_is_its_parameter_at_the_trained_window():
    attention = blocks_of(model_of("res-post-norm", "cosine", "table"))[0].attn
    assert isinstance(attention, TableBiasAttention)
    assert attention.position_table((4, 4), torch.device("cpu")) is attention.relative_position_bias_table


def test_resizing_a_table_is_the_identity_for_its_own_window_and_keeps_symmetry():
    """The offset 0 stays in the middle, and a bias that does not tell left from right goes on not to."""
    table = torch.randn(7 * 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert resized_table(table, (4, 4), (4, 4)) is table
    even = (table + table.flip(0)).view(7, 7, 3)
    larger = resized_table(even.reshape(49, 3), (4, 4), (8, 8)).view(15, 15, 3)
    assert torch.allclose(larger, larger.flip(0, 1), atol=1e-12)
    assert torch.allclose(larger[7, 7], even[3, 3], atol=1e-12)


def test_resized_table_stretches_over_the_larger_window():
    """What V1's bias means after interpolation: half as far in the image as the same offset was, not a new offset."""
    ramp = torch.arange(-7.0, 8.0, dtype=torch.float64)[:, None].expand(15, 15).reshape(225, 1)
    larger = resized_table(ramp, (8, 8), (16, 16)).view(31, 31)
    middle = larger[11:20, 15]  # offsets -4 .. 4 of 15
    expected = torch.arange(-4.0, 5.0, dtype=torch.float64) * 15 / 31
    assert (middle - expected).abs().max() <= 0.05  # torch's cubic is not exact on a ramp: worst seen 0.026


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("post-norm", "cosine", "log"), "are not among"),
        (("pre-norm", "dot product", "table"), "with the bias 'log' alone"),
    ],
)
def test_parts_that_are_not_there_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        model_of(*parts)


@pytest.mark.parametrize("parts", [("pre-norm", "dot product", "log"), ("res-post-norm", "cosine", "table")])
def test_variants_share_their_initial_values_with_ours(parts):
    """Or their difference would be the random numbers' too."""
    models = []
    for each in (OURS, parts):
        torch.manual_seed(5)
        model = SwinTransformerV2(num_classes=10, pretrained_window_sizes=(0, 0), **SIZES)
        models.append(dict(with_parts(model, *each).named_parameters()))
    shared = [name for name in models[0] if name in models[1] and ".norm" not in name]
    assert "layers.1.blocks.1.attn.qkv.weight" in shared and "head.weight" in shared
    assert all(torch.equal(models[0][name], models[1][name]) for name in shared)


def test_every_variant_takes_another_window():
    """The windows of question 2: 32 px at 4, then 64 px at 8."""
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for bias in ("log", "linear", "table"):
        model = model_of("res-post-norm", "cosine", bias)
        model.set_input_size(64, 8)
        assert model(images).isfinite().all()
    pre_norm = model_of("pre-norm", "dot product", "log")
    pre_norm.set_input_size(64, 8)
    assert all(isinstance(block, PreNormBlock) and block.window_size == (8, 8) for block in blocks_of(pre_norm))
    assert pre_norm(images).isfinite().all()


# --------------------------------------------------------------------------------------------------------------------
# Training


RECIPE = Recipe(
    img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, crop_scale=(0.6, 1.0),
    batch_size=16, steps=5, warmup_steps=1, clip_grad_norm=5.0, table_lr_scale=1.0, eval_sizes=((32, 4),),
)  # fmt: skip


def run_of(norm: str = "res-post-norm", attention: str = "cosine", bias: str = "log", **changes) -> Run:
    return Run(**{"question": "q", "norm": norm, "attention": attention, "bias": bias, "lr": 1e-3, "seed": 0,
                  "recipe": RECIPE} | changes)  # fmt: skip


def some_images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (24,), generator=generator)


def test_runs_of_a_seed_see_the_same_batches_and_an_epoch_uses_every_image_once():
    """The differences between variants are taken batch by batch."""
    images, _ = some_images()
    numbers = torch.arange(24)
    first, second = (list(batches(run, images, numbers)) for run in (run_of(), run_of("pre-norm", lr=1.0)))
    for (crops, labels), (other_crops, other_labels) in zip(first, second, strict=True):
        assert torch.equal(crops, other_crops) and torch.equal(labels, other_labels)
    assert sorted(torch.cat([labels for _, labels in first])[:24].tolist()) == list(range(24))
    other_seed = list(batches(run_of(seed=1), images, numbers))
    assert not torch.equal(first[0][1], other_seed[0][1])


def test_a_run_that_diverges_ends_there_and_says_so():
    """A loss that is not a number must not reach the means of the table as one."""
    torch.manual_seed(0)
    run = run_of()
    model = run.recipe.model(run.norm, run.attention, run.bias)
    images, labels = some_images()
    bad = torch.full((16, 3, 32, 32), float("nan"))
    data = [(images[:16].float() / 255, labels[:16]), (bad, labels[:16]), (images[:16].float() / 255, labels[:16])]
    losses = fit(run, model, iter(data))
    assert len(losses) == 2 and losses[0] is not None and losses[1] is None
    assert json.dumps(losses, allow_nan=False)


def test_table_learns_at_its_own_rate_and_the_rest_at_the_runs():
    """AdamW's first step moves every entry by its learning rate, whatever the gradient: 1e-3, and 30 times that."""
    images, labels = some_images()
    recipe = replace(RECIPE, table_lr_scale=30.0, steps=1, warmup_steps=0, clip_grad_norm=0.0)
    run = run_of(bias="table", recipe=recipe)
    model = recipe.model(run.norm, run.attention, run.bias)
    for block in blocks_of(model):
        torch.nn.init.ones_(block.norm1.weight)  # they start at 0, and no gradient would reach the table
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(run, model, iter([(images[:16].float() / 255, labels[:16])]))
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert moved["layers.0.blocks.0.attn.relative_position_bias_table"] == pytest.approx(0.03, rel=0.01)
    assert moved["head.bias"] == pytest.approx(0.001, rel=0.01)


def test_amplitudes_are_those_behind_every_block():
    """Blocks begin as the identity, so in the first stage all are those of the patch norm."""
    torch.manual_seed(0)
    model = RECIPE.model(*OURS)
    images = torch.randn(4, 3, 32, 32)
    found = amplitudes(model, images)
    assert len(found) == 1 + 4
    patches = model.patch_embed(images)
    assert found[:3] == pytest.approx([patches.std().item()] * 3, rel=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_score_counts_every_image():
    """24 images in a batch of 100: the last, short batch counts, and a model that always says 3 is right on the 3s."""
    model = RECIPE.model(*OURS)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        model.head.bias[3] = 1.0
    images, labels = some_images()
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    for pixels, window in ((16, 4), (32, 4), (64, 8)):
        model.set_input_size(pixels, window)
        found = score(model, images, labels, pixels, zero, one)
        assert found["top1"] == pytest.approx(100 * (labels == 3).float().mean().item())
        assert found["loss"] == pytest.approx(F.cross_entropy(model.head.bias.expand(24, 10), labels).item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# The script


def a_result(question: str = "blocks", final: float | None = 1.0, **changes) -> dict:
    """The result of a run of ten steps, as the script keeps it."""
    run = {"question": question, "norm": "res-post-norm", "attention": "cosine", "bias": "log", "lr": 1e-3, "seed": 0,
           "recipe": asdict(RECIPE) | {"steps": 10}} | changes  # fmt: skip
    return {"run": run, "losses": [2.0] * 8 + [final] * 2 if final is not None else [2.0, None],
            "amplitudes": {"end": [0.5, 1.0, 4.0]}}  # fmt: skip


def test_final_loss_is_that_of_the_last_fifth_and_none_of_a_divergence():
    assert final_loss(a_result(final=1.25)) == 1.25
    assert final_loss(a_result(final=None)) is None


def test_differences_are_taken_seed_by_seed():
    """A spread between the seeds that both share must not hide a difference."""
    assert mean_of([1.25, 3.5], 2) == "2.38 ± 1.59"
    assert differences([1.25, 3.5, None, 1.0], [1.0, 3.0, 3.0, None], 2) == "+0.38 (+0.25 .. +0.50)"
    assert differences([None], [1.0]) == "-"


def test_worsening_counts_points_lost_and_cross_entropy_gained():
    """One of them has the other sign; both grow where the larger window does harm."""
    result = {"scores": {"32/8": {"top1": 50.0, "loss": 1.5}, "64/16": {"top1": 48.0, "loss": 1.75}}}
    assert (worsening(result, "top1", "32/8", "64/16"), worsening(result, "loss", "32/8", "64/16")) == (2.0, 0.25)


def test_a_row_counts_the_runs_that_diverged_and_leaves_them_out_of_the_mean():
    v1 = {"norm": "pre-norm", "attention": "dot product"}
    results = [a_result(), a_result(seed=1), a_result(final=3.0, **v1), a_result(final=None, seed=1, **v1)]
    results += [a_result(seed=seed, attention="dot product") for seed in (0, 1)]
    row = next(line for line in blocks_section(results).splitlines() if "pre-norm" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "0.001", "pre-norm, dot product", "4.000", "8.000", "1 of 2", "3.000",
        "+2.000 (+2.000 .. +2.000)",
    ]  # fmt: skip


@pytest.mark.slow
def test_script_trains_keeps_and_writes(tmp_path, monkeypatch):
    """All of it on fifty real files: a second call trains nothing again, one of other settings does."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        samples = [(f"{split}_{i:03d}", encode_png(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)), "png", i % 10)
                   for i in range(count)]  # fmt: skip
        write_shards(samples, str(tmp_path / "data" / split), 40)
    small = replace(RECIPE, steps=2, batch_size=8)
    monkeypatch.setattr(ablations, "RECIPES", {"blocks": replace(small, eval_sizes=()), "windows": small})
    monkeypatch.setattr(ablations, "LRS", (1e-3,))
    command = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "found")]
    command += ["--seeds", "1", "--processes", "1"]
    assert ablations.main(command) == 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
    assert len(kept) == len(ablations.BLOCKS) + len(ablations.BIASES)
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    windows = [result for result in results if result["run"]["question"] == "windows"]
    assert len(results) == 6 and [len(result["losses"]) for result in results] == [2] * 6
    assert all(0 <= result["scores"]["32/4"]["top1"] <= 100 for result in windows)
    page = (tmp_path / "found.md").read_text()
    assert "pre-norm, dot product" in page and "| table |" in page
    assert all((tmp_path / f"found_{name}.png").stat().st_size > 0 for name in ("blocks", "windows"))

    assert ablations.main(command) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setitem(ablations.RECIPES, "windows", replace(small, steps=3))
    assert [ablations.kept(run, tmp_path / "out") is None for run in ablations.plan(1, ["blocks", "windows"])] == [
        False] * 3 + [True] * 3  # fmt: skip
    other_data = ["--data", str(tmp_path / "other"), *command[2:]]
    write_shards(samples, str(tmp_path / "other" / "train"), 40)
    write_shards(samples, str(tmp_path / "other" / "test"), 40)
    with pytest.raises(ConfigError, match="its runs saw other images"):
        ablations.main(other_data)
