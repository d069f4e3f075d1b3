"""The rules between keys.  Those of one key stand at the key (``config/rules.py``)."""

from __future__ import annotations

from swinv2_train.config.errors import ConfigError
from swinv2_train.config.keys import check_values
from swinv2_train.config.pixels import check_bands
from swinv2_train.config.recompute import parse_recompute
from swinv2_train.config.rules import between, one_of, positive
from swinv2_train.config.schema import MIX, PROBE_SCORES, SPLITS, Config, averaged_score, is_pipe

BF16_LARGEST_DECAY = 0.996
"""1 - 2^-8, one step of bf16: times more than this, a bf16 number is rounded to what it was."""


def check_config(config: Config) -> None:
    """Check every range and every relation between keys that needs no file, model or process group."""
    check_values(config)
    _check_lengths(config)
    _check_mix(config)
    _check_checksums(config)
    _check_model(config)
    check_bands(config)
    _check_init(config)
    config.task.check(config)
    _check_labels(config)
    _check_hang_timeout(config)
    _check_moments(config)
    _check_lora(config)
    _check_ema(config)
    _check_keep_best(config)


def _check_lengths(config: Config) -> None:
    """The run and its warm-up have a length; and in steps where images cannot be counted beforehand."""
    train, schedule = config.train, config.optim.schedule
    for key, steps, other, epochs in (
        ("train.max_steps", train.max_steps, "train.epochs", train.epochs),
        ("optim.schedule.warmup_steps", schedule.warmup_steps, "optim.schedule.warmup_epochs", schedule.warmup_epochs),
    ):
        if steps is None and epochs is None:
            raise ConfigError(f"{key} and {other} are both null; set one of them")
        if steps is None and is_pipe(config.data.shards):
            raise ConfigError(
                f"{other} has no length where data.shards is a pipe ({config.data.shards}), whose images cannot be "
                f"counted beforehand; set {key}"
            )


def _check_mix(config: Config) -> None:
    """Sources that are mixed stand in place of data.shards, and each can be read anywhere."""
    data = config.data
    if data.mix and data.shards:
        raise ConfigError(
            f"data.shards ({data.shards}) and data.mix ({', '.join(data.mix)}) both name training images; make the "
            "first a source of the mixture (+data.mix.NAME.shards=PATTERN), or leave one out"
        )
    if not data.mix and not data.shards:
        raise ConfigError("data.shards is empty; name shards or a folder: data.shards=PATTERN")
    for name, source in data.mix.items():
        if is_pipe(source.shards) or not source.shards:
            raise ConfigError(
                f"{MIX}{name}.shards ({source.shards}) names no files, whose order a mixture needs to know; name "
                "shards or a folder"
            )
        positive().check(f"{MIX}{name}.weight", source.weight)


def _check_checksums(config: Config) -> None:
    if config.data.verify and is_pipe(config.data.shards):
        raise ConfigError(
            "data.verify=true, but data.shards is a pipe, which has no index to compare with; set data.verify=false"
        )


def _check_model(config: Config) -> None:
    """What counts the model's stages, or needs an engine."""
    model = config.model
    num_stages = len(model.pretrained_window_sizes)
    recompute = parse_recompute(model.recompute, num_stages)
    if recompute.place == "partitioned" and config.engine.name != "deepspeed":
        raise ConfigError(
            f"model.recompute ({model.recompute}) needs engine.name=deepspeed, not {config.engine.name}; "
            "set engine.name=deepspeed, or another place of the saved inputs"
        )
    if model.frames is not None and config.task.name not in ("simmim", "classify"):
        raise ConfigError(
            f"model.frames ({model.frames}): task={config.task.name} takes images; set model.frames=null, or "
            "task=simmim or classify"
        )
    if model.frames is not None and config.reads_values:
        raise ConfigError(
            f"model.frames ({model.frames}): clips are of 3 x 8 bits, and images are values of {model.in_chans} bands "
            "here; set model.in_chans=3 and leave data.bands, data.nodata and data.scale out, or set model.frames=null"
        )
    for stage in model.sequential_stages:
        between(1, num_stages).check("model.sequential_stages", stage)


def _check_init(config: Config) -> None:
    """A recipe of fine-tuning has weights to start from, for its learning rate and length are of no use without."""
    task = config.task
    if task.init_required and task.init_from is None:
        raise ConfigError(
            "task.init_from (null): this recipe fine-tunes, and its learning rate and length are made for trained "
            "weights; name them (task.init_from=RUN_OR_FILE), or train from scratch by it on purpose "
            "(task.init_required=false)"
        )


