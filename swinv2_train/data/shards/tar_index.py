"""The index of one tar shard: where each sample's bytes lie, found by reading every header once.

webdataset 1.x silently loses the rest of a shard in three kinds of damage (measured: a cut at a member border, a zeroed
or a corrupt header in the middle), so every header's checksum and the end of the file are checked here.
"""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from swinv2_train.config.pixels import CLIP_EXTENSIONS, VIDEO_EXTENSIONS
from swinv2_train.config.plain_files import open_regular
from swinv2_train.config.shown import shown
from swinv2_train.data.sample import LABEL, LABEL_BYTES, MEMBERS, ShardError, read_label
from swinv2_train.data.transforms.decode import DecodeError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "bmp", "tif", "tiff", "gif", "npy", "npz")
"""In order of preference when one sample holds several (first as webdataset's "jpg;jpeg;png;webp")."""
SAMPLE_EXTENSIONS = (*IMAGE_EXTENSIONS, *CLIP_EXTENSIONS)
"""Behind images, clips: an image beside a clip is taken, unless data.image_member names the clip."""
LABEL_MISSING = -1
"""The sample has no .cls member."""
LABEL_UNREADABLE = -2
"""The .cls member is not a non-negative integer."""

CHECKSUM = "crc32"
"""The index's field with a checksum of the image."""
TIME_FIELDS = ("times_at", "num_frames", "num_keys")
"""Of a video: the place of its first time stamp, and how many there are of frames, and behind them of key frames; all 0
where the file tells none, which whoever reads it hears again.
"""

_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")  # webdataset's base_plus_ext
_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset skips these
_REGULAR = (b"0", b"\0", b"7")
_HARD_LINK, _SYMBOLIC_LINK = b"1", b"2"
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes."""
_RECORDS = (b"x", b"L", b"K", b"g")
"""Members that say something of the next one, or of all that follow."""
_RECORD_BYTES = 2**20
"""Of one such member; a name or a link has some thousands at most, and more would only be read into memory."""
MAX_NAME = 4096
"""Letters of a name; every record of the index has room for the longest one."""
_ASCII = bytes(range(128))
_REMEDY = "fetch or write it again"


def stored_targets() -> dict[str, str]:
    """The targets of which the index says where their bytes lie, by the suffix of their member; labels are in it."""
    return {member.suffix: name for name, member in MEMBERS.items() if name != LABEL}


def target_fields(name: str, checksums: bool) -> tuple[str, ...]:
    """What the fields of a target's place are called: its byte offset, its size (-1 where there is none), CRC-32."""
    return (f"{name}_offset", f"{name}_size", *([f"{name}_{CHECKSUM}"] if checksums else []))


def targets_in(rows: np.ndarray) -> tuple[str, ...]:
    """The targets that at least one sample of an index has, beside labels."""
    names = rows.dtype.names or ()
    return tuple(name for name in stored_targets().values() if f"{name}_offset" in names)


def index_dtype(key_bytes: int, checksums: bool, targets: Sequence[str] = (), clips: bool = False) -> np.dtype:
    """One record per sample: byte offset and size of the image (-1 where there is none), label, extension, key.

    checksums: and the CRC-32 of the image's bytes (0 where there is none).  targets: and where these lie, which is in
    the indices of shards alone that have any.  clips: and, in those that have clips, how many frames and key frames a
    video has, and where their time stamps begin in what follows the records (index_times).
    """
    extension_bytes = max(map(len, SAMPLE_EXTENSIONS if clips else IMAGE_EXTENSIONS))
    fields = [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("label", "<i8"),
        ("extension", f"S{extension_bytes}"),
        ("key", f"S{max(key_bytes, 1)}"),
    ]
    if checksums:
        fields.append((CHECKSUM, "<u4"))
    for name in targets:
        fields += zip(target_fields(name, checksums), ("<i8", "<i8", "<u4"), strict=False)
    if clips:
        fields += [(name, "<i8") for name in TIME_FIELDS]
    return np.dtype(fields)


