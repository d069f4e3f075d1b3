"""Views of images with objects: boxes, masks and pixels move together, whatever is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from swinv2_train.data.mask_codes import encode_mask
from swinv2_train.data.objects import Mask, Objects
from swinv2_train.data.transforms.crop import random_dihedral
from swinv2_train.data.transforms.detect import Cut, DetectTrainView, View, eval_views

SIZE = (48, 80)
TRAIN = DetectTrainView(
    size=(64, 56), scale=(0.5, 2.0), resize="opencv", flip=0.5, dihedral=True, max_objects=6, min_object_px=1.0,
    masks=True, fill=(7.0, 8.0, 9.0),
)  # fmt: skip


def scene(kind: str) -> tuple[torch.Tensor, Objects]:
    """Rectangles in colours of their own on black, with masks as polygons or as run lengths."""
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    boxes = np.array([[4, 6, 20, 30], [30, 10, 70, 20], [50, 30, 76, 44]], np.float32)
    masks = []
    for number, (x0, y0, x1, y1) in enumerate(boxes.astype(int).tolist()):
        image[number, y0:y1, x0:x1] = 255
        pixels = np.zeros(SIZE, bool)
        pixels[y0:y1, x0:x1] = True
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)
        masks.append(Mask(polygons=(corners,)) if kind == "polygons" else Mask(rle=encode_mask(pixels)))
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.float64)
    crowd = np.array([False, True, False])
    return image, Objects(SIZE, 1, boxes, np.array([5, 6, 7]), crowd, area, tuple(masks))


def drawn(seed: int, kind: str = "polygons", view: DetectTrainView = TRAIN) -> View:
    image, objects = scene(kind)
    return view(image, objects, np.random.default_rng(seed))


def mask_of(view: View, number: int) -> np.ndarray:
    assert view.masks is not None
    return np.unpackbits(view.masks[number].numpy(), axis=1)[:, : view.images.shape[2]].astype(bool)


@pytest.mark.parametrize("kind", ["polygons", "rle"])
@pytest.mark.parametrize("seed", range(40))
def test_boxes_and_masks_lie_where_the_pixels_are(seed: int, kind: str) -> None:
    """Each rectangle has a colour, so that the pixels tell where it went."""
    view = drawn(seed, kind)
    count = int((view.classes >= 0).sum())
    assert (view.classes[count:] == -1).all() and (view.boxes[count:] == 0).all()
    rows, columns = view.extent.tolist()
    for number in range(count):
        band = int(view.classes[number]) - 5
        seen = view.images[band, :rows, :columns].numpy() > 127
        mask = mask_of(view, number)
        assert not mask[rows:].any() and not mask[:, columns:].any()
        assert (mask[:rows, :columns] != seen).sum() <= 2 * (seen.any(0).sum() + seen.any(1).sum())  # its edge
        assert bool(view.crowd[number]) == (band == 1)
        if seen.sum() > 30:
            ys, xs = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
            truth = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
            np.testing.assert_allclose(view.boxes[number].numpy(), truth, atol=1.01)
    padding = view.images.clone()
    padding[:, :rows, :columns] = torch.tensor([7, 8, 9]).view(3, 1, 1)
    assert (padding == torch.tensor([7, 8, 9]).view(3, 1, 1)).all()


def test_every_direction_turns_points_as_it_turns_pixels() -> None:
    image = torch.arange(6 * 4).view(1, 6, 4)
    for turn in range(8):

        class Drawn:
            def integers(self, high: int) -> int:
                return turn  # noqa: B023

        seen = random_dihedral(image, Drawn())  # type: ignore[arg-type]
        size = (seen.shape[1], seen.shape[2])
        cut = Cut((6, 4), turn, size, 0, 0, size, mirrored=False)
        assert torch.equal(cut.image(image.float(), "opencv"), seen.float())
        for y, x in ((0, 0), (2, 3), (5, 1)):
            there = cut.points(np.array([x + 0.5, y + 0.5]))
            assert seen[0, int(there[1]), int(there[0])] == image[0, y, x], (turn, y, x)


def test_the_same_generator_gives_the_same_view_and_another_one_another() -> None:
    first, again, other = drawn(3), drawn(3), drawn(4)
    for one, two in zip(first[:6], again[:6], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.images, other.images)


def test_as_many_numbers_are_drawn_whatever_comes_of_them() -> None:
    """So what is drawn after a view does not depend on what was in it."""
    image, objects = scene("polygons")
    none = replace(objects, boxes=objects.boxes[:0], classes=objects.classes[:0], crowd=objects.crowd[:0],
                   area=objects.area[:0], masks=())  # fmt: skip
    generators = [np.random.default_rng(5), np.random.default_rng(5)]
    views = [TRAIN(image, each, rng) for each, rng in zip((objects, none), generators, strict=True)]
    assert generators[0].random() == generators[1].random()
    assert (views[1].classes == -1).all() and torch.equal(views[0].images, views[1].images)


def test_the_largest_objects_are_kept_in_their_order_and_the_others_counted() -> None:
    plain = replace(TRAIN, max_objects=2, scale=(0.5, 0.5), dihedral=False, flip=0.0)
    view = drawn(0, view=plain)
    assert view.classes.tolist() == [5, 6] and view.left_out == 1  # of 384, 400 and 364 pixels


def test_an_object_with_too_little_left_is_left_out() -> None:
    """A scale of a tenth leaves 1 px of the thin one's 10 at most."""
    small = replace(TRAIN, scale=(0.1, 0.1), min_object_px=2.0, dihedral=False)
    assert 6 not in drawn(0, view=small).classes.tolist()
    assert 6 in drawn(0, view=replace(small, scale=(1.0, 1.0))).classes.tolist()


