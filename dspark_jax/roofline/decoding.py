"""The floor of one decode round by term: floating-point operations and bytes, counted from shapes.

Every weight and every cached position is read once a pass, of routed experts those that some row chooses; activations
between the products of a layer stay on the chip. Logits and laws over the vocabulary are float32 and do pass through
memory.

Letters: R requests, c positions cached a request, γ drafts, W = γ + 1, P = R W rows verified, D hidden, F mlp, Q query
heads, G kv heads, H head dim, V vocab, U ids that may be drafted, m taps, L layers of the target, L' of the drafter,
r Markov rank, b bytes.
"""

from dspark_jax.drafters.config import DrafterConfig, DSparkConfig
from dspark_jax.roofline.hardware import Term
from dspark_jax.targets.config import TargetConfig

LOGIT = 4  # bytes
LAW_FLOPS = 5  # an entry of a softmax


def distinct_experts(experts: int, chosen: int, rows: float) -> float:
    """Experts of a layer that are read when each of `rows` rows chooses `chosen` of `experts`, in expectation under
    even routing: E (1 - (1 - K / E)^n)."""
    return experts * (1 - (1 - chosen / experts) ** rows)


def round_terms(
    target: TargetConfig, drafter: DrafterConfig | None, requests: int, context: float, itemsize: int, cut: bool = True
) -> list[Term] | None:
    """The terms of one round on one device, in which every request verifies its whole block.

    Args:
        target: its shapes.
        drafter: None for a round of plain decoding.
        requests: R.
        context: positions cached a request, c.
        itemsize: bytes of a weight and of a cached number.
        cut: some request uses top-k or top-p, whose thresholds are searched for.
    Returns:
        None for drafters of another kind than DSpark: they are not counted.
    """
    if not isinstance(drafter, DSparkConfig | None):
        return None

    block = 0 if drafter is None else drafter.block_size
    rows, vocab = requests * (block + 1), target.vocab_size
    laws = requests * (2 * block + 1) * vocab  # of γ drafts and γ + 1 verified rows

    terms = [
        _weights("verify: projections and MLP", target, rows, itemsize),
        _cache("verify: attention over the cache", target, requests, block + 1, context, itemsize),
        _head("verify: head", target.hidden_size, vocab, rows, itemsize),
    ]

    if drafter is not None:
        dims = drafter.backbone
        # A drafter whose anchor predicts nothing has one more input row.
        inputs = requests * (block + (not drafter.sample_from_anchor))
        terms += [
            _weights("draft: projections and MLP", dims, inputs, itemsize),
            _cache("draft: attention over the context", dims, requests, block, context, itemsize, append=False),
            # The drafter's head is the target's, or its rows of a pruned vocabulary: a second pass over those weights.
            _head("draft: head", target.hidden_size, drafter.draft_vocab_size, requests * block, itemsize),
            _context(drafter, requests, itemsize),
        ]
        if drafter.markov_rank:
            terms.append(_markov(drafter, requests, itemsize))

    # Each law is read as logits and written as probabilities.
    terms.append(Term("sampling laws", LAW_FLOPS * laws, 2 * LOGIT * laws))
    if cut:
        # Two searches bisect 31 bits, each step a comparison and a sum; rows may stay on the chip between the steps.
        terms.append(Term("cuts of laws (top-k, top-p)", 2 * 31 * 2 * laws, 2 * LOGIT * laws))

    # Rejection sampling reads the rejecting row of both laws and writes their residual (docs/algorithm.md, rule 4).
    return [*terms, Term("acceptance", 3 * requests * vocab, 3 * LOGIT * requests * vocab)]


def _weights(name: str, dims: TargetConfig, rows: int, b: int) -> Term:
    """The matrix products of all decoder layers over `rows` rows; each weight that they use is read once."""
    used = read = 0.0  # weights that a row is multiplied by, and that the pass reads
    for layer in dims.layers:
        queries, keys = dims.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        # Q and O, then K and V, which share a projection where values are keys.
        attention = dims.hidden_size * (2 * queries + keys * (1 if layer.values_are_keys else 2))
        used, read = used + attention, read + attention

        # Gate, up and down: of one MLP, or of the experts behind a router.
        if layer.sparse and dims.experts is not None:
            experts, router = dims.experts, dims.hidden_size * dims.experts.count
            one = 3 * dims.hidden_size * experts.intermediate_size
            used += router + experts.per_token * one
            read += router + distinct_experts(experts.count, experts.per_token, rows) * one
        else:
            used += 3 * dims.hidden_size * dims.intermediate_size
            read += 3 * dims.hidden_size * dims.intermediate_size

    return Term(name, 2.0 * rows * used, read * b)


def _cache(
    name: str, dims: TargetConfig, requests: int, width: int, context: float, b: int, append: bool = True
) -> Term:
    """Attention of `width` rows a request over c cached positions and each other; `append`: their K/V are cached."""
    flops = moved = 0.0
    for layer in dims.layers:
        # Scores and mixing: two products, of 2 operations each. A row sees half of the new ones on average.
        seen = context if layer.window is None else min(context, layer.window)
        flops += 4.0 * requests * width * (seen + width / 2) * dims.num_heads * layer.head_dim
        moved += requests * (seen + width * append) * 2 * layer.num_kv_heads * layer.head_dim * b

    return Term(name, flops, moved)


def _head(name: str, hidden: int, vocab: int, rows: int, b: int) -> Term:
    return Term(name, 2.0 * rows * vocab * hidden, vocab * hidden * b + rows * vocab * LOGIT)


def _context(drafter: DSparkConfig, requests: int, b: int) -> Term:
    """Fusion of the verified rows' taps, and their projection to every draft layer's K/V, which are cached."""
    dims, rows = drafter.backbone, requests * (drafter.block_size + 1)
    # Committed rows are counted at their most, a whole block, as the compiled program runs them.
    taps = len(drafter.target_layer_ids) * dims.hidden_size
    keys = sum(2 * layer.num_kv_heads * layer.head_dim for layer in dims.layers)
    size = taps * dims.hidden_size + dims.hidden_size * keys

    return Term("commit: context K/V of the drafter", 2.0 * rows * size, (size + rows * (taps + keys)) * b)


def _markov(drafter: DSparkConfig, requests: int, b: int) -> Term:
    """The Markov head: γ sequential steps, each of which reads all of W_2 and adds a bias to a row of logits."""
    rows = requests * drafter.block_size
    if drafter.selector_top_k:
        # A selector gathers its candidates' rows of W_2, and no others.
        gathered = rows * drafter.selector_top_k * drafter.markov_rank
        return Term("draft: selector", 2.0 * gathered, gathered * b)

    # Step by step, since x_k is needed before x_{k+1} is drawn: W_2 is read γ times and not once.
    size = drafter.draft_vocab_size * drafter.markov_rank
    return Term("draft: Markov head", 2.0 * rows * size, drafter.block_size * size * b)
