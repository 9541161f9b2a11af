"""The floor of a training step by term: floating-point operations and bytes, counted from shapes.

A product x W of n rows costs 2 n i o forward and as much again for each gradient; frozen tables have no weight
gradient, taps no input gradient, and the target's logits have neither. Each product reads both operands and writes its
result once, in the compute dtype; weight gradients are written in float32. Attention and the losses keep scores and
logits on the chip. Recomputation (`Term.again`) is counted separately; norms and RoPE are not counted. A query sees T/2
positions on average.

Letters: B sequences of a step, T padded tokens, N anchors, γ block size, P = N γ rows, m taps, D hidden, F mlp, Q query
heads, G kv heads, H head dim, V vocab, L draft layers, R Markov rank, b bytes of the compute dtype, W parameters.
"""

from functools import singledispatch

from dspark_jax.drafters.config import SELECTOR, DrafterConfig, DSparkConfig
from dspark_jax.drafters.eagle3 import Eagle3Config
from dspark_jax.drafters.mtp import MTPConfig
from dspark_jax.roofline.hardware import Term, total
from dspark_jax.targets.config import TargetConfig

ELEMENTWISE = 20  # operations per logit of the losses: two softmaxes, their difference, both gradients
ADAMW_FLOPS = 16
# A parameter and two moments read and written, its gradient read for the norm and for the update.
ADAMW_BYTES = 8 * 4


def training_flops(config: DrafterConfig, sequences: int, length: int) -> float | None:
    """Operations of the products of one step of B sequences padded to T, forward and backward; None for a kind that
    isn't registered below."""
    terms = product_terms(config, sequences, length, 2)
    return None if terms is None else total(terms).flops


def step_terms(
    config: DrafterConfig,
    sequences: int,
    length: int,
    parameters: int,
    itemsize: int,
    micro_batches: int = 1,
) -> list[Term] | None:
    """The terms of one optimizer step on one device.

    Args:
        config: the drafter's shapes.
        sequences: B, of one micro-batch.
        length: the padded T.
        parameters: their number on this device.
        itemsize: bytes of the compute dtype.
        micro_batches: of the step.
    Returns:
        None for a kind of drafter that isn't registered below.
    """
    terms = product_terms(config, sequences, length, itemsize)
    if terms is None:
        return None

    # No bytes: logits stay on the chip, chunk by chunk (docs/algorithm.md, rule 49).
    losses = Term("losses", ELEMENTWISE * sequences * _loss_rows(config, length) * config.backbone.vocab_size, 0.0)
    # Each micro-batch reads the parameters in float32 and writes them in the compute dtype.
    cast = Term("cast of the parameters", 0.0, (4 + itemsize) * parameters)
    update = Term("optimizer", ADAMW_FLOPS * parameters, ADAMW_BYTES * parameters)

    # The optimizer runs once a step, everything else once a micro-batch.
    return [term.times(micro_batches) for term in (*terms, losses, cast)] + [update]


@singledispatch
def product_terms(config: DrafterConfig, sequences: int, length: int, itemsize: int) -> list[Term] | None:
    """The products of one micro-batch, forward and backward, by term; None for a kind that isn't registered below."""
    return None


