"""README.md beside exported weights, the model card of hubs: what they are, how they came about, how they are used.

It says what run, configuration and weights say, and of what they do not that nothing is known.  Their texts may be a
stranger's, so each stands in the card as code or as YAML's own writing of it, without secrets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from swinv2_train import __version__
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.load import config_yaml
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import shown
from swinv2_train.models import SimMIM, SwinTransformerV2, encoder_of
from swinv2_train.models.upernet import UPerNet
from swinv2_train.runtime import version_of
from swinv2_train.weights.card_facts import RunFacts, Scores
from swinv2_train.weights.hub import HubAddress
from swinv2_train.weights.hub_errors import hub_errors

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_METRICS = {"top1": ("accuracy", "Top-1"), "top5": ("accuracy", "Top-5"), "miou": ("mean_iou", "Mean IoU")}
"""By our name: the hub's, and how it is called; percent all of them."""
_CLASSES_NAMED = 20
_IMAGE = '"image.jpg"'
_VERSIONS = ("python", "swinv2-train", "torch", "deepspeed", "timm")


class Exported(NamedTuple):
    """What is written, and of whom."""

    config: Config
    module: SwinTransformerV2 | SimMIM | UPerNet
    """With shapes alone."""
    format: str
    """huggingface or timm."""
    origin: str
    """Where the weights come from."""
    classes: Sequence[str] | None
    facts: RunFacts | None
    """None for weights that are no run's."""
    license: str | None
    name: str
    """Of the directory or repository."""


def check_license(license: str | None) -> None:
    """ConfigError for what is no identifier of a licence, as hubs list them."""
    if license is not None and _LICENSE.fullmatch(license) is None:
        raise ConfigError(
            f"license ({license}) is no identifier such as apache-2.0, mit, cc-by-nc-4.0 or other; write one"
        )


def model_card(of: Exported) -> str:
    """The text of README.md.  Raises ConfigError where huggingface_hub is missing."""
    sections = [
        f"# {code(of.name)}",
        _model(of),
        "## How it was trained\n\n" + _training(of),
        "## Scores\n\n" + _scores(of.facts),
        "## Use\n\n" + _use(of),
        "## Licence\n\n" + _licence(of),
        "## Configuration\n\n" + _configuration(of.config),
        "## Versions\n\n" + _versions(of.facts),
    ]
    return f"---\n{_metadata(of)}\n---\n\n" + "\n\n".join(sections) + "\n"


