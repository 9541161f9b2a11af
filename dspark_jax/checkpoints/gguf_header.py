"""Bounds of a GGUF file's header, checked before the gguf package reads it.

The package believes the counts that a file announces: an array of 2**60 numbers in a file of a kilobyte is a loop that
has no end, and arrays within arrays exhaust the stack. This walk reads lengths only.
"""

import mmap
import struct
from pathlib import Path

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Size by the format's number of a type; 8 is text, 9 an array."""
TEXT, ARRAY = 8, 9
MOST_ENTRIES = 100_000
"""Limit of the entries of metadata, and of those of tensors."""
MOST_ITEMS = 8_000_000
"""Limit of the items of all arrays together; the largest tokenizers have half a million merges."""
MOST_DEPTH = 4
MOST_AXES = 16


def check_header(file: Path) -> None:
    """Walks through a GGUF file's metadata and tensor descriptions.

    Raises:
        ValueError: no GGUF file, a count beyond the bounds, or one beyond the file's end.
        OSError: the file can't be read.
    """
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).run()


class _Walk:
    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.items = data, 8, 0
        if len(data) < 8 or data[:4] != b"GGUF":
            raise ValueError("GGUF magic invalid")
        # The version is small, so its low half is zero only where the other byte order wrote it.
        self.order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"

    def run(self) -> None:
        # In this order by the format; both before anything else is walked, since they bound the loops.
        tensors, entries = self.number("Q"), self.number("Q")
        if max(tensors, entries) > MOST_ENTRIES:
            raise ValueError(f"it announces {tensors:,} tensors and {entries:,} fields")

        for _ in range(entries):
            self.skip(self.number("Q"))  # the key
            self.value(self.number("I"), depth=0)

        for _ in range(tensors):
            self.skip(self.number("Q"))  # the name
            axes = self.number("I")
            if axes > MOST_AXES:
                raise ValueError(f"it announces a tensor of {axes:,} axes")
            self.skip(8 * axes + 4 + 8)  # the shape, the type, the offset

    def value(self, kind: int, depth: int) -> None:
        """Passes over one value of a type."""
        if kind == TEXT:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            # Items of all arrays are added up: many small arrays cost as much as a large one.
            inner, count = self.number("I"), self.number("Q")
            self.items += count
            if depth == MOST_DEPTH or self.items > MOST_ITEMS:
                raise ValueError(f"it announces an array of {count:,} items at byte {self.at:,}, depth {depth}")
            if inner in SCALAR_BYTES:
                self.skip(count * SCALAR_BYTES[inner])
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind])
        else:
            raise ValueError(f"it has a value of type {kind}, which the format does not have")

    def number(self, form: str) -> int:
        """The unsigned number here, of a struct format."""
        # Skipped first, so that a number across the file's end is refused like any other content.
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(self.order + form, self.data, start)[0])

    def skip(self, count: int) -> None:
        # Against what is left, not by adding to `at`: a count near 2**64 must not pass.
        if count > len(self.data) - self.at:
            raise ValueError(f"{count:,} bytes are announced at byte {self.at:,} of {len(self.data):,}")
        self.at += count
