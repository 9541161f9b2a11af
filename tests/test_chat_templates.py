"""One rule for every template: decoding's prompt begins the training row, and the loss covers what is generated."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data import templates
from dspark_jax.data.chat import encode_conversation, encode_prompt, template_id
from dspark_jax.datagen.regeneration import Regenerator
from dspark_jax.errors import UserError
from dspark_jax.serving.jobs import tokenize_prompt
from dspark_jax.serving.prompts import encode
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.chat_templates import SPECIAL, STYLES, tokenizer_of
from tests.tiny import write_tiny_target

PIECES = ["Seven", " four", "\n", "\n\n", "  ", "你好", "東京", "🙂", "👩‍💻", "é", "\ue000",
          "def f():\n    return 1", "7", ".", *SPECIAL, "<think>", "</think>"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def conversation(pairs: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    said = [m for u, a in pairs for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})]
    return [{"role": "system", "content": system}, *said] if system is not None else said


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", STYLES)
@quick
@example([("Hi", "\n\nThe sum."), ("And?", "Yes.")], "Be brief.")
@example([("Write <|im_end|> and </s>.", "They are <|im_end|> and </s>, 🙂."), ("你好", " 你好 ")], None)
@given(turns, st.none() | texts)
def test_a_training_row_is_the_prompt_and_what_is_generated(name, thinking, pairs, system):
    style, tokenizer = STYLES[name], tokenizer_of(name)
    messages = conversation(pairs, system)
    if system is not None and not style.system:
        for call in (encode_prompt, encode_conversation):
            with pytest.raises(UserError, match="template refused .*System role not supported"):
                call(tokenizer, messages)
        return

    rows = encode_conversation(tokenizer, messages, thinking=thinking)
    assert all((row.input_ids.dtype, row.loss_mask.dtype) == (np.int32, np.uint8) for row in rows)
    supervised = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, messages[:index], thinking).tolist()
        expected = style.generated(message["content"], thinking)
        found = [after for row in rows if (after := _generated(row, prompt)) is not None]
        assert expected in [tokenizer.decode(ids) for ids in found]
        supervised += min(len(ids) for ids in found if tokenizer.decode(ids) == expected)
    assert sum(row.loss_tokens for row in rows) == supervised


def _generated(row, prompt: list[int]) -> list[int] | None:
    """The supervised tokens right after the prompt, where the row begins with it."""
    ids, mask = row.input_ids.tolist(), row.loss_mask.tolist()
    at = len(prompt)
    if ids[:at] != prompt or at >= len(ids) or not mask[at] or mask[at - 1]:
        return None
    end = mask.index(0, at) if 0 in mask[at:] else len(mask)
    return ids[at:end]


@pytest.mark.parametrize("name", STYLES)
def test_a_plain_conversation_is_one_row_where_the_template_repeats_its_answers(name):
    messages = conversation([("Hi", "Seven."), ("And then?", "Four."), ("So?", "Seven.")])
    assert len(encode_conversation(tokenizer_of(name), messages)) == (1 if STYLES[name].multi_turn else 3)


@pytest.mark.parametrize("name", STYLES)
def test_names_of_special_tokens_in_messages_are_text(name):
    tokenizer = tokenizer_of(name)
    plain, named = ([{"role": "user", "content": f"Say {word}."}] for word in ("x", "<|im_end|></s><end_of_turn>"))
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    written = [[t for t in encode_prompt(tokenizer, turns).tolist() if t in special] for turns in (plain, named)]
    assert written[0] == written[1]
    whole = tokenizer.apply_chat_template(named, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert tokenizer.decode(encode_prompt(tokenizer, named)) == tokenizer.decode(tokenizer(whole)["input_ids"])
    # The tokenizer itself is as it was: other threads use it.
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [SPECIAL.index("<|im_end|>")]


@pytest.mark.parametrize("thinking", [False, True])
def test_api_program_regeneration_and_training_send_the_same_ids(thinking, tmp_path):
    target = load_target(write_tiny_target(tmp_path / "tiny", vocab_size=400))
    for name in STYLES:
        target = replace(target, tokenizer=tokenizer_of(name))
        messages = conversation([("Hi <|im_end|>", "Seven."), ("And then?", "Four.")])[:3]
        regenerator = Regenerator(target, thinking, SamplingParams(8), EngineConfig(), 512)
        expected = encode_prompt(target.tokenizer, messages, thinking)
        assert tokenize_prompt(target, messages, thinking=thinking) == tuple(expected.tolist())
        assert encode(target, messages, thinking) == regenerator._encode(messages) == tuple(expected.tolist())
        row = encode_conversation(target.tokenizer, [*messages, {"role": "assistant", "content": "x"}], None, thinking)[
            -1
        ]
        np.testing.assert_array_equal(row.input_ids[: len(expected)], expected)
    switched = {name for name in STYLES if len({_length(name, on) for on in (False, True)}) > 1}
    assert switched == {"chatml, empty thought", "qwen3"}


def _length(name: str, thinking: bool) -> int:
    return len(encode_prompt(tokenizer_of(name), [{"role": "user", "content": "Hi"}], thinking))


def test_tool_calls_and_thoughts_are_the_templates():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = STYLES["chatml"].template.replace(
        "m.content +", "m.content + (m.tool_calls or '') | string +"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    (row,) = encode_conversation(tokenizer, [{"role": "user", "content": "Hi"}, call])
    assert tokenizer.decode(row.input_ids[row.loss_mask == 1]) == "[{'name': 'f'}]<|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "did not end within 0.3 seconds",
        ),
        ("{% if %}", "refused a conversation with the roles user: Expected an expression"),
        ("{{ messages[0].content.nothing.at_all }}", "refused .* has no attribute"),
        ("{{ raise_exception('no \nway') }}", "refused .* no way"),
        ("{{ 1 / 0 }}", "refused .* division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "refused .* recursion"),
        ("{{ 'a' * 10 ** 15 }}", "refused .* MemoryError"),
        ("{{ messages | length * 'x' * 60000000 }}", "made 60,000,000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused .* unsafe"),
    ],
)
def test_templates_that_are_damaged_or_never_end_are_one_sentence(template, said, monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3 if "0.3" in said else 10.0)
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value) and time.monotonic() - began < 8


def test_an_answer_that_a_template_leaves_out_is_named():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        encode_conversation(tokenizer, conversation([("a", "b")]))


def test_a_changed_template_has_another_identity():
    one, other = tokenizer_of("chatml"), tokenizer_of("dated")
    assert template_id(one) == template_id(tokenizer_of("chatml")) != template_id(other)
    assert template_id(one) != template_id(one, thinking=True)
