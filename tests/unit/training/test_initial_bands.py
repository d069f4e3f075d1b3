"""task.init_bands: from the configuration to the weights that a run starts from."""

from __future__ import annotations

import pytest

from swinv2_train.config import ConfigError
from tests.support.configs import composed


@pytest.mark.parametrize("value", ["mean", "repeat", "fresh", "[2,1,0]"])
def test_init_bands_takes_a_rule_or_a_list(value):
    assert (
        str(
            composed(["task=classify", "run_dir=r", "data.shards=x", f"task.init_bands={value}"]).task.init_bands
        ).replace(" ", "")
        == value
    )


@pytest.mark.parametrize("value", ["sum", "[]", "[-1]", "[0.5]", "[a]", "3", "true"])
def test_anything_else_is_refused_with_key_value_and_remedy(value):
    with pytest.raises(ConfigError, match=r"task.init_bands \(.*\) must be one of mean, repeat, fresh, or a list.*=\["):
        composed(["task=classify", "run_dir=r", "data.shards=x", f"task.init_bands={value}"])