def sample_member(name: str) -> tuple[str, str] | None:
    """The key and the ending (small letters) of a member; None for one that webdataset's readers, and so this index
    and pipes, pass over.
    """
    match = _KEY_AND_EXTENSION.match(name)
    return None if match is None or _META_MEMBER.match(name) else (match[1], match[2].lower())


def build_index(
    path: str, name: str | None = None, checksums: bool = True, image_member: str | None = None
) -> np.ndarray:
    """Read every header of the tar at `path` and return its index, one `index_dtype` record per sample.

    name: what errors call the tar, else its path.  checksums: read every image too, and keep its checksum.
    image_member: what follows KEY. in the names of images (data.image_member); None = one of SAMPLE_EXTENSIONS.
    Raises ShardError, naming the byte, for a file that is compressed or not a tar, is cut off, has a damaged header, no
    end mark, non-zero bytes after the end mark, the same member twice, or members but no image.  A tar without any
    member is legal (an index of length 0) and warned about.
    """
    images: dict[str, tuple[int, int, int, int]] = {}  # key -> (rank of the extension, offset, size, checksum)
    labels: dict[str, int] = {}
    stored, targets = stored_targets(), dict[str, dict[str, tuple[int, int, int]]]()
    keys: dict[str, None] = {}
    seen: set[tuple[str, str]] = set()
    passed_over = PassedOver()
    shard, wanted = name or path, SAMPLE_EXTENSIONS if image_member is None else (image_member,)
    fd = os.open(path, os.O_RDONLY)
    try:
        for entry in tar_entries(TarFile(fd), shard):
            member, offset, size = entry.name, entry.offset, entry.size
            named = sample_member(member) if entry.is_file else None
            if named is None:
                passed_over.note(entry)
                continue
            key, extension = named
            if (key, extension) in seen:
                raise ShardError(
                    f"{shard}: the key {key!r:.200} has two .{extension:.20} members (the second at byte {offset}); "
                    "keys must be unique within a shard: write it again"
                )
            seen.add((key, extension))
            keys[key] = None
            if extension in wanted:
                preference = wanted.index(extension)
                if key not in images or preference < images[key][0]:
                    images[key] = (preference, offset, size, _checksum(fd, offset, size) if checksums else 0)
            elif extension in stored:
                place = (offset, size, _checksum(fd, offset, size) if checksums else 0)
                targets.setdefault(stored[extension], {})[key] = place
            elif extension == MEMBERS[LABEL].suffix:
                label = read_label(os.pread(fd, min(size, LABEL_BYTES + 1), offset))
                labels[key] = LABEL_UNREADABLE if label is None else label
    finally:
        os.close(fd)
    passed_over.warn(shard)
    if not keys:
        warnings.warn(f"{shown(shard)}: the shard holds no samples", stacklevel=2)
    elif not images:
        found = ", ".join(sorted({extension for _, extension in seen})[:8])
        raise ShardError(f"{shard}: no image in it (members end in: {found}); wanted {', '.join(wanted)}")

    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    endings = {key: wanted[preference].rpartition(".")[2] for key, (preference, *_) in images.items()}
    clips = not {*endings.values()}.isdisjoint(CLIP_EXTENSIONS)
    index = np.zeros(len(keys), index_dtype(max(map(len, encoded), default=1), checksums, sorted(targets), clips))
    for row, (key, key_bytes) in enumerate(zip(keys, encoded, strict=True)):
        _, offset, size, checksum = images.get(key, (-1, -1, -1, 0))
        record: tuple[Any, ...] = (
            offset, size, labels.get(key, LABEL_MISSING), endings.get(key, "").encode(), key_bytes
        )  # fmt: skip
        if checksums:
            record = (*record, checksum)
        for name in sorted(targets):
            record = (*record, *targets[name].get(key, (-1, -1, 0))[: 3 if checksums else 2])
        if clips:
            record = (*record, *(0 for _ in TIME_FIELDS))
        index[row] = record
    return index


