"""The look command: one page that asks for nothing from elsewhere, and says what it does not show."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_train import embed, look
from swinv2_train.config import ConfigError
from swinv2_train.config.load import config_yaml
from swinv2_train.inference.gallery import saved_gallery
from swinv2_train.tasks import build_task
from tests.support.configs import composed
from tests.support.detector import DETECT
from tests.support.detector import randomised as random_detector
from tests.support.evaluation import CLASSIFY, MEAN, MODEL, STD, logits_of, make_images, make_model, save_model
from tests.support.harness import RankFailed, run_distributed
from tests.support.segmenter import SEGMENT, randomised

COUNT, NASTY, BROKEN = 7, "<script>alert(1)<video>.png", "zz&broken.png"
IMAGES = make_images(COUNT, seed=1)


class Page(HTMLParser):
    """What a page holds: pictures with the texts beside them, words by the tag around them, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.pictures, self.fetched, self.tags = "", [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            head, _, data = (given.get("src") or "").partition(",")
            assert head == "data:image/jpeg;base64"
            self.pictures.append((given["alt"], np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))))
        self.fetched += [value for key, value in attrs if key in ("src", "href") and not str(value).startswith("data:")]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def shown(self, text: str) -> list[np.ndarray]:
        """Pictures of which this is said."""
        return [picture for alt, picture in self.pictures if text in alt]


def looked(*words: str) -> dict[str, Any]:
    config, request = look.parse(list(words))
    return run_distributed(lambda world: look.look(config, request), 1, init=False)[0]


