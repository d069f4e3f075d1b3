"""``python -m swinv2_train.make_shards SOURCE OUT``: pack images or clips into webdataset shards with an index and
checksums.

    swinv2-make-shards SOURCE OUT               # images/ or images.zip -> OUT-000000.tar, OUT-000001.tar, ...
    swinv2-make-shards SOURCE OUT --labels MASKS  # and the label image of each, for task=segment
    swinv2-make-shards SOURCE OUT --annotations PATH  # and the objects of each, for task=detect
    swinv2-make-shards SOURCE OUT --clips mp4   # clips encoded anew, to be read fast
    swinv2-make-shards --reindex 'DIR/*.tar'    # make index and manifest of existing shards again
    swinv2-make-shards --verify 'DIR/*.tar'     # read everything, compare with the manifest's checksums

SOURCE is a folder, zip or plain tar of images or of clips, or a list of either (.txt or .csv, 'path label' a line, as
Kinetics').  With class folders (SOURCE/<class>/...) the labels are the classes' places in sorted order (numbers by
their value), kept in classes.txt beside the shards; where one is there already, its numbers are taken.  Files directly
in SOURCE get no labels.  Files are copied byte for byte, in an order shuffled once.

Clips may be encoded anew, so that any frame is decoded fast: --clips mp4 makes H.264 of them with a key frame every few
frames, --clips frames the JPEG files of their frames, for machines without a decoder of videos; both smaller than most
videos come, without sound.  A damaged clip is left out, counted and named (--on-bad-clip error: refused).

Label images are PNG files whose pixels are numbers of classes: MASKS/<path>.png for SOURCE/<path>.jpg, or KEY.seg.png
beside KEY.jpg in SOURCE itself.  Each is compared with its image, their values are counted and shown, and the first few
are drawn over their images (OUT-labels-0.png, ...).

Objects with boxes and masks are read from a COCO json, or from a folder, zip or tar of Pascal VOC xml, YOLO txt or
labelme json files; each image is packed with its own, KEY.json, and the classes are those of the annotations.  What
cannot be is counted, named and handled by one rule for each kind (docs/detection.md).  With --labels, or KEY.seg.png
beside them, they are packed with the classes of their pixels, too (task.semantic_classes).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.config.command_line import stoppable
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown, tell
from swinv2_train.data.annotations.rules import BadBoxes
from swinv2_train.data.class_names import CLASSES_NAME
from swinv2_train.data.clips.encoding import CLIP_FORMS, ClipEncoder
from swinv2_train.data.label_checks import LabelImageChecks
from swinv2_train.data.object_checks import ObjectChecks, Overlay
from swinv2_train.data.objects import Objects
from swinv2_train.data.packing import pack, read_annotated, read_source
from swinv2_train.data.sample import ShardError, lacking
from swinv2_train.data.shards.tar_reader import Manifest, reindex, verify_shards
from swinv2_train.data.sources.label_folders import pixel_class_names
from swinv2_train.data.sources.virtual_shards import PACKING_SEED, SAMPLES_PER_SHARD
from swinv2_train.data.transforms.decode import DecodeError, decode_image

_SHORT_PX, _KEY_FRAMES = 256, 16
_MIN_SHORT_PX = 16


def _of_the_machine(error: Exception) -> bool:
    """Whether the same command may work at another time; a permission is the user's to give."""
    forbidden = isinstance(error, PermissionError)
    return isinstance(error, MachineError) or (lacking(error) is not None and not forbidden)


def _clip_encoder(options: argparse.Namespace) -> ClipEncoder | None:
    """Raises ShardError for options that do not go with each other."""
    chosen = {"--clips-short-side": options.clips_short_side, "--clips-gop": options.clips_gop,
              "--on-bad-clip": options.on_bad_clip}  # fmt: skip
    if options.clips is None:
        if alone := [name for name, value in chosen.items() if value is not None]:
            raise ShardError(f"{' and '.join(alone)} are of clips that are encoded anew; add --clips mp4, or frames")
        return None
    if options.labels is not None or options.annotations is not None or options.reindex or options.verify:
        raise ShardError(
            f"--clips {options.clips} packs clips with the label of each, and goes with none of --labels, "
            "--annotations, --reindex and --verify"
        )
    if options.clips_gop is not None and options.clips != "mp4":
        raise ShardError(f"--clips-gop is of --clips mp4: every frame of --clips {options.clips} is read by itself")
    short_px = _SHORT_PX if options.clips_short_side is None else options.clips_short_side
    key_frames = _KEY_FRAMES if options.clips_gop is None else options.clips_gop
    if short_px < _MIN_SHORT_PX or short_px % 2:
        raise ShardError(f"--clips-short-side ({short_px}) must be an even number of pixels, {_MIN_SHORT_PX} or more")
    if key_frames < 1:
        raise ShardError(f"--clips-gop ({key_frames}) must be at least 1, where every frame is a key frame")
    return ClipEncoder(options.clips, short_px, key_frames, refuse=options.on_bad_clip == "error")


