"""``python -m swinv2_train.stats data.shards=PATTERN [KEY=VALUE ...]``: mean, std and more of each band of images.

  data.shards=PATTERN  shards, a folder, a saved data set or a pipe; or data.mix
  model.in_chans=N     bands; without it as many as the first image has (photographs: red, green and blue in 0..1)
  out=FILE.yaml        where the statistics go (default stats.yaml), for data=FILE.yaml of the other commands
  picture=FILE.png     the bands' histograms (default: beside out); needs matplotlib
  json=FILE            write all numbers as JSON, too

The other keys are the train command's: data.bands, data.nodata, data.scale, data.image_member, data.array_layout and
data.on_bad_sample say how images are read; statistics are of the values after data.scale, over all pixels of all images
that hold data.  They are exact, and the same bits for any number of ranks (torchrun) and of data.num_workers.  Images
of other than 8- and 16-bit whole numbers are read twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from swinv2_train.config import Config, ConfigError, MachineError, is_pipe
from swinv2_train.config.arguments import unquoted
from swinv2_train.config.command_line import compose_overrides, run_on_weights
from swinv2_train.config.load import home_expanded
from swinv2_train.config.saved import literal
from swinv2_train.config.secret_texts import public
from swinv2_train.config.shown import tell
from swinv2_train.data.loading.loader import check_bad_fraction
from swinv2_train.data.loading.workers import with_workers
from swinv2_train.data.shards.shard_cache import shard_cache_for
from swinv2_train.data.shards.transfers import is_remote
from swinv2_train.data.sources.base import Source, open_source
from swinv2_train.data.sources.mixture import open_mixture
from swinv2_train.data.sources.pipe import Stream, open_stream
from swinv2_train.data.statistics.numbers import Scale
from swinv2_train.data.statistics.reading import Images, Look, Track, first_bands
from swinv2_train.data.statistics.summary import (
    PERCENTILES,
    BandStatistics,
    check_measured,
    check_varied,
    mixed,
    needs_second_look,
    of_two_looks,
    of_whole_numbers,
    wanted_of,
)
from swinv2_train.data.statistics.tally import FirstLook, SecondLook
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.distributed import (
    World,
    gather_objects,
    on_main,
    raise_together,
    shutdown_distributed,
)
from swinv2_train.distributed.same_start import join_ranks
from swinv2_train.monitoring.console import tracked
from swinv2_train.report.histograms import Histogram, draw_histograms
from swinv2_train.report.plots import plots_problem
from swinv2_train.storage.atomic import replace_text

OWN_KEYS = ("out", "picture", "json")
HOW_READ = ("bands", "image_member", "array_layout", "scale", "nodata", "max_nodata_fraction")
"""Keys of data that say what an image's numbers mean, and so what the statistics are of."""


@dataclass(frozen=True)
class StatsRequest:
    """What the command line asks for besides the configuration."""

    out: str = "stats.yaml"
    picture: str | None = None
    """None = out with the ending .png."""
    json: str | None = None
    count_bands: bool = False
    """The first image says how many bands there are."""


@dataclass(frozen=True)
class Measured:
    """The statistics of all images of a source."""

    name: str
    """Of a source of data.mix; "" elsewhere."""
    images: int
    left_out: int
    """Damaged samples (data.on_bad_sample=replace)."""
    bands: list[BandStatistics]


def measure(config: Config, request: StatsRequest) -> list[BandStatistics]:
    """Measure the bands of data.shards or data.mix over all ranks; print them and write what the request names.

    Returns the bands that training sees: of a mixture each source by its weight.  Raises ConfigError for wrong input.
    """
    world = join_ranks(config)
    sources: dict[str, Source | Stream]
    sources, weights = on_main(world, lambda: open_sources(config))
    if request.count_bands:
        config = on_main(world, lambda: with_bands_of(config, next(iter(sources.values()))))
    names = band_names(config)
    found = [measured(config, name, source, names, world) for name, source in sources.items()]
    bands = found[0].bands if len(found) == 1 else mixed([each.bands for each in found], weights)
    check_varied(bands, "data.mix" if config.data.mix else "data.shards", names)
    on_main(world, lambda: write(config, request, found, bands, names))
    shutdown_distributed()
    return bands


def open_sources(config: Config) -> tuple[dict[str, Source | Stream], tuple[int, ...]]:
    """What data names, by the names of data.mix ("" for data.shards), and the weight of each."""
    data = config.data
    if data.mix:
        mixture = open_mixture(data, tell, _of_images)
        return dict(zip(mixture.names, mixture.sources, strict=True)), mixture.weights
    if is_pipe(data.shards):
        return {"": open_stream(data.shards)}, (1,)
    cache = shard_cache_for(data.shards, data)
    source = open_source(data.shards, "data.shards", tell, cache, data.verify, data.image_member, data.label_folders)
    return {"": _of_images(source, "data.shards")}, (1,)


