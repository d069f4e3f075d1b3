"""From a command line to a validated Config: Hydra composes, load_config checks, the user gets one message or a run.

Hydra is used for composition alone (groups, experiments, overrides, ``--help``, ``--cfg job``, shell completion); it
opens no output directory and no logger, so that it does nothing per rank.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.errors import ConfigError, MachineError
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from swinv2_train.config.keys import known_keys
from swinv2_train.config.load import config_yaml, load_config, one_line, unknown_key
from swinv2_train.config.near_names import did_you_mean
from swinv2_train.config.reference import Entry, help_text, reference
from swinv2_train.config.schema import TASKS, Config
from swinv2_train.config.secret_texts import without_secrets

T = TypeVar("T")

_HELP = {"-h", "--help"}


def run_command(run: Callable[[Config], int]) -> None:
    """Compose sys.argv into a Config and exit with run(config)'s exit code.

    Exits with 2 and one message when the user's input is wrong, before anything else is done.
    """

    def command() -> int:
        config = compose_argv()
        return EXIT_DONE if config is None else run(config)

    sys.exit(guarded(command))


def run_on_weights(
    usage: str, parse: Callable[[list[str]], tuple[Config, T]], run: Callable[[Config, T], object]
) -> None:
    """Exit with the code of a command on existing weights, whose keys parse splits from the configuration's.

    ``--help`` prints usage, ``--help KEY`` what a key of the configuration means, ``--cfg job`` the configuration.
    """
    arguments = sys.argv[1:]

    def command() -> int:
        if _HELP & set(arguments):
            print(key_help(arguments) or usage)
            return EXIT_DONE
        config, request = parse([argument for argument in arguments if argument not in ("--cfg", "job")])
        if "--cfg" in arguments:
            print(config_yaml(config), end="")
        else:
            run(config, request)
        return EXIT_DONE

    sys.exit(guarded(command))


def guarded(command: Callable[[], int]) -> int:
    """A command's own exit code, or 2 after one line about wrong input (from rank 0), or 1 after a traceback."""
    try:
        return command()
    except ConfigError as error:
        if (speaker := _speaker()) is not None:
            print(without_secrets(f"error: {speaker}{error}"), file=sys.stderr)
        return EXIT_USER_ERROR
    except MachineError as error:  # of this rank alone
        print(without_secrets(f"error: {_speaker() or ''}{error}"), file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # `--help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception:  # noqa: BLE001  the last place that can say what happened
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        return EXIT_FAILED


def _speaker() -> str | None:
    """What an error begins with on this rank, or None where it is another's to say.

    In a process group all ranks raise the same, and rank 0 says it.  Before there is one, every host's first does: rank
    0 may be waiting for just the host that has been refused.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))  # of torchrun, or of srun
    if rank == "0":
        return ""
    distributed = sys.modules.get("torch.distributed")
    together = distributed is not None and distributed.is_available() and distributed.is_initialized()
    first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    return f"rank {rank} on {socket.gethostname()}: " if first and not together else None


def compose_argv() -> Config | None:
    """The validated configuration that sys.argv composes, or None after ``--help`` and ``--cfg``."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError(
            "--multirun starts one run after another in one process; start each with its own run_dir, on a cluster as "
            "a job array: SWEEP=FILE sbatch --array=1-N launch/train.sbatch ... (docs/cluster.md)"
        )
    if _HELP & set(sys.argv[1:]) and (text := key_help(sys.argv[1:])):
        print(text)
        return None
    composed: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting with 1
    with _composition_errors():
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(composed.append)()
    return load_config(composed[0]) if composed else None


def key_help(arguments: Sequence[str]) -> str:
    """What the keys and sections are that a command line names beside ``--help``; "" where it names none."""
    names = [each for each in arguments if not each.startswith("-") and "=" not in each and each != "job"]
    return help_text(names, key_reference()) if names else ""


def key_reference() -> list[Entry]:
    """Every key of the configuration: its type, default, what it may be and what it means."""
    with _composition_errors(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return reference({task: _defaults(task) for task in TASKS})


def _defaults(task: str) -> DictConfig:
    """What conf/ says for a task without any override; Hydra must be initialised there."""
    return compose("train", [f"task={task}"])


def compose_source(arguments: list[str], own_keys: tuple[str, ...]) -> tuple[Config, dict[str, str]]:
    """The configuration behind existing weights: of the run that ``run_dir=DIR`` names, with the other KEY=VALUE
    arguments on top; or, for ``weights=PATH`` without a run, what the train command would compose of them.

    own_keys: keys that are the command's own and no part of a configuration; returned as they were given.
    """
    given = {key: _unquoted(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    own = {key: given[key] for key in own_keys if key in given}
    overrides = [argument for argument in arguments if argument.partition("=")[0] not in own_keys]
    if "run_dir" not in given and "weights" in own:
        unused = ["run_dir=unused", "data.shards=unused"]  # what training needs and these commands do not look at
        return compose_overrides([*unused, *overrides]), own
    if "run_dir" not in given:
        raise ConfigError("run_dir has no value; name the directory of a run: run_dir=DIR")
    return load_run_config(Path(given["run_dir"]), overrides), own


def own_flag(own: dict[str, str], key: str) -> bool:
    """A command's own key that is true or false; false where it is not given."""
    value = own.get(key, "false").lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{key} ({own[key]}) must be true or false")
    return value == "true"


def _unquoted(value: str) -> str:
    """A value without the quotes in which Hydra's grammar would take it: run_dir='my run'."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an earlier run, with overrides on top; keys that are newer than the run have their defaults.

    Raises ConfigError when run_dir holds none, or one that load_config refuses.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"run_dir ({run_dir}) holds no config.yaml; name the directory of a run")
    with _composition_errors():
        with initialize_config_dir(str(run_dir.resolve()), version_base="1.3"):
            has = compose("config")
            newer = [key for key in known_keys() if OmegaConf.select(has, key, default=MISSING) == MISSING]
            plus = [f"+{each}" if each.partition("=")[0] in newer else each for each in overrides]
            saved = compose("config", plus)
        task = OmegaConf.select(saved, "task.name")
        if task in TASKS:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                defaults = _defaults(task)
            OmegaConf.set_struct(defaults, False)  # load_config is the one to say what is unknown
            saved = cast(DictConfig, OmegaConf.merge(defaults, saved))
    return load_config(saved)


def compose_overrides(overrides: list[str], unused: tuple[str, ...] = ()) -> Config:
    """The validated configuration of a list of overrides, as the train command would compose it.

    unused: keys at which the command does not look, so that they need no value.
    """
    with _composition_errors(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("train", overrides)
    for key in unused:
        if OmegaConf.select(composed, key, throw_on_missing=False) is None:
            OmegaConf.update(composed, key, "unused")
    return load_config(composed)


@contextlib.contextmanager
def _composition_errors() -> Iterator[None]:
    """What Hydra and YAML complain about becomes a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(_explain(error)) from error  # ValueError: a group set to a number


def _explain(error: Exception) -> str:
    """Hydra's complaint in one line, with a remedy where the key is unknown."""
    text = one_line(error)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    option = re.search(r"Could not find '(\w+)/([^']*)' Available options in '\w+': (.*?) Config search path", text)
    if option:
        group, given, names = option[1], option[2], [name for name in option[3].split() if name != "common"]
        hint = did_you_mean(given, names)
        return f"{group}={given}: there is no such {group}; {hint}{' ' if hint else ''}there are {', '.join(names)}"
    if unknown:
        return unknown_key(unknown.group(1))
    return text