def _pack(options: argparse.Namespace, encoder: ClipEncoder | None) -> Manifest:
    if options.annotations is not None:
        return _pack_annotated(options)
    labels = None if options.labels is None else Path(options.labels)
    entries, classes = read_source(Path(options.source), labels)
    checks, overlays = None, Overlays(f"{options.out}-labels")
    if entries[0].read_labels is not None:
        classes = pixel_class_names(labels or Path(options.source))
        checks = _label_image_checks(options, classes, overlays)
    elif options.num_classes is not None or options.reduce_zero_label:
        raise ShardError(
            f"--num-classes and --reduce-zero-label are of label images, and SOURCE {options.source} has none; name "
            "their folder by --labels"
        )
    manifest = pack(
        entries, options.out, options.samples_per_shard, options.seed, classes, options.overwrite, checks, encoder
    )  # fmt: skip
    overlays.write()
    if classes:
        print(f"{len(classes)} classes, see {CLASSES_NAME}")
    elif entries[0].label is not None:
        print(f"labels up to {max(entry.label or 0 for entry in entries)}, as SOURCE lists them")
    elif checks is None:
        print("no class folders, so no labels")
    return manifest


def _pack_annotated(options: argparse.Namespace) -> Manifest:
    if options.reduce_zero_label:
        raise ShardError(
            "--reduce-zero-label is of task=segment, and --annotations of task=detect, which takes label images as "
            "they are (task.semantic_classes); leave one of them out"
        )
    labels = None if options.labels is None else Path(options.labels)
    entries, classes = read_annotated(Path(options.source), Path(options.annotations), labels)
    of_pixels, of_objects, of_labels = None, Overlays(f"{options.out}-objects"), Overlays(f"{options.out}-labels")
    if any(entry.read_labels is not None for entry in entries):
        of_pixels = _label_image_checks(options, None, of_labels)
    elif options.num_classes is not None:
        raise ShardError(
            "--num-classes is of label images, and there are none; name their folder by --labels, or leave it out"
        )
    checks = ObjectChecks(
        f"SOURCE {options.source}", classes, BadBoxes(options.annotations, refuse=options.on_bad_box == "error"),
        options.drop_empty, _objects_overlay(of_objects, classes), options.overlays, of_pixels,
    )  # fmt: skip
    manifest = pack(entries, options.out, options.samples_per_shard, options.seed, classes, options.overwrite, checks)
    of_objects.write()
    of_labels.write()
    print(f"{len(classes)} classes, see {CLASSES_NAME}; task.num_classes={len(classes)}")
    return manifest


