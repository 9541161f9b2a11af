"""Damages files of every kind that is read from outside, and reads them: a whole value or one sentence, nothing else.

    python -m tests.fuzz_readers --examples 2000          every kind of file, 2000 damages each
    python -m tests.fuzz_readers --kinds drafter-config sps.json

Damages are bytes that are flipped, cut, inserted or replaced, and values of the JSON tree that are replaced, dropped,
doubled or nested. Prints a table, and the damage that was neither read nor refused in a sentence.
"""

import argparse
import json
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from configs.debug import get_config
from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target, load_tokenizer
from dspark_jax.checkpoints.layouts import LAYOUTS
from dspark_jax.checkpoints.safetensors_header import read_tensor_header
from dspark_jax.checkpoints.serving_tables import (
    SpsAdditiveTable,
    SpsTable,
    StsTable,
    read_sps,
    read_sts,
    write_sps,
)
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.checkpoints.tensors import TensorFolder
from dspark_jax.data.chat import encode_conversation, encode_prompt
from dspark_jax.data.conversations import read_conversations, read_prompt_records
from dspark_jax.data.pipeline import open_cache
from dspark_jax.datagen.client import UnansweredError, read_answer
from dspark_jax.errors import UserError
from dspark_jax.files import require_same_settings, weights_hash, write_settings
from dspark_jax.readers import read_records
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.temperatures import read_calibration, write_calibration
from dspark_jax.training.run_folder import (
    require_built_with,
    require_same_inputs,
    require_same_run,
    write_config,
    write_inputs,
)
from tests.drafters_tiny import write_pair
from tests.families_tiny import FAMILIES
from tests.kill_cache import write_cache

