"""What a detector's parts are, in loops over plain numbers in float64."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from swinv2_train.models.detection.choose import IGNORED, NEGATIVE


def area(box) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def shared_area(a, b) -> float:
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    return max(width, 0.0) * max(height, 0.0)


def iou_by_loops(a, b) -> float:
    shared = shared_area(a, b)
    return shared / max(area(a) + area(b) - shared, 1e-6)


def encode_by_loops(box, reference, stds) -> list[float]:
    """arXiv:1311.2524, equations 6 to 9."""
    w, h = reference[2] - reference[0], reference[3] - reference[1]
    x = ((box[0] + box[2]) / 2 - (reference[0] + reference[2]) / 2) / w
    y = ((box[1] + box[3]) / 2 - (reference[1] + reference[3]) / 2) / h
    deltas = (x, y, math.log((box[2] - box[0]) / w), math.log((box[3] - box[1]) / h))
    return [delta / std for delta, std in zip(deltas, stds, strict=True)]


def decode_by_loops(deltas, reference, stds) -> list[float]:
    """With sizes that change by at most 1000 / 16."""
    x, y, w, h = (delta * std for delta, std in zip(deltas, stds, strict=True))
    most = math.log(1000 / 16)
    width, height = reference[2] - reference[0], reference[3] - reference[1]
    x, y = (reference[0] + reference[2]) / 2 + x * width, (reference[1] + reference[3]) / 2 + y * height
    width, height = width * math.exp(min(max(w, -most), most)), height * math.exp(min(max(h, -most), most))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def assign_by_loops(candidates, boxes, classes, crowd, rule) -> list[int]:
    """One image's, object by object."""
    real = [m for m in range(len(boxes)) if classes[m] >= 0 and not crowd[m]]
    overlaps = [[iou_by_loops(np.float64(c), np.float64(boxes[m])) for m in real] for c in candidates]
    found = []
    for row in overlaps:
        best = max(row, default=-1.0)
        found.append(real[row.index(best)] if best >= rule.positive else NEGATIVE if best < rule.negative else IGNORED)
    if rule.best is not None:
        for number, m in enumerate(real):
            top = max(row[number] for row in overlaps)
            for n, row in enumerate(overlaps):
                if top >= rule.best and row[number] == top:
                    found[n] = m
    for n, candidate in enumerate(candidates):
        for m in range(len(boxes)):
            in_crowd = classes[m] >= 0 and crowd[m]
            if found[n] == NEGATIVE and in_crowd and shared_area(candidate, boxes[m]) >= 0.5 * area(candidate):
                found[n] = IGNORED
    return found


def suppress_by_loops(boxes, scores, count, least, threshold, soft):
    """(score, class, box) of the best `count`, of boxes (N, K or 1, 4) and scores (N, K); each class by itself."""
    found = []
    for kind in range(scores.shape[1]):
        left = {n: float(s) for n, s in enumerate(scores[:, kind]) if s > least}
        of_class = boxes[:, kind if boxes.shape[1] > 1 else 0]
        while left:
            best = max(left, key=lambda n: left[n])
            score = left.pop(best)
            if soft != "none" and score <= max(least, 1e-3):
                break
            found.append((score, kind, of_class[best]))
            for n in list(left):
                overlap = iou_by_loops(of_class[best], of_class[n])
                if soft == "gaussian":
                    left[n] *= math.exp(-(overlap**2) / 0.5)
                elif overlap > threshold:
                    left[n] *= 1 - overlap
                    if soft == "none":
                        del left[n]
    return sorted(found, key=lambda each: -each[0])[:count]


