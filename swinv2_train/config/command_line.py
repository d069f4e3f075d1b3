"""From a command line to a validated Config: Hydra composes, load_config checks, the user gets one message or a run.

Hydra is used for composition alone (groups, experiments, overrides, ``--help``, ``--cfg job``, shell completion); it
opens no output directory and no logger, so that it does nothing per rank.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TypeVar, cast

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swinv2_train import __version__
from swinv2_train.config.arguments import check_once, prepared, unquoted, without_launchers
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.errors import ConfigError, MachineError
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, exit_code_of
from swinv2_train.config.group_files import with_group_files
from swinv2_train.config.keys import known_keys
from swinv2_train.config.load import config_yaml, home_expanded, load_config, no_value, one_line, unknown_key
from swinv2_train.config.near_names import did_you_mean
from swinv2_train.config.reference import Entry, help_text, reference
from swinv2_train.config.saved import CONFIG_NAME, read_saved_config
from swinv2_train.config.schema import TASKS, Config
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import TRACEBACK_CHARACTERS, shown
from swinv2_train.config.standard_streams import hold_standard_streams
from swinv2_train.config.torchrun_report import tell_torchrun

T = TypeVar("T")

_HELP = {"-h", "--help"}
_NEXT_LINE = "\n  "
"""A line break in a message; the blanks tell a name that holds one from a line of ours."""
_SAVED = "values_of_a_saved_run"
"""What Hydra calls them while overrides are put on top."""
_SPEAKER_SEC = 20.0
"""How long a silent rank waits for who says why all ranks end: when the first one leaves, torchrun ends the others."""
_VERSION = "--version"


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

    Ctrl-C and SIGTERM end it with EXIT_STOPPED and a line: it has nothing to save.
    ``--help`` prints usage, ``--help KEY`` what a key of the configuration means, ``--cfg job`` the configuration.
    """
    arguments = sys.argv[1:]

    def command() -> int:
        if _HELP & set(arguments):
            print(key_help(arguments) or usage)
            return EXIT_DONE
        check_once(arguments)
        config, request = parse(
            [argument for argument in without_launchers(arguments) if argument not in ("--cfg", "job")]
        )
        if "--cfg" in arguments:
            print(config_yaml(config), end="")
        else:
            run(config, request)
        return EXIT_DONE

    sys.exit(stoppable(command))


def stoppable(command: Callable[[], int]) -> int:
    """guarded() for a command that has nothing to save: Ctrl-C and SIGTERM end it with EXIT_STOPPED and a line.

    They mean what they meant before once it returns: forks of this process would not die of SIGTERM otherwise.
    """
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return guarded(command, EXIT_STOPPED)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def guarded(command: Callable[[], int], interrupted: int = 128 + signal.SIGINT) -> int:
    """A command's own exit code, or 2 after one line about wrong input (from rank 0), or 1: after one line about the
    machine or an outage, or a traceback.  Of all commands ``--version`` is this package's, and not Hydra's.

    interrupted: the exit code after Ctrl-C, where the command itself does not answer it.
    """
    hold_standard_streams()
    if _VERSION in sys.argv[1:]:
        print(f"swinv2_train {__version__}")
        return EXIT_DONE
    try:
        code = _with_interrupts(command)
        if code in (EXIT_FAILED, EXIT_USER_ERROR):
            tell_torchrun("what went wrong is said above", code)
        return code
    except (ConfigError, MachineError) as error:
        code = exit_code_of(error)
        text = without_secrets(str(error).replace(chr(10), _NEXT_LINE))
        speaker = _speaker()
        if speaker is not None or not isinstance(error, ConfigError):  # else all ranks have the same
            print(f"error: {speaker or ''}{text}", file=sys.stderr)
        tell_torchrun(f"error: {text}", code)
        if speaker is None and isinstance(error, ConfigError) and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(_SPEAKER_SEC)
        return code
    except KeyboardInterrupt as stop:
        if _speaker() == "":
            print(f"stopped by {str(stop) or 'Ctrl-C'}", file=sys.stderr)
        return interrupted
    except BrokenPipeError:  # `--help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception:  # noqa: BLE001  the last place that can say what happened
        text = shown(traceback.format_exc(), TRACEBACK_CHARACTERS, lines=True)
        print(without_secrets(text), end="", file=sys.stderr)
        tell_torchrun("a traceback, which is printed above", EXIT_FAILED)
        return EXIT_FAILED


