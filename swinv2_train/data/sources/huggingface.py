"""A data set that Hugging Face's `datasets` wrote by save_to_disk: its columns, its labels, and one row by position.

The directory holds Arrow streams and two JSON files that describe them, and pyarrow, which `datasets` itself stands on,
reads those.  `datasets` is not imported: that takes six times as long, and it opens connections of its own accord.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import open_regular, read_bytes
from swinv2_train.config.shown import shown
from swinv2_train.data.class_names import canonical
from swinv2_train.data.sample import Sample, SampleError, ShardError, again, labelled, unreadable
from swinv2_train.data.shards.tar_index import LABEL_MISSING
from swinv2_train.data.sources.array_columns import ARRAYS, array_fault, array_type, is_array, npy_bytes, plain_lists
from swinv2_train.data.sources.label_folders import pixel_class_names
from swinv2_train.data.sources.virtual_shards import VirtualShards, VirtualShardsReader, packed_index, packing_order
from swinv2_train.storage.json_files import Shape, anything, file_name, listing, mapping, record, text

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_END_MARK = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends an Arrow stream.  pyarrow does without it, and loses rows in silence where a file was cut between batches."""
_AGAIN = "copy or save it again"
_JSON_BYTES = 2**26
_IMAGE_BYTES = 2**31
_FEATURES = mapping(anything(), names=text(200))
_STATE_SHAPE = record(
    {
        "_data_files": listing(record({"filename": file_name(deep=False)}), most=100_000, least=1),
        "_fingerprint": text(200),
    }
)


@dataclass(frozen=True, eq=False)
class SavedDataset(VirtualShards):
    """The rows of a saved data set.  Picklable."""

    files: tuple[str, ...]
    """Names of the Arrow files in the directory."""
    file_rows: tuple[int, ...]
    """Rows of each file."""
    image_column: str
    rows: np.ndarray
    """int64 (images,): the number of the row at each place of the packing order."""
    label_column: str | None = None
    """The column of label images, whose pixels are classes."""
    has_label_image: np.ndarray | None = None
    """bool (images,), in packing order; None without that column."""
    labels_from = "a column of class labels"

    @cached_property
    def unsegmented(self) -> tuple[int, ...]:
        """Images per shard without a label image."""
        if self.has_label_image is None:
            return self.counts
        ends = np.cumsum(self.counts)
        return tuple(int((~shard).sum()) for shard in np.split(self.has_label_image, ends[:-1]))

    def open_reader(self, max_open: int = 64) -> SavedDatasetReader:
        """max_open: of no meaning here; all files are mapped into memory, and none stays open."""
        return SavedDatasetReader(self)


