"""Where prompts come from: files in every form, hub datasets, the held-out split, repetitions, rows set aside."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dspark_jax.data.conversations import BadRow, file_rows, hub_rows, parse_rows, read_conversations
from dspark_jax.data.jsonl import read_lines
from dspark_jax.datagen.regeneration import Rejected, Source
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.datagen.sources import prompts_sha256, read_sources
from dspark_jax.errors import UserError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
# The columns of Open-PerfectBlend.
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "source": "blend"},
    {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Sum?"}], "source": "x"},
]
EXPECTED = [MESSAGES, [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sum?"}]]


def settings(**options: Any) -> PrepareSettings:
    return PrepareSettings(**{"output": Path("out.jsonl"), "target": "t"} | options)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def sources_of(**options: Any) -> tuple[list[Source], list[Rejected]]:
    return read_sources(settings(**options))


@pytest.mark.parametrize("form", ["jsonl", "json", "lines.json", "parquet"])
def test_the_same_rows_in_every_form_of_file(form: str, tmp_path: Path):
    path = tmp_path / f"blend.{form}"
    if form == "parquet":
        write_parquet(path, SHAREGPT)
    elif form == "json":
        path.write_text(json.dumps(SHAREGPT))
    else:
        write_jsonl(path, SHAREGPT)
    found = list(read_conversations(path))
    assert [r.messages for r in found] == EXPECTED
    assert [(r.id, r.extra) for r in found] == [("0", {"source": "blend"}), ("1", {"source": "x"})]
    unit = {"json": "item", "parquet": "row"}.get(form, "line")
    assert [r.where for r in found] == [f"{path} {unit} 1", f"{path} {unit} 2"]


def test_fields_that_are_null_in_a_column_were_absent(tmp_path: Path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    rows = [{"messages": [MESSAGES[0], call], "note": None}, {"messages": MESSAGES, "note": "n"}]
    found = list(read_conversations(write_parquet(tmp_path / "a.parquet", rows)))
    assert found[0].messages[1]["tool_calls"] == [{"name": "f"}] and found[0].extra == {}
    assert found[1].messages == MESSAGES and found[1].extra == {"note": "n"}


def test_a_dataset_in_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "blend" / "data"
    data.mkdir(parents=True)
    write_parquet(data / "train-00000-of-00001.parquet", SHAREGPT)
    write_parquet(data / "test-00000-of-00001.parquet", SHAREGPT[:1])
    folder = str(tmp_path / "blend")
    found = list(parse_rows(hub_rows(folder, "train")))
    assert [r.messages for r in found] == EXPECTED and found[1].where == f"{folder} train row 2"
    sources, refused = sources_of(dataset=folder, dataset_split="test")
    assert [s.segments for s in sources] == [((MESSAGES[0],),)] and not refused
    with pytest.raises(UserError, match=r"No dataset could be loaded from .*blend \(split 'valid'\).*valid"):
        hub_rows(folder, "valid")
    with pytest.raises(UserError, match="No dataset could be loaded from .*absent"):
        hub_rows(str(tmp_path / "absent"), "train")


def test_files_that_are_not_what_their_names_say(tmp_path: Path):
    whole = write_parquet(tmp_path / "a.parquet", SHAREGPT).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a.parquet cannot be read as Parquet .* expected a whole Parquet file"):
        list(file_rows(tmp_path / "a.parquet"))
    for name in ("none.parquet", "none.json", "none.jsonl"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            list(file_rows(tmp_path / name))
    (tmp_path / "a.json").write_text('[{"messages": [}]')
    with pytest.raises(UserError, match="a.json line 1: not JSON.* expected one JSON object"):
        list(read_conversations(tmp_path / "a.json"))


def test_bad_rows_stop_or_are_set_aside_with_their_place(tmp_path: Path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"id": "a", "messages": MESSAGES}, {"id": "a", "messages": []}, {"text": "x"}, {"messages": EXPECTED[1]}]
    write_jsonl(path, rows)
    path.write_text(path.read_text().replace('{"text"', '{"text'))
    bad = [r for r in parse_rows(file_rows(path)) if isinstance(r, BadRow)]
    assert [(r.id, r.where) for r in bad] == [("a#1", f"{path} line 2"), ("2", f"{path} line 3")]
    with pytest.raises(UserError, match="mixed.jsonl line 2: the id 'a' was used on an earlier line"):
        sources_of(prompts=(path,))
    sources, refused = sources_of(prompts=(path,), bad_rows="set-aside")
    assert [(s.index, s.id) for s in sources] == [(0, "a"), (3, "3")]
    assert [r.source.index for r in refused] == [1, 2] and "line 3: not JSON" in refused[1].reason


def test_repeated_prompts_are_set_aside(tmp_path: Path):
    again = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Another answer."}]
    longer = [*MESSAGES, {"role": "user", "content": "And?"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": m} for m in (MESSAGES, again, longer, EXPECTED[1])])
    sources, refused = sources_of(prompts=(path,))
    assert [s.id for s in sources] == ["0", "2", "3"]
    assert [(r.source.id, r.reason) for r in refused] == [("1", f"its prompts are those of {path} line 1.")]
    assert len(sources_of(prompts=(path,), dedup=False)[0]) == 4


def test_the_held_out_split_follows_the_first_prompt_alone(tmp_path: Path):
    conversations = [[{"role": "user", "content": f"Question {i}?"}] for i in range(200)]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": m} for m in conversations])
    taken = {
        split: {s.id for s in sources_of(prompts=(path,), split=split, heldout=0.2)[0]}
        for split in ("train", "heldout")
    }
    assert not taken["train"] & taken["heldout"] and len(taken["train"] | taken["heldout"]) == 200
    assert 20 < len(taken["heldout"]) < 60
    longer = [[*m, {"role": "assistant", "content": ""}, {"role": "user", "content": "Go on."}] for m in conversations]
    turned = write_jsonl(tmp_path / "q.jsonl", [{"messages": m} for m in longer[::-1]])
    heldout = sources_of(prompts=(turned,), split="heldout", heldout=0.2)[0]
    assert {str(199 - int(s.id)) for s in heldout} == taken["heldout"]
    limited = sources_of(prompts=(path,), split="heldout", heldout=0.2, limit=3)[0]
    assert [s.id for s in limited] == sorted(taken["heldout"], key=int)[:3]


def test_the_hash_of_prompts_sees_what_was_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES}])
    sources, refused = sources_of(prompts=(path,))
    assert prompts_sha256([*sources, *(r.source for r in refused)]) != prompts_sha256(sources)
    assert settings(prompts=(path,)).recorded() != settings(prompts=(path,), dedup=False).recorded()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"server": "http://x"}, "Say who answers in one way"),
        ({"target": ""}, "Say who answers in one way"),
        ({"target": "", "server": "http://x"}, "--server needs --server-model"),
        ({"dataset": "a/b", "embedded_prompts": "code"}, "Give the prompts in one way"),
        ({"split": "heldout"}, "--split heldout needs --heldout"),
        ({"heldout": 1.0}, r"--heldout in \[0, 1\)"),
        ({"server_extra": "[1]"}, "--server-extra is '.1.'; a JSON object"),
        ({"server_attempts": 0}, "--server-attempts is 0; at least 1"),
    ],
)
def test_options_that_contradict(options: dict, said: str):
    given = {"prompts": (Path("p.jsonl"),)} if "dataset" not in options else {}
    with pytest.raises(UserError, match=said):
        settings(**given | options)


def test_what_tables_hold_beside_text_is_json(tmp_path: Path):
    """NaN, which pandas writes for a field that a row lacks, is none; an empty id is none either."""
    rows = [{"id": "", "score": float("nan"), "deep": {"a": [float("inf"), 1.0]}, **row} for row in SHAREGPT]
    found = list(read_conversations(write_parquet(tmp_path / "a.parquet", rows)))
    assert [record.id for record in found] == [str(i) for i in range(len(rows))]
    assert all("score" not in record.extra and record.extra["deep"] == {"a": [None, 1.0]} for record in found)

    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"messages": broken}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        list(read_conversations(tmp_path / "b.parquet"))


def test_a_line_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dspark_jax.data.jsonl.MAX_JSON_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": []}\n' + b"[" * 5000)
    with pytest.raises(UserError, match="a.jsonl line 2 has more than 1,000 bytes"):
        list(read_lines(tmp_path / "a.jsonl"))
