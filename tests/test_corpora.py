"""The embedded target's conversations, tokenizer, packing and a run that is killed and continued."""

import ast
import dataclasses
import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.chat import encode_conversation, encode_prompt
from dspark_jax.datagen.corpora import DOMAINS, conversations, prompts, stdlib
from dspark_jax.datagen.corpora.stdlib import definitions, split_of
from dspark_jax.errors import UserError
from train.embedded import report as embedded_report
from train.embedded.packing import Encoder, batches, mixture
from train.embedded.recipe import Progress, Recipe, learning_rate
from train.embedded.target import History, Run, export, train
from train.embedded.tokenizer import MASK, SPECIAL, VOCABULARY, learn_tokenizer, save_tokenizer

LIMIT = 400


def sample(split: str, limit: int = LIMIT) -> list[dict]:
    return [item for domain in DOMAINS for item in conversations(domain, split, limit)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(item["messages"] for item in sample("train", 3000))


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, path, context=512)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return path


@pytest.mark.parametrize("domain", DOMAINS)
def test_conversations_are_a_function_of_domain_split_and_seed(domain: str) -> None:
    first = list(conversations(domain, "train", 50, seed=3))
    assert first == list(conversations(domain, "train", 50, seed=3))
    assert first != list(conversations(domain, "train", 50, seed=4))
    for item in first:
        assert item["domain"] == domain
        assert [m["role"] for m in item["messages"]] == ["user", "assistant"]
        assert all(m["content"].strip() for m in item["messages"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_source_and_no_answer_is_in_both_splits(domain: str) -> None:
    limit = 2000 if domain == "math" else None
    train_items, held_out = (list(conversations(domain, split, limit)) for split in ("train", "heldout"))
    assert len(train_items) >= 2000
    assert len(held_out) >= 60
    assert len({item["id"] for item in train_items}) == len(train_items)
    if domain == "math":
        questions = {item["messages"][0]["content"] for item in train_items}
        assert not questions & {item["messages"][0]["content"] for item in held_out}
    else:
        assert not {item["source"] for item in train_items} & {item["source"] for item in held_out}
        assert all(split_of(item["source"]) == "heldout" for item in held_out)


def test_prompts_are_the_user_turns() -> None:
    for asked, full in zip(prompts("code", "heldout", 20), conversations("code", "heldout", 20), strict=True):
        assert asked["id"] == full["id"]
        assert asked["messages"] == full["messages"][:1]


def test_code_answers_parse_and_keep_the_signature() -> None:
    for item in conversations("code", "heldout", 60):
        code = re.fullmatch(r"```python\n(.*)\n```", item["messages"][1]["content"], re.S)
        assert code is not None
        compile(code[1], item["id"], "exec", dont_inherit=True)
    documented = {item.name: item for item in definitions() if item.doc}
    assert documented["textwrap.dedent"].header == "def dedent(text):"


def test_a_body_keeps_the_decorator_that_it_opens_with() -> None:
    source = "def outer(f):\n    @wraps(f)\n    def inner():\n        return f()\n    return inner\n"
    [found] = [item for item in stdlib._of_module("m", ast.parse(source), source.splitlines()) if item.body]
    assert found.body == "    @wraps(f)\n    def inner():\n        return f()\n    return inner"


def test_math_steps_are_true() -> None:
    for item in conversations("math", "heldout", 300):
        answer = item["messages"][1]["content"]
        results = [0]
        for left, operator, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer):
            a, b, results[0] = int(left), int(right), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator] == results[0] >= 0
        assert answer.endswith(f"The answer is {results[0]}.")


def test_unknown_domain_and_split_are_refused() -> None:
    with pytest.raises(UserError, match="'poetry'.*code, chat, math"):
        conversations("poetry", "train")
    with pytest.raises(UserError, match="'test'.*train, heldout"):
        conversations("code", "test")


def test_tokenizer_round_trips_and_splits_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert [tokenizer.token_to_id(name) for name in SPECIAL] == [0, 1, 2, 3]
    text = "for i in range(1024):\n    naïve = '→'  # 37\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert sum(token.isdigit() for token in tokenizer.encode("1024").tokens) == 4


def test_training_tokens_are_what_the_chat_template_renders(tokenizer: Tokenizer, folder: Path) -> None:
    """Drafters train on `encode_conversation` and decode from `encode_prompt`: one text, which the target was taught
    beside the form without a system message. The target also learns the newline after the end marker."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token, loaded.pad_token, loaded.mask_token) == ("<|im_end|>", "<|endoftext|>", MASK)
    encoder, with_system = Encoder(tokenizer, context_weight=0.25), 0
    for item in sample("heldout", 20):
        ours = encoder(item["messages"])
        theirs = encode_conversation(loaded, item["messages"])[0]
        tokens, answer = ours.tokens[:-1], ours.weights[:-1] == 1.0
        header = len(theirs.input_ids) - len(tokens)  # the default system message, which some of `ours` go without
        with_system += header == 0
        np.testing.assert_array_equal(tokens, theirs.input_ids[header:])
        np.testing.assert_array_equal(answer, theirs.loss_mask[header:] == 1)
        prompt = encode_prompt(loaded, item["messages"][:1])
        np.testing.assert_array_equal(theirs.input_ids[: len(prompt)], prompt)
    assert 15 <= with_system <= 45


def test_the_report_asks_as_the_chat_template_does(tokenizer: Tokenizer, folder: Path) -> None:
    """Held-out figures and samples have the default system message, which everything that serves the target has."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    encoder = embedded_report.held_out_encoder(tokenizer)
    for item in sample("heldout", 4):
        asked = embedded_report.prompt_ids(tokenizer, item["messages"][:1])
        assert asked == list(encode_prompt(loaded, item["messages"][:1]))
        assert encoder(item["messages"]).tokens[: len(asked)].tolist() == asked