def index_times(path: str, index: np.ndarray) -> np.ndarray | None:
    """The time stamps of all videos of a shard, int64, one after the other; their places and numbers become known to
    its index (TIME_FIELDS).  None for an index without clips.

    Every video's packets are read.  What cannot be, is left without: who reads that sample says why.  Raises
    ConfigError where videos cannot be read here at all.
    """
    if TIME_FIELDS[0] not in (index.dtype.names or ()):
        return None
    from swinv2_train.data.clips.video import read_times

    found, at = [np.zeros(0, "<i8")], 0
    fd = os.open(path, os.O_RDONLY)
    try:
        for row in range(len(index)):
            extension, size = index[row]["extension"].decode(), int(index[row]["size"])
            if extension not in VIDEO_EXTENSIONS or size <= 0:
                continue
            try:
                times = read_times(os.pread(fd, size, int(index[row]["offset"])), extension)
            except DecodeError:
                continue
            for name, value in zip(TIME_FIELDS, (at, len(times.shown), len(times.keys)), strict=True):
                index[name][row] = value
            found += [times.shown, times.keys]
            at += len(times.shown) + len(times.keys)
    finally:
        os.close(fd)
    return np.concatenate(found)


def save_index(file: IO[bytes], index: np.ndarray, times: np.ndarray | None) -> None:
    """Write an index, and behind it the time stamps of its videos, where it may have any."""
    np.save(file, index)
    if times is not None:
        np.save(file, times)


