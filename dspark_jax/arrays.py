"""A strict reader of the arrays in an .npz file."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dspark_jax.errors import UserError
from dspark_jax.readers import read_bytes

MAX_ARRAYS_BYTES = 4 << 30


def read_arrays(path: Path, layouts: Mapping[str, tuple[str, int]], expected: str) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file.

    Args:
        path: a regular file as `np.savez` writes it; pickled objects are refused.
        layouts: (dtype, number of axes) of each array that the file must hold; others are left unread.
        expected: the kind of file, for a sentence.
    Raises:
        UserError: the file is missing, unreadable or damaged, or an array is absent or of another dtype or rank.
    """
    data = read_bytes(path, limit=MAX_ARRAYS_BYTES, expected=expected)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as content:
            arrays = {name: content[name] for name in layouts if name in content}
    except Exception as error:  # zip directory, compression, headers: a damaged file can raise anything in its reader
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); expected {expected}; copy the file again.") from None

    for name, (dtype, axes) in layouts.items():
        if name not in arrays:
            raise UserError(f"{path} has no array {name!r}; expected {expected}; copy the file again.")
        if (arrays[name].dtype, arrays[name].ndim) != (np.dtype(dtype), axes):
            raise UserError(
                f"{path} holds {name} as {arrays[name].dtype} of {arrays[name].ndim} axes; expected {dtype} of {axes}; "
                "copy the file again."
            )
    return arrays
