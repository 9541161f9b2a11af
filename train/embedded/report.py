"""Quality of the embedded target: held-out loss and exactness by domain, samples, and the README of its folder."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from dspark_jax.datagen.corpora import DOMAINS, conversations, prompts
from dspark_jax.targets.attention import CausalRows

from .packing import Encoder, Rows, batches, render, with_default_system
from .recipe import Progress, Recipe
from .tokenizer import END, VOCABULARY

HELD_OUT = 160  # conversations a domain
BATCH = 8
SAMPLES = 2  # a domain
SAMPLE_TOKENS = 160


@partial(jax.jit, static_argnums=0)
def _score(graphdef: nnx.GraphDef, params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats and argmax correctness of every label, [B, T] each."""
    model = nnx.merge(graphdef, params)
    logits = model.logits(model(rows.tokens, rows.positions, CausalRows(jnp.asarray(rows.segments))).hidden)
    # log Z - the label's logit, without a second [B, T, V] array of log-probabilities.
    right = jnp.take_along_axis(logits, rows.labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right, jnp.argmax(logits, axis=-1) == rows.labels


def evaluate(graphdef: nnx.GraphDef, params: Any, tokenizer: Tokenizer, length: int) -> dict[str, dict[str, float]]:
    """Measures held-out answers.

    Args:
        graphdef: of the model.
        params: its parameters.
        tokenizer: of the target.
        length: tokens of a row; longer conversations are left out.

    Returns:
        By domain: loss in nats a token, the share of tokens that are the greedy choice after the true prefix, the share
        of answers for which all are, and the counts.
    """
    encoder, found = held_out_encoder(tokenizer), {}
    for domain in DOMAINS:
        encoded = (encoder(item["messages"]) for item in conversations(domain, "heldout", HELD_OUT))
        # Left out and not cut: half an answer is neither right nor wrong as a whole.
        fitting = (item for item in encoded if len(item.tokens) <= length)
        loss, hits, tokens, exact, answers = 0.0, 0, 0, 0, 0

        for rows in batches(fitting, BATCH, length):
            entropy, hit = map(np.asarray, _score(graphdef, params, rows))
            # Labels of answers alone; the context and padding have weight 0.
            counted = rows.weights > 0
            loss, hits, tokens = loss + entropy[counted].sum(), hits + hit[counted].sum(), tokens + counted.sum()
            for b in range(BATCH):
                # Several conversations share a row; segment 0 is padding.
                for segment in range(1, rows.segments[b].max() + 1):
                    answers += 1
                    # Every token right after the true prefix is the same as greedy decoding giving the whole answer.
                    exact += bool(hit[b][(rows.segments[b] == segment) & counted[b]].all())

        found[domain] = {
            "loss": float(loss / tokens),
            "accuracy": float(hits / tokens),
            "exact": exact / answers,
            "tokens": int(tokens),
            "answers": answers,
        }

    return found


def held_out_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes held-out conversations: weight 0 for the context, since answers alone are counted."""
    # Every one opens with the default system message, as the shipped template has it in every prompt.
    return Encoder(tokenizer, context_weight=0.0, system_every=1)


def prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt, as the shipped chat template renders it."""
    return tokenizer.encode(render(with_default_system(messages), generation_prompt=True)).ids


@partial(jax.jit, static_argnums=0)
def _next(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(tokens, positions, CausalRows(jnp.ones_like(tokens))).hidden
    # The head runs on one position a row: over the whole row it would be the largest product of the model.
    chosen = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return jnp.argmax(model.logits(chosen), axis=-1)


def samples(graphdef: nnx.GraphDef, params: Any, tokenizer: Tokenizer, length: int) -> list[dict[str, str]]:
    """Greedy answers to held-out prompts, recomputing the whole row for every token."""
    asked = [item for domain in DOMAINS for item in prompts(domain, "heldout", SAMPLES, seed=1)]
    ids = [prompt_ids(tokenizer, item["messages"]) for item in asked]
    rows = np.zeros((len(ids), length), np.int32)
    # At least one place for the answer.
    starts = np.array([min(len(prompt), length - 1) for prompt in ids])
    for row, prompt, start in zip(rows, ids, starts, strict=True):
        row[:start] = prompt[:start]

    ends, stop = starts.copy(), tokenizer.token_to_id(END)
    running = np.ones(len(ids), bool)
    for _ in range(SAMPLE_TOKENS):
        running &= ends < length
        if not running.any():
            break

        # One compiled shape: rows keep their full length, and `ends` says where each is.
        chosen = np.asarray(_next(graphdef, params, jnp.asarray(rows), jnp.asarray(ends - 1)))
        # The end marker itself is not written, so the decoded answer does not show it.
        running &= chosen != stop
        for i in np.flatnonzero(running):
            rows[i, ends[i]] = chosen[i]
            ends[i] += 1

    answers = [tokenizer.decode(rows[i, starts[i] : ends[i]].tolist()) for i in range(len(ids))]
    return [
        {"domain": item["domain"], "prompt": item["messages"][0]["content"], "answer": answer}
        for item, answer in zip(asked, answers, strict=True)
    ]


@lru_cache(maxsize=1)
def _amounts() -> dict[str, str]:
    # Cached: the corpora are read once, though the README is written at every checkpoint.
    amounts = {}
    for domain in ("code", "chat"):
        sizes = [(split, list(conversations(domain, split))) for split in ("train", "heldout")]
        amounts[domain] = ", ".join(
            f"{len(items)} {'training' if split == 'train' else 'held-out'} conversations from "
            f"{len({item['source'] for item in items})} sources"
            for split, items in sizes
        )

    return {**amounts, "math": "generated without end"}


def write_readme(
    folder: Path,
    recipe: Recipe,
    progress: Progress,
    history: list[dict[str, Any]],
    shown: list[dict[str, str]] | None,
) -> None:
    """Writes README.md of the model's folder from the run's figures; `shown` None: training is not finished."""
    lines = [
        "# Embedded target",
        "",
        f"A Qwen3-architecture chat model: vocabulary {VOCABULARY}, hidden {recipe.hidden}, {recipe.layers} layers, "
        f"{recipe.heads} query and {recipe.kv_heads} key-value heads of {recipe.head_dim}, MLP {recipe.mlp}, tied "
        "embeddings, bfloat16. It exists so that everything in this project runs without network and GPU; it is a toy.",
        "This file is written by `python -m train.embedded.target`.",
        "",
        "## Training",
        "",
        f"- {progress.tokens / 1e6:.2f} M tokens in {progress.step} steps of {recipe.rows} rows of {recipe.length}, "
        f"{progress.seconds / 60:.1f} minutes on CPU"
        + (" (still running: an intermediate model)." if shown is None else "."),
        f"- Muon (matrices) and AdamW (embedding, norms), rate {recipe.learning_rate:g} with "
        f"{recipe.warmup} warm-up steps and a cosine, weight decay "
        f"{recipe.weight_decay:g}; assistant tokens weigh 1, all others {recipe.context_weight:g}; seed {recipe.seed}.",
        "- Another of its kind: "
        f"`python -m train.embedded.target --steps {progress.step} --output OTHER --run-dir OTHER_RUN` "
        "(this run followed the clock, so its learning rates, and with them its weights, are its own).",
        "",
        "## Data",
        "",
        "Made from the Python installation itself; a module or math question is wholly in training or held out.",
        "",
        *(f"- {domain} ({recipe.shares()[domain]:.0%} of the tokens): {text}." for domain, text in _amounts().items()),
        "",
        "## Held-out",
        "",
        "Over answers only. Accuracy: greedy choice right after the true prefix. Exact: whole answers word for word.",
        "",
        "| step | M tokens | " + " | ".join(f"{domain} loss" for domain in DOMAINS) + " |",
        "|" + "---|" * (2 + len(DOMAINS)),
    ]

    for entry in history:
        values = " | ".join(f"{entry['heldout'][domain]['loss']:.3f}" for domain in DOMAINS)
        lines.append(f"| {entry['step']} | {entry['tokens'] / 1e6:.2f} | {values} |")

    lines += ["", "| domain | loss (nats a token) | accuracy | exact | answers | tokens |", "|---|---|---|---|---|---|"]
    for domain, value in (history[-1]["heldout"] if history else {}).items():
        lines.append(
            f"| {domain} | {value['loss']:.3f} | {value['accuracy']:.1%} | {value['exact']:.1%} | "
            f"{value['answers']} | {value['tokens']} |"
        )

    lines += ["", "## Samples", "", "Greedy answers to held-out prompts, not chosen by hand.", ""] if shown else []
    for sample in shown or []:
        lines += [f"### {sample['domain']}", ""]
        lines += [*_quoted("Prompt", sample["prompt"]), *_quoted("Answer", sample["answer"])]

    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quoted(title: str, text: str) -> list[str]:
    # Four backticks, since the texts hold fences of three.
    return [f"{title}:", "", "````text", *text.split("\n"), "````", ""]