def test_packing_keeps_every_conversation_once_and_apart(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 0.3)
    given = [item for item in (encoder(c["messages"]) for c in sample("heldout", 30)) if len(item.tokens) <= 256]
    seen = []
    for rows in batches(iter(given), rows=4, length=256):
        for b in range(4):
            for segment in range(1, rows.segments[b].max() + 1):
                inside = rows.segments[b] == segment
                seen.append(tuple(rows.tokens[b][inside]))
                np.testing.assert_array_equal(rows.positions[b][inside], np.arange(inside.sum()))
                assert rows.weights[b][inside][-1] == 0.0  # the next conversation's first token is not a label
                np.testing.assert_array_equal(rows.labels[b][inside][:-1], rows.tokens[b][inside][1:])
        assert not rows.weights[rows.segments == 0].any()
    assert sorted(seen) == sorted(tuple(item.tokens) for item in given)


def test_mixture_follows_the_shares(tokenizer: Tokenizer) -> None:
    shares = {"code": 0.5, "chat": 0.2, "math": 0.3}
    rows = next(batches(mixture(Encoder(tokenizer, 0.3), shares, 256), rows=24, length=256))
    assert (rows.segments > 0).mean() > 0.9
    drawn = list(islice(mixture(Encoder(tokenizer, 0.3), shares, 256), 400))
    math_tokens = sum(len(item.tokens) for item in drawn if "The answer is" in tokenizer.decode(item.tokens.tolist()))
    assert abs(math_tokens / sum(len(item.tokens) for item in drawn) - shares["math"]) < 0.03


def test_a_killed_run_continues_bit_for_bit_and_its_folder_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_report, "HELD_OUT", 8)
    small = Recipe(output=tmp_path / "model", run_dir=tmp_path / "run", steps=4, rows=2, length=128, save_minutes=1e9)
    small = dataclasses.replace(small, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=48, warmup=2)
    whole = Run.start(small)
    train(whole, History.open(whole))
    export(whole, History.open(whole).entries, final=False)

    halved = dataclasses.replace(small, run_dir=tmp_path / "halved")
    first = Run.start(halved)
    _train_steps(first, 2)
    second = Run.start(halved)
    assert second.progress.step == 2
    train(second, History.open(second))
    for a, b in zip(_leaves(whole.state.params), _leaves(second.state.params), strict=True):
        np.testing.assert_array_equal(a, b)

    target = load_target(small.output)
    assert target.config.num_layers == 2
    assert target.stop_tokens == (2, 0)
    assert not (tmp_path / "model.partial").exists()
    assert "intermediate" in (small.output / "README.md").read_text()
    with pytest.raises(UserError, match="another recipe"):
        Run.start(dataclasses.replace(halved, learning_rate=1e-4))

    # A folder that was damaged since is one sentence.
    heldout, checkpoint = halved.run_dir / "heldout.jsonl", halved.run_dir / "checkpoint.npz"
    for line in ("[]", '{"step": "1"}', '{"step": 1, "tokens": 2, "seconds": 1, "heldout": {"math": 3}}'):
        lines = heldout.read_text()
        heldout.write_text(lines + line + "\n")
        with pytest.raises(UserError, match="heldout.jsonl line"):
            History.open(second)
        heldout.write_text(lines)
    whole_bytes = checkpoint.read_bytes()
    with np.load(checkpoint) as stored:
        arrays = dict(stored)
    for damage in ({"header": np.frombuffer(b"{}", np.uint8)}, {"leaf_0000": np.zeros(3, np.float32)}):
        np.savez(checkpoint, **arrays | damage)
        with pytest.raises(UserError, match="checkpoint.npz"):
            Run.start(halved)
    checkpoint.write_bytes(whole_bytes[: len(whole_bytes) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        Run.start(halved)


def test_every_matrix_of_a_layer_is_trained_by_muon() -> None:
    from flax.traverse_util import flatten_dict

    from dspark_jax.targets.joined import apart
    from tests.decoding_tiny import tiny_pair
    from train.embedded.optimizer import _matrices

    target = tiny_pair()[0]
    params = apart(target.params, target.config)
    found, leaves = flatten_dict(_matrices(params)), flatten_dict(params)
    matrices = {path for path, leaf in leaves.items() if path[0] == "layers" and leaf.ndim == 2}
    assert matrices and {path for path, numbers in found.items() if numbers is not None} == matrices


def _train_steps(run: Run, steps: int) -> None:
    """Trains as `train` does and saves after `steps`, as a run that is killed right after a checkpoint leaves it."""
    from train.embedded.optimizer import make_optimizer, make_step

    step = make_step(run.graphdef, make_optimizer(run.recipe.weight_decay, run.config))
    for rows in islice(run.data(), steps):
        run.state, _ = step(run.state, rows, np.float32(learning_rate(run.recipe, run.progress.step, run.fraction())))
        run.progress = Progress(run.progress.step + 1, 0, 0.0)
    run.save()


def _leaves(tree: object) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