def is_saved_dataset(directory: str) -> bool:
    """True for what Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in (_STATE, _SPLITS))


def open_saved_dataset(
    path: str,
    key: str = "data.shards",
    progress: Callable[[str], None] | None = None,
    columns: Sequence[str] | None = None,
    in_order: bool = False,
) -> SavedDataset:
    """Find the image and the label column of a saved data set by their types, and read the labels.

    Images are files in a column of type Image, or, where there is none, arrays in one of type Array2D or Array3D.

    key: the config key that error messages name.  progress: receives a line.  columns: those of the images and of their
    label images, whose pixels are classes (data.label_folders); then a column of labels is none.  in_order: the rows as
    they are counted.  Raises ShardError for several splits, a damaged directory, no or several columns of a kind, or no
    rows; ConfigError when pyarrow is not installed.
    """
    path, source = os.path.abspath(path), f"{key} '{path}'"
    _check_single(path, source)
    state, info = _read_json(path, _STATE), _read_json(path, _INFO)
    if state.get("_indices_data_files"):
        raise ShardError(f"{source} holds rows of which a list says the order; save it again with a newer `datasets`")
    features = info.get("features") or {}
    _check_shape(features, _FEATURES, f"{path}: {_INFO}: features")
    _check_shape(state, _STATE_SHAPE, f"{path}: {_STATE}")
    image, label = find_columns(features, source) if columns is None else named_columns(features, columns, source)
    files = tuple(file["filename"] for file in state["_data_files"])
    labels, file_rows, segmented = [], [], []
    for file in files:
        table = _open_table(os.path.join(path, file), image, label, files_in=() if columns is None else columns[1:])
        file_rows.append(table.num_rows)
        labels.append(_labels(table, None if columns else label, os.path.join(path, file)))
        if columns is not None:
            segmented.append(np.array(table.column(label).is_valid().to_pylist(), bool))
    if not sum(file_rows):
        raise ShardError(f"{source} holds no rows; name a data set that has some")
    count = sum(file_rows)
    rows = np.array(range(count) if in_order else packing_order(count), "<i8")
    label_of_row = np.concatenate(labels)[rows]
    has_label_image = np.concatenate(segmented)[rows] if columns else None
    if columns is not None:
        classes = pixel_class_names(Path(path), levels=0)
    else:
        classes = None if label is None else _class_names(features[label], label_of_row, source)
    digest = hashlib.sha256(f"{state['_fingerprint']}\0{image}\0{label}\0".encode())
    for part in (rows, label_of_row):
        digest.update(part.tobytes())
    if progress is not None:
        told = "none" if label is None else f"'{label}'"
        what = "labels" if columns is None else "label images"
        progress(f"{path}: {len(rows)} rows; images in the column '{image}', {what} in {told}")
    return SavedDataset(
        path, label_of_row, classes, digest.hexdigest(), files, tuple(file_rows), image, rows,
        None if columns is None else label, has_label_image,
    )  # fmt: skip


def named_columns(features: Mapping[str, Any], columns: Sequence[str], source: str) -> tuple[str, str]:
    """The columns of images and of label images, which are files.  Raises ShardError where they are others."""
    listed = ", ".join(f"{name} ({_type_name(kind)})" for name, kind in features.items()) or "none"
    for column, wanted in zip(columns, (("Image", *ARRAYS), ("Image",)), strict=True):
        kind = features.get(column)
        if not isinstance(kind, dict) or kind.get("_type") not in wanted:
            raise ShardError(
                f"data.label_folders ({', '.join(columns)}): {source} has no column '{column}' of type "
                f"{' or '.join(wanted)}; its columns: {listed}; name those of the images and of their label images"
            )
    return columns[0], columns[1]


def find_columns(features: Mapping[str, Any], source: str) -> tuple[str, str | None]:
    """The one column of images, and the one of labels: of class labels, or, without those, of integers; None for none.

    Images are those of type Image, and arrays where there are none.
    features: by column, as dataset_info.json has them.  source: what errors call the data set.  Raises ShardError
    when there is no column of images, or several of a kind.
    """

    def of_type(matches: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        return [name for name, kind in features.items() if isinstance(kind, dict) and matches(kind)]

    images = of_type(lambda kind: kind.get("_type") == "Image") or of_type(is_array)
    labels = of_type(lambda kind: kind.get("_type") == "ClassLabel")
    labels = labels or of_type(  # arrays have a dtype too
        lambda kind: kind.get("_type") == "Value" and str(kind.get("dtype")).startswith(("int", "uint"))
    )
    listed = ", ".join(f"{name} ({_type_name(kind)})" for name, kind in features.items()) or "none"
    if not images:
        raise ShardError(
            f"{source} has no column of type Image, Array2D or Array3D; its columns: {listed}; cast the one that holds "
            "the images (cast_column(NAME, datasets.Image()), or Array3D(SHAPE, DTYPE)) and save it again"
        )
    for what, found in (("images", images), ("labels", labels)):
        if len(found) > 1:
            raise ShardError(
                f"{source} has {len(found)} columns that may be the {what}: {', '.join(found)}; its columns: {listed}; "
                "keep one of them (select_columns([...])) and save it again"
                + (f"; of label images: data.label_folders=[{found[0]},{found[1]}]" if what == "images" else "")
            )
    return images[0], labels[0] if labels else None


def _class_names(feature: Mapping[str, Any], labels: np.ndarray, source: str) -> tuple[str, ...] | None:
    """The names of a column of class labels, label by label; None where it has none."""
    names = feature.get("names")
    if not names:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ShardError(f"{source}: the names of its classes are not a list of texts; {_AGAIN}")
    classes = tuple(map(canonical, names))
    if len(set(classes)) < len(classes):
        doubled = next(name for name in classes if classes.count(name) > 1)
        raise ShardError(f"{source} has two classes called '{shown(doubled)}'; give each its own name")
    if len(labels) and labels.max() >= len(classes):
        raise ShardError(
            f"{source} has labels up to {labels.max()}, but names {len(classes)} classes; name each, and save it again"
        )
    return classes


def _type_name(kind: Any) -> str:
    return str(kind.get("dtype", kind.get("_type", "nested")) if isinstance(kind, dict) else "nested")


def _check_single(path: str, source: str) -> None:
    if os.path.isfile(os.path.join(path, _SPLITS)):
        content = _read_json(path, _SPLITS)
        _check_shape(content, record({"splits": listing(text(200), most=1000)}), f"{path}: {_SPLITS}")
        splits = [os.path.join(path, name) for name in content["splits"]]
        raise ShardError(f"{source} holds several data sets; name one of them: {', '.join(splits)}")


def _read_json(path: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(Path(path, name), _JSON_BYTES))
    except FileNotFoundError as error:
        raise ShardError(f"{path}: {name} is missing; {_AGAIN}") from error
    except OSError as error:
        problem = ShardError(f"{path}: {name} cannot be read ({error}); {_AGAIN}")
        raise unreadable(error, f"{path}/{name}", problem) from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: {name} cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path}: {name} is not what `datasets` writes; {_AGAIN}")
    return content


def _check_shape(content: Any, shape: Shape, what: str) -> None:
    try:
        shape(content, "")
    except ConfigError as error:
        raise ShardError(f"{what}: {error}; {_AGAIN}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            "data sets of Hugging Face's `datasets` need pyarrow, which is not installed; "
            "pip install 'pyarrow>=16', or name a folder of images or shards"
        ) from error
    return pyarrow


def _open_table(path: str, image: str, label: str | None, files_in: Sequence[str] = ()) -> Any:
    """The two columns of an Arrow file, mapped into memory: nothing of the images is read yet.

    Their lengths and offsets are compared with the file first: pyarrow believes them, and a flipped bit in one ended
    the process (one of thirteen flips in a small file).
    """
    arrow = _pyarrow()
    try:
        with open(open_regular(Path(path)), "rb") as file:
            file.seek(-min(len(_END_MARK), os.fstat(file.fileno()).st_size), os.SEEK_END)
            complete = file.read() == _END_MARK
        table = plain_lists(arrow.ipc.open_stream(arrow.memory_map(path)).read_all(), image)
        _check_columns(table, image, label, path)
        for column in files_in:
            _check_columns(table, column, None, path)
        table = table.select([image] if label is None else [image, label])
        table.validate(full=True)
    except ShardError:
        raise
    except (OSError, ValueError, KeyError, OverflowError, arrow.ArrowException) as error:
        problem = ShardError(f"{path} cannot be read: {error}; {_AGAIN}")
        raise unreadable(error, path, problem) if isinstance(error, OSError) else problem from error
    if not complete:
        raise ShardError(f"{path}: cut off: there is no end mark, so rows are missing; {_AGAIN}")
    return table


def _check_columns(table: Any, image: str, label: str | None, path: str) -> None:
    types = _pyarrow().types
    kind = table.schema.field(image).type if table.schema.names.count(image) == 1 else None
    if label is not None and table.schema.names.count(label) != 1:
        raise ShardError(f"{path}: there is no column '{label}', which {_INFO} names; {_AGAIN}")
    if kind is not None and array_type(kind) is not None:
        if fault := array_fault(kind):
            raise ShardError(f"{path}: the column '{image}' {fault}")
        return
    inner = [kind.field(i) for i in range(kind.num_fields)] if kind is not None and types.is_struct(kind) else []
    fields = {field.name: field.type for field in inner}
    whole = len(fields) == len(inner) and {"bytes", "path"} <= fields.keys()
    if not (
        whole
        and (types.is_binary(fields["bytes"]) or types.is_large_binary(fields["bytes"]))
        and (types.is_string(fields["path"]) or types.is_large_string(fields["path"]) or types.is_null(fields["path"]))
    ):
        raise ShardError(f"{path}: the column '{image}' is {kind}, not a struct of bytes and path; save it again")


def _labels(table: Any, label: str | None, path: str) -> np.ndarray:
    """int64 (rows,), -1 where there is none."""
    if label is None:
        return np.full(table.num_rows, LABEL_MISSING, "<i8")
    column, arrow = table.column(label), _pyarrow()
    if not arrow.types.is_integer(column.type):
        raise ShardError(f"{path}: the column '{label}' is {column.type}, not of whole numbers; save it again")
    column = column.cast(arrow.int64(), safe=False)  # beyond 63 bit: negative, no readable label
    # by way of Python's numbers, 0.03 us each: fill_null and to_numpy would import pandas
    numbers = [LABEL_MISSING if number is None else number for number in column.to_pylist()]
    return np.maximum(np.array(numbers, "<i8"), LABEL_MISSING)


# --------------------------------------------------------------------------------------------------------------------


class SavedDatasetReader(VirtualShardsReader):
    """Any image of a saved data set by (shard, index).  Picklable; maps the files when it first reads."""

    def __init__(self, dataset: SavedDataset) -> None:
        _pyarrow()  # here, or every worker process would import it on its own
        self.dataset = dataset
        self._chunks: tuple[list[int], list[list[Any]]] | None = None

    def read(self, shard: int, index: int) -> Sample:
        """The row's bytes.  Raises SampleError where there are none, ShardError where a file has changed."""
        path, place = self.dataset.path, packed_index(shard, index)
        key = self.key(shard, index)
        starts, columns = self._mapped()
        chunk = bisect_right(starts, int(self.dataset.rows[place])) - 1
        cell, *labels = (chunks[chunk][int(self.dataset.rows[place]) - starts[chunk]] for chunks in columns)
        image, extension = _array(cell, path, key) if array_type(cell.type) else _file(cell, path, key)
        targets = labelled(int(self.dataset.labels[place]))
        if self.dataset.has_label_image is not None and self.dataset.has_label_image[place]:
            try:
                content, _ = _file(labels[0], path, key)
            except SampleError as error:
                raise SampleError(f"its label image: {error.cause}", path, key) from error
            targets = {**targets, "segmentation": content}
        return Sample(key, image, extension, targets, path)

    def key(self, shard: int, index: int) -> str:
        """The number of the row."""
        return str(self.dataset.rows[packed_index(shard, index)])

    def close(self) -> None:
        """Let the mapped files go; the next read maps them again."""
        self._chunks = None

    def _mapped(self) -> tuple[list[int], list[list[Any]]]:
        """The number of the first row of every batch of rows that the files hold, and their images and label images."""
        if self._chunks is None:
            image, label = self.dataset.image_column, self.dataset.label_column
            columns: list[list[Any]] = [[]] if label is None else [[], []]
            for name, rows in zip(self.dataset.files, self.dataset.file_rows, strict=True):
                path = os.path.join(self.dataset.path, name)
                table = _open_table(path, image, label, files_in=() if label is None else (label,))
                if table.num_rows != rows:
                    raise ShardError(f"{self.dataset.path}: {name} changed since the run started; {_AGAIN}")
                for batch in table.to_batches():
                    for number, chunks in enumerate(columns if batch.num_rows else ()):
                        chunks.append(batch.column(number))
            starts = np.cumsum([0, *map(len, columns[0])])[:-1].tolist()
            self._chunks = (starts, columns)
        return self._chunks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None}