def code(text: object) -> str:
    """A text as code within a line of Markdown, where nothing of it means anything."""
    given = plain(text)
    longest = max((len(run) for run in re.findall("`+", given)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if given.startswith("`") or given.endswith("`") or not given.strip() else ""
    return f"{fence}{pad}{given}{pad}{fence}"


def plain(text: object) -> str:
    """A text in one line and without secrets."""
    return shown(without_secrets(str(text)))


def _metadata(of: Exported) -> str:
    with hub_errors("the model card"):
        from huggingface_hub import EvalResult, ModelCardData

    task, results = of.config.task.pipeline_tag, []
    for scores in of.facts.scores if of.facts is not None else ():
        for name in scores.values.keys() & _METRICS.keys():
            metric, called = _METRICS[name]
            results.append(
                EvalResult(
                    task_type=task, dataset_type="images", dataset_name=_data_name(scores),
                    dataset_split=plain(scores.split), metric_type=metric, metric_name=called,
                    metric_value=round(scores.values[name], 4),
                )
            )  # fmt: skip
    data = ModelCardData(
        license=of.license,
        library_name="timm" if of.format == "timm" else "transformers",
        pipeline_tag=task,
        tags=["swin-transformer-v2", "swinv2_train", of.config.task.name],
        base_model=_base_model(of),
        datasets=_hub_datasets(of),
        model_name=plain(of.name),
        eval_results=sorted(results, key=lambda each: (each.dataset_split or "", each.metric_name or "")) or None,
    )
    return str(data.to_yaml()).strip()


def _base_model(of: Exported) -> str | None:
    """The repository that a run started from, or that was converted."""
    address = _address(of.config.task.init_from if of.facts is not None else of.origin)
    return None if address is None else address.repo


def _address(path: str | None) -> HubAddress | None:
    """Of a configuration that may be a stranger's, and name none that we know."""
    try:
        return HubAddress.of(path)
    except ConfigError:
        return None


def _hub_datasets(of: Exported) -> list[str] | None:
    """Data sets of the hub that a run was trained on, by their names there."""
    if of.facts is None:
        return None
    data = of.config.data
    texts = " ".join([data.shards, *(each.shards for each in data.mix.values())])
    return sorted(set(re.findall(r"hf://datasets/([\w.-]+/[\w.-]+)", texts))) or None


def _model(of: Exported) -> str:
    encoder = of.module.encoder if isinstance(of.module, UPerNet) else encoder_of(of.module)
    height, width = encoder.img_size
    rows = [
        ("size", f"{code(of.config.model.name)}: {encoder.embed_dim} channels, depths {_numbers(encoder.depths)}, "
                 f"heads {_numbers(encoder.num_heads)}"),
        ("parameters", f"{sum(each.numel() for each in of.module.parameters()):,}"),
        ("images", f"{encoder.in_chans} channels, {height} x {width} px; patches of {encoder.patch_size} px, windows "
                   f"of {_pair(encoder.window_size)} patches"),
        ("position bias", "of windows " + ", ".join(map(_pair, encoder.pretrained_window_sizes))),
    ]  # fmt: skip
    if count := _num_classes(of.config):
        rows.append(("classes", _classes(count, of.classes)))
    return (
        f"A Swin Transformer V2 ([arXiv:2111.09883](https://arxiv.org/abs/2111.09883)) for {of.config.task.purpose}"
        f", written by swinv2_train {__version__}.\n\n{_table(('', ''), rows)}"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, in whose cells a | is a letter."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(values: Sequence[int]) -> str:
    return "-".join(map(str, values))


def _pair(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _num_classes(config: Config) -> int:
    """How many classes a model names; 0 where it names none."""
    return config.task.label_classes or config.task.pixel_classes or 0


def _classes(count: int, names: Sequence[str] | None) -> str:
    if not names:
        return f"{count:,}, without names"
    more = f" and {count - _CLASSES_NAMED:,} more" if count > _CLASSES_NAMED else ""
    return f"{count:,}: " + ", ".join(code(name) for name in names[:_CLASSES_NAMED]) + more


def _training(of: Exported) -> str:
    config, facts = of.config, of.facts
    if facts is None:
        return f"Not known here: the weights were converted from {code(of.origin)}."
    optim, data = config.optim, config.data
    what = "the averages (EMA) of the weights" if facts.averaged else "the weights"
    lines = [
        f"These are {what} after step {facts.step:,} and {facts.images_seen:,} images seen, "
        f"{config.train.global_batch_size:,} images a step.",
        f"AdamW: learning rate {optim.lr:g} ({code(optim.schedule.name)} schedule), weight decay "
        f"{optim.weight_decay:g}, layer decay {optim.layer_decay:g}, drop path {config.model.drop_path_rate:g}; "
        f"computed in {code(config.engine.precision)}.",
        f"Started from {_start(config)}.",
        "Images: " + "; ".join(map(code, config.task.augmentations(data))) + ".",
        f"Data: {_data(config)}; seed {config.seed}.",
    ]
    lora = optim.lora
    if lora.rank:
        lines.append(
            "Of the encoder, adapters of low rank alone were trained (LoRA: "
            f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(map(code, lora.targets))}); they are merged into "
            "these weights."
        )
    if optim.freeze:
        lines.append(f"Not trained: parameters with {', '.join(map(code, optim.freeze))} in their names.")
    if data.balanced:
        lines.append("Every class had the same share of each epoch.")
    return "\n".join(f"- {line}" for line in lines)


def _start(config: Config) -> str:
    init_from = config.task.init_from
    if init_from is None:
        return "new weights"
    return code(init_from if _address(init_from) is not None else Path(init_from).name)


def _data(config: Config) -> str:
    data = config.data
    if not data.mix:
        return code(data.shards)
    return "; ".join(f"{code(each.shards)} (weight {each.weight:g})" for each in data.mix.values())


def _scores(facts: RunFacts | None) -> str:
    if facts is None or not facts.scores:
        return "None of these weights are known."
    rows = [
        (code(scores.split), code(name), f"{value:.4g}", "" if scores.num_images is None else f"{scores.num_images:,}")
        for scores in facts.scores
        for name, value in sorted(scores.values.items())
    ]
    where = [f"{code(scores.split)}: {code(scores.images)}" for scores in facts.scores if scores.images is not None]
    return _table(("split", "score", "value", "images"), rows) + (
        "\n\nMeasured on " + "; ".join(where) + "." if where else ""
    )


def _data_name(scores: Scores) -> str:
    """What images are called by where they are: the folder's name."""
    folder, _, last = plain(scores.images or "").partition("::")[0].rstrip("/").rpartition("/")
    is_file = re.search(r"[.*?{\[]", last) is not None
    return (folder.rpartition("/")[2] if is_file else last) or "unknown"


def _use(of: Exported) -> str:
    repo = of.name if "/" in of.name else f"USER/{re.sub(r'[^A-Za-z0-9_.-]', '-', plain(of.name))}"
    ours = f'import swinv2_train as s2\n\nmodel = s2.load("hf://{repo}")\n'
    ours += f"print(model.{'predict' if _num_classes(of.config) else 'features'}({_IMAGE}))"
    if of.format == "timm":
        theirs = f'import timm\n\nmodel = timm.create_model("hf-hub:{repo}", pretrained=True).eval()'
    else:
        name = of.config.task.transformers_class
        theirs = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo}")'
    return f"```python\n{ours}\n```\n\nor\n\n```python\n{theirs}\n```"


def _licence(of: Exported) -> str:
    if of.license is None:
        return "None is stated here. Ask who publishes these weights before you use them."
    return f"{code(of.license)}, as whoever exported the weights has stated it."


def _configuration(config: Config) -> str:
    text = shown(config_yaml(config), 100_000, lines=True).rstrip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"<details><summary>every key</summary>\n\n{fence}yaml\n{text}\n{fence}\n\n</details>"


def _versions(facts: RunFacts | None) -> str:
    starts = facts.record.starts if facts is not None else ()
    if starts:
        versions = starts[-1].get("versions") or {}
        found = {name: versions.get(name) for name in _VERSIONS}
        gpus = starts[-1].get("gpus") or []
        on = f" on {starts[-1].get('world_size', 1)} ranks" + (f" of {code(gpus[0].get('name'))}" if gpus else "")
        said = "Trained" + on
    else:
        found, said = {name: version_of(name) for name in _VERSIONS}, "Written"
    return f"{said} with " + ", ".join(f"{name} {code(value)}" for name, value in found.items() if value) + "."
