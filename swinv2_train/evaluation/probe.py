"""What a frozen encoder is worth without fine-tuning: a k-NN vote and a linear classifier on its pooled features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from swinv2_train.config import PROBE_SCORES, Config, ConfigError, is_pipe, pair
from swinv2_train.config.shown import tell
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.loading.loader import EvalLoader, check_labels
from swinv2_train.data.loading.workers import with_workers
from swinv2_train.data.shards.shard_cache import shard_cache_for
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.matched import matched
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.distributed import World, all_reduce_sum, any_rank
from swinv2_train.distributed.interruptible import on_main_unless_stopped
from swinv2_train.evaluation.features import Features, WholeImage, extract
from swinv2_train.evaluation.knn import knn
from swinv2_train.evaluation.linear_probe import linear
from swinv2_train.runtime import StopRequest


def check_probe(config: Config, training: bool) -> None:
    """Everything that needs no file and no process group; training: for a run, which has a schedule too."""
    probe, best = config.probe, config.train.keep_best
    if training and probe.every_steps is not None and not probe.methods:
        raise ConfigError(
            f"probe.every_steps ({probe.every_steps}) is given, but probe.methods is empty; set "
            "probe.methods=[knn,linear], or probe.every_steps=null"
        )
    measured = [name for method in probe.methods for name in PROBE_SCORES[method]]
    if training and best is not None and best.startswith("probe/") and best not in measured:
        method = next(method for method, names in PROBE_SCORES.items() if best in names)
        raise ConfigError(f"train.keep_best ({best}) needs probe.methods=[{method}]; set it, or train.keep_best=null")
    if not probe.methods:
        return
    for own_key, key, pattern in _images(config):
        if pattern is None:
            raise ConfigError(
                f"probe.methods ({','.join(probe.methods)}) needs labelled images to be scored on, but {own_key} and "
                f"{key} have no value; set {own_key}=PATTERN, or probe.methods=[]"
            )
        if is_pipe(pattern):
            raise ConfigError(
                f"{key} ({pattern}) is a pipe, which probe.methods cannot read again and again; name files by "
                f"{own_key}=PATTERN, or set probe.methods=[]"
            )


def open_probe(
    config: Config, known: Mapping[str, Source], progress: Callable[[str], None] | None = None
) -> tuple[Source, Source]:
    """The images that the probes learn from, and those that they are scored on.

    known: what is open already, by its pattern.  Raises ConfigError for images without labels, and for some to be
    scored of classes that cannot be learned.
    """
    found = []
    for own_key, key, pattern in _images(config):
        remedy = f"probe.methods needs labelled images: name some by {own_key}=PATTERN, or set probe.methods=[]"
        try:
            source = known.get(str(pattern)) or open_source(
                str(pattern), key, progress, shard_cache_for(str(pattern), config.data), config.data.verify,
                config.data.image_member, config.data.label_folders,
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"{error} ({remedy})") from error
        check_labels(source, config.data, key, remedy)
        found.append(source)
    learning, scored = _images(config)
    if found[0].classes is None and found[1].classes is None:
        return found[0], found[1]
    names, say = found[0].classes, progress or (lambda line: None)
    whose = f"the classes of {learning.key}"
    return found[0], matched(found[1], scored.key, names, None, whose, say)


class _Images(NamedTuple):
    """Where images come from."""

    own_key: str
    key: str
    """The key that names them: the probe's own, or the one that counts where it is null."""
    pattern: str | None


def _images(config: Config) -> tuple[_Images, _Images]:
    """The images that the probes learn from, and those that they are scored on."""

    def images(name: str) -> _Images:
        own = getattr(config.probe, name)
        if own is None:
            return _Images(f"probe.{name}", f"data.{name}", getattr(config.data, name) or None)
        return _Images(f"probe.{name}", f"probe.{name}", own)

    return images("shards"), images("eval_shards")


def image_patterns(config: Config) -> list[tuple[str, str | None]]:
    """The keys of the images that the probes read, and what they name."""
    return [(key, pattern) for _, key, pattern in _images(config)]


class Probe:
    """Both probes of an encoder that goes on changing.  shards: as open_probe found them."""

    def __init__(self, config: Config, shards: tuple[Source, Source], world: World) -> None:
        self._config, self._world = config.probe, world
        ranges = [source.label_range for source in shards if source.label_range is not None]
        self._num_classes = max((last for _, last in ranges), default=0) + 1
        transform = WholeImage(
            config.data,
            pair("model.img_size", config.model.img_size),
            bands=Bands.of(config),
            clips=ClipViews.of(config),
        )
        data = with_workers(config.data, world.cores)
        self._loaders = [
            EvalLoader(
                source, data, transform, config.train.micro_batch_size, world.rank, world.world_size, images.key,
            )
            for source, images in zip(shards, _images(config), strict=True)
        ]  # fmt: skip

    def scores(self, features: Features, on_progress: Callable[[], None]) -> dict[str, float]:
        """probe/knn_top1, probe/knn_top5, probe/linear_top1, probe/linear_top5 in percent, of probe.methods.

        on_progress: called every now and then.  nan where there are no images to learn from or to score, or features
        are not finite.  Changes no random state.  Collective; the same on every rank.
        """
        with torch.no_grad():
            training, testing = (extract(features, loader, on_progress) for loader in self._loaders)
        counts = torch.tensor([len(training), len(testing)])
        finite = all(bool(share.features.sum(dtype=torch.float64).isfinite()) for share in (training, testing))
        usable = bool(all_reduce_sum(counts).all()) and not any_rank(not finite)
        found: dict[str, float] = {}
        for method, names in PROBE_SCORES.items():
            if method not in self._config.methods:
                continue
            values = [math.nan] * len(names)
            if usable and method == "knn":
                neighbours, temperature = self._config.knn_neighbours, self._config.knn_temperature
                values = knn(training, testing, self._num_classes, neighbours, temperature, self._world, on_progress)
            elif usable:  # the last, because it changes them
                values = linear(training, testing, self._num_classes, self._world, on_progress)
            found |= dict(zip(names, values, strict=True))
        return found


def build_probe(
    config: Config,
    world: World,
    shards: tuple[Source | Stream | None, Source | None],
    stop: StopRequest | None = None,
) -> Probe | None:
    """What probe.methods asks for; ConfigError on every rank for images without labels.

    shards: of training and evaluation, where they are open already.  stop: may come meanwhile; StopNow on every rank.
    """
    if not config.probe.methods:
        return None
    patterns = (config.data.shards, config.data.eval_shards)
    known = {
        str(key): found
        for key, found in zip(patterns, shards, strict=True)
        if found is not None and not isinstance(found, Stream)
    }
    return Probe(config, on_main_unless_stopped(world, stop, lambda: open_probe(config, known, tell)), world)