def load_times(path: str) -> np.ndarray | None:
    """The time stamps behind an index that load_index has read; None where it has no clips.

    Raises OSError, or ValueError for what are none, or fewer than the index speaks of.
    """
    with open(path, "rb") as file:
        try:
            index = np.load(file, allow_pickle=False)
            if TIME_FIELDS[0] not in (index.dtype.names or ()):
                return None
            times: np.ndarray = np.load(file, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  as in load_index
            raise ValueError(f"its time stamps are missing ({error or type(error).__name__})") from error
    at, frames, keys = (index[name] for name in TIME_FIELDS)
    if times.ndim != 1 or times.dtype != np.dtype("<i8"):
        raise ValueError(f"no time stamps (they are {times.dtype} {times.shape})")
    if len(index) and (min(at.min(), frames.min(), keys.min()) < 0 or (at + frames + keys).max() > len(times)):
        raise ValueError("it names time stamps that are not there")
    if ((frames > 0) != (keys > 0)).any():
        raise ValueError("it names videos without frames or key frames")
    return times


def load_index(path: str, shard_bytes: int) -> np.ndarray:
    """The index at path, mapped into memory, of a shard of shard_bytes.

    Raises OSError, or ValueError for what is no such index, or one that leads out of the shard or to no image.
    """
    os.close(open_regular(Path(path)))
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  numpy parses the header as Python, and raises what that raises
        raise ValueError(f"not an index ({error or type(error).__name__})") from error
    names = rows.dtype.names or ()
    key = rows.dtype.fields["key"][0].itemsize if "key" in names and rows.dtype.fields is not None else 0
    targets = sorted(targets_in(rows))
    clips = TIME_FIELDS[0] in names
    if rows.ndim != 1 or rows.dtype not in (index_dtype(key, sums, targets, clips) for sums in (False, True)):
        raise ValueError(f"not an index (it holds {rows.dtype} {rows.shape})")
    for fields in (("offset", "size"), *(target_fields(name, checksums=False) for name in targets)):
        offset, size = (rows[field][rows[fields[1]] >= 0] for field in fields)
        if len(offset) and (offset.min() < 0 or size.max() > shard_bytes or (offset > shard_bytes - size).any()):
            raise ValueError("it names bytes that the shard does not have")
    if not np.isin(rows["extension"], [b"", *(each.encode() for each in SAMPLE_EXTENSIONS)]).all():
        raise ValueError("it names files that are no images")
    return rows


def _checksum(fd: int, offset: int, size: int) -> int:
    checksum = 0
    for start in range(offset, offset + size, 1 << 20):
        checksum = zlib.crc32(os.pread(fd, min(1 << 20, offset + size - start), start), checksum)
    return checksum


class TarBytes(Protocol):
    """The bytes of a tar.  tar_entries asks for them in rising order alone, so that they may come out of a pipe."""

    def read_at(self, size: int, position: int) -> bytes:
        """Fewer at the end."""

    def reaches(self, end: int) -> bool:
        """True when there are at least `end` bytes."""

    def size(self) -> int:
        """All there are; asked only when the end has been met."""


class TarFile:
    """The bytes of a tar behind a descriptor, which its caller closes."""

    def __init__(self, fd: int) -> None:
        self._fd, self._size = fd, os.fstat(fd).st_size

    def read_at(self, size: int, position: int) -> bytes:
        return os.pread(self._fd, size, position)

    def reaches(self, end: int) -> bool:
        return end <= self._size

    def size(self) -> int:
        return self._size


class TarEntry(NamedTuple):
    """A member of a tar."""

    name: str
    offset: int
    """The first byte of its content."""
    size: int
    """Bytes of its content; 0 for a link."""
    kind: bytes
    """The type flag of its header."""
    target: str
    """What a link points to; "" for others."""

    @property
    def is_file(self) -> bool:
        return self.kind in _REGULAR and not self.name.endswith("/")  # before ustar that slash was what made a folder

    @property
    def is_link(self) -> bool:
        return self.kind in (_HARD_LINK, _SYMBOLIC_LINK)

    @property
    def is_hard_link(self) -> bool:
        """Its target is a name of the archive; a symbolic link's is a path from its own folder on."""
        return self.kind == _HARD_LINK


class PassedOver:
    """Members that no reader of webdataset takes, though they may have been meant as images: they are counted and said.

    What its writers put there for themselves (``__meta__``) and folders are not.
    """

    def __init__(self) -> None:
        self._counts = {"without an ending": 0, "links": 0}

    def note(self, entry: TarEntry) -> None:
        """Count a member, if it is one."""
        if entry.is_link:
            self._counts["links"] += 1
        elif entry.is_file and _META_MEMBER.match(entry.name) is None:
            self._counts["without an ending"] += 1

    def warn(self, shard: str) -> None:
        """One line that names them, where there are any."""
        found = [f"{count} {kind}" for kind, count in self._counts.items() if count]
        if found:
            warnings.warn(f"{shard}: members are passed over: {', '.join(found)}", stacklevel=3)


def tar_entries(source: TarBytes, path: str) -> Iterator[TarEntry]:
    """Every member, in order (ustar, GNU and PAX headers).

    path: what errors call the tar.  Raises ShardError, naming the byte, where the tar is damaged.
    """
    position = 0
    long_name: str | None = None
    long_target: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = source.read_at(BLOCK, position)
        if len(header) < BLOCK:
            if source.size() == 0:
                raise ShardError(f"{path}: empty (0 bytes); {_REMEDY}")
            raise ShardError(
                f"{path}: cut off at byte {source.size()}: there is no end mark, so samples are missing; {_REMEDY}"
            )
        if not any(header):
            _check_tail(source, path, position)
            return
        size = _check_header(header, path, position)
        kind = header[156:157]
        start = position + BLOCK
        if kind in _RECORDS:
            if size > _RECORD_BYTES:  # before anything of that size is asked for
                raise ShardError(
                    f"{path}: a name or PAX record of {size} bytes at byte {position}, more than {_RECORD_BYTES}: a "
                    f"damaged header; {_REMEDY}"
                )
            record = source.read_at(size, start)
            if kind == b"x":
                pax = _pax_records(record, path, position)
            elif kind == b"L":
                long_name = _text(record.rstrip(b"\0"))
            elif kind == b"K":
                long_target = _text(record.rstrip(b"\0"))
            elif {"path", "size", "linkpath"} & _pax_records(record, path, position).keys():
                raise ShardError(f"{path}: the PAX header at byte {position} names all members alike; {_REMEDY}")
        else:  # a real member: the records before it speak of it
            if not re.fullmatch(r"[0-9]{1,18}", pax.get("size", "0")):
                raise ShardError(f"{path}: damaged PAX header before byte {position}; {_REMEDY}")
            size = int(pax.get("size", size))
            if kind in _WITHOUT_CONTENT:  # some writers give a link its target's size
                size = 0
        if not source.reaches(start + size):
            raise ShardError(
                f"{path}: cut off at byte {source.size()}: the member at byte {position} ends at {start + size}; "
                f"{_REMEDY}"
            )
        position = start + -(-size // BLOCK) * BLOCK
        if kind in _RECORDS:
            continue
        if kind == b"S" or any(record.startswith("GNU.sparse") for record in pax):
            raise ShardError(f"{path}: sparse member at byte {start - BLOCK}; write the shard without --sparse")
        if kind == b"M":
            raise ShardError(f"{path}: a piece of a member at byte {start - BLOCK}; join the volumes to one tar")
        name = pax.get("path") or long_name or _header_name(header)
        if len(name) > MAX_NAME:
            raise ShardError(
                f"{path}: a name of {len(name)} letters at byte {start - BLOCK}: no path is that long; {_REMEDY}"
            )
        target = pax.get("linkpath") or long_target or _text(header[157:257].split(b"\0", 1)[0])
        long_name, long_target, pax = None, None, {}
        yield TarEntry(name, start, size, kind, target if kind in (_HARD_LINK, _SYMBOLIC_LINK) else "")


def is_tar_header(block: bytes) -> bool:
    """Whether a tar can begin with this block."""
    return len(block) == BLOCK and _header_size(block) is not None


def _check_header(header: bytes, path: str, position: int) -> int:
    """Verify the checksum; return the size field."""
    size = _header_size(header)
    if size is not None:
        return size
    if position > 0:
        raise ShardError(f"{path}: damaged header at byte {position}: the samples after it are lost; {_REMEDY}")
    if header[:2] == b"\x1f\x8b" or header[:3] == b"BZh" or header[:6] == b"\xfd7zXZ\0" or header[:4] == b"(\xb5/\xfd":
        raise ShardError(f"{path}: a compressed tar has no random access; unpack it to a plain .tar")
    if header[:4] == b"PK\x03\x04":
        raise ShardError(
            f"{path}: a zip is no shard; pack it (swinv2-make-shards SOURCE OUT), or unpack it to a folder"
        )
    raise ShardError(f"{path}: not a tar file (no valid header at byte 0); {_REMEDY}")


def _header_size(header: bytes) -> int | None:
    """The size field; None where the checksum is wrong."""
    try:
        stored, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        return None
    off = sum(header) - sum(header[148:156]) + 8 * 32 - stored
    if off:  # some old tars sum up signed bytes
        off -= 256 * len((header[:148] + header[156:]).translate(None, _ASCII))
    return size if off == 0 and size >= 0 else None


def _check_tail(source: TarBytes, path: str, position: int) -> None:
    end_mark = position
    while chunk := source.read_at(1 << 20, position):  # "only zeros may follow"; a legal tail has up to 11,263 of them
        if chunk.count(0) != len(chunk):
            first = position + next(i for i, byte in enumerate(chunk) if byte)
            raise ShardError(
                f"{path}: non-zero bytes at byte {first}, after the end mark at {end_mark}: a damaged header or an "
                f"appended tar hides samples; {_REMEDY}"
            )
        position += len(chunk)


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own format keeps other things in the prefix field
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")  # names may be any bytes


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for 8 GiB and more
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    text = field.split(b"\0", 1)[0].strip()
    return int(text, 8) if text else 0


def _pax_records(data: bytes, path: str, position: int) -> dict[str, str]:
    records: dict[str, str] = {}
    start = 0
    while start < len(data) and data[start] != 0:
        space = data.find(b" ", start)
        length = data[start:space]
        if space < 0 or not re.fullmatch(rb"[0-9]{1,8}", length) or int(length) <= len(length):
            raise ShardError(f"{path}: damaged PAX header at byte {position}; {_REMEDY}")
        record = data[space + 1 : start + int(length) - 1]
        name, _, value = record.partition(b"=")
        records[name.decode("utf-8", "replace")] = _text(value)
        start += int(length)
    return records