def align_by_loops(box, scale, side, size) -> dict[tuple[int, int, int, int], float]:
    """RoIAlign of one box: (bin row, bin column, row, column) -> what the place counts in the bin's mean."""
    x0, y0, x1, y1 = (each * scale - 0.5 for each in box)
    height, width = (y1 - y0) / side, (x1 - x0) / side
    rows, columns = math.ceil(height), math.ceil(width)
    found: dict[tuple[int, int, int, int], float] = defaultdict(float)
    for i in range(side):
        for j in range(side):
            for a in range(rows):
                for b in range(columns):
                    y, x = y0 + (i + (a + 0.5) / rows) * height, x0 + (j + (b + 0.5) / columns) * width
                    if not (-1 <= y <= size[0] and -1 <= x <= size[1]):
                        continue
                    y, x = max(y, 0.0), max(x, 0.0)
                    low = min(int(y), size[0] - 1), min(int(x), size[1] - 1)
                    up = y - low[0] if low[0] < size[0] - 1 else 0.0
                    right = x - low[1] if low[1] < size[1] - 1 else 0.0
                    for dy, share_y in ((0, 1 - up), (1, up)):
                        for dx, share_x in ((0, 1 - right), (1, right)):
                            if share_y * share_x:
                                found[i, j, low[0] + dy, low[1] + dx] += share_y * share_x / (rows * columns)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Losses of one image, with their gradients


def sample_by_loops(found, keys, number, most_positive):
    """[(candidate, place or None)]: those with the highest keys, positive first."""
    order = sorted(range(len(found)), key=lambda n: -int(keys[n]))
    positive = [(n, found[n]) for n in order if found[n] >= 0][:most_positive]
    return positive + [(n, None) for n in order if found[n] == NEGATIVE][: number - len(positive)]


def entropy_by_loops(logits, right):
    """Cross-entropy of one row and its gradient."""
    highest = max(logits)
    exponents = [math.exp(each - highest) for each in logits]
    total = sum(exponents)
    gradient = [each / total - (k == right) for k, each in enumerate(exponents)]
    return math.log(total) + highest - logits[right], gradient


def binary_by_loops(logit, right):
    return max(logit, 0) - logit * right + math.log1p(math.exp(-abs(logit))), 1 / (1 + math.exp(-logit)) - right


def distance_by_loops(delta, wanted, beta):
    """Smooth L1, and its gradient."""
    d = delta - wanted
    if abs(d) < beta:
        return 0.5 * d * d / beta, d / beta
    return abs(d) - 0.5 * beta, math.copysign(1.0, d)


def giou_by_loops(deltas, reference, wanted, stds):
    """10 x (1 - GIoU) of the decoded box, and its gradient by differences."""

    def loss(values):
        box = decode_by_loops(values, reference, stds)
        shared = shared_area(box, wanted)
        union = area(box) + area(wanted) - shared
        around = (max(box[2], wanted[2]) - min(box[0], wanted[0])) * (max(box[3], wanted[3]) - min(box[1], wanted[1]))
        return 10 * (1 - shared / union + (around - union) / around)

    slopes = []
    for j in range(4):
        ends = [loss([v + step * (i == j) for i, v in enumerate(deltas)]) for step in (1e-5, -1e-5)]
        slopes.append((ends[0] - ends[1]) / 2e-5)
    return loss(deltas), slopes


def rpn_by_loops(places, logits, deltas, image, keys, rule, beta, usable):
    """[classification, box], and the gradients of each: (A,), (A, 4)."""
    found = assign_by_loops(places, image["boxes"], image["classes"], image["crowd"], rule)
    found = [f if u else IGNORED for f, u in zip(found, usable, strict=True)]
    chosen = sample_by_loops(found, keys, 256, 128)
    losses, slopes = [0.0, 0.0], [np.zeros(len(places)), np.zeros((len(places), 4))]
    for n, place in chosen:
        loss, slope = binary_by_loops(float(logits[n]), float(place is not None))
        losses[0] += loss / len(chosen)
        slopes[0][n] = slope / len(chosen)
        if place is not None:
            wanted = encode_by_loops(image["boxes"][place].astype(float), places[n].astype(float), (1, 1, 1, 1))
            for j in range(4):
                loss, slope = distance_by_loops(float(deltas[n, j]), wanted[j], beta)
                losses[1] += loss / len(chosen)
                slopes[1][n, j] = slope / len(chosen)
    return losses, slopes