class Overlays:
    """Pictures of what is packed, which get their names when all of it is: of a set that is refused none stays."""

    def __init__(self, prefix: str) -> None:
        """prefix: of their paths."""
        self._prefix = prefix
        self._drawn: list[tuple[bytes, str]] = []

    def add(self, picture: np.ndarray, text: str) -> None:
        """uint8 (H, W, 3) of a few hundred pixels, and what it is."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        self._drawn.append((png.getvalue(), text))

    def write(self) -> None:
        """Put them beside the shards, and say so."""
        for number, (png, text) in enumerate(self._drawn):
            path = Path(f"{self._prefix}-{number}.png")
            path.write_bytes(png)
            tell(f"{path}: {text}; look whether they fit")


def _objects_overlay(overlays: Overlays, classes: Sequence[str]) -> Overlay:
    from swinv2_train.tasks.detect_picture import Shown, draw_objects

    def overlay(key: str, image: bytes, extension: str, objects: Objects) -> None:
        try:
            pixels = decode_image(image, extension).permute(1, 2, 0).numpy()
        except DecodeError:  # values of bands, or damaged, which a run will tell
            return
        masks = [None if mask is None else mask.pixels(objects.size) for mask in objects.masks]
        picture = draw_objects(pixels, Shown(objects.boxes, objects.classes, None, masks), classes)
        overlays.add(picture, f"the objects of '{shown(key)}'")

    return overlay


def _label_image_checks(
    options: argparse.Namespace, names: tuple[str, ...] | None, overlays: Overlays
) -> LabelImageChecks:  # fmt: skip
    from swinv2_train.tasks.segment_picture import overlay_picture

    def overlay(key: str, image: bytes, extension: str, values: np.ndarray) -> None:
        labels = values.astype(np.int64)
        if options.reduce_zero_label:
            labels = np.where((labels == 0) | (labels == options.ignore_index), options.ignore_index, labels - 1)
        try:
            pixels = decode_image(image, extension).permute(1, 2, 0).numpy()
        except DecodeError:  # values of bands, or damaged, which a run will tell
            pixels = None
        picture = overlay_picture(pixels, labels, options.ignore_index, names)
        overlays.add(picture, f"the label image of '{shown(key)}' over it")

    return LabelImageChecks(
        options.source, options.samples_per_shard, options.num_classes or (len(names) if names else None),
        options.reduce_zero_label, options.ignore_index, names, overlay, options.overlays,
    )  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code (2: wrong input, 1: the machine lacks something, each with one message)."""
    parser = argparse.ArgumentParser(
        "swinv2-make-shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", help="folder, zip, tar or list; a shard pattern with --reindex"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="prefix of the shards, e.g. data/my/train")
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="aim at 100 to 500 MB each (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=PACKING_SEED, help="of the shuffle (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards of that prefix")
    parser.add_argument("--labels", metavar="MASKS", help="folder, zip or tar of label images, as SOURCE is of images")
    parser.add_argument(
        "--annotations", metavar="PATH",
        help="objects: a COCO json, or a folder, zip or tar of Pascal VOC xml, YOLO txt or labelme json",
    )  # fmt: skip
    parser.add_argument(
        "--on-bad-box", choices=("rules", "error"), default="rules",
        help="go by the rules of docs/detection.md, and count; or end at the first (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--drop-empty", action="store_true", help="leave out images without objects")
    parser.add_argument("--num-classes", type=int, help="of pixels; label images with others are refused")
    parser.add_argument(
        "--reduce-zero-label", action="store_true", help="check as task.reduce_zero_label=true reads: 0 is no class"
    )
    parser.add_argument("--ignore-index", type=int, default=255, help="value of pixels without a class (%(default)s)")
    parser.add_argument(
        "--overlays", type=int, default=4, help="label images, or images with objects, to draw (%(default)s)"
    )
    parser.add_argument("--clips", choices=CLIP_FORMS, help="encode clips anew: H.264, or JPEG files; else copied")
    parser.add_argument(
        "--clips-short-side", type=int, metavar="PX",
        help=f"pixels of the shorter side of clips that are larger ({_SHORT_PX})",
    )  # fmt: skip
    parser.add_argument(
        "--clips-gop", type=int, metavar="N", help=f"mp4: frames from a key frame to the next, at most ({_KEY_FRAMES})"
    )
    parser.add_argument(
        "--on-bad-clip", choices=("leave-out", "error"),
        help="leave out what cannot be decoded, and count; or end at the first (leave-out)",
    )  # fmt: skip
    parser.add_argument("--reindex", action="store_true", help="make index and manifest of existing shards again")
    parser.add_argument("--verify", action="store_true", help="compare existing shards with their checksums")
    options = parser.parse_args(arguments)
    wanted = {"SOURCE": options.source} | ({} if options.reindex or options.verify else {"OUT": options.out})
    if missing := [name for name, value in wanted.items() if value is None]:
        parser.error(f"{' and '.join(missing)} missing: swinv2-make-shards images/ data/my/train, say")
    if options.samples_per_shard < 1:
        parser.error(f"--samples-per-shard ({options.samples_per_shard}) must be at least 1")
    try:
        encoder = _clip_encoder(options)
        if options.reindex:
            manifest = reindex(options.source, tell)
        elif options.verify:
            verify_shards(options.source, tell)
            return EXIT_DONE
        else:
            manifest = _pack(options, encoder)
    except (ConfigError, OSError, MemoryError, MachineError) as error:
        said = shown(str(error) or "no memory is left", MESSAGE_CHARACTERS)
        print(without_secrets(f"make_shards: {said}"), file=sys.stderr)
        return EXIT_FAILED if _of_the_machine(error) else EXIT_USER_ERROR
    size = sum(manifest.sizes) / 1e6
    what = "clips" if sum(manifest.clips) else "images"
    tell(f"{manifest.num_samples} {what} in {len(manifest.paths)} shards, {size:.1f} MB; {manifest.paths[0]} ...")
    return EXIT_DONE


def main() -> None:
    """The console script swinv2-make-shards."""
    sys.exit(stoppable(lambda: run(sys.argv[1:])))


if __name__ == "__main__":
    main()
