"""Zips and tars of image files: the files in them by name, or one message that says what is wrong with which member.

A tar is read by the reader that indexes shards, a zip with the same strictness: what is damaged, hidden, encrypted or
outside of the archive's own folder is refused before the first image is packed, and every byte is checked as it comes.
"""

from __future__ import annotations

import os
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from lzma import LZMAError
from pathlib import Path

from swinv2_train.config.shown import shown
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_index import BLOCK, TarEntry, TarFile, is_tar_header, tar_entries
from swinv2_train.data.sources.listing import is_image

Read = Callable[[], bytes]
"""The content of one file.  Raises ShardError where it is damaged."""

MAX_IMAGE_BYTES = 1 << 30
"""More than any image that is decoded can have; a member that claims it would only be read into memory."""
_METHODS = {9: "Deflate64", 6: "Implode", 1: "Shrink", 93: "Zstandard", 95: "XZ", 97: "WavPack", 98: "PPMd"}
_LOCAL_HEADER, _DIRECTORY_END, _DIRECTORY_END_64 = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06"
_LINKS_IN_A_ROW = 8
_AGAIN = "fetch or write the archive again"
_UNPACK = "unpack it and name the folder"
_BROKEN_ZIP = (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError, IndexError)


@dataclass
class Archive:
    """What lies in a zip or tar; paths are relative, with / between folders."""

    files: dict[str, Read] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    """Those that are members of their own."""


def open_archive(path: Path, source: str) -> Archive:
    """The files of a zip or plain tar; nothing of their content is read yet.

    source: what errors call it.  Raises ShardError for a file that is neither, that is cut off, damaged or holds hidden
    members, and, naming the member, for one that lies outside of the archive's folder, comes twice, is encrypted or
    compressed by an unknown method, or is a link to nothing.
    """
    with open(path, "rb") as file:
        first = file.read(BLOCK)
    if first[:4] in (_LOCAL_HEADER, _DIRECTORY_END):
        return _open_zip(path, source)
    if is_tar_header(first):
        return _open_tar(path, source)
    if zipfile.is_zipfile(path):  # behind a program that unpacks it
        return _open_zip(path, source)
    what = "empty" if not first else "cut off or compressed" if any(first) else "nothing but zeros at its start"
    raise ShardError(f"{source} is not a folder, zip or uncompressed tar ({what}); {_UNPACK}")


def _member_path(name: str, source: str) -> str:
    """A member's name as a path below the archive's folder; Windows' programs write backslashes."""
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or re.match("[A-Za-z]:", path) or ".." in parts:
        raise ShardError(f"{source}: the member '{shown(name)}' lies outside of the archive's folder; {_UNPACK}")
    return "/".join(parts)


def _add(archive: Archive, path: str, name: str, read: Read, size: int, source: str) -> None:
    if path in archive.files and is_image(path):
        raise ShardError(f"{source}: the member '{shown(name)}' comes twice; {_UNPACK}, where one of them remains")
    if size > MAX_IMAGE_BYTES and is_image(path):
        raise ShardError(f"{source}: the member '{shown(name)}' has {size} bytes, which no image has; {_AGAIN}")
    archive.files[path] = read


# --------------------------------------------------------------------------------------------------------------------
# Tars


def _open_tar(path: Path, source: str) -> Archive:
    archive, links = Archive(), dict[str, TarEntry]()
    fd = os.open(path, os.O_RDONLY)
    try:
        for entry in tar_entries(TarFile(fd), source):
            name = _member_path(entry.name, source)
            if entry.is_file:
                read = partial(_read_slice, path, entry.offset, entry.size, source, entry.name)
                _add(archive, name, entry.name, read, entry.size, source)
            elif entry.is_link:
                links[name] = entry
            elif is_image(name) and not entry.name.endswith("/"):
                kind = entry.kind.decode("latin-1")
                raise ShardError(f"{source}: the member '{shown(entry.name)}' is no file (type {kind!r}); {_UNPACK}")
            else:
                archive.folders.add(name)
    finally:
        os.close(fd)
    for name in links:
        _add_link(archive, name, links, source)
    return archive


def _add_link(archive: Archive, name: str, links: dict[str, TarEntry], source: str) -> None:
    """A link to a file of the archive is that file; any other to an image, or to a folder of images, is refused."""
    target = name
    for _ in range(_LINKS_IN_A_ROW):
        if target not in links:
            break
        entry = links[target]
        joined = entry.target if entry.is_hard_link else posixpath.join(posixpath.dirname(target), entry.target)
        target = posixpath.normpath(joined)
    if target in archive.files and target not in links:
        archive.files[name] = archive.files[target]
    elif is_image(name) or any(file.startswith(f"{target}/") for file in archive.files):
        raise ShardError(
            f"{source}: the member '{shown(name)}' is a link to '{shown(links[name].target)}', which is no file of the "
            "archive; write it with tar --dereference --hard-dereference, or unpack it and name the folder"
        )