def _of_images(source: Source, key: str) -> Source:
    """Raises ConfigError for clips: of these nothing is measured."""
    if any(source.clips):
        raise ConfigError(
            f"{key}: {sum(source.clips)} of {source.num_samples} samples are clips, of which no statistics are made; "
            "name images, such as some of their frames (clips are read as photographs, by data.mean and data.std)"
        )
    return source


def with_bands_of(config: Config, source: Source | Stream) -> Config:
    """The configuration with as many bands as the first image has, where that is no photograph."""
    count, kind = first_bands(source, config.data)
    if count is None and not config.reads_values:
        return config
    count = count or 3
    bands = list(range(3)) if count == 3 else None  # or three bands of numbers would be read as photographs
    tell(f"model.in_chans={count}: the first image has {count} bands of {kind}")
    model, data = dataclasses.replace(config.model, in_chans=count), dataclasses.replace(config.data, bands=bands)
    return dataclasses.replace(config, model=model, data=data)


def band_names(config: Config) -> list[str]:
    """What the bands are called in messages and tables."""
    if config.reads_values:
        return [str(band) for band in config.data.bands or range(config.model.in_chans)]
    return ["red", "green", "blue"]


def measured(config: Config, name: str, source: Source | Stream, names: list[str], world: World) -> Measured:
    """The statistics of one source over all ranks.  Collective."""
    key = f"data.mix.{name}.shards" if name else "data.shards"
    scale = Scale.of(config)
    data = with_workers(config.data, world.cores)
    images = Images(source, data, Bands.of(config), scale, world.rank, world.world_size)
    new = partial(FirstLook, config.model.in_chans)
    first, left_out = over_ranks(images, new, tracker(config, key, "counting", world))
    check_bad_fraction(config.data.max_bad_fraction, first.images + left_out, left_out, first.images + left_out)
    check_measured(first, key, names)
    if not needs_second_look(first):
        return Measured(name, first.images, left_out, of_whole_numbers(first, scale))
    again = partial(SecondLook, wanted_of(first, scale))
    second, _ = over_ranks(images, again, tracker(config, key, "second look", world))
    return Measured(name, first.images, left_out, of_two_looks(first, second, scale))


def over_ranks(images: Images, new: Callable[[], Look], track: Track) -> tuple[Look, int]:
    """What all ranks together count, on each, and the damaged samples that they left out."""
    mine: tuple[Look, int] | None = None
    problem: BaseException | None = None
    try:
        mine = images.counted(new, track)
    except (ConfigError, MachineError) as error:
        problem = error
    raise_together(problem)
    assert mine is not None, "an error was raised"
    total, left_out = new(), 0
    for part, count in gather_objects((mine[0].sent(), mine[1])):
        total.add(part)
        left_out += count
    return total, left_out