def write_run(folder: Path, task: Any, *words: str) -> tuple[str, str]:
    """The configuration of a run, and weights."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config_yaml(composed([*words, f"run_dir={folder}", "data.shards=gone.tar"])))
    torch.save(task.module.state_dict(), folder / "w.pth")
    return f"run_dir={folder}", f"weights={folder / 'w.pth'}"


def task_of(*words: str) -> Any:
    return build_task(composed([*words, "run_dir=x", "data.shards=x"]), torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, ...]:
    """A run, weights and images, one of a name that is markup and one that is no image."""
    folder = tmp_path_factory.mktemp("look")
    (folder / "images").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / "images" / (NASTY if number == 0 else f"{number:02d}.png"))
    (folder / "images" / BROKEN).write_bytes(b"no image")
    (folder / "run").mkdir()
    words = (*CLASSIFY, *MODEL, "data.num_workers=0", f"run_dir={folder / 'run'}", "data.shards=gone.tar")
    (folder / "run" / "config.yaml").write_text(config_yaml(composed(words)))
    return f"run_dir={folder / 'run'}", f"weights={save_model(folder / 'w.safetensors')}", f"images={folder / 'images'}"


@torch.no_grad()
def alike() -> np.ndarray:
    """Cosines of all pairs of images, by plain numpy: (COUNT, COUNT)."""
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    pooled = torch.cat([make_model()(((image - MEAN) / STD)[None], features=True) for image in pixels])
    unit = pooled.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.slow
def test_the_page_of_a_classifier(files, tmp_path):
    line = looked(*files, f"out={tmp_path / 'a'}", "neighbours=3", "cam_stage=[1,2]", "max_images=20")
    path = tmp_path / "a" / "look.html"
    page = Page(path)
    assert line["shown"] == COUNT and line["images"] == COUNT + 1 and line["unreadable_images"] == [BROKEN]
    assert line["out"] == str(path) and line["mib"] == pytest.approx(path.stat().st_size / 2**20, abs=0.01)
    assert not page.fetched and page.tags.count("script") == 1 and "video" not in page.tags
    assert NASTY in page.text and BROKEN in page.text and "no known format" in page.text
    assert line["not_shown"] == ["Reconstruction"] and "task=classify reconstructs nothing" in page.text
    said = logits_of(IMAGES).softmax(1)
    for row in said:
        text = f"{int(row.argmax())}: {100 * float(row.max()):.1f} %"
        assert len(page.shown(f"{text} (stage 1")) == len(page.shown(f"{text} (stage 2")) > 0
    assert len(page.shown("attention")) == COUNT * 2 * 5 and len(page.shown("each head")) == COUNT * 2
    cosines = alike()
    np.fill_diagonal(cosines, -1)
    names = [NASTY, *(f"{number:02d}.png" for number in range(1, COUNT))]
    order = sorted(range(COUNT), key=lambda number: names[number])
    expected = [(names[other], cosines[query, other]) for query in order for other in np.argsort(-cosines[query])[:3]]
    found = [re.fullmatch(r"(-?\d\.\d{3})  (.*)", alt) for alt, _ in page.pictures]
    given = [(each[2], float(each[1])) for each in found if each is not None]
    assert [name for name, _ in given] == [name for name, _ in expected]
    assert [value for _, value in given] == pytest.approx([value for _, value in expected], abs=6e-4)
    with pytest.raises(RankFailed, match=r"look\.html\) exists already"):
        looked(*files, f"out={tmp_path / 'a'}")


@pytest.mark.slow
def test_what_cannot_be_read_is_told_once(files, tmp_path, capfd):
    """Among the images that are shown, and among those of its own gallery or of another one."""
    other = tmp_path / "other"
    other.mkdir()
    (other / BROKEN).write_bytes(b"no image either")
    Image.fromarray(IMAGES[0]).save(other / "0.png")
    for more, count in (((), 1), ((f"gallery={files[2].partition('=')[2]}",), 1), ((f"gallery={other}",), 2)):
        out = f"out={tmp_path / str(len(list(tmp_path.iterdir())))}"
        config, request = look.parse([*files, out, "max_images=20", *more])

        def telling(world: Any, config: Any = config, request: Any = request) -> Any:
            logging.getLogger("swinv2_train").addHandler(logging.StreamHandler())
            return look.look(config, request)

        assert run_distributed(telling, 1, init=False)[0]["unreadable"] == count
        assert capfd.readouterr().err.count("unreadable image: ") == count


@pytest.mark.slow
def test_few_of_many_images_a_class_and_a_gallery_that_embed_wrote(files, tmp_path):
    config, request = embed.parse([*files, f"out={tmp_path / 'f'}", "dtype=fp16", "queries=0"])
    run_distributed(lambda world: embed.embed(config, request), 1, init=False)
    line = looked(
        *files, f"out={tmp_path / 'a.html'}", "max_images=2", "class=3", "queries=[[0,0]]", "blocks=[2.1]",
        f"gallery={tmp_path / 'f'}", "neighbours=2",
    )  # fmt: skip
    page = Page(tmp_path / "a.html")
    assert (line["shown"], line["images"], line["gallery"]) == (1, COUNT + 1, COUNT + 1)  # the last one is broken
    assert "1 of 8 images are shown" in page.text
    first = int(np.argmin([NASTY, *(f"{number:02d}.png" for number in range(1, COUNT))]))
    share = 100 * float(logits_of(IMAGES[[first]]).softmax(1)[0, 3])
    assert len(page.shown(f"3: {share:.1f} % (stage 2")) == 1 and len(page.shown("attention")) == 1
    assert len(page.shown("1.000  ")) == 1  # itself, which is in this gallery as any other
    model = make_model()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(-1)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    other = (files[0], f"weights={tmp_path / 'other.pth'}", files[2], f"gallery={tmp_path / 'f'}")
    with pytest.raises(RankFailed, match="features of another model"):
        looked(*other, f"out={tmp_path / 'b'}")


@pytest.mark.slow
def test_reconstructions_of_fourteen_bands(tmp_path):
    """Values are stretched for the eye; the mask is the image's own at every start."""
    words = (
        "task=simmim", "task.mask_unit_px=8", *MODEL, "data=folder", "model.in_chans=14", f"data.mean={[0.0] * 14}",
        f"data.std={[1.0] * 14}", "data.num_workers=0", "data.picture_bands=[3,2,1]", "data.nodata=[nan]",
        "data.array_layout=chw",
    )  # fmt: skip
    run = write_run(tmp_path / "run", task_of(*words), *words)
    (tmp_path / "images").mkdir()
    values = np.random.default_rng(0).normal(size=(2, 14, 16, 16)).astype(np.float32)
    for number, each in enumerate(values):
        np.save(tmp_path / "images" / f"{number}.npy", each)
    pages = []
    for name in "ab":
        line = looked(*run, f"images={tmp_path / 'images'}", f"out={tmp_path / name}", "neighbours=1")
        pages.append(Page(tmp_path / name / "look.html"))
    shown = pages[0].shown("what is hidden")
    assert line["not_shown"] == ["Grad-CAM"] and "names no class" in pages[0].text and len(shown) == 2
    assert shown[0].shape == (112, 3 * 100 - 4, 3)  # three columns of 16 px sixfold, below a line of labels
    assert all(np.array_equal(a, b) for a, b in zip(shown, pages[1].shown("what is hidden"), strict=True))