def _read_slice(path: Path, offset: int, size: int, source: str, name: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise ShardError(f"{source}: the member '{shown(name)}' is cut off: the archive changed while it was read")
    return content


# --------------------------------------------------------------------------------------------------------------------
# Zips


def _open_zip(path: Path, source: str) -> Archive:
    try:
        zipped = zipfile.ZipFile(path)
    except _BROKEN_ZIP as error:
        raise ShardError(f"{source} is a damaged zip, cut off perhaps ({str(error)[:200]}); {_AGAIN}") from error
    except OSError as error:
        if error.strerror is not None and error.filename is not None:
            raise
        raise ShardError(f"{source} is a damaged zip: its directory lies outside of it; {_AGAIN}") from error
    members = zipped.infolist()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        listed = _listed_members(file.fileno(), size)
        if listed is not None and listed != len(members) % (1 << 16 if listed < 1 << 16 else 1 << 64):
            raise ShardError(
                f"{source} is a damaged zip: its directory names {len(members)} members and says {listed}; {_AGAIN}"
            )
        _check_hidden(file.fileno(), members, source)
    archive = Archive()
    for info in members:
        name = _member_path(info.filename, source)
        is_folder = info.filename.endswith(("/", "\\"))
        if "\0" in info.orig_filename or (is_folder and info.file_size):
            raise ShardError(f"{source}: the member '{shown(info.orig_filename)}' has a damaged name; {_AGAIN}")
        if is_folder:
            archive.folders.add(name)
            continue
        if is_image(name):
            _check_readable(info, source)
        _add(archive, name, info.filename, partial(_read_zipped, zipped, info, source), info.file_size, source)
    return archive


def _check_readable(info: zipfile.ZipInfo, source: str) -> None:
    member = f"'{shown(info.filename)}'"
    if info.flag_bits & 0x2041:  # the member itself, by a stronger method, or the directory
        raise ShardError(f"{source}: the member {member} is encrypted; unpack the zip with its password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        raise ShardError(f"{source}: the member {member} is compressed by {method}, which is not read; {_UNPACK}")


def _listed_members(fd: int, size: int) -> int | None:
    """How many members the zip says it has: exact in a big one, else modulo 65,536, as some programs count on."""
    start = max(0, size - (1 << 16) - 22)
    tail = os.pread(fd, size - start, start)
    at = tail.rfind(_DIRECTORY_END)
    if at < 0 or len(tail) < at + 22:
        return None
    count: int = struct.unpack_from("<H", tail, at + 10)[0]
    if count < 0xFFFF or at < 20 or tail[at - 20 : at - 16] != b"PK\x06\x07":
        return count
    record = os.pread(fd, 56, struct.unpack_from("<Q", tail, at - 12)[0] & (1 << 62) - 1)
    if len(record) < 56 or record[:4] != _DIRECTORY_END_64:
        return None
    big: int = struct.unpack_from("<Q", record, 32)[0]
    return big


def _check_hidden(fd: int, members: Sequence[zipfile.ZipInfo], source: str) -> None:
    """A directory that has lost entries leaves their members in the file, where no reader would miss them."""
    starts = {info.header_offset for info in members}
    behind = "a member that its directory does not name"
    if os.pread(fd, 4, 0) == _LOCAL_HEADER and 0 not in starts:
        raise ShardError(f"{source} is a damaged zip: {behind} at byte 0; {_AGAIN}")
    end = 0
    for info in sorted(members, key=lambda each: each.header_offset):
        header = os.pread(fd, 30, max(info.header_offset, 0))
        if len(header) < 30 or header[:4] != _LOCAL_HEADER:
            raise ShardError(f"{source}: the member '{shown(info.filename)}' is not where the zip says; {_AGAIN}")
        if info.header_offset < end:
            raise ShardError(f"{source}: the member '{shown(info.filename)}' lies within another one; {_AGAIN}")
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        end = info.header_offset + 30 + name_bytes + extra_bytes + info.compress_size
        described = (0, 12, 16, 20, 24) if info.flag_bits & 8 else (0,)  # sizes that follow the content, in four forms
        after = os.pread(fd, 28, end)
        for skip in described:
            if after[skip : skip + 4] == _LOCAL_HEADER and end + skip not in starts:
                raise ShardError(f"{source} is a damaged zip: {behind} at byte {end + skip}; {_AGAIN}")


def _read_zipped(zipped: zipfile.ZipFile, info: zipfile.ZipInfo, source: str) -> bytes:
    problem: Exception | str
    try:
        with zipped.open(info) as file:
            content = file.read(info.file_size + 1)  # no more than it claims, whatever it would unpack to
        if len(content) == info.file_size:
            return content
        problem = f"{len(content)} bytes, the zip says {info.file_size}"
    except (*_BROKEN_ZIP, zlib.error, LZMAError, RuntimeError) as error:
        problem = error
    except OSError as error:
        if error.errno is not None:
            raise
        problem = error  # bzip2's own
    raise ShardError(f"{source}: the member '{shown(info.filename)}' is damaged ({str(problem)[:200]}); {_AGAIN}")