@product_terms.register
def _(config: DSparkConfig, sequences: int, length: int, itemsize: int) -> list[Term]:
    # Context features are projected at all T positions, blocks run on N γ rows alone.
    dims, b, positions = config.backbone, itemsize, sequences * length
    d, v, layers, blocks = dims.hidden_size, dims.vocab_size, dims.num_layers, sequences * config.num_anchors
    queries, keys = _heads(dims)

    # A block has a row that predicts nothing where its anchor does not.
    width = config.block_size + (not config.sample_from_anchor)
    inputs, rows = blocks * width, blocks * config.block_size

    attention = product("", inputs, d, queries + 2 * keys, b) + product("", inputs, queries, d, b)
    scores = _attention(inputs, positions, length / 2 + width, queries, 2 * keys, b)
    mlp = product("", inputs, d, 2 * dims.intermediate_size, b) + product("", inputs, dims.intermediate_size, d, b)
    # Everything is made once; the backward pass of attention alone makes its scores again, from their sums.
    terms = [
        product("feature fusion", positions, len(config.target_layer_ids) * d, d, b, inputs=False),
        _named("context K/V projection", product("", positions, d, 2 * keys, b).times(layers)),
        _named("block attention, projections", attention.times(layers)),
        _named("block attention, scores", _again(scores.times(layers), 6)),
        _named("MLP", mlp.times(layers)),
        *_frozen_heads(rows, rows, d, v, b),
    ]

    if config.markov_rank:
        terms.append(_markov(config, rows, b))

    if config.convolution is not None:
        kernels = 2 * config.convolution.taps * (d // config.convolution.group)
        # Around attention and around the MLP; the taps themselves are elementwise.
        terms.append(_named("local convolutions", product("", inputs, d, kernels, b).times(2 * layers)))

    if config.enable_confidence_head:
        size = d + (config.markov_rank if config.confidence_head_with_markov else 0)
        # In float32, hence 4 bytes.
        terms.append(product("confidence head", rows, size, 1, 4))

    return terms


@product_terms.register
def _(config: MTPConfig, sequences: int, length: int, itemsize: int) -> list[Term]:
    dims, d, positions = config.backbone, config.backbone.hidden_size, sequences * length
    # The one layer runs at every position, heads and losses at the anchors alone.
    rows = sequences * config.num_anchors

    return [
        product("feature fusion", positions, 2 * d, d, itemsize),
        *_layer(dims, positions, length / 2, d, itemsize),
        *_frozen_heads(rows, rows, d, dims.vocab_size, itemsize),
    ]


@product_terms.register
def _(config: Eagle3Config, sequences: int, length: int, itemsize: int) -> list[Term]:
    dims, steps, d = config.backbone, config.block_size, config.backbone.hidden_size
    # A query of step s sees the context and its own position in the steps before (docs/algorithm.md, rule 53).
    seen, positions = length / 2 + steps / 2, sequences * length

    return [
        product("feature fusion", positions, len(config.target_layer_ids) * d, d, itemsize, inputs=False),
        *(term.times(steps) for term in _layer(dims, positions, seen, 2 * d, itemsize)),
        # The target's logits are the same for all steps.
        *_frozen_heads(steps * positions, positions, d, dims.vocab_size, itemsize),
    ]


def _frozen_heads(rows: int, target_rows: int, d: int, v: int, b: int) -> list[Term]:
    """The frozen output head on the drafter's and on the target's rows; logits stay on the chip."""
    return [
        product("draft head", rows, d, v, b, weights=False, kept=True),
        product("target's head", target_rows, d, v, b, weights=False, inputs=False, kept=True),
    ]


def _layer(dims: TargetConfig, rows: int, seen: float, width: int, b: int) -> list[Term]:
    """A decoder layer over `rows` positions, whose attention reads inputs of `width` and sees `seen` positions."""
    d, (queries, keys) = dims.hidden_size, _heads(dims)
    # Q, K and V as one product: they read the same input, of `width`, which is 2 D in Eagle3's layer.
    projections = product("", rows, width, queries + 2 * keys, b) + product("", rows, queries, d, b)
    mlp = product("", rows, d, 2 * dims.intermediate_size, b) + product("", rows, dims.intermediate_size, d, b)

    return [
        _named("attention, projections", projections),
        _named("attention, scores", _attention(rows, 0, seen, queries, 2 * keys, b)),
        _named("MLP", mlp),
    ]


def _heads(dims: TargetConfig) -> tuple[int, int]:
    """(Q H, G H) of the draft layers, which are all alike."""
    # Queries and K/V have their own head counts (grouped-query attention).
    layer = dims.layers[0]
    return dims.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim


def _loss_rows(config: DrafterConfig, length: int) -> int:
    """Rows of a sequence for which logits are computed."""
    if isinstance(config, Eagle3Config):
        return length * config.block_size
    # MTP drafts one token an anchor: its block size is 1.
    return getattr(config, "num_anchors", 0) * config.block_size


def product(
    name: str, rows: float, i: int, o: int, b: int, weights: bool = True, inputs: bool = True, kept: bool = False
) -> Term:
    """The product x W [rows, i] x [i, o] with its gradients.

    Args:
        name: of the term.
        rows, i, o, b: sizes, and bytes of an element.
        weights, inputs: whether the gradients of W and of x are needed.
        kept: the result [rows, o] and its gradient stay on the chip.
    """
    # A multiplication and an addition for each pair.
    once = 2.0 * rows * i * o
    operands, result = (rows * i + i * o) * b, 0.0 if kept else rows * o * b
    moved = operands + result
    # dx = dy W^T reads dy and W and writes dx; dW = x^T dy reads x and dy and writes dW in float32.
    if inputs:
        moved += i * o * b + rows * i * b + result

    if weights:
        moved += rows * i * b + i * o * 4 + result

    return Term(name, once * (1 + weights + inputs), moved)


def _attention(rows: float, context: float, seen: float, queries: int, keys: int, b: int) -> Term:
    """Scores and mixing of `rows` rows, each over `seen` positions.

    The backward pass takes two such pairs of products and moves everything twice.
    """
    once = 2 * 2.0 * rows * seen * queries
    moved = (2 * rows * queries + (rows + context) * keys) * b
    return Term("", 3 * once, 3 * moved)


def _markov(config: DSparkConfig, rows: int, b: int) -> Term:
    """The Markov head: rows of W_1, its type's layer, and the bias over the vocabulary; W_1's gradient is dense."""
    d, r, v = config.backbone.hidden_size, config.markov_rank, config.backbone.vocab_size
    # A selector scores its candidates alone, each row with rows of W_2 of its own.
    head = product("Markov head", rows, r, config.selector_top_k or v, b, kept=True)
    head = head + Term("", 0.0, 2 * rows * r * b + v * r * 4)

    # Gate of [h ; e]; the RNN's gate, candidate and output of [s ; e ; h]; the selector's projection of h
    # (docs/algorithm.md, rules 32, 33 and 122).
    shapes = {"gated": (d + r, r), "rnn": (d + 2 * r, 3 * r), SELECTOR: (d, r)}
    if config.markov_head_type in shapes:
        head = head + product("", rows, *shapes[config.markov_head_type], b)

    return head


def _again(term: Term, passes: int) -> Term:
    """The term with one of `passes` equal parts repeated in the backward pass."""
    return Term(term.name, term.flops, term.bytes, term.flops / passes)


def _named(name: str, term: Term) -> Term:
    return Term(name, term.flops, term.bytes, term.again)
