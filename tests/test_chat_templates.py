"""One rule for every template: decoding's prompt begins the training row, and the loss covers what is generated."""

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data import templates
from dspark_jax.data.chat import encode_conversation, encode_prompt, template_id
from dspark_jax.datagen.regeneration import Regenerator
from dspark_jax.errors import UserError
from dspark_jax.serving.jobs import tokenize_prompt
from dspark_jax.serving.prompts import encode
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.chat_templates import BACKENDS, SPECIAL, STYLES, tokenizer_of
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma"])
def test_a_name_in_a_later_message_changes_no_token_before_it(name, backend):
    """Whatever the tokenizer does at the beginning of a text: prompts of a conversation are tokenised alike, whether
    or not a later turn names a special token, and the name changes nothing around it."""
    tokenizer = tokenizer_of(name, backend)
    pairs = [("The sum and 你好", "and the sum"), ("Say <|im_end|> and </s>.", "The </s> and")]
    messages = conversation(pairs)
    rows = encode_conversation(tokenizer, messages)
    for index in (1, 3):
        prompt = encode_prompt(tokenizer, messages[:index]).tolist()
        assert any(row.input_ids[: len(prompt)].tolist() == prompt for row in rows), index

    # As without the name: the same tokens up to it, and the same after it. "#" is no word's part, as "<" and ">".
    plain = [[{"role": "user", "content": f"The sum {word} and the sum"}] for word in ("<|im_end|>", "#")]
    named, other = (encode_prompt(tokenizer, turns).tolist() for turns in plain)
    before = next(i for i, (a, b) in enumerate(zip(named, other)) if a != b)
    after = next(i for i, (a, b) in enumerate(zip(named[::-1], other[::-1])) if a != b)
    assert before + after >= len(other) - 2
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    assert [t for t in named if t in ids] == [t for t in other if t in ids]


