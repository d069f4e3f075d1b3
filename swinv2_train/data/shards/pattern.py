"""What data.shards names: braces, wildcards and ``::`` become a list of local paths and remote addresses."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path

from swinv2_train.config import PIPE, is_pipe
from swinv2_train.config.secret_texts import is_redacted
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.manifest import MANIFEST_NAME, read_entries
from swinv2_train.data.shards.transfers import ONCE, RetryPolicy, is_remote, list_matching, redacted


def expand_pattern(
    pattern: str, key: str = "data.shards", complete: bool = True, retry_policy: RetryPolicy = ONCE
) -> list[str]:
    """Paths of a pattern: ``{00..11}`` and ``{a,b}`` braces, ``* ? [..]`` wildcards (sorted), parts joined by ``::``.

    What is there is meant by its name, a file or the folders before a pattern, whatever they hold of these: of
    ``runs[1]/{a,b}/*.tar`` with a folder runs[1]/{a,b} the star alone is a wildcard.  Elsewhere ``\\{`` is a brace.

    A part may be an address that fsspec knows (https://, s3://, ...); there wildcards need a file system that can list
    (asked as retry_policy says), and whether the named shards exist is found out by who opens them.  Raises ShardError
    naming `key` when a part matches no file, when (`complete`) a local wildcard misses shards that the manifest beside
    them lists, or for a pipe.
    """
    paths: list[str] = []
    check_whole(pattern, key)
    for part in pattern.split("::"):
        if is_pipe(part):
            raise ShardError(
                f"{key} '{part}': what a command prints can be read once only and has no index, so data.shards alone "
                "may be a pipe; write it to a folder, or name an address (https://, s3://, ...)"
            )
        for candidate in _candidates(part, key):
            paths += _remote(candidate, key, retry_policy) if is_remote(candidate) else _local(candidate, key, complete)
    doubled = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if doubled:
        raise ShardError(f"{key} names {redacted(doubled[0])} twice; every shard may appear once")
    return paths


def remote_wildcards(pattern: str) -> list[str]:
    """The addresses with a wildcard; what they miss is found out by who fetches the manifest beside them."""
    candidates = [candidate for part in pattern.split("::") for candidate in _candidates(part, "")]
    return [candidate for candidate in candidates if is_remote(candidate) and _has_wildcard(candidate)]


def expand_commands(pattern: str, key: str = "data.shards") -> list[str]:
    """Shell commands of a pattern of ``pipe:COMMAND`` parts with braces, joined by ``::``, without their ``pipe:``.

    Raises ShardError naming `key` when a part is no pipe, or an empty one.
    """
    commands: list[str] = []
    check_whole(pattern, key)
    for part in pattern.split("::"):
        if not part.startswith(PIPE) or not part.removeprefix(PIPE).strip():
            raise ShardError(
                f"{key} '{part}': {'an empty pipe' if part.startswith(PIPE) else 'no pipe, but other parts are'}; "
                "name pipes (pipe:COMMAND) or indexed shards, not both"
            )
        commands += _braces(part.removeprefix(PIPE).strip(), key)
    return commands


def check_whole(pattern: str, key: str) -> None:
    """Raises ShardError for an address or a command out of a run's own record, which keeps none of its secrets."""
    if is_redacted(pattern):
        raise ShardError(
            f"{key} '{pattern}' is out of a run directory, which keeps no user, password, query or token; give the "
            f"whole of it on the command line: {key}=..."
        )


def _candidates(part: str, key: str) -> list[str]:
    part = os.path.expanduser(part.removeprefix("file://"))
    there, rest = ("", part) if is_remote(part) else _split(part)
    return [there + each for each in _braces(rest, key)] if rest else [there]


def _split(path: str) -> tuple[str, str]:
    """A path's longest beginning that is there by its letters, folders or the whole of it, and what follows."""
    if os.path.isfile(path) or os.path.isdir(path):
        return path, ""
    there = 0
    while (end := path.find("/", there) + 1) and os.path.isdir(path[:end]):
        there = end
    return path[:there], path[there:]


def _braces(part: str, key: str) -> list[str]:
    """A backslash guards a brace or a comma; before anything else it is one, as it is in names and commands."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(re.sub(r"\\(?![{},])", r"\\\\", part)))
    except ValueError as error:  # a brace without its partner
        raise ShardError(f"{key} '{part}': {error}; a range is written {{00..11}}") from error


def _local(candidate: str, key: str, complete: bool) -> list[str]:
    remedy = f"set {key} to your shards (swinv2-make-shards SOURCE OUT makes them), or run make demo for CIFAR-10"
    if os.path.isdir(candidate):
        raise ShardError(
            f"{key} '{candidate}' is a folder; name its shards, e.g. {os.path.join(candidate, '*.tar')} (a folder of "
            "images or a saved data set stands alone: it is not joined to others by :: or braces)"
        )
    there, rest = _split(candidate)
    if not rest:
        return [candidate]
    if not glob.has_magic(rest):
        raise ShardError(f"{key} names '{candidate}', which does not exist; {remedy}")
    wildcard = glob.escape(there) + rest
    found = sorted(path for path in glob.glob(wildcard, recursive=True) if os.path.isfile(path))
    if not found:
        raise ShardError(f"{key} '{candidate}' matches no file; {remedy}")
    for folder in sorted({os.path.dirname(path) for path in found}) if complete else ():
        present = {os.path.basename(path) for path in found if os.path.dirname(path) == folder}
        lost = sorted(set(fnmatch.filter(read_entries(Path(folder)), os.path.basename(candidate))) - present)
        if lost:
            raise ShardError(
                f"{os.path.join(folder, lost[0])} is missing, {MANIFEST_NAME} lists it ({len(lost)} such shards); "
                f"fetch it again, or run swinv2-make-shards --reindex '{candidate}' to go on without it"
            )
    return found


def _remote(candidate: str, key: str, retry_policy: RetryPolicy) -> list[str]:
    if not _has_wildcard(candidate):
        return [candidate]
    found = list_matching(candidate, retry_policy)
    if not found:
        raise ShardError(
            f"{key} '{redacted(candidate)}' matches nothing; not every server lists its files: name them by braces, "
            "{000000..000011}"
        )
    return found


def _has_wildcard(address: str) -> bool:
    return any(char in address.split("?")[0] for char in "*[")  # a ? begins the query of an address
