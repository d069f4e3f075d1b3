"""What looking after whole files and comparing checksums adds to decoding, as ratios to the decoder by itself.

    OMP_NUM_THREADS=1 python benchmarks/decode_checks.py [--rounds 60]

Photographs of 500 x 375 pixels (benchmarks/loader_throughput.py).  Every way takes its turn on each picture in each
round, and each picture's smallest CPU time counts, so that other programs on the machine disturb all ways alike.
"""

from __future__ import annotations

import argparse
import io
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks.loader_throughput import photograph
from swinv2_train.data.transforms.decode import decode_image

PICTURES = 8


def simplejpeg_alone(data: bytes) -> torch.Tensor:
    import simplejpeg

    simplejpeg.decode_jpeg_header(data)
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", strict=True)).permute(2, 0, 1)


def pillow_alone(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def ours(data: bytes) -> torch.Tensor:
    return decode_image(data, "x")


def verified(data: bytes) -> torch.Tensor:
    """As data.verify=true does before it decodes."""
    zlib.crc32(data)
    return decode_image(data, "x")


def saved(data: bytes, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, kind, **options)
    return buffer.getvalue()


def cpu_ms(ways: dict[str, Callable[[bytes], object]], files: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds per file of each way."""
    best = {name: [float("inf")] * len(files) for name in ways}
    order = list(ways.items())
    for _ in range(rounds):
        order = order[1:] + order[:1]  # the first one finds the file outside of the processor's caches
        for number, data in enumerate(files):
            for name, way in order:
                started = time.process_time_ns()
                way(data)
                best[name][number] = min(best[name][number], (time.process_time_ns() - started) / 1e6)
    return {name: sum(times) / len(files) for name, times in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [photograph(number) for number in range(PICTURES)]
    cases: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
        "JPEG": (simplejpeg_alone, pictures),
        "JPEG, a warning first": (simplejpeg_alone, pictures),
        "PNG": (pillow_alone, [saved(data, "PNG") for data in pictures]),
        "WebP": (pillow_alone, [saved(data, "WEBP") for data in pictures]),
    }
    print("| files | kB | by itself, ms | decode_image | with data.verify=true |\n|---|---|---|---|---|")
    for name, (alone, files) in cases.items():
        tried = [data[:-2] + b"\1" * 9 + data[-2:] for data in files] if "warning" in name else files
        plain = cpu_ms({"alone": alone}, files, options.rounds)["alone"] if "warning" in name else 0.0
        ways = {"ours": ours, "verified": verified} | ({} if plain else {"alone": alone})
        took = cpu_ms(ways, tried, options.rounds)
        base = plain or took["alone"]
        size = sum(map(len, files)) / len(files) / 1000
        print(f"| {name} | {size:.0f} | {base:.3f} | {took['ours'] / base:.3f} | {took['verified'] / base:.3f} |")


if __name__ == "__main__":
    main()