def _with_interrupts(command: Callable[[], T]) -> T:
    """The command's result; what a library's tidying up has raised over a KeyboardInterrupt is that again.

    Ctrl-C in the middle of a composition is an AttributeError of OmegaConf's, and a ConfigError without a word.
    """
    try:
        return command()
    except Exception as error:
        if (stop := _interrupt_behind(error)) is not None:
            raise stop from None
        raise


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C during whose handling an error was raised, or one of its causes; None without."""
    behind, seen = [error], set()
    while behind:
        each = behind.pop()
        if isinstance(each, KeyboardInterrupt):
            return each
        if id(each) not in seen:
            seen.add(id(each))
            behind += [next for next in (each.__cause__, each.__context__) if next is not None]
    return None


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


def compose_words(words: Sequence[str]) -> Config:
    """The validated configuration of the KEY=VALUE words that a program gives in place of a command line.

    Raises ConfigError for what the command would refuse, and for its flags.
    """
    for word in words:
        if not isinstance(word, str) or word.startswith("-"):
            raise ConfigError(f"{word!r} is no 'KEY=VALUE'; flags and other things belong to the command line")
    check_once(words)
    return _with_interrupts(lambda: compose_overrides(list(words)))


def compose_argv() -> Config | None:
    """The validated configuration that sys.argv composes, or None after ``--help`` and ``--cfg``."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError(
            "--multirun starts one run after another in one process; start each with its own run_dir, on a cluster as "
            "a job array: SWEEP=FILE sbatch --array=1-N launch/train.sbatch ... (docs/cluster.md)"
        )
    words = sys.argv[1:]
    if _HELP & set(words):
        if text := key_help(words):
            print(text)
            return None
    else:
        check_once(words)
        if not any(word.startswith("-") for word in words):
            return compose_overrides(words)  # hydra.main composes twice, to look for its mode
        with _composition_errors(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            words = with_group_files(prepared(words))
    composed: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting with 1
    with _composition_errors(), _arguments(words):
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(composed.append)()
    return load_config(composed[0]) if composed else None


@contextlib.contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    """Hydra reads them from sys.argv, which otherwise stays as the user typed it."""
    typed = sys.argv
    sys.argv = [typed[0], *words]
    try:
        yield
    finally:
        sys.argv = typed


def key_help(arguments: Sequence[str]) -> str:
    """What the keys and sections are that a command line names beside ``--help``; "" where it names none."""
    names = [each for each in arguments if not each.startswith("-") and "=" not in each and each != "job"]
    return help_text(names, key_reference()) if names else ""


def key_reference() -> list[Entry]:
    """Every key of the configuration: its type, default, what it may be and what it means."""
    with _composition_errors(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return reference({task: _defaults(task, conf_dir()) for task in TASKS})


@functools.cache
def _defaults(task: str, folder: Path) -> DictConfig:
    """What conf/ says for a task without any override, composed once a process; Hydra must be initialised there."""
    defaults = compose("train", [f"task={task}"])
    OmegaConf.set_struct(defaults, False)  # load_config is the one to say what is unknown
    return defaults


def compose_source(
    arguments: list[str], own_keys: tuple[str, ...], needed: Mapping[str, str] = MappingProxyType({})
) -> tuple[Config, dict[str, str]]:
    """The configuration behind existing weights: of the run that ``run_dir=DIR`` names, with the other KEY=VALUE
    arguments on top; or, for ``weights=PATH`` without a run, what the train command would compose of them.

    own_keys: keys that are the command's own and no part of a configuration; returned as they were given.
    needed: what the command cannot do without, its own or the configuration's, and how its value is called.
    """
    given = {key: unquoted(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    given |= {key: home_expanded(key, value) for key, value in given.items() if key in (*own_keys, "run_dir")}
    own = {key: given[key] for key in own_keys if key in given}
    needed = {key: value for key, value in needed.items() if key not in own}
    overrides = [argument for argument in arguments if argument.partition("=")[0] not in own_keys]
    if "run_dir" not in given and "weights" in own:
        return compose_overrides(overrides, ("run_dir", "data.shards"), needed=needed), own
    if "run_dir" not in given:
        raise ConfigError(no_value({"run_dir": "DIR", **{key: needed[key] for key in needed if key in own_keys}}))
    return load_run_config(Path(given["run_dir"]), overrides, needed), own


def own_flag(own: dict[str, str], key: str) -> bool:
    """A command's own key that is true or false; false where it is not given."""
    value = own.get(key, "false").lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{key} ({own[key]}) must be true or false")
    return value == "true"


def load_run_config(
    run_dir: Path, overrides: Sequence[str] = (), needed: Mapping[str, str] = MappingProxyType({})
) -> Config:
    """The configuration of an earlier run, with overrides on top; keys that are newer than the run have their defaults.

    The saved one is data (config/saved.py); overrides are the user's own, in Hydra's grammar.  Raises ConfigError when
    run_dir holds none, or one that read_saved_config or load_config refuses.
    """
    path = run_dir / CONFIG_NAME
    if not os.path.lexists(path):
        raise ConfigError(f"run_dir ({run_dir}) holds no config.yaml; name the directory of a run")
    has = read_saved_config(path)
    has.pop("plan", None)  # belongs to a command line alone: it names files to write
    with _composition_errors(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        newer = [key for key in known_keys() if OmegaConf.select(has, key, default=MISSING) == MISSING]
        plus = [f"+{each}" if each.partition("=")[0] in newer else each for each in prepared(overrides)]
        saved = _with_overrides(has, plus)
        task = OmegaConf.select(saved, "task.name")
        if task in TASKS:
            saved = cast(DictConfig, OmegaConf.merge(_defaults(task, conf_dir()), saved))
    return load_config(saved, needed)


def _with_overrides(values: DictConfig, overrides: list[str]) -> DictConfig:
    """The user's overrides, in Hydra's grammar, on top of plain values; Hydra must be initialised."""
    if not overrides:
        return values
    ConfigStore.instance().store(_SAVED, values)  # a tree in memory: it has no file, and so nothing to search or import
    return compose(_SAVED, overrides)


def compose_overrides(
    overrides: list[str],
    unused: tuple[str, ...] = (),
    settle: Callable[[DictConfig], None] | None = None,
    needed: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """The validated configuration of a list of overrides, as the train command would compose it.

    unused: keys at which the command does not look, so that they need no value.  settle: sets what the command itself
    has to say, before anything is checked.  needed: as load_config takes it.
    """
    with _composition_errors(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("train", with_group_files(prepared(overrides)))
    if settle is not None:
        settle(composed)
    for key in unused:
        mixed = key == "data.shards" and OmegaConf.select(composed, "data.mix")  # which stands in place of it
        if OmegaConf.select(composed, key, throw_on_missing=False) is None and not mixed:
            OmegaConf.update(composed, key, "unused")
    return load_config(composed, needed)


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
    text = one_line(error) or one_line(error.__cause__ or error) or type(error).__name__
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    option = re.search(r"Could not find '(\w+)/([^']*)' Available options in '\w+': (.*?) Config search path", text)
    if option:
        group, given, names = option[1], option[2], [name for name in option[3].split() if name != "common"]
        hint = did_you_mean(given, names)
        return f"{group}={given}: there is no such {group}; {hint}{' ' if hint else ''}there are {', '.join(names)}"
    if several := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        return f"{several[1]} ({several[2]}) is several values; give one, and a list in brackets: {several[1]}=[A,B]"
    if twice := re.search(r"Multiple values for (\S+)\. To override", text):
        return f"{twice[1]} is chosen already; without the plus it is chosen anew: {twice[1]}=NAME"
    if unknown:
        return unknown_key(unknown.group(1))
    return text
