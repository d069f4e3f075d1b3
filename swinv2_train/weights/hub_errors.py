"""What huggingface_hub and the hub behind it have to say, as one message of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from swinv2_train.config import ConfigError, OutageError
from swinv2_train.config.shown import shown

_LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


@contextlib.contextmanager
def hub_errors(what: object) -> Iterator[None]:
    """Errors of the hub and of its library become a ConfigError, or an OutageError where trying again may help.

    what: the address that is asked for; begins the message.
    """
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{what}: huggingface_hub is not installed ({error}); pip install huggingface_hub") from error
    except Exception as error:  # noqa: BLE001  its HTTP client's errors go through it, and are another's each year
        raise _explained(what, error) from error


def _explained(what: object, error: Exception) -> ConfigError:
    from huggingface_hub import constants, errors

    answered = next((each for each in _behind(error) if _status(each)), None)
    if answered is not None:
        return _of_answer(what, answered)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.is_offline_mode():
            return ConfigError(
                f"{what}: HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) does not have it; fetch it "
                "where there is a network"
            )
        return OutageError(f"{what}: {constants.ENDPOINT} does not answer ({_cause(error)}); try again later")
    if isinstance(error, OSError) and error.filename is not None:
        return OutageError(
            f"{what}: {error.filename}: {error.strerror}; the hub's cache is {constants.HF_HUB_CACHE}; set HF_HOME to "
            "a folder that you may write and that has room"
        )
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return OutageError(f"{what}: came incomplete ({_first_line(error)}); try again later")
    if type(error) is ValueError:  # what the library itself has found wrong in what it was given
        return ConfigError(f"{what}: {shown(' '.join(str(error).split()), 400)}")
    return OutageError(f"{what}: {constants.ENDPOINT} does not answer as a hub does ({_cause(error)}); try again later")


def _status(error: BaseException) -> int:
    """Of the HTTP answer that an error is about; 0 for another error."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _of_answer(what: object, error: BaseException) -> ConfigError:
    """From an HTTP status to what the user can do."""
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(f"{what}: only who has accepted its terms gets it; do so on its page, and {_LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{what}: the repository has no such revision; name another branch, tag or commit")
    if isinstance(error, errors.EntryNotFoundError):
        return ConfigError(f"{what}: the repository has no such file at this revision; name another")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(f"{what}: there is no such repository, or it is private ({status}); {_LOG_IN}")
    if status == 401:
        return ConfigError(f"{what}: the hub does not know who asks (401); {_LOG_IN}")
    if status == 403:
        return ConfigError(f"{what}: whose token this is may not do that (403: {_first_line(error)}); use another")
    if status == 429:
        return OutageError(f"{what}: the hub wants fewer requests (429); try again later, or {_LOG_IN}")
    if status >= 500:
        return OutageError(f"{what}: the hub fails ({status}); try again later")
    return ConfigError(f"{what}: the hub refuses it ({status}: {_first_line(error)})")


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised for, and so on."""
    behind: BaseException | None = error
    while behind is not None:
        yield behind
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)


def _cause(error: BaseException) -> str:
    """The innermost reason, which is the one that says something."""
    *_, innermost = _behind(error)
    return _first_line(innermost)


def _first_line(error: BaseException) -> str:
    server = str(getattr(error, "server_message", None) or "")
    text = server or next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {shown(text.strip(), 200)}" if not server else shown(server, 200)
