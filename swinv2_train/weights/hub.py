"""hf://USER/NAME[@REVISION][/FILE]: weights in a repository of the Hugging Face hub, at one commit of it.

Files come through huggingface_hub into its cache (HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean to it).
Asked for are weights and the JSON beside them, by their names; what else a repository holds, programs among it, never
comes to this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

from swinv2_train.config import ConfigError, OutageError
from swinv2_train.config.shown import shown
from swinv2_train.distributed import World, raise_together
from swinv2_train.storage.atomic import sha256_of
from swinv2_train.weights.files import HUGGINGFACE_FILES, index_parts
from swinv2_train.weights.hub_errors import hub_errors

WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".index.json")
"""Of the files that may be asked for."""
BESIDE = ("config.json", "preprocessor_config.json")
"""What says of a Hugging Face model's weights how they are used."""
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?")
"""One / is what pathlib leaves of two."""
_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMED = 8
"""How many files a message names."""
_SEC = 30.0
"""How long a hub may take to say what a repository holds."""


class HubAddress(NamedTuple):
    """Where weights are in a hub."""

    repo: str
    """USER/NAME"""
    revision: str | None
    """A commit, a branch or a tag; None = the main branch."""
    file: str | None
    """Its path in the repository; None = the one that is found there."""

    @classmethod
    def of(cls, path: str | Path | None) -> Self | None:
        """The address in a text; None where it is none, but a file's or directory's.

        Raises ConfigError for one that names no repository, or a file that is not of weights.
        """
        text = str(path)
        if path is None or not text.startswith("hf:/"):
            return None
        match = _ADDRESS.fullmatch(text)
        if match is None or match["repo"].startswith(("datasets/", "spaces/")):
            raise ConfigError(f"{text} is no address of weights; the form is hf://USER/NAME[@REVISION][/FILE]")
        check_repo(match["repo"], text)
        revision = match["revision"]
        address = cls(match["repo"], None if revision is None else revision.replace("%2F", "/"), match["file"])
        parts = (address.file or "model.safetensors").split("/")
        if not parts[-1].endswith(WEIGHT_ENDINGS) or {"", ".", ".."} & set(parts):
            raise ConfigError(
                f"{text} names no file of weights; these end in one of {', '.join(WEIGHT_ENDINGS)}. A branch whose "
                "name has a / is written with %2F"
            )
        return address

    def __str__(self) -> str:
        revision = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return f"hf://{self.repo}{revision}{'' if self.file is None else f'/{self.file}'}"

    @property
    def has_commit(self) -> bool:
        """Whether its revision is a commit, which means the same for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def begins(self, other: HubAddress) -> bool:
        """Whether the other may be what this address meant at some time: the same, with a commit and a file."""
        same_file = self.file in (None, other.file)
        return self.repo == other.repo and other.has_commit and not self.has_commit and same_file


def check_repo(repo: str, given: str) -> None:
    """ConfigError unless a text may be the USER/NAME of a repository.  given: what the user wrote."""
    names = repo.split("/")
    if len(names) != 2 or not all(map(_NAME.fullmatch, names)) or "--" in repo or ".." in repo:
        raise ConfigError(
            f"{given} names no repository, which is called USER/NAME: letters, digits, -, _ and ., with a letter, "
            "digit or _ at the ends, and without -- or .."
        )


def pinned(path: str | Path) -> str:
    """An address of a hub with the commit that it means now and with its file; a path as it stands.

    Raises ConfigError where there is no such repository, revision or file, where several files may be meant, and where
    the hub lets nobody in; OutageError where it does not answer.
    """
    address = HubAddress.of(path)
    if address is None:
        return str(Path(path))
    if address.has_commit and address.file is not None:
        return str(address)
    with hub_errors(address):
        from huggingface_hub.constants import is_offline_mode
    if is_offline_mode():
        return str(_cached(address))
    commit, names = _contents(address)
    if address.file is not None and address.file not in names:
        raise ConfigError(f"{address}: the repository has no such file; its weights are {_listed(_weights_of(names))}")
    return str(address._replace(revision=commit, file=address.file or _chosen(names, address)))


def fetched(path: str | Path) -> Path:
    """The local file of weights at an address of a hub, in whose cache it then lies; other paths as they stand.

    Raises as pinned does, and where what came is broken.
    """
    if HubAddress.of(path) is None:
        return Path(path)
    address = HubAddress.of(pinned(path))
    assert address is not None and address.file is not None, "pinned() gives both"
    folder, name = PurePosixPath(address.file).parent, PurePosixPath(address.file).name
    for beside in BESIDE if name in HUGGINGFACE_FILES else ():
        _file(address, str(folder / beside), required=False)
    file = _file(address, address.file)
    assert file is not None, "it is required"
    for part in index_parts(file) if name.endswith(".index.json") else ():
        if PurePosixPath(part).name != part or not part.endswith(WEIGHT_ENDINGS):
            raise ConfigError(f"{address} names {shown(part)!r}, which is not beside it; there is no such model")
        _file(address, str(folder / part))
    return file


def fetch_on_every_host(path: str | Path, world: World) -> None:
    """Have the weights at an address of a hub on every host before any rank reads them; one rank of each fetches.

    Collective, for a hub's address alone.  What one rank finds wrong, all raise.
    """
    if HubAddress.of(path) is None:
        return
    problem: ConfigError | None = None
    if world.local_rank == 0:
        try:
            fetched(path)
        except ConfigError as error:
            problem = error
    raise_together(problem)


def _contents(address: HubAddress) -> tuple[str, list[str]]:
    """The commit that an address means now, and the names of its files."""
    with hub_errors(address):
        from huggingface_hub import HfApi

        info = HfApi().model_info(address.repo, revision=address.revision, timeout=_SEC)
    if info.sha is None or _COMMIT.fullmatch(info.sha) is None:
        raise OutageError(f"{address}: the hub names no commit ({info.sha}); check HF_ENDPOINT")
    return info.sha, [each.rfilename for each in info.siblings or ()]


def _cached(address: HubAddress) -> HubAddress:
    """The address with commit and file, by what the cache has.  Raises ConfigError where that does not say it."""
    from huggingface_hub import constants, try_to_load_from_cache

    for name in HUGGINGFACE_FILES if address.file is None else (address.file,):
        found = try_to_load_from_cache(address.repo, name, revision=address.revision)
        if isinstance(found, str):
            depth = len(PurePosixPath(name).parts)
            return address._replace(revision=Path(found).parents[depth - 1].name, file=name)
    snapshots = Path(constants.HF_HUB_CACHE, f"models--{address.repo.replace('/', '--')}", "snapshots")
    commits = sorted(each.name for each in snapshots.iterdir()) if snapshots.is_dir() else []
    there = f"of which it has {', '.join(commits[:_NAMED])}" if commits else "where nothing of this repository is"
    raise ConfigError(
        f"{address}: HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) does not say which commit and "
        f"file are meant; name a commit, {there}, or fetch it where there is a network"
    )


def _chosen(names: Sequence[str], address: HubAddress) -> str:
    """The file of a repository that holds its weights."""
    standard = next((name for name in HUGGINGFACE_FILES if name in names), None)
    if standard is not None:
        return standard
    weights = _weights_of([name for name in names if "/" not in name])
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise ConfigError(f"{address} has several weight files ({_listed(weights)}); name one: {address}/FILE")
    elsewhere = _weights_of(names)
    if elsewhere:
        raise ConfigError(f"{address} has weights in folders alone ({_listed(elsewhere)}); name one: {address}/FILE")
    raise ConfigError(f"{address} has no weights among its {len(names)} files ({_listed(names)}); name another")


def _weights_of(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(WEIGHT_ENDINGS)]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(shown(name, 80) for name in names[:_NAMED]) or "none") + more


def _file(address: HubAddress, name: str, required: bool = True) -> Path | None:
    """One file of an address's commit, fetched unless the cache has it; None where it is not there nor required.

    A large file is known by its SHA-256, with which what came is compared.
    """
    with hub_errors(address._replace(file=name)):
        from huggingface_hub import HfApi, constants, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        cached = try_to_load_from_cache(address.repo, name, revision=address.revision)
        if isinstance(cached, str):
            return Path(cached)
        if not required and (cached is not None or constants.is_offline_mode()):
            return None
        try:
            file = Path(HfApi().hf_hub_download(address.repo, name, revision=address.revision))
        except EntryNotFoundError as error:
            if required or isinstance(error, LocalEntryNotFoundError):  # which is of a hub that does not answer
                raise
            return None
    if address.revision not in file.parts:
        raise OutageError(f"{address}: the hub answers with another commit ({file}); check HF_ENDPOINT")
    blob = Path(os.path.realpath(file))
    if _SHA256.fullmatch(blob.name) and sha256_of(str(blob)) != blob.name:
        for each in (file, blob):
            each.unlink(missing_ok=True)
        raise OutageError(f"{address}: {name} came with other bytes than its SHA-256 says; fetch it again")
    return file