def stages_by_loops(settings, image, proposals, usable, heads, masks, keys_of, extent):
    """The losses of all stages of one image in the order of RoIHead.losses, and the gradients of what heads say.

    heads: of each stage logits (S, K + 1) and deltas (S, K or 1, 4); masks: (N, K, 28, 28) of each stage, or None.
    keys_of(stream, count): the random order of candidates.
    """
    candidates, losses, slopes = [(proposals[n].astype(float)) for n in range(len(proposals)) if usable[n]], [], []
    at = [n for n in range(len(proposals)) if usable[n]]  # each one's place, which its key belongs to
    total = len(proposals)
    for i, stage in enumerate(settings.stages):
        chosen = choose_by_loops(settings, stage, image, candidates, at, total, keys_of, 1 + i)
        logits, deltas = (each.astype(float) for each in heads[i])
        slope = [np.zeros(logits.shape), np.zeros(deltas.shape)]
        loss, refined, places = [0.0, 0.0], [], []
        for row, (box, place, own) in enumerate(chosen):
            right = settings.num_classes if place is None else int(image["classes"][place])
            entropy, gradient = entropy_by_loops(logits[row].tolist(), right)
            loss[0] += entropy / len(chosen)
            slope[0][row] = np.array(gradient) / len(chosen) * stage.weight
            kind = int(np.argmax(logits[row, :-1])) if place is None else right
            kind = 0 if deltas.shape[1] == 1 else kind
            if place is not None:
                truth = image["boxes"][place].astype(float)
                if settings.box_loss == "giou":
                    distance, gradient = giou_by_loops(deltas[row, kind].tolist(), box, truth, stage.stds)
                else:
                    wanted = encode_by_loops(truth, box, stage.stds)
                    beta = 1.0 if settings.box_loss == "smooth_l1" else 0.0
                    pairs = [distance_by_loops(d, w, beta) for d, w in zip(deltas[row, kind], wanted, strict=True)]
                    distance, gradient = sum(pair[0] for pair in pairs), [pair[1] for pair in pairs]
                loss[1] += distance / len(chosen)
                slope[1][row, kind] = np.array(gradient) / len(chosen) * stage.weight
            if not own:
                moved = decode_by_loops(deltas[row, kind], box, stage.stds)
                limits = (extent[1], extent[0]) * 2
                refined.append(np.array([min(max(v, 0.0), m) for v, m in zip(moved, limits, strict=True)]))
                places.append(row)
        losses += [stage.weight * each for each in loss]
        candidates, at, total = refined, places, settings.box_samples
        if masks is not None:
            if settings.interleaved:
                chosen = choose_by_loops(settings, stage, image, candidates, at, total, keys_of, 11 + i)
            loss, gradient = mask_by_loops(settings, image, chosen, masks[i])
            losses.append(stage.weight * loss)
            slope.append(gradient * stage.weight)
        slopes.append(slope)
    return losses, slopes


def choose_by_loops(settings, stage, image, candidates, at, total, keys_of, stream):
    """[(box, place or None, whether it is an object's own)] of the candidates and the objects' own boxes."""
    own = [m for m in range(len(image["classes"])) if image["classes"][m] >= 0 and not image["crowd"][m]]
    boxes = [*candidates, *(image["boxes"][m].astype(float) for m in own)]
    if not boxes:
        return []
    every = [*at, *(total + m for m in own)]
    keys = keys_of(stream, total + len(image["classes"]))
    found = assign_by_loops(boxes, image["boxes"].astype(float), image["classes"], image["crowd"], stage.rule)
    chosen = sample_by_loops(found, [keys[n] for n in every], settings.box_samples, settings.box_samples // 4)
    return [(boxes[n], place, n >= len(candidates)) for n, place in chosen]


def mask_by_loops(settings, image, chosen, logits):
    slope, total = np.zeros(logits.shape), 0.0
    rows = [
        (row, box, place)
        for row, (box, place, _) in enumerate(chosen[: settings.mask_samples])
        if place is not None and image["pixels"][place].any()
    ]
    for row, box, place in rows:
        pixels, share_of = image["pixels"][place], np.zeros((28, 28))
        for (i, j, y, x), share in align_by_loops([float(np.float32(v)) for v in box], 1.0, 28, pixels.shape).items():
            share_of[i, j] += share * pixels[y, x]
        kind = int(image["classes"][place])
        for i in range(28):
            for j in range(28):
                right = float(share_of[i, j] >= 0.5 - 1e-7)
                loss, gradient = binary_by_loops(float(logits[row, kind, i, j]), right)
                total += loss / 784 / len(rows)
                slope[row, kind, i, j] = gradient / 784 / len(rows)
    return total, slope
