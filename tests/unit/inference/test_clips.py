"""Clips from programs: a file, its bytes, an array and a tensor are the same clip, and what is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import swinv2_train
from swinv2_train.config import ConfigError
from swinv2_train.data.clips.frames_file import pack_frames
from swinv2_train.data.transforms.decode import decode_image
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import save_weights
from tests.support.clips import jpeg

SIZES = {
    "img_size": 16, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 2,
    "num_classes": 3, "frames": 4, "patch_frames": 2, "window_frames": 2, "drop_path_rate": 0.0,
}  # fmt: skip
KEYS = ("model.window_size=2", "model.img_size=16", "model.frames=4", "model.window_frames=2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(1)
    model = SwinTransformerV2(**SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path_factory.mktemp("weights") / "clips.safetensors"
    save_weights(model, path, "microsoft")
    return str(path)


@pytest.fixture(scope="module")
def model(weights):
    return swinv2_train.load(weights, *KEYS, "data.frame_stride=1", "data.eval_crop_pct=1", device="cpu")


@pytest.fixture(scope="module")
def film() -> tuple[bytes, np.ndarray]:
    """A file of six frames, and what is in it: uint8 (6, 16, 24, 3)."""
    files = [jpeg(np.random.default_rng(n).integers(0, 256, (16, 24, 3), dtype=np.uint8)) for n in range(6)]
    return pack_frames(files), np.stack([decode_image(each, "jpg").permute(1, 2, 0).numpy() for each in files])


@pytest.mark.slow
def test_a_clip_is_the_same_as_file_bytes_array_and_tensor(model, film, tmp_path):
    """The middle four of six frames, the middle 16 columns of 24."""
    data, array = film
    (tmp_path / "a.frames").write_bytes(data)
    tensor = torch.from_numpy(array).permute(3, 0, 1, 2)
    forms = [str(tmp_path / "a.frames"), tmp_path / "a.frames", data, array, tensor]
    found = model.features(forms)
    assert found.shape == (5, 768) and all(torch.equal(found[0], row) for row in found)
    mean, std = (torch.tensor(each).view(3, 1, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (tensor[:, 1:5, :, 4:20] / 255 - mean) / std
    with torch.no_grad():
        plain = model.module(pixels[None])[0].softmax(0)
    answer = model.predict(array, top_k=3)
    assert torch.allclose(torch.tensor(answer.probabilities), plain.sort(descending=True).values, atol=1e-5)
    assert [each.classes for each in model.predict([data, array])] == [answer.classes] * 2


def test_what_is_no_clip_is_refused_with_what_would_be_one(model, film, tmp_path, weights):
    data, array = film
    damaged = pack_frames([jpeg(array[0]), jpeg(array[1]), b"\xff\xd8" + bytes(50), jpeg(array[3])])
    for wrong, message in (
        (array[0], r"a clip is ndarray of uint8 and \(16, 24, 3\), .* an array \(frames, height, width, 3\)"),
        (array.astype(np.float32), r"a clip is ndarray of float32"),
        ("cat.jpg", r"cat.jpg is no clip, and this model takes clips: mp4, .*frames"),
        (tmp_path / "gone.frames", r"gone.frames: No such file"),
        (data[:-5], r"a clip \(bytes\): not a readable .frames file"),
        (damaged, r"a clip \(bytes\): frame 2: "),
    ):
        with pytest.raises(ConfigError, match=message):
            model.predict(wrong)
    with pytest.raises(ConfigError, match=r"does not say its model.frames, which shapes do not show"):
        swinv2_train.load(weights, *KEYS[:2], device="cpu")
