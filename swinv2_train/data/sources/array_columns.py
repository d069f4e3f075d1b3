"""A saved data set's column of arrays (Array2D, Array3D of `datasets`): lists, each row as a .npy file.

From there on they are what a .npy file is: shapes, types and layouts have one reader (transforms/numpy_files.py).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from swinv2_train.data.transforms.numpy_files import ELEMENT_TYPES

ARRAYS = {"Array2D": 2, "Array3D": 3}
"""Types of such columns, and how deep their lists are."""
_ARROW_NAMES = {"halffloat": "float16", "float": "float32"}


def is_array(feature: Mapping[str, Any]) -> bool:
    """Whether a column, as dataset_info.json has it, is one of images as arrays."""
    return feature.get("_type") in ARRAYS


def plain_lists(table: Any, column: str) -> Any:
    """The table with the column as the lists that it is, in a process that has imported `datasets` too."""
    from pyarrow import BaseExtensionType, chunked_array

    place = table.schema.get_field_index(column)
    if place < 0 or not isinstance(kind := table.schema.field(place).type, BaseExtensionType):
        return table
    chunks = [chunk.storage for chunk in table.column(place).chunks]
    return table.set_column(place, column, chunked_array(chunks, kind.storage_type))


def array_type(kind: Any) -> tuple[int, str] | None:
    """How deep an Arrow type's lists are, and NumPy's name of what is in them; None for what is no array."""
    from pyarrow import types

    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return (depth, _ARROW_NAMES.get(str(kind), str(kind))) if depth in ARRAYS.values() else None


def array_fault(kind: Any) -> str | None:
    """What is wrong with a column of this Arrow type; None where its arrays are read."""
    found = array_type(kind)
    if found is None:
        return f"is {kind}, no array of two or three sides; save it again"
    if found[1] not in ELEMENT_TYPES:
        return f"holds {found[1]}, not one of {', '.join(ELEMENT_TYPES)}; cast it to one of them and save it again"
    return None


def npy_bytes(cell: Any) -> bytes:
    """A cell's array as a .npy file.  Raises ValueError where it is ragged, or something is missing in it."""
    values, sides = cell.values, [len(cell.values)]
    while hasattr(values, "value_lengths"):
        lengths = set(values.value_lengths().to_pylist())
        if len(lengths) != 1:
            raise ValueError(f"its lists have {len(lengths)} lengths, not one")
        sides.append(lengths.pop())
        values = values.flatten()
    if None in sides or values.null_count:
        raise ValueError("some of its values are missing; write NaN or another number in their place, and data.nodata")
    buffer = io.BytesIO()
    np.save(buffer, values.to_numpy(zero_copy_only=False).reshape(sides))
    return buffer.getvalue()