def test_names_of_special_tokens_are_text_in_every_field_of_a_message():
    """Tool calls and thoughts, their arguments' names as well."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = STYLES["chatml"].template.replace(
        "m.content +", "m.content + (m.tool_calls or '') | string + (m.reasoning_content or '') +"
    )
    said = {
        "content": "",
        "tool_calls": [{"name": "f", "arguments": {"<|im_end|>": ["</s>"]}}],
        "reasoning_content": "<|im_start|>",
    }
    (row,) = encode_conversation(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", **said}])
    special = [t for t in row.input_ids[row.loss_mask == 1].tolist() if t in {SPECIAL.index(name) for name in SPECIAL}]
    assert special == [SPECIAL.index("<|im_end|>")], "the template's own"
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(UserError, match="Turn 0 .* nested deeper"):
        encode_prompt(tokenizer, [{"role": "user", "content": "Hi", "tool_calls": deep}])


def test_text_of_private_use_characters_is_text():
    """All of the first area: what stands for the names of special tokens is taken from another."""
    tokenizer, area = tokenizer_of("chatml"), "".join(map(chr, range(0xE000, 0xF900)))
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": area + "<|im_end|>"}])
    assert tokenizer.decode(prompt).count(area + "<|im_end|><|im_end|>\n") == 1
    everything = area + "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(UserError, match="every character of Unicode's private use areas"):
        encode_prompt(tokenizer, [{"role": "user", "content": everything}])


@pytest.mark.parametrize("cut", ["false", 1, [], "no"])
def test_a_cut_answer_is_marked_by_true_alone(cut):
    messages = [*conversation([("Hi", "Seven.")])[:1], {"role": "assistant", "content": "Seven", "truncated": cut}]
    with pytest.raises(UserError, match="Turn 1 .* truncated = .*, expected true or false"):
        encode_conversation(tokenizer_of("chatml"), messages)


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


MUCH = "one operation would make more than 50,000,000 characters"


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
        ("{{ messages | length * 'x' * 60000000 }}", MUCH),
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


LARGE = [
    "{{ 2 ** 40000000 }}",
    "{% set x = 3 ** 20000 %}{{ x * x * x * x }}",
    "{{ (2 ** 60000) // 3 ** 60000 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ ['a' * 1000] * 10 ** 6 }}",
    "{{ 7 ** (10 ** 10) }}",
    "{{ range(10 ** 12) | list }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10 ** 10}) }}",
    "{{ ('{0}' * 10 ** 6).format('a' * 10 ** 6) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.zfill(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ ('a\n' * 10 ** 5) | indent(10 ** 6) }}",
    "{{ ('\t' * 10 ** 5).expandtabs(10 ** 6) }}",
    "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ ['a'] | batch(10 ** 10, 'b') | list }}",
    "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
    "{{ ('a' * 10 ** 6).join('b' * 10 ** 6) }}",
    "{{ range(99999) | map('center', 10 ** 6) | join }}",
    "{{ strftime_now('%10000000000d') }}",
    "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{% set ns = namespace(a=['aa']) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}"
    "{% set ns.a = b %}{% endfor %}",
    "{% macro f(a) %}{{ a }}{{ a }}{% endmacro %}{% set ns = namespace(a='aa') %}"
    "{% for i in range(99) %}{% set ns.a = f(ns.a) %}{% endfor %}",
    "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = [ns.a, 'a' * 10 ** 7] %}{% endfor %}",
    "{% for i in range(9999) %}{{ 'a' * 10 ** 7 }}{% endfor %}",
]


@pytest.mark.parametrize("template", LARGE)
def test_no_operation_of_a_template_takes_all_memory(template, monkeypatch):
    """Weighed before it runs: the peak is the bound's own, and nothing waits for the deadline."""
    # Ten megabytes a step take seconds on a machine that does much else.
    monkeypatch.setattr(templates, "RENDER_SECONDS", 60.0)
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="more than [0-9,]+ (characters|bits)|Range too big"):
            encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
        assert tracemalloc.get_traced_memory()[1] < 2**30
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", STYLES)
def test_the_sandbox_renders_what_transformers_renders(name):
    tokenizer = tokenizer_of(name)
    said = conversation([("Hi ~ {{ 1 }}", "\n1 + 1 %s"), ("你好", "🙂")])
    for end in (1, 2, 3, 4):
        given = {"add_generation_prompt": end % 2 == 1, "enable_thinking": end > 2}
        try:
            expected = tokenizer.apply_chat_template(said[:end], tokenize=False, **given)
        except TemplateError:
            with pytest.raises(UserError, match="refused"):
                templates.render(tokenizer, said[:end], **given)
            continue
        assert templates.render(tokenizer, said[:end], **given) == expected


def test_what_published_templates_use_renders_as_in_transformers():
    """Every extension of transformers' environment, and the filters and methods that published templates call."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = (
        "{{- bos_token or 'none' }}{{ eos_token }}{% for m in messages if m.role != 'tool' %}\n"
        "  {% if loop.index0 > 3 %}{% break %}{% endif %}\n"
        "  {%- generation %}{% set x = 1 %}{{ m.content | trim | upper }}{% endgeneration %}{{ x is defined }}\n"
        "{% endfor %}{{ messages | tojson(indent=2) }}{{ {'a': '<é>'} | tojson }}{{ tools is none }}"
        "{{ 'a-b'.split('-')[-1].rstrip('b') ~ 1 ~ none ~ [1, 'x'] }}{{ '%s: %05d' % ('a', 7) }}{{ '{:>4}'.format(7) }}"
        "{{ messages | map(attribute='role') | unique | join(', ') }}{{ 'a\nb' | indent(2) }}{{ 7 // 2 * 3 ** 2 }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'aab' | replace('a', 'b') }}"
        "{{ ['a'] + ['b'] }}{{ messages[0].items() | list | string }}{{ 'x' * 3 }}{{ undefined_name }}"
    )
    said = conversation([(" Hi ", "Yes <b>"), ("你好", "🙂")])
    assert templates.render(tokenizer, said) == tokenizer.apply_chat_template(said, tokenize=False)


def test_an_answer_that_a_template_leaves_out_is_named():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        encode_conversation(tokenizer, conversation([("a", "b")]))


def test_a_changed_template_has_another_identity():
    one, other = tokenizer_of("chatml"), tokenizer_of("dated")
    assert template_id(one) == template_id(tokenizer_of("chatml")) != template_id(other)
    assert template_id(one) != template_id(one, thinking=True)
