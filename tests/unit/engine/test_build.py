"""What belongs to an engine is chosen by its name in one place."""

from __future__ import annotations

import pytest

from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.engine.build import ENGINES, engine_memory
from swinv2_train.engine.model_sizes import LayerSizes, ModelSizes
from tests.support.configs import composed

FILES = sorted(path.stem for path in (conf_dir() / "engine").glob("*.yaml") if path.stem != "common")


@pytest.mark.parametrize("file", FILES)
def test_every_engine_file_names_an_engine_whose_memory_is_known(file: str) -> None:
    """An engine without a formula could not be planned."""
    engine = composed(["run_dir=unused", "data.shards=unused", f"engine={file}"]).engine
    sizes = ModelSizes(1000, 100, (600, 400), LayerSizes(500, 10, 20), blocks=((500,),), others=(500,))
    assert engine.name in ENGINES
    assert sum(engine_memory(engine, sizes, 1, 1, on_cpu=False).rests.values()) > 0
