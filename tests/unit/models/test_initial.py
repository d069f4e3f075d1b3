"""Models without values, and the values of a seed that any process can make any part of."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.initial import Constant, Normal, Uniform, initial_rule, on_meta
from swinv2_train.models.upernet import UPerNet
from swinv2_train.training.initial_values import BLOCK, InitialValues

SMALL = {
    "img_size": 32, "window_size": 4, "embed_dim": 192, "depths": (2, 2), "num_heads": (6, 12),
    "pretrained_window_sizes": (0, 0), "extra_norm_period": 2,
}  # fmt: skip
LARGEST = "layers.1.blocks.0.mlp.fc1.weight"
SHAPE = (1536, 384)


def simmim():
    return SimMIM(swin_v2("demo", num_classes=0, **SMALL), 8)


def classifier():
    return swin_v2("demo", num_classes=100, **SMALL)


def segmenter():
    return UPerNet(swin_v2("demo", num_classes=0, **SMALL), 50, 64, 32, head_norm="batch")


def found(head: str, norm: str):
    """A detector with boxes and masks."""
    from swinv2_train.config import DetectConfig
    from swinv2_train.tasks.detect import build_rcnn
    from tests.support.configs import composed
    from tests.support.detector import DETECT

    config = composed([*DETECT, "run_dir=x", "data.shards=x", f"task.head={head}", f"task.head_norm={norm}"])
    assert isinstance(config.task, DetectConfig)
    return build_rcnn(config, config.task)


def detector():
    return found("mask_rcnn", "layer")


def cascade():
    return found("cascade_mask_rcnn", "group")


def whole(values, name, shape):
    target = torch.full((math.prod(shape),), torch.nan)
    values.fill(target, name, 0)
    return target.view(shape)


@pytest.mark.parametrize("build", [simmim, classifier, segmenter, detector, cascade])
def test_rules_are_those_of_the_constructors(build):
    """Constants exactly; what is drawn by its distribution, of which a constructor gives one sample."""
    model = build()
    values = InitialValues(model, 3)
    for name, parameter in model.named_parameters():
        rule, drawn = initial_rule(model, name), whole(values, name, parameter.shape)
        assert drawn.isfinite().all(), name
        if isinstance(rule, Constant):
            assert torch.equal(drawn, parameter), name
            continue
        std = rule.std if isinstance(rule, Normal) else rule.bound / math.sqrt(3)
        for tensor in (drawn, parameter.detach()):
            five_sigma = 5 / math.sqrt(tensor.numel())
            assert float(tensor.mean()) == pytest.approx(0, abs=std * five_sigma), name
            assert float(tensor.std()) == pytest.approx(std, rel=five_sigma), name
            if isinstance(rule, Uniform):
                assert float(tensor.abs().max()) <= rule.bound * (1 + 1e-6), name
        assert not torch.equal(drawn, parameter)


def test_every_parameter_and_seed_has_values_of_its_own():
    model = classifier()
    one, other = InitialValues(model, 0), InitialValues(model, 1)
    names = ("layers.0.blocks.0.mlp.fc1.weight", "layers.0.blocks.1.mlp.fc1.weight")
    drawn = [whole(values, name, (768, 192)) for values in (one, other) for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    large = whole(one, LARGEST, SHAPE).flatten()
    assert not torch.equal(large[:BLOCK], large[BLOCK : 2 * BLOCK])
    assert torch.equal(drawn[0], whole(InitialValues(classifier(), 0), names[0], (768, 192)))


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 1), (5, 100), (BLOCK - 1, 2), (BLOCK, BLOCK), (BLOCK + 7, 2 * BLOCK + 1), (1536 * 384 - 1, 1)],
)
def test_a_part_equals_the_same_part_of_the_whole(start, length):
    values = InitialValues(classifier(), 0)
    part = torch.full((length,), torch.nan)
    values.fill(part, LARGEST, start)
    assert torch.equal(part, whole(values, LARGEST, SHAPE).flatten()[start : start + length])
    rounded = torch.empty(length, dtype=torch.bfloat16)
    values.fill(rounded, LARGEST, start)
    assert torch.equal(rounded, part.bfloat16())


def test_values_of_a_seed_stay_what_they_are():
    """The values are those of this numpy (constraints.txt).

    A change breaks `the same seed, the same run`; it needs a line in CHANGELOG.
    """
    values = InitialValues(simmim(), 0)
    expected = {
        "encoder.layers.0.blocks.0.mlp.fc1.weight": [0.04802151, -0.02056879, -0.03768503],
        "encoder.patch_embed.proj.weight": [-0.1048297, -0.03937998, -0.1059068],
    }
    for name, numbers in expected.items():
        part = torch.empty(3)
        values.fill(part, name, 1)
        assert part.tolist() == pytest.approx(numbers, rel=1e-6), name


def test_parameters_without_a_rule_are_named():
    model = classifier()
    model.gain = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(AssertionError, match="gain has no rule"):
        initial_rule(model, "gain")


@pytest.mark.slow
def test_a_model_without_values_draws_nothing_and_imports_no_compiler():
    """torch's meta kernels of clamp_, log and normal_ import 800 modules (1.5 s and more, measured with torch 2.13)."""
    program = (
        "import sys, torch\n"
        "from swinv2_train.config.command_line import compose_overrides\n"
        "from swinv2_train.models.initial import on_meta\n"
        "from swinv2_train.tasks import build_task\n"
        "state = torch.get_rng_state()\n"
        "for name in ('simmim_giant_192', 'ade20k_upernet_giant_640', 'coco_htc_giant_1536'):\n"
        "    config = compose_overrides([f'experiment={name}', 'run_dir=x', 'data.shards=x'])\n"
        "    with on_meta():\n"
        "        module = build_task(config, torch.device('cpu')).module\n"
        "    assert all(parameter.is_meta for parameter in module.parameters())\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with on_meta():
        model = simmim()
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in simmim().named_parameters()
    }