def test_a_box_that_the_edge_cuts_is_drawn_around_what_is_left_of_the_object() -> None:
    """Of an L the part in the view may be much smaller than the part of its box."""
    pixels = np.zeros((40, 40), bool)
    pixels[0:40, 0:4], pixels[36:40, 0:40] = True, True
    box = np.array([[0, 0, 40, 40]], np.float32)
    angle = Objects(
        (40, 40), 1, box, np.array([0]), np.array([False]), np.array([304.0]), (Mask(rle=encode_mask(pixels)),)
    )
    cut = Cut((40, 40), 0, (40, 40), 0, 0, (20, 20), mirrored=False)
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)

    class Fixed(DetectTrainView):
        def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Cut:
            return cut

    settings = {**TRAIN.__dict__, "size": (20, 20)}
    masked, boxed = (
        Fixed(**{**settings, "masks": each})(image, angle, np.random.default_rng(0)) for each in (True, False)
    )
    assert masked.boxes[0].tolist() == [0, 0, 4, 20] and boxed.boxes[0].tolist() == [0, 0, 20, 20]
    assert boxed.masks is None


def test_an_object_without_a_mask_has_an_empty_one() -> None:
    image, objects = scene("polygons")
    view = TRAIN(image, replace(objects, masks=(None,) * 3), np.random.default_rng(1))
    assert view.masks is not None and not view.masks.any() and (view.classes >= 0).any()


def test_values_of_many_bands_keep_what_was_not_measured() -> None:
    _, objects = scene("polygons")
    values = torch.rand(5, *SIZE)
    values[2, :4] = torch.nan
    view = replace(TRAIN, fill=(0.5,) * 5, scale=(1.0, 1.0))(values, objects, np.random.default_rng(2))
    assert view.images.shape == (5, 64, 56) and view.images.dtype == torch.float32 and view.images.isnan().any()


def test_evaluation_sees_the_whole_image_at_each_scale() -> None:
    image, _ = scene("polygons")
    assert [each.shape for each in eval_views(image, 80, 48, (1.0, 0.5), "opencv")] == [(3, 48, 80), (3, 24, 40)]


def test_what_is_drawn_in_a_cut_is_the_cut_of_what_is_drawn() -> None:
    """COCO's rule rounds towards 0, so that an outline beyond the upper and left edges would move by a pixel."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        mask = Mask(polygons=(rng.uniform(0, 60, (5, 2)),))
        whole = Cut((60, 60), 0, (60, 60), 0, 0, (60, 60), mirrored=False).mask(mask)
        part = Cut((60, 60), 0, (60, 60), 20, 25, (40, 35), mirrored=False).mask(mask)
        assert (part == whole[20:, 25:]).all()


@pytest.mark.parametrize("seed", range(6))
def test_labels_of_pixels_go_the_way_of_masks_and_the_middle_of_each_cell_is_taken(seed: int) -> None:
    image, objects = scene("rle")
    labels = np.full(SIZE, 9, np.uint8)
    for number, mask in enumerate(objects.masks):
        assert mask is not None
        labels[mask.pixels(SIZE)] = number
    small = replace(TRAIN, size=(60, 52), max_objects=3, min_object_px=1e-6, scale=(0.5, 1.2))  # no multiples of 8
    view = small(image, objects, np.random.default_rng(seed), labels)
    assert view.semantic is not None and view.semantic.shape == (8, 7)
    assert small(image, objects, np.random.default_rng(seed)).semantic is None
    rows, columns = view.extent.tolist()
    for i in range(8):
        for j in range(7):
            y, x = 8 * i + 4, 8 * j + 4
            if y >= rows or x >= columns:
                assert view.semantic[i, j] == 255
                continue
            on = [int(view.classes[number]) - 5 for number in range(3) if mask_of(view, number)[y, x]]
            assert view.semantic[i, j] == (on[0] if on else 9)
    assert len(view.semantic.unique()) > 2