def tracker(config: Config, key: str, what: str, world: World) -> Track:
    """Shows how far rank 0 is."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def track(parts: Iterable[Any], count: int) -> Iterable[Any]:
        return tracked(parts, count, f"{what} {key}", "part", config.log.progress if world.is_main else "none", say)

    return track


# --------------------------------------------------------------------------------------------------------------------
# Writing


def write(
    config: Config, request: StatsRequest, found: Sequence[Measured], bands: Sequence[BandStatistics], names: list[str]
) -> None:
    """Print the table; write the YAML, the picture and the JSON."""
    lines = table(found, bands, names)
    print(*lines, sep="\n")
    out = Path(request.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, group_text(config, bands, lines))
    picture = Path(request.picture) if request.picture is not None else out.with_suffix(".png")
    if request.picture is not None or plots_problem() is None:
        charts = {name: {each.name: _histogram(each.bands[i]) for each in found} for i, name in enumerate(names)}
        tell(f"wrote {draw_histograms(charts, picture)}")
    else:
        print(f"note: no picture: {plots_problem()}", file=sys.stderr)
    if request.json is not None:
        content = {each.name or "data.shards": _as_json(each, names) for each in found}
        replace_text(Path(request.json), json.dumps(content, indent=1) + "\n")
    tell(f"wrote {out}: give data={out} model.in_chans={config.model.in_chans} to the other commands")


def table(found: Sequence[Measured], bands: Sequence[BandStatistics], names: list[str]) -> list[str]:
    """For people: a line for each band, of each source and of their mixture."""
    heads = ("band", "mean", "std", "min", *(f"{percent} %" for percent in PERCENTILES), "max", "no data")
    lines = []
    for each in found:
        of = f"{each.name}: " if each.name else ""
        damaged = f", {each.left_out:,} damaged ones left out" if each.left_out else ""
        lines += [f"{of}{each.images:,} images{damaged}", *_rows(heads, each.bands, names)]
    if len(found) > 1:
        plain = (*heads[:4], *heads[-2:])
        lines += ["the mixture, each source by its weight", *_rows(plain, bands, names)]
    return lines


def _rows(heads: Sequence[str], bands: Sequence[BandStatistics], names: list[str]) -> list[str]:
    rows = [list(heads)]
    for name, band in zip(names, bands, strict=True):
        percentiles = band.percentiles if len(heads) > 6 else ()
        numbers = (band.mean, band.std, band.low, *percentiles, band.high)
        rows.append([name, *(f"{number:.6g}" for number in numbers), f"{100 * band.nodata:.3g} %"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def group_text(config: Config, bands: Sequence[BandStatistics], lines: Sequence[str]) -> str:
    """The file for data=FILE: where images are, how they are read, and their bands' mean and std."""
    values = dataclasses.asdict(config.data)
    where: dict[str, Any] = {"shards": _anywhere(config.data.shards)} if config.data.shards else {}
    if config.data.mix:
        where = {"shards": "", "mix": {
            name: {**source, "shards": _anywhere(source["shards"])} for name, source in values["mix"].items()
        }}  # fmt: skip
    hidden = public(where) != where
    content = {
        **({} if hidden else where),
        **{key: values[key] for key in HOW_READ},
        "mean": [band.mean for band in bands],
        "std": [band.std for band in bands],
    }
    head = [
        f"Written by swinv2-stats: give data=THIS_FILE model.in_chans={config.model.in_chans} to the other commands.",
        *(
            ["Give data.shards or data.mix, too: the address has secrets, which are not written down."]
            if hidden
            else []
        ),
        *lines,
    ]
    text = yaml.safe_dump(literal(content), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    return "".join(f"# {line}\n" for line in head) + text


def _anywhere(pattern: str) -> str:
    """A pattern that names the same shards from every directory."""
    if is_pipe(pattern):
        return pattern
    return "::".join(part if is_remote(part) else os.path.abspath(part) for part in pattern.split("::"))


def _histogram(band: BandStatistics) -> Histogram:
    return Histogram(band.bars, band.bars_from, band.bars_to, band.mean)


def _as_json(source: Measured, names: list[str]) -> dict[str, Any]:
    bands = {}
    for name, band in zip(names, source.bands, strict=True):
        percentiles = {str(percent): value for percent, value in zip(PERCENTILES, band.percentiles, strict=True)}
        histogram = {"from": band.bars_from, "to": band.bars_to, "counts": list(band.bars)}
        bands[name] = {"mean": band.mean, "std": band.std, "min": band.low, "max": band.high, "nodata": band.nodata,
                       "percentiles": percentiles, "histogram": histogram}  # fmt: skip
    return {"images": source.images, "left_out": source.left_out, "bands": bands}


# --------------------------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str]) -> tuple[Config, StatsRequest]:
    """The configuration and the command's own keys of a command line."""
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    own = {key: home_expanded(key, unquoted(given[key])) for key in OWN_KEYS if key in given}
    overrides = [argument for argument in arguments if argument.partition("=")[0] not in OWN_KEYS]
    counted = False

    def settle(composed: DictConfig) -> None:
        nonlocal counted
        told = {key.lstrip("+") for key in given}
        per_band = [OmegaConf.select(composed, f"data.{key}") for key in ("bands", "scale.factor", "scale.offset")]
        lengths = [len(value) for value in per_band if isinstance(value, ListConfig)]
        count = OmegaConf.select(composed, "model.in_chans")
        if "model.in_chans" not in told and count == 3:
            counted = not lengths
            count = lengths[0] if lengths else 3
        if not isinstance(count, int) or count < 1:
            return  # which the gate will say
        values = {"model.in_chans": count, "data.mean": [0.0] * count, "data.std": [1.0] * count}
        for key, value in {**values, "train.max_steps": 1, "optim.schedule.warmup_steps": 0}.items():
            OmegaConf.update(composed, key, value)

    config = compose_overrides(overrides, ("run_dir",), settle)
    if not own.get("out", "x.yaml").endswith((".yaml", ".yml")):
        raise ConfigError(f"out ({own['out']}) must end in .yaml, or data={own['out']} could not name it; add .yaml")
    return config, StatsRequest(**own, count_bands=counted)


def main() -> None:
    """The console script swinv2-stats."""
    run_on_weights(__doc__, parse, measure)


if __name__ == "__main__":
    main()
