"""A detector's training step beside torchvision's Mask R-CNN with our encoder in it and transformers' Mask2Former.

    python -m benchmarks.detector_step [--size tiny] [--px 256] [--window 8] [--batch 2] [--objects 7 128]

The same images, boxes, classes and masks for all; random weights; forward pass and backward pass, float32 on a CPU.
Each contestant lives in a process of its own and they take turns, in alternating order, a step that is not measured and
one that is.  Seconds by the clock and of CPU time (all threads), which other load on the machine moves less; peak
memory of the process above what it holds at rest, with weights.  Prints a Markdown table for each number of objects.

torchvision: torchvision.models.detection.MaskRCNN on the maps of our encoder, with the heads of
maskrcnn_resnet50_fpn ("v1": two fully connected layers) or of maskrcnn_resnet50_fpn_v2 (BatchNorm in pyramid and heads,
two convolutions in the RPN, four convolutions in the box head).  Ours has the same number of layers in the box head in
the rows beside.  Mask2Former: transformers' own SwinV2 of the same sizes, 100 queries; it needs scipy.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from scripts.benchmark_worker import Laps, Refused, Runner, Worker, reason
from swinv2_train.models import SIZES, SwinTransformerV2, swin_v2
from swinv2_train.models.detection.rcnn import RCNN, RPNSettings
from swinv2_train.models.detection.roi import ONE_STAGE, RoISettings
from swinv2_train.models.detection.suppress import Suppression
from swinv2_train.runtime import tune_allocator

CLASSES = 80
CONTESTANTS = (
    "ours",
    "torchvision v1",
    "ours, box head of 4 convolutions",
    "torchvision v2",
    "transformers Mask2Former",
)
"""Each peer behind ours of the same box head; Mask2Former has none."""
PEERS = {"torchvision v1": CONTESTANTS[0], "torchvision v2": CONTESTANTS[2], "transformers Mask2Former": CONTESTANTS[0]}
"""What each is compared with."""


@dataclass(frozen=True)
class Shape:
    """What all contestants are given."""

    size: str
    px: int
    window: int
    batch: int
    objects: int
    samples: int
    """Boxes of an image that the heads learn from; a quarter of them have masks."""
    threads: int

    def encoder(self) -> SwinTransformerV2:
        """With stochastic depth off, so that every step does the same."""
        return swin_v2(self.size, img_size=self.px, window_size=self.window, num_classes=0, drop_path_rate=0.0)


class Batch:
    """Images of noise with rectangles in them, a quarter of the side to half of it; their masks are whole."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        count, px = (shape.batch, shape.objects), shape.px
        self.images = torch.randn(shape.batch, 3, px, px, generator=generator)
        sides = px * (0.125 + 0.25 * torch.rand(*count, 2, generator=generator))
        low = (px - sides) * torch.rand(*count, 2, generator=generator)
        self.boxes = torch.cat([low, low + sides], dim=2).round()
        self.classes = torch.randint(CLASSES, count, generator=generator)
        at = torch.arange(px).float()
        x0, y0, x1, y1 = (each[..., None] for each in self.boxes.unbind(dim=2))
        self.masks = ((at >= y0) & (at < y1)).unsqueeze(3) & ((at >= x0) & (at < x1)).unsqueeze(2)


Step = Callable[[], Tensor]
"""Gives the loss."""


def ours(shape: Shape, batch: Batch, convs: int) -> tuple[nn.Module, Step]:
    """The detector of task=detect with published sizes."""
    rpn = RPNSettings(per_level=2000, number=1000, eval_number=1000, inside_only=False, beta=0.0)
    roi = RoISettings(
        stages=ONE_STAGE, num_classes=CLASSES, convs=convs, norm="layer", width=1024, class_agnostic=False,
        box_loss="l1", masks=True, box_samples=shape.samples,
        mask_samples=shape.samples // 4, interleaved=False, mask_flow=False,
    )  # fmt: skip
    module = RCNN(shape.encoder(), rpn, roi, Suppression(100, 0.05, 0.5, "none"))
    packed = torch.nn.functional.pad(batch.masks, (0, -shape.px % 8)).unflatten(3, (-1, 8))
    bits = (packed * (2 ** torch.arange(7, -1, -1))).sum(dim=4).to(torch.uint8)
    targets = {
        "boxes": batch.boxes, "classes": batch.classes, "crowd": torch.zeros_like(batch.classes, dtype=torch.bool),
        "draw": torch.arange(shape.batch), "masks": bits,
    }  # fmt: skip
    return module, lambda: module(batch.images, **targets)["losses"].sum(dim=1).mean()