DEEPSPEC_CACHE = Path(__file__).parent / "data" / "target_cache" / "cache"


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it is, and what reads it. `tensors`: a safetensors file, whose header is the JSON."""

    name: str
    path: Path
    read: Callable[[], Any]
    tensors: bool = False


def kinds_of_files(folder: Path) -> list[Kind]:
    """Whole files of every kind below an empty folder."""
    target, drafter = write_pair(folder / "target")
    made = [
        Kind("target-config", folder / "target/config.json", lambda: describe_target(folder / "target")),
        Kind("generation-config", folder / "target/generation_config.json", lambda: describe_target(folder / "target")),
        Kind("tokenizer-config", folder / "target/tokenizer_config.json", lambda: load_tokenizer(folder / "target")),
        Kind("tokenizer", folder / "target/tokenizer.json", lambda: load_tokenizer(folder / "target")),
        Kind("target-weights", folder / "target/model.safetensors",
             lambda: load_target(folder / "target", tokenizer=False), tensors=True),
    ]  # fmt: skip
    for name, config in FAMILIES.items():
        path = folder / name / "config.json"
        write_json(path, config)
        made.append(Kind(f"{name}-config", path, lambda path=path: describe_target(path.parent)))

    header = read_tensor_header(folder / "target/model.safetensors")
    index = folder / "indexed/model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")})
    (folder / "indexed/model.safetensors").write_bytes((folder / "target/model.safetensors").read_bytes())
    made.append(Kind("weights-index", index, lambda: TensorFolder(index.parent)))

    for layout in LAYOUTS:
        at = folder / layout
        save_drafter(at, drafter, target, layout=layout)
        load = lambda at=at: load_drafter(at, target)  # noqa: E731
        made += [Kind(f"{layout}-{file}", at / file, load) for file in ("config.json", "dspark.json")]
        made.append(Kind(f"{layout}-weights", at / "model.safetensors", load, tensors=True))
    return made + _tables(folder) + _records(folder) + _chats(folder)


def _tables(folder: Path) -> list[Kind]:
    """The files that a server or a loop reads beside a drafter."""
    sts, sps, additive, profile = (folder / name for name in ("sts.json", "sps.json", "additive.json", "profile.json"))
    valid = {"target": "a", "target_name": "b", "temperature": 1.0}
    write_calibration(sts, StsTable((1.0, 2.0), "x", 3, (0.1, 0.2), (0.1, 0.2)), valid)
    write_sps(sps, SpsTable((1, 2), (10.0, 5.0), 4))
    write_sps(additive, SpsAdditiveTable(0.1, (1, 2), (0.1, 0.2), (1, 2), (0.1, 0.3)))
    grid, line = ((0.1, 0.2), (0.2, 0.3)), (0.1, 0.2)
    Profile({"device": "cpu"}, (1, 2), (3.0, 4.0), grid, grid, line, line, line, line, 0.1).save(profile)
    return [
        Kind("sts.json", sts, lambda: (read_sts(sts), read_calibration(sts, valid))),
        Kind("sps.json", sps, lambda: read_sps(sps)),
        Kind("additive-sps.json", additive, lambda: read_sps(additive)),
        Kind("profile", profile, lambda: Profile.read(profile).cost_table()),
    ]


def _records(folder: Path) -> list[Kind]:
    """Caches, settings and records."""
    write_cache(folder / "cache")
    deepspec = folder / "deepspec_cache"
    deepspec.mkdir()
    for file in DEEPSPEC_CACHE.iterdir():
        (deepspec / file.name).write_bytes(file.read_bytes())
    chosen, records = folder / "settings.json", folder / "metrics.jsonl"
    write_settings(chosen, {"seed": 1, "names": ["a"]})
    records.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
    run = folder / "run"
    write_config(run, get_config())
    write_inputs(run, {"target weights": "a"})
    build = folder / "built" / "build.json"
    write_settings(build, {"weights_xxh3": weights_hash(folder / "target")})
    return [
        Kind("run-config", run / "config.json", lambda: require_same_run(run, get_config())),
        Kind("run-inputs", run / "inputs.json", lambda: require_same_inputs(run, {"target weights": "a"})),
        Kind("cache-settings", build, lambda: require_built_with(build.parent, folder / "target")),
        Kind("cache-manifest", folder / "cache/manifest.json", lambda: open_cache(folder / "cache")),
        Kind("deepspec-manifest", deepspec / "manifest.json", lambda: open_cache(deepspec)),
        Kind("settings", chosen, lambda: require_same_settings(chosen, {"seed": 1, "names": ["a"]}, folder)),
        Kind("metrics.jsonl", records, lambda: read_records(records)),
    ]


def _chats(folder: Path) -> list[Kind]:
    """Conversations as programs read them and write them on, and what a server answers."""
    tokenizer = load_tokenizer(folder / "target")
    files = {name: folder / f"chats/{name}" for name in ("talks.jsonl", "talks.json", "sharegpt.jsonl", "turns.jsonl")}
    said = [
        {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello."), ("user", "So?"))
    ]
    talks = [{"id": str(i), "domain": "d", "messages": said} for i in range(2)]
    turned = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}] * 2
    (folder / "chats").mkdir()
    for name, rows in (
        ("talks.jsonl", talks),
        ("sharegpt.jsonl", turned),
        ("turns.jsonl", [{"turns": ["a", "b"]}] * 2),
    ):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["talks.json"].write_text(json.dumps(talks))
    reply, choice = folder / "chats/reply.json", {"message": {"content": "Hello."}, "finish_reason": "stop"}
    reply.write_text(json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}))

    def encode(path: Path) -> None:
        for record in read_conversations(path):
            encode_conversation(tokenizer, record.messages)
            json.dumps({"id": record.id, **record.extra}, ensure_ascii=False).encode()

    def prompts() -> None:
        for record in read_prompt_records(files["turns.jsonl"]):
            encode_prompt(tokenizer, record.segments()[0])

    def answer() -> None:
        try:
            read_answer(reply.read_bytes())
        except UnansweredError as error:
            raise UserError(f"{error}.") from error

    templated = folder / "templated/tokenizer_config.json"
    template = (folder / "target/chat_template.jinja").read_text()
    write_json(
        templated, json.loads((folder / "target/tokenizer_config.json").read_text()) | {"chat_template": template}
    )
    (templated.parent / "tokenizer.json").write_bytes((folder / "target/tokenizer.json").read_bytes())

    known = ("talks.jsonl", "talks.json", "sharegpt.jsonl")
    made = [Kind(name, files[name], lambda name=name: encode(files[name])) for name in known]
    made += [Kind("turns.jsonl", files["turns.jsonl"], prompts), Kind("reply.json", reply, answer)]
    chat = lambda: encode_conversation(load_tokenizer(templated.parent), said)  # noqa: E731
    return [*made, Kind("chat-template", templated, chat)]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# ---- damages

ODD = [None, True, -1, 0, 1, 2, 0.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "1", "x\0", "\ud800",
       "../x", "/etc/passwd", [], [[]], {}, {"": None}, ["a", 1], [-1], "é" * 3]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.one_of(
    st.sampled_from(ODD),
    LEAVES,
    st.lists(LEAVES, max_size=4),
    st.dictionaries(st.text(max_size=6), LEAVES | st.lists(LEAVES, max_size=3), max_size=3),
)
BYTES = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "replace", "drop"]), st.floats(0, 1), st.integers(1, 255),
    st.binary(min_size=1, max_size=12),
)  # fmt: skip
TREES = st.tuples(
    st.sampled_from(["value", "value", "value", "drop", "rename", "nest", "double", "root"]),
    st.integers(0, 10**6),
    VALUES,
)
DAMAGES = st.one_of(st.tuples(st.just("bytes"), BYTES), st.tuples(st.just("tree"), TREES))


def damaged(whole: bytes, damage: tuple[str, Any], tensors: bool) -> bytes:
    kind, how = damage
    if kind == "bytes":
        return _damaged_bytes(whole, *how)
    if not tensors:
        lines = whole.split(b"\n")
        if len(lines) > 2 and lines[0].startswith(b"{") and lines[0].endswith(b"}"):  # JSON lines
            return b"\n".join([_damaged_tree(lines[0], *how), *lines[1:]])
        return _damaged_tree(whole, *how)
    length = struct.unpack("<Q", whole[:8])[0]
    header = _damaged_tree(whole[8 : 8 + length], *how)
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def _damaged_bytes(whole: bytes, how: str, where: float, mask: int, extra: bytes) -> bytes:
    at = int(where * (len(whole) - 1))
    if how == "flip":
        return whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
    if how == "cut":
        return whole[:at]
    if how == "insert":
        return whole[:at] + extra + whole[at:]
    return extra if how == "replace" else whole[:at] + whole[at + len(extra) :]


def _damaged_tree(whole: bytes, how: str, choice: int, value: Any) -> bytes:
    tree = json.loads(whole)
    places = list(_places(tree))
    if how == "root" or not places:
        return _encoded(value)
    parent, key = places[choice % len(places)]
    if how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[str(value)[:10]] = parent.pop(key)
    elif how == "nest":
        for _ in range(choice % 100):
            parent[key] = [parent[key]]
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent[key] = value
    return _encoded(tree)


def _places(tree: Any) -> Any:
    """(container, key) of every value below the root."""
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _places(value)


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


# ---- trials


def attempt(kind: Kind, damage: tuple[str, Any]) -> str:
    """ "read" or "refused"; anything else than a sentence is an AssertionError that shows the damage."""
    whole = kind.path.read_bytes()
    content = damaged(whole, damage, kind.tensors)
    try:
        kind.path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read()
        return "read"
    except UserError as error:
        sentence = str(error)
        assert sentence.endswith((".", "?")) and len(sentence) < 2000, (kind.name, damage, sentence)
        assert "\n" not in sentence, (kind.name, damage, sentence)
        return "refused"
    except Exception as error:
        raise AssertionError(f"{kind.name}, {damage}: {type(error).__name__}: {error}") from error
    finally:
        kind.path.write_bytes(whole)


def trial(kind: Kind, examples: int, seconds: float = float("inf")) -> Counter[str]:
    """Outcomes of at most `examples` damages, begun within `seconds`; AssertionError with the smallest one that is
    neither read nor refused."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(DAMAGES)
    def run(damage: tuple[str, Any]) -> None:
        if time.monotonic() < end:
            outcomes[attempt(kind, damage)] += 1

    run()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--kinds", nargs="*", help="names of kinds; all by default")
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds_of_files(Path(scratch)):
            if options.kinds and kind.name not in options.kinds:
                continue
            start = time.monotonic()
            try:
                found = trial(kind, options.examples)
                counts = f"{found['read']:6d} read {found['refused']:6d} refused"
            except AssertionError as error:
                failures += 1
                counts = f"FAIL {error}"
            print(f"{kind.name:28s} {counts}  {time.monotonic() - start:6.1f} s", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
