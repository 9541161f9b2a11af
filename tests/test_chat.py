"""Chat templates, loss masks, conversations in JSONL."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.data.chat import encode_conversation, encode_prompt
from dspark_jax.data.conversations import parse_conversation, read_conversations
from dspark_jax.data.deepspec_chat import DEEPSPEC_FORMATS
from dspark_jax.data.jsonl import ResumableJsonl
from dspark_jax.data.tokenizers import load_tokenizer, tokenizer_hash
from dspark_jax.errors import UserError
from tests.golden_data import check_chat

CASE = Path(__file__).parent / "data" / "chat_template"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(CASE / "tokenizer_qwen")


def test_golden_case():
    results = list(check_chat(CASE))
    assert len(results) > 80
    assert [r for r in results if not r[3]] == []


def test_deepspec_spans_end_at_the_text_when_the_marker_is_missing():
    for form in DEEPSPEC_FORMATS.values():
        text = f"{form.assistant_header}{form.answer_prefix}one{form.end_of_turn}{form.assistant_header}two"
        assert [text[a:b] for a, b in form.loss_spans(text)] == [f"one{form.end_of_turn}", "two"]


def test_deepspec_adds_the_gemma_prefix_once_and_never_supervises_it():
    tokenizer, form = load_tokenizer(CASE / "tokenizer_gemma4"), DEEPSPEC_FORMATS["gemma4"]
    prefixed = [TURNS[0], {"role": "assistant", "content": form.answer_prefix + "Hello there."}]
    plain, given = (form.encode(tokenizer, turns) for turns in (TURNS, prefixed))
    np.testing.assert_array_equal(plain.input_ids, given.input_ids)
    np.testing.assert_array_equal(plain.loss_mask, given.loss_mask)
    assert form.render(tokenizer, TURNS).count(form.answer_prefix) == 1


def test_nothing_is_inserted_and_the_loss_ends_with_the_marker(qwen):
    """Where DeepSpec's parser puts a system message in front and supervises the newline after the marker."""
    (row,) = encode_conversation(qwen, TURNS)
    assert "system" not in qwen.decode(row.input_ids.tolist())
    assert qwen.decode(row.input_ids[row.loss_mask == 1].tolist()) == "Hello there.<|im_end|>"
    assert DEEPSPEC_FORMATS["qwen"].render(qwen, TURNS).startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_truncation_keeps_a_partial_mask(qwen):
    (whole,) = encode_conversation(qwen, TURNS)
    first = int(np.argmax(whole.loss_mask))
    (cut,) = encode_conversation(qwen, TURNS, max_length=first + 2)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[: first + 2])
    assert cut.loss_tokens == 2
    assert encode_conversation(qwen, TURNS, max_length=first)[0].loss_tokens == 0


def test_tokenizer_hash_is_of_the_content(qwen, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(CASE / "tokenizer_qwen", copy)
    before = tokenizer_hash(copy)
    qwen("a long text " * 9, truncation=True, max_length=4, padding="max_length")
    assert before == tokenizer_hash(qwen) == tokenizer_hash(str(CASE / "tokenizer_qwen"))
    changed = json.loads((copy / "tokenizer.json").read_text())
    changed["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(changed))
    assert tokenizer_hash(copy) != before != tokenizer_hash(CASE / "tokenizer_gemma4")


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "no turns"),
        ([TURNS[1]], "expected 'user'"),
        ([{"role": "user"}], "content None"),
        ([{"role": "user", "content": "a\udc00"}], "Turn 0 .* surrogate"),
        ([{"role": "wizard", "content": "a"}], "has the role 'wizard', expected one of system, developer, user"),
        ([{"role": ["user"], "content": "a"}], "expected an object with a role"),
        (["Hi"], "Turn 0 .* is 'Hi', expected an object"),
        ("Hi", "expected a list"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only text"),
    ],
)
def test_bad_conversations_are_named(qwen, turns, words):
    with pytest.raises(UserError, match=words):
        encode_conversation(qwen, turns)