class Maps(nn.Module):
    """Our encoder's maps in torchvision's pyramid, with a norm of each raw map as ours has it."""

    def __init__(self, encoder: SwinTransformerV2, norm: Callable[..., nn.Module] | None) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        from swinv2_train.models.upernet import MapLayerNorm

        widths = [encoder.embed_dim * 2**i for i in range(len(encoder.depths))]
        self.encoder, self.out_channels = encoder, 256
        self.norms = nn.ModuleList(MapLayerNorm(width) for width in widths[:-1])
        self.fpn = FeaturePyramidNetwork(widths, 256, LastLevelMaxPool(), norm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        *raw, last = self.encoder.forward_features(images)
        maps = [*(norm(x) for norm, x in zip(self.norms, raw, strict=True)), last]
        found: dict[str, Tensor] = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        return found


def torchvision(shape: Shape, batch: Batch, version: int) -> tuple[nn.Module, Step]:
    """As maskrcnn_resnet50_fpn (1) and maskrcnn_resnet50_fpn_v2 (2) put their parts together."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, RPNHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

    norm = nn.BatchNorm2d if version == 2 else None
    sides = tuple((8 * 2 ** (i + 2),) for i in range(len(SIZES[shape.size]["depths"]) + 1))
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
    more: dict[str, Any] = {}
    if version == 2:
        more = {
            "rpn_head": RPNHead(256, anchors.num_anchors_per_location()[0], conv_depth=2),
            "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm),
            "mask_head": MaskRCNNHeads(256, [256] * 4, 1, norm_layer=norm),
        }
    module = MaskRCNN(
        Maps(shape.encoder(), norm), CLASSES + 1, min_size=shape.px, max_size=shape.px, image_mean=[0.0] * 3,
        image_std=[1.0] * 3, rpn_anchor_generator=anchors, rpn_pre_nms_top_n_train=2000, rpn_post_nms_top_n_train=1000,
        box_batch_size_per_image=shape.samples, **more,
    )  # fmt: skip
    targets = [
        {"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)}
        for boxes, labels, masks in zip(batch.boxes, batch.classes, batch.masks, strict=True)
    ]
    return module, lambda: torch.stack(list(module(list(batch.images), targets).values())).sum()


def mask2former(shape: Shape, batch: Batch) -> tuple[nn.Module, Step]:
    """transformers' published sizes (100 queries, 6 + 9 layers of 256 channels) on its own SwinV2."""
    import scipy.optimize  # noqa: F401  its loss needs it, and would say so after a step
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Swinv2Config

    size = SIZES[shape.size]
    backbone = Swinv2Config(
        image_size=shape.px, embed_dim=size["embed_dim"], depths=list(size["depths"]), drop_path_rate=0.0,
        num_heads=list(size["num_heads"]), window_size=shape.window,
        out_features=[f"stage{i + 1}" for i in range(len(size["depths"]))],
    )  # fmt: skip
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)
    module = Mask2FormerForUniversalSegmentation(config)
    masks, classes = list(batch.masks.float()), list(batch.classes)
    given = {"pixel_values": batch.images, "mask_labels": masks, "class_labels": classes}
    return module, lambda: module(**given).loss.sum()


def build(name: str, shape: Shape, batch: Batch) -> tuple[nn.Module, Step]:
    """A contestant in training mode, and its step's forward pass."""
    torch.manual_seed(0)
    if name in (CONTESTANTS[0], CONTESTANTS[2]):
        return ours(shape, batch, 4 if name == CONTESTANTS[2] else 0)
    if name in (CONTESTANTS[1], CONTESTANTS[3]):
        return torchvision(shape, batch, 1 + CONTESTANTS.index(name) // 2)
    return mask2former(shape, batch)


class Training(Runner):
    """Forward and backward pass of one batch."""

    def __init__(self, name: str, shape: Shape) -> None:
        super().__init__(torch.device("cpu"))
        self.module, self._loss = build(name, shape, Batch(shape))
        self.module.train()

    def weights_gib(self) -> float:
        return sum(each.numel() * each.element_size() for each in self.module.parameters()) / 2**30

    def step(self, laps: Laps) -> None:
        self.module.zero_grad(set_to_none=True)
        loss = self._loss()
        laps.mark()
        loss.backward()
        laps.mark()
        laps.mark()  # no optimizer

    def rest(self) -> None:
        self.module.zero_grad(set_to_none=True)
        super().rest()


def take_part(connection: Connection, name: str, shape: Shape) -> None:
    """Answer with millions of parameters, then every number of steps with its times."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(shape.threads)
    try:
        tune_allocator()
        runner = Training(name, shape)
        connection.send(sum(each.numel() for each in runner.module.parameters()) / 1e6)
        while True:
            connection.send(runner.turn(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    except Exception as error:  # noqa: BLE001 - whatever another's code raises is told in the table
        connection.send(Refused(reason(error)))


def table(shape: Shape, rounds: int) -> str:
    """A Markdown table of one number of objects."""
    workers = {name: Worker(take_part, name, shape) for name in CONTESTANTS}
    millions: dict[str, float] = {}
    refused: dict[str, str] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for name, worker in workers.items():
        try:
            millions[name] = worker.answer()
        except Refused as error:
            refused[name] = str(error)
    for number in range(rounds):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            if name not in refused:
                try:
                    turns[name].append(workers[name].turn(1))
                except Refused as error:
                    refused[name] = str(error)
                print(f"  {shape.objects} objects, round {number + 1}: {name}", flush=True)
    for worker in workers.values():
        worker.close()
    lines = [
        "| | million parameters | CPU s an image | by the clock | forward, CPU s | peak GiB | CPU time of ours / its |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CONTESTANTS:
        if name in refused:
            lines.append(f"| {name} | not measured: {refused[name]} | | | | | |")
            continue
        cpu, wall, forward = (
            [turn["steps"][0][clock][lap] / shape.batch for turn in turns[name]]
            for clock, lap in (("cpu", "step"), ("wall", "step"), ("cpu", "forward"))
        )
        ratio = "1"
        if name in PEERS:
            own = [turn["steps"][0]["cpu"]["step"] / shape.batch for turn in turns[PEERS[name]]]
            ratios = [a / b for a, b in zip(own, cpu, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        peak = max(turn["peak_gib"] for turn in turns[name])
        shown = [f"{statistics.median(each):.2f}" for each in (cpu, wall, forward)]
        lines.append(f"| {name} | {millions[name]:.1f} | {' | '.join(shown)} | {peak:.2f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--objects", type=int, nargs="+", default=[7, 128])
    parser.add_argument("--samples", type=int, default=512, help="boxes the heads learn from (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for objects in options.objects:
        shape = Shape(
            options.size, options.px, options.window, options.batch, objects, options.samples, options.threads
        )
        print(f"\n{shape}\n\n{table(shape, options.rounds)}", flush=True)


if __name__ == "__main__":
    main()
