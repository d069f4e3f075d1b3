"""DeepSpeed's JSON says everything that changes what is computed, and nobody overrides it unseen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError, EngineConfig
from swinv2_train.engine.deepspeed.config import KNOWN_KEYS, check_engine, deepspeed_json
from swinv2_train.engine.model_sizes import LayerSizes
from tests.support.configs import make_config

GOLDEN = Path(__file__).parents[3] / "golden" / "deepspeed_configs.json"
ENGINE = EngineConfig(
    name="deepspeed",
    zero_stage=3,
    precision="bf16",
    optimizer_states="fp32",
    offload_optimizer="none",
    offload_param="none",
    nvme_dir=None,
    reduce_bucket_size=None,
    prefetch_bucket_size=None,
    persistence_threshold=None,
    max_reuse_distance=None,
    max_live_parameters=None,
    overlap_comm=True,
    communication_data_type=None,
    deepspeed_overrides={},
)
SIZES = LayerSizes(largest_block=50_000_000, largest_vector=100_000, small=200_000)


def config(clip=5.0, **engine):
    optim = {"lr": 1e-3, "no_decay": [], "clip_grad_norm": clip}
    train = {"global_batch_size": 64, "micro_batch_size": 8}
    return make_config(train=train, optim=optim, engine={**dataclasses.asdict(ENGINE), **engine})


CASES = {
    "stage 3 bf16": {},
    "stage 3 bf16, all on the CPU, own sizes": {
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
        "reduce_bucket_size": 1,
        "prefetch_bucket_size": 2,
        "persistence_threshold": 3,
        "max_reuse_distance": 4,
        "max_live_parameters": 5,
    },
    "stage 2 bf16, bf16 states": {"zero_stage": 2, "optimizer_states": "bf16"},
    "stage 2 bf16, optimizer on the CPU": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "stage 1 fp32, one more key": {
        "zero_stage": 1,
        "precision": "fp32",
        "deepspeed_overrides": {"zero_optimization": {"ignore_unused_parameters": False}, "wall_clock_breakdown": True},
    },
    "stage 0 fp32": {"zero_stage": 0, "precision": "fp32"},
}


def test_generated_json_equals_the_golden_file():
    """A change here changes what runs compute: make the golden file anew only on purpose."""
    made = {name: deepspeed_json(config(**case), 4, 2, SIZES) for name, case in CASES.items()}
    assert made == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_clipping_is_always_written(clip):
    """Trap 1: without the key DeepSpeed clips at 1.0."""
    assert deepspeed_json(config(clip), 4, 2, SIZES)["gradient_clipping"] == clip


def test_deepspeeds_in_place_linear_is_off():
    """Trap 5: it adds the bias in place, which gives wrong gradients under selective recomputation."""
    assert deepspeed_json(config(), 4, 2, SIZES)["zero_optimization"]["memory_efficient_linear"] is False


def test_gradients_are_summed_in_their_own_type_or_in_fp32():
    """Nothing is written for null, so that an override of before means what it did; both at once contradict."""
    override = {"communication_data_type": "fp16"}
    for wanted, overrides, written in ((None, {}, None), ("fp32", {}, "fp32"), (None, override, "fp16")):
        settings = config(communication_data_type=wanted, deepspeed_overrides=overrides)
        assert deepspeed_json(settings, 2, 1, SIZES).get("communication_data_type") == written
    with pytest.raises(ConfigError, match=r"communication_data_type \(fp16\) contradicts what we generate \(fp32\)"):
        check_engine(config(communication_data_type="fp32", deepspeed_overrides=override).engine)


def test_stage_0_with_16_bit_is_refused():
    """Trap 6: DeepSpeed takes a dummy optimizer step at start."""
    with pytest.raises(ConfigError, match=r"engine\.zero_stage \(0\) with engine\.precision \(bf16\).*zero_stage=1"):
        check_engine(config(zero_stage=0).engine)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gradient_cliping": 1.0}, r"gradient_cliping is no key that DeepSpeed reads.*did you mean gradient_clipping"),
        ({"gradient_clipping": 1.0}, r"deepspeed_overrides\.gradient_clipping \(1\.0\) contradicts what we generate"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage \(2\) contradicts what we generate \(3\)"),
        ({"optimizer": {"type": "Adam"}}, r"deepspeed_overrides\.optimizer: .*set optim\.\* instead"),
        ({"fp16": {"enabled": True}}, r"set engine\.precision=bf16 or fp32 instead"),
        ({"bf16": {"check_grad_overflow": False}}, r"bf16\.check_grad_overflow \(False\) contradicts"),
    ],
)
def test_overrides_that_deepspeed_ignores_or_that_contradict_ours_are_refused(overrides, message):
    """Trap 10: DeepSpeed ignores unknown top-level keys without a word."""
    with pytest.raises(ConfigError, match=message):
        check_engine(config(deepspeed_overrides=overrides).engine)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"zero_stage": 0, "precision": "fp32", "offload_optimizer": "cpu"}, r"needs .*zero_stage 1, 2, 3, not 0"),
        ({"zero_stage": 2, "offload_optimizer": "nvme", "nvme_dir": "x"}, r"\(nvme\) needs .*zero_stage 3, not 2"),
        ({"zero_stage": 2, "offload_param": "cpu"}, r"offload_param \(cpu\) needs engine\.zero_stage 3, not 2"),
        ({"offload_param": "cpu"}, r"set engine\.offload_optimizer=cpu or nvme"),
        ({"offload_optimizer": "nvme"}, r"engine\.nvme_dir has no value"),
        ({"zero_stage": 1, "optimizer_states": "bf16"}, r"stage 1 keeps fp32 states all the same"),
        ({"precision": "fp32", "optimizer_states": "bf16"}, r"engine\.precision \(fp32\).*engine\.precision=bf16"),
        ({"offload_optimizer": "cpu", "optimizer_states": "bf16"}, r"its own CPU optimizer only"),
        ({"name": "local"}, "engine.name=local, which is the fp32 reference"),
    ],
)
def test_engine_that_cannot_be_is_refused(engine, message):
    with pytest.raises(ConfigError, match=message):
        check_engine(config(**engine).engine)


def test_known_keys_are_those_of_the_installed_deepspeed():
    """A key that we let through but DeepSpeed does not read would be ignored silently."""
    import importlib.util

    root = Path(importlib.util.find_spec("deepspeed").origin).parent
    folders = ("runtime", "comm", "profiling", "monitor", "autotuning", "compile", "inference", "utils", "datastates")
    source = "\n".join(
        path.read_text() for folder in folders for path in (root / folder).rglob("*.py") if "kernels" not in str(path)
    )
    missing = [key for key in KNOWN_KEYS if f'"{key}"' not in source and f"'{key}'" not in source]
    assert not missing
