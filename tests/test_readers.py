"""Strict readers: each kind of bad JSON, file or header is one sentence, and what is whole reads as it is."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.checkpoints.safetensors_header import TensorEntry, read_tensor_header
from dspark_jax.errors import UserError
from dspark_jax.readers import (
    MAX_DEPTH,
    check_fields,
    either,
    flag,
    integer,
    list_of,
    number,
    object_of,
    one_of,
    optional,
    parse_json,
    read_bytes,
    read_object,
    read_records,
    text,
)

BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON, Expecting value at line 1 column 1"),
    "cut": (b'{"a": 1', "not JSON"),
    "two values": (b"{} {}", "not JSON, Extra data"),
    "comment": (b'{"a": 1} // one', "not JSON"),
    "control character": (b'"\x01"', "not JSON, Invalid control character"),
    "NaN": (b'{"a": NaN}', "found NaN, which JSON does not have"),
    "Infinity": (b"[-Infinity]", "found -Infinity"),
    "overflow": (b"[1e999]", "which no float64 holds"),
    "digits": (b"9" * 5000, "a whole number of 5000 digits"),
    "latin-1": ("{'é'}".encode("latin-1"), "byte 2 is not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "a byte order mark"),
    "surrogate": (rb'{"a": "\ud800"}', "half of a UTF-16 surrogate pair"),
    "surrogate name": (rb'{"\udc00": 1}', "half of a UTF-16 surrogate pair"),
    "twice": (b'{"a": 1, "b": 2, "a": 1}', 'the name "a" stands twice'),
    "deep": (b"[" * 70 + b"]" * 70, "nested deeper than 64 levels"),
    "very deep": (b"[" * 1_000_000 + b"]" * 1_000_000, "nested deeper than 64 levels"),
    "deep objects": (b'{"a":' * 500_000, "nested deeper than 64 levels"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_sentence(case: str) -> None:
    data, message = BAD_JSON[case]
    with pytest.raises(UserError, match=message) as refused:
        parse_json(data, "x.json")
    sentence = str(refused.value)
    assert sentence.startswith("x.json") and sentence.endswith(".") and "\n" not in sentence and len(sentence) < 300


def test_whole_json_reads_as_it_is() -> None:
    value = {"a": [1, 2.5, None, True, {"é": "\U0001f600"}], "b": {"c": ""}, "big": 10**30}
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x") is not None


def test_paths_that_cannot_be_read_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 101)
    (tmp_path / "list").write_text("[1, 2]")
    cases = {
        "missing": "does not exist; expected a JSON object there",
        "folder": "is a folder; expected",
        "loop": "cannot be read",
        "pipe": "is no regular file",
        "large": "has 101 bytes; expected a JSON object of at most 100",
        "x" * 300: "cannot be read",
        "a\0b": "cannot be read",
        "list": "holds a list of 2; expected a JSON object",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_object(tmp_path / name, limit=100)
    with pytest.raises(UserError, match="is no regular file"):
        read_bytes("/dev/zero")


def test_records_end_at_a_torn_line_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"ste')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: not JSON"):
        read_records(path)
    path.write_text("[]\n")
    with pytest.raises(UserError, match="line 1: found a list of 0; expected one JSON object a line"):
        read_records(path)


CHECKS: list[tuple[Any, list[Any], list[Any]]] = [
    (integer(1, 5), [1, 5], [0, 6, 2.0, True, "2", None, [1]]),
    (number(0, 1), [0, 1, 0.5], [-0.1, 1.1, True, None, "0", 10**400]),
    (number(above=0), [1e-300, 3], [0, -1]),
    (text(), ["", "a"], [1, None, ["a"]]),
    (text(empty=False), ["a"], [""]),
    (flag(), [True, False], [0, 1, None, "true"]),
    (one_of(1, "a"), [1, "a"], [True, 1.0, "b"]),
    (list_of(integer(), least=1, most=2), [[1], [1, 2]], [[], [1, 2, 3], [None], 1, {"a": 1}]),
    (object_of(integer()), [{}, {"a": 1}], [[], {"a": "1"}]),
    (either(integer(), list_of(integer())), [1, [1]], ["1", ["1"]]),
    (optional(flag()), [None, True], [0]),
]


@pytest.mark.parametrize("case", range(len(CHECKS)))
def test_types_and_ranges(case: int) -> None:
    check, good, bad = CHECKS[case]
    for value in good:
        check_fields({"f": value}, {"f": check}, "x.json")
    for value in bad:
        with pytest.raises(UserError, match=r"x\.json has f = .*; expected .*; correct the file or copy it again\."):
            check_fields({"f": value}, {"f": check}, "x.json")
    with pytest.raises(UserError, match="x.json has no field 'f'; expected"):
        check_fields({}, {"f": check}, "x.json", required=("f",))


def tensors_file(path: Path, header: Any, data: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "list": ([], b"", "its header is a list of 0"),
    "not JSON": (b"{]", b"", "its header: not JSON"),
    "NaN": (b'{"a": NaN}', b"", "found NaN"),
    "tensor list": ({"a": []}, b"", "is a list of 0; expected an object"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, b"", "has no field 'dtype'"),
    "dtype": ({"a": ENTRY | {"dtype": "F33"}}, b"x" * 8, 'dtype = "F33"; expected one of'),
    "negative": ({"a": ENTRY | {"shape": [-2]}}, b"x" * 8, r"shape = \[-2\]"),
    "size": ({"a": ENTRY | {"shape": [3]}}, b"x" * 8, "8 bytes, and F32 .3. takes 12"),
    "huge": ({"a": ENTRY | {"shape": [2**40, 2**40]}}, b"x" * 8, "takes"),
    "overlap": ({"a": ENTRY, "b": ENTRY}, b"x" * 8, "a gap or an overlap"),
    "short": ({"a": ENTRY}, b"x" * 7, "not a whole safetensors file"),
    "long": ({"a": ENTRY}, b"x" * 9, "not a whole safetensors file"),
    "twice": (b'{"a": {}, "a": {}}', b"", 'the name "a" stands twice'),
    "deep": (b'{"a":' * 1000 + b"1" + b"}" * 1000, b"", "nested deeper"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_tensor_headers_are_sentences(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    with pytest.raises(UserError, match=message):
        read_tensor_header(tensors_file(tmp_path / "m.safetensors", header, data))


def test_a_header_that_never_ends_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length, size in ((2**63, 100), (2**40, 100), (90, 20), (200_000_000, 0)):
        with open(path, "wb") as handle:
            handle.write(struct.pack("<Q", length))
            handle.truncate(8 + (size or 300_000_000))
        with pytest.raises(UserError, match="not a whole safetensors file: its .* bytes announce a header"):
            read_tensor_header(path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(UserError, match="no regular file"):
        read_tensor_header(path)


def test_headers_read_as_the_library_writes_them(tmp_path: Path) -> None:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int8), "c": np.ones((), np.float16)}
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = read_tensor_header(tmp_path / "m.safetensors")
    # The library writes wide types first, so that each tensor is aligned.
    wanted = {"a": TensorEntry("F32", (2, 3), 0), "c": TensorEntry("F16", (), 24), "b": TensorEntry("I8", (4,), 26)}
    assert found == wanted
