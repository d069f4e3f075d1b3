"""``python -m swinv2_train.make_shards SOURCE OUT``: pack images into webdataset shards with an index and checksums.

    swinv2-make-shards SOURCE OUT               # images/ or images.zip -> OUT-000000.tar, OUT-000001.tar, ...
    swinv2-make-shards --reindex 'DIR/*.tar'    # make index and manifest of existing shards again
    swinv2-make-shards --verify 'DIR/*.tar'     # read everything, compare with the manifest's checksums

SOURCE is a folder, zip or plain tar of images.  With class folders (SOURCE/<class>/...) the labels are the classes'
places in sorted order (numbers by their value), kept in classes.txt beside the shards; where one is there already, its
numbers are taken.  Images directly in SOURCE get no labels.  Image files are copied byte for byte, in an order shuffled
once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from swinv2_train.config import MachineError
from swinv2_train.config.command_line import stoppable
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown, tell
from swinv2_train.data.class_names import CLASSES_NAME
from swinv2_train.data.packing import pack, read_source
from swinv2_train.data.sample import ShardError, lacking
from swinv2_train.data.shards.tar_reader import reindex, verify_shards
from swinv2_train.data.sources.virtual_shards import PACKING_SEED, SAMPLES_PER_SHARD


def _of_the_machine(error: Exception) -> bool:
    """Whether the same command may work at another time; a permission is the user's to give."""
    forbidden = isinstance(error, PermissionError)
    return isinstance(error, MachineError) or (lacking(error) is not None and not forbidden)


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code (2: wrong input, 1: the machine lacks something, each with one message)."""
    parser = argparse.ArgumentParser(
        "swinv2-make-shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", help="folder, zip or tar of images; a shard pattern with --reindex"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="prefix of the shards, e.g. data/my/train")
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="aim at 100 to 500 MB each (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=PACKING_SEED, help="of the shuffle (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards of that prefix")
    parser.add_argument("--reindex", action="store_true", help="make index and manifest of existing shards again")
    parser.add_argument("--verify", action="store_true", help="compare existing shards with their checksums")
    options = parser.parse_args(arguments)
    wanted = {"SOURCE": options.source} | ({} if options.reindex or options.verify else {"OUT": options.out})
    if missing := [name for name, value in wanted.items() if value is None]:
        parser.error(f"{' and '.join(missing)} missing: swinv2-make-shards images/ data/my/train, say")
    if options.samples_per_shard < 1:
        parser.error(f"--samples-per-shard ({options.samples_per_shard}) must be at least 1")
    try:
        if options.reindex:
            manifest = reindex(options.source, tell)
        elif options.verify:
            verify_shards(options.source, tell)
            return EXIT_DONE
        else:
            entries, classes = read_source(Path(options.source))
            manifest = pack(
                entries, options.out, options.samples_per_shard, options.seed, classes, overwrite=options.overwrite
            )
            print(f"{len(classes)} classes, see {CLASSES_NAME}" if classes else "no class folders, so no labels")
    except (ShardError, OSError, MemoryError, MachineError) as error:
        said = shown(str(error) or "no memory is left", MESSAGE_CHARACTERS)
        print(without_secrets(f"make_shards: {said}"), file=sys.stderr)
        return EXIT_FAILED if _of_the_machine(error) else EXIT_USER_ERROR
    size = sum(manifest.sizes) / 1e6
    tell(f"{manifest.num_samples} images in {len(manifest.paths)} shards, {size:.1f} MB; {manifest.paths[0]} ...")
    return EXIT_DONE


def main() -> None:
    """The console script swinv2-make-shards."""
    sys.exit(stoppable(lambda: run(sys.argv[1:])))


if __name__ == "__main__":
    main()