def _array(cell: Any, path: str, key: str) -> tuple[bytes, str]:
    """A row's array as a .npy file, and that ending."""
    if not cell.is_valid:
        raise SampleError("no array", path, key)
    try:
        return npy_bytes(cell), "npy"
    except ValueError as error:
        raise SampleError(f"no array: {error}", path, key) from error


def _file(cell: Any, path: str, key: str) -> tuple[bytes, str]:
    """A row's image file, and its name's end."""
    found = cell.as_py() or {}
    image, file = found.get("bytes"), found.get("path")
    if image is None:
        image = _read_file(file, path, key)
    if not image:
        raise SampleError("an empty image", path, key)
    return image, os.path.splitext(file or "")[1][1:].lower() or "bin"


def _read_file(file: str | None, path: str, key: str) -> bytes:
    """The image of a row that has none in it, but a path to a file below the data set.

    The rows may be anybody's, so what lies elsewhere is not read: it may be any file of the user's.
    """
    if file is None:
        raise SampleError("no image", path, key)
    if "://" in file:
        raise SampleError(f"no image, but the address {file.split('?')[0]}", path, key)
    root = os.path.realpath(path)
    try:
        found = os.path.realpath(os.path.join(root, file))
        if os.path.commonpath([root, found]) != root:
            raise SampleError(
                f"no image, but the path {file}, which leads out of the data set; save it again with its images in it "
                "(save_to_disk of a current version of `datasets` does)",
                path,
                key,
            )
        return again(lambda: read_bytes(Path(found), _IMAGE_BYTES))
    except SampleError:
        raise
    except (ConfigError, ValueError) as error:
        raise SampleError(f"its file {file} cannot be read: {error}", path, key) from error
    except OSError as error:
        gone = SampleError(f"its file {file} cannot be read: {error.strerror}", path, key)
        raise unreadable(error, file, gone) from error