@pytest.mark.slow
def test_segmenters_are_asked_of_classes_and_detectors_of_attention_alone(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(make_images(1, 3, 70)[0]).save(tmp_path / "images" / "a.png")
    images = f"images={tmp_path / 'images'}"
    names = "task.class_names=[sky,sea,sand,stone,<i>]"
    run = write_run(tmp_path / "segment", randomised(task_of(*SEGMENT)), *SEGMENT, names)
    line = looked(*run, images, f"out={tmp_path / 's.html'}", "class=stone", "cam_stage=[1,4]")
    page = Page(tmp_path / "s.html")
    assert len(page.shown("stone: ")) == 2 and "one image alone" in page.text
    assert line["not_shown"] == ["Reconstruction", "Neighbours"]
    run = write_run(tmp_path / "detect", random_detector(task_of(*DETECT)), *DETECT)
    line = looked(*run, images, f"out={tmp_path / 'd.html'}", "neighbours=0")
    assert line["not_shown"] == ["Grad-CAM", "Reconstruction", "Neighbours"]
    assert len(Page(tmp_path / "d.html").shown("attention")) == 4 * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("queries=[[0.5,1.5]]",), r"queries .* pairs of shares"),
        (("queries=0.5",), r"queries .* pairs of shares"),
        (("queries=[]",), r"queries .* pairs of shares"),
        (("blocks=[12]",), r"blocks \(12\) must be STAGE.BLOCK"),
        (("cam_stage=0",), r"cam_stage \(0\) must be the number of a stage"),
        (("max_images=0",), r"max_images \(0\) must be a whole number of at least 1"),
        (("neighbours=0", "gallery=x"), "gallery .* is for neighbours"),
        (("gallery=pipe:cat x",), "gallery is a pipe"),
        (("neighbors=1",), "neighbors"),
    ],
)
def test_wrong_keys_are_refused_with_the_remedy(files, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        look.parse([*files, f"out={tmp_path / 'a'}", *words])


def test_what_the_model_does_not_have_is_refused_before_an_image_is_read(files, tmp_path):
    for words, message in (
        ("blocks=[1.1,2.2]", r"blocks \(2.2\) is no block of this model, whose stages have 1, 1"),
        ("cam_stage=3", r"cam_stage \(3\) is no stage of this model, which has 2"),
        ("class=4", r"class \(4\) is none of the model's; name one, or give a number from 0 to 3"),
    ):
        with pytest.raises(RankFailed, match=message):
            looked(*files, f"out={tmp_path / 'a'}", words)
    assert not (tmp_path / "a").exists()


def test_models_of_clips_are_refused_at_once(files, tmp_path):
    words = (
        "model.frames=4", "task.rand_augment=null", "task.color_jitter=0", "task.cutmix_alpha=0", "task.erasing_prob=0",
    )  # fmt: skip
    config, request = look.parse([*files, f"out={tmp_path / 'a'}", *words])
    with pytest.raises(ConfigError, match=r"model.frames \(4\): this is a model of clips, of which no page is made"):
        look.look(config, request)


@pytest.mark.parametrize("images", ["pipe:touch ran", "https://127.0.0.1:9/a.tar"])
def test_a_gallery_of_somebody_starts_and_fetches_nothing(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedding.json").write_text(json.dumps({"features": "pooled", "images_from": images}))
    np.save(tmp_path / "pooled.npy", np.zeros((1, 16), np.float32))
    config = composed([*CLASSIFY, *MODEL, "run_dir=x", "data.shards=x"])
    with pytest.raises(ConfigError, match="which is not on this machine; name the images themselves"):
        saved_gallery(config, None, tmp_path, set())
    assert not (tmp_path / "ran").exists()
