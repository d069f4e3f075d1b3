"""A file of the user's in place of an option of a group: values alone, on top of what would be chosen without it."""

from __future__ import annotations

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import compose_overrides
from tests.support.processes import finished, forked_command

PLAIN = ["run_dir=r", "data.shards=x"]


def test_a_file_lies_between_its_group_and_the_command_line(tmp_path):
    """Of two groups at once; an experiment's option is what each lies on."""
    (tmp_path / "nodes.yaml").write_text("name: ours\ntflops_bf16: 500.0\n")
    (tmp_path / "crops.yml").write_text("hflip: 0.125\ncrop_ratio: [0.5, 2.0]\n")
    words = [*PLAIN, "experiment=in1k_tiny_256_w8", f"data={tmp_path}/crops.yml", f"hardware={tmp_path}/nodes.yaml"]
    config = compose_overrides([*words, "data.crop_ratio=[0.9,1.1]"])
    plain = compose_overrides([*PLAIN, "experiment=in1k_tiny_256_w8"])
    assert (config.data.hflip, config.data.crop_ratio) == (0.125, [0.9, 1.1])
    assert config.data.crop_scale == plain.data.crop_scale
    assert (config.hardware.name, config.hardware.tflops_bf16, config.hardware.device) == ("ours", 500.0, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hflp: 0.5\n", "unknown key data.hflp: .*data.hflip"),
        ("hflip: 5\n", "data.hflip"),
        ("defaults: [labelled]\n", "defaults is a list of files to compose"),
        ("cache_dir: ${oc.env:HOME}\n", "interpolation"),
        ("- 1\n", "holds no sections"),
        ("hflip: !!python/object:os.system 1\n", "tag"),
    ],
)
def test_a_file_that_holds_more_than_values_of_its_group_is_refused(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        compose_overrides([*PLAIN, f"data={tmp_path}/mine.yaml"])


@pytest.mark.slow
def test_the_printed_configuration_has_the_files_values(tmp_path):
    """--cfg job goes through Hydra's own main; the path is the shell's, from where it stands."""
    (tmp_path / "mine.yaml").write_text("hflip: 0.125\n")
    told = finished(forked_command("swinv2_train.train", *PLAIN, "data=mine.yaml", "--cfg", "job", cwd=tmp_path,
                                   stdout=-1, stderr=-1))  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "hflip: 0.125" in told.stdout