def _check_labels(config: Config) -> None:
    """There are files of labels where the task reads labels, and of images whose keys are known beforehand."""
    data, kind = config.data, config.task.label_kind
    if data.balanced and (kind is None or data.mix or is_pipe(data.shards)):
        if kind is None:
            why = f"task={config.task.name} has no classes of whole images"
        else:
            why = (
                "data.mix shares batches among sources itself"
                if data.mix
                else "a pipe's images are not known beforehand"
            )
        raise ConfigError(f"data.balanced (true): {why}; set data.balanced=false")
    for name, split in data.eval_splits.items():
        if split.labels is not None and kind != "label":
            uses = "no labels" if kind is None else f"its {kind} from data.labels"
            raise ConfigError(
                f"{SPLITS}{name}.labels ({split.labels}) needs task=classify with task.target=single; "
                f"task={config.task.name} uses {uses}"
            )
    for key in ("labels", "eval_labels"):
        if getattr(data, key) is not None and kind is None:
            raise ConfigError(
                f"data.{key} ({getattr(data, key)}) needs task=classify; task={config.task.name} takes no labels of "
                f"whole images; set data.{key}=null"
            )
    if kind is not None and is_pipe(data.shards) and (data.labels is not None or kind != "label"):
        what = f"data.labels ({data.labels})" if data.labels is not None else f"its {kind}"
        raise ConfigError(
            f"data.shards is a pipe ({data.shards}), whose keys are not known beforehand, and the task takes {what}; "
            "name shards or a folder"
        )


def _check_hang_timeout(config: Config) -> None:
    """A shard that is still being fetched is no hang."""
    hang_sec, data = config.runtime.hang_timeout_sec, config.data
    training = "::".join((data.shards, *(source.shards for source in data.mix.values())))
    if hang_sec is not None and "://" in training and hang_sec <= data.fetch_give_up_sec:
        raise ConfigError(
            f"runtime.hang_timeout_sec ({hang_sec:g}) must be more than data.fetch_give_up_sec "
            f"({data.fetch_give_up_sec:g}), which a shard at an address may take; raise the one or lower the other"
        )


def _check_moments(config: Config) -> None:
    """Moments in bf16 need a decay that bf16 can show."""
    betas = config.optim.betas
    if config.engine.optimizer_states == "bf16" and betas[1] > BF16_LARGEST_DECAY:
        raise ConfigError(
            f"optim.betas ({betas}) with engine.optimizer_states (bf16): a bf16 average times {betas[1]:g} "
            "is rounded to what it was and never decays; set optim.betas=[0.9,0.99] or engine.optimizer_states=fp32"
        )


def _check_lora(config: Config) -> None:
    """What adapters are trained beside is trained no more, so it must come from somewhere."""
    lora, task = config.optim.lora, config.task
    if lora.rank == 0:
        return
    if not lora.targets:
        raise ConfigError(
            f"optim.lora.targets ([]) leaves no layer for adapters of optim.lora.rank ({lora.rank}); name some of "
            "qkv, proj, fc1, fc2, or set optim.lora.rank=0"
        )
    if task.init_from is None:
        raise ConfigError(
            f"optim.lora.rank ({lora.rank}) keeps the encoder as it starts, and task.init_from is null: it would stay "
            "random; name its weights, or set optim.lora.rank=0"
        )
    if task.init_bands == "fresh":
        raise ConfigError(
            f"optim.lora.rank ({lora.rank}) keeps the patch embedding as it starts, and with task.init_bands=fresh it "
            "would stay random; set task.init_bands=mean or repeat, or optim.lora.rank=0"
        )


def _check_ema(config: Config) -> None:
    """The EMA of the weights lies beside float32 masters, in memory."""
    decay, engine = config.optim.ema_decay, config.engine
    if decay is None:
        return
    if "nvme" in (engine.offload_optimizer, engine.offload_param):
        raise ConfigError(
            f"optim.ema_decay ({decay}) with engine.offload_optimizer ({engine.offload_optimizer}) and "
            f"engine.offload_param ({engine.offload_param}): no averages are kept of weights on disk; set "
            "optim.ema_decay=null, or offload to cpu"
        )
    if engine.optimizer_states == "bf16":
        raise ConfigError(
            f"optim.ema_decay ({decay}) with engine.optimizer_states (bf16): the averages are of float32 masters; set "
            "optim.ema_decay=null or engine.optimizer_states=fp32"
        )


def _check_keep_best(config: Config) -> None:
    """The score by which a checkpoint is the best is one that the run measures."""
    best, scores, patience = config.train.keep_best, config.task.measured, config.train.patience
    if patience is not None and best is None:
        raise ConfigError(
            f"train.patience ({patience}) waits for a better score, and train.keep_best is null; name one: "
            f"train.keep_best={scores[0]}"
        )
    if best is None:
        return
    every, steps = "train.eval_every_steps", config.train.eval_every_steps
    if best.startswith("probe/"):
        every, steps = "probe.every_steps", config.probe.every_steps
    if patience is not None and steps is None:
        raise ConfigError(f"train.patience ({patience}) counts evaluations, and {every} is null; set {every}=NUMBER")
    probed = [name for names in PROBE_SCORES.values() for name in names]
    one_of(*scores, *map(averaged_score, scores), *probed).check("train.keep_best", best)
    if best not in (*scores, *probed) and config.optim.ema_decay is None:
        raise ConfigError(f"train.keep_best ({best}) needs optim.ema_decay; set it, or name a val/ score")
    if best not in probed and config.data.eval_shards is None:
        raise ConfigError(f"train.keep_best ({best}) needs data.eval_shards; set it, or train.keep_best=null")