def test_bad_tokenizers(qwen, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copytree(CASE / "tokenizer_qwen", tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(load_tokenizer(tmp_path / "t"), TURNS[:1])
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles user: roles must alternate"):
        encode_prompt(load_tokenizer(tmp_path / "t"), TURNS[:1])


def test_a_truncated_answer_does_not_learn_to_end(qwen):
    first = [*TURNS, {"role": "user", "content": "And then?"}]
    whole, cut = ({"role": "assistant", "content": "The sum"} | more for more in ({}, {"truncated": True}))
    ended, broken = (encode_conversation(qwen, [*first, turn])[-1] for turn in (whole, cut))
    assert ended.input_ids[:-1].tolist() == broken.input_ids.tolist()
    learnt = [qwen.decode(row.input_ids[row.loss_mask > 0].tolist()) for row in (ended, broken)]
    assert learnt == ["The sum<|im_end|>", "The sum"]
    with pytest.raises(UserError, match="Turn 1 .* is marked as truncated, but others follow"):
        encode_conversation(qwen, [TURNS[0], cut, *first])


def test_conversation_layouts_mean_the_same(tmp_path):
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there."}]
    records = [{"messages": TURNS}, {"conversations": TURNS}, {"conversations": sharegpt, "id": "x", "domain": "chat"}]
    path = tmp_path / "c.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in records))
    found = list(read_conversations(path))
    assert [r.messages for r in found] == [TURNS] * 3
    assert [(r.id, r.where) for r in found] == [(i, f"{path} line {n}") for i, n in (("0", 1), ("1", 3), ("x", 5))]
    assert found[2].extra == {"domain": "chat"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', "line 2: not JSON"),
        ('{"text": "a"}', "line 2: found 'text'"),
        ('{"messages": []}', "line 2: 'messages' is a list of 0"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2, turn 0: found role text and content the number 3"),
        ('{"messages": [{"from": "alien", "value": "x"}]}', "line 2, turn 0: found 'from' 'alien'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: .*surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}], "id": "\\udfff"}', "line 2: .*surrogate"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "line 2, turn 0: found the role 'wizard', expected one"),
        ('{"messages": [{"from": ["human"], "value": "x"}]}', "line 2, turn 0: found 'from' .'human'."),
        ('{"messages": ' + "[" * 200 + "]" * 200 + "}", "line 2: nested deeper than 64"),
        ("[" * 200_000, "line 2: nested deeper than 64"),
        ('{"messages": 1' + "0" * 5000 + "}", "line 2: found a whole number of 5001 digits"),
        ('{"turns": ["a"]}', "line 2: found 'turns', expected the field 'messages'"),
        ('{"id": "0", "messages": [{"role": "user", "content": "x"}]}', "line 2: the id '0' was used"),
        ("[1]", "line 2: found a list of 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=words):
        list(read_conversations(path))


def test_missing_file_and_bad_utf8(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: byte 14 is not UTF-8"):
        list(read_conversations(tmp_path / "b.jsonl"))


def test_tool_calls_as_text_are_parsed():
    turn = {"role": "assistant", "content": "", "tool_calls": '[{"name": "f"}]'}
    assert parse_conversation({"messages": [turn]})[0]["tool_calls"] == [{"name": "f"}]


def test_jsonl_torn_at_every_byte_is_resumed(tmp_path):
    rows = [{"id": str(k), "text": "é" * k} for k in range(4)]
    path = tmp_path / "out.jsonl"
    with ResumableJsonl(path) as out:
        out.append(rows)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with ResumableJsonl(path) as out:
            assert out.finished == {str(k) for k in range(whole[:length].count(b"\n"))}
            out.append([row for row in rows if row["id"] not in out.finished])
        assert path.read_bytes() == whole


def test_jsonl_refuses_what_it_would_spoil(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResumableJsonl(path) as out:
        out.append([{"id": "a"}])
        with pytest.raises(ValueError, match="new"):
            out.append([{"id": "b"}, {"id": "a"}])
        opened = f"from dspark_jax.data.jsonl import ResumableJsonl; ResumableJsonl({str(path)!r})"
        root = Path(__file__).parents[1]
        env = {**os.environ, "PYTHONPATH": str(root)}
        second = subprocess.run([sys.executable, "-c", opened], capture_output=True, text=True, cwd=root, env=env)
        assert "Another process is writing the conversations" in second.stderr
    path.write_text('{"id": "a"}\n{"text": 1}\n{"id"')
    with pytest.raises(UserError, match="line 2: found an object without 'id'"):
        ResumableJsonl(path)
    assert path.read_text().endswith('{"id"')


@pytest.mark.parametrize("wrong", [3_000_000_000, -1, 1.5, True, "7"])
def test_ids_far_beyond_a_vocabulary_are_refused_before_they_are_loaded(tmp_path: Path, wrong: object) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(CASE / "tokenizer_qwen", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"][next(iter(content["model"]["vocab"]))] = wrong
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="gives a token the id"):
        load_tokenizer(folder)
