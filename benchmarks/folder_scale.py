"""Time and memory of listing a folder like ImageNet's, 1.3 million files in 1,000 classes, and of passing it on.

    python benchmarks/folder_scale.py [--images 1300000] [--classes 1000]

The files are made for the purpose, of a size but without content, and deleted again.
"""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import tempfile
import time

from swinv2_train.data.sources.folder import FolderReader, open_folder
from swinv2_train.data.sources.virtual_shards import SAMPLES_PER_SHARD


def make(folder: str, images: int, classes: int) -> None:
    for label in range(classes):
        os.mkdir(f"{folder}/n{label:08d}")
    for number in range(images):
        path = f"{folder}/n{number % classes:08d}/n{number % classes:08d}_{number // classes}.JPEG"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.truncate(fd, 100_000 + number % 1000)
        os.close(fd)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        make(folder, options.images, options.classes)
        print(f"{options.images} files made in {time.perf_counter() - started:.0f} s")
        for attempt in ("first", "second"):
            before, started, cpu = peak_mib(), time.perf_counter(), time.process_time()
            source = open_folder(folder)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            print(
                f"{attempt} listing: {seconds:.1f} s, {cpu:.1f} CPU s, {peak_mib() - before:.0f} MiB more at its peak"
            )
        started = time.perf_counter()
        passed = pickle.dumps(source)
        again = pickle.loads(passed)
        seconds = time.perf_counter() - started
        print(f"packed and unpacked for another rank: {len(passed) / 2**20:.0f} MiB, {seconds:.2f} s")
        reader, count = FolderReader(again), min(200_000, source.num_samples)
        started = time.perf_counter()
        for place in range(count):
            reader.key(*divmod(place, SAMPLES_PER_SHARD))
        print(f"{1e6 * (time.perf_counter() - started) / count:.2f} us per key")


if __name__ == "__main__":
    main()
