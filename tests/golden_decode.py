"""Golden checks of decoding: first rounds, greedy transcripts with stops and thresholds, temperature 1, statistics."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.decoding.acceptance import RejectionSampling, first_stop, normalised
from dspark_jax.decoding.sampling import SamplingArrays, sampling_law
from dspark_jax.drafters.laws import Dense
from dspark_jax.drafters.registry import Drafter
from dspark_jax.evaluation.calibration_metrics import calibration_metrics, prefix_survival
from dspark_jax.scheduling.policies import Fixed, Threshold, VerifyPolicy
from dspark_jax.serving.assembly import WHOLE_BLOCKS
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.target import Target
from tests.decoding_tiny import one_round
from tests.forced import forced_blocks

Result = tuple[str, float, float, bool]
ATOL, RTOL = 2e-4, 1e-4
NEW_TOKENS = 48
LONGEST = 120  # prompt and new tokens: one cache size for all transcripts, so that they share compiled rounds
SIGNIFICANCE = 1e-6  # of the statistical checks: they are seeded, so this decides once and for all


def close(name: str, found: Any, expected: Any) -> Result:
    """Within atol + rtol |expected|, reported as the largest error against the tolerance of its own entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return (f"{name} shape {found.shape} for {expected.shape}", float("inf"), ATOL, False)
    if not found.size:
        return (name, 0.0, ATOL, True)
    error, allowed = np.abs(found - expected), ATOL + RTOL * np.abs(expected)
    worst = np.unravel_index(np.argmax(error / allowed), error.shape)
    return (name, float(error[worst]), float(allowed[worst]), bool(np.all(error <= allowed)))


def exact(name: str, found: Any, expected: Any) -> Result:
    found, expected = np.asarray(found), np.asarray(expected)
    same = found.shape == expected.shape and bool(np.all(found == expected))
    return (name, 0.0 if same else 1.0, 0.0, same)


def at_least(name: str, p_value: float) -> Result:
    """A statistical check: reported as how far the p-value falls below the significance level."""
    return (f"{name} p={p_value:.3g}", max(0.0, SIGNIFICANCE - p_value), SIGNIFICANCE, p_value >= SIGNIFICANCE)


def check_decode(case: Path) -> Iterator[Result]:
    """All decoding groups that a DSpark or DFlash case holds."""
    vectors = np.load(case / "vectors.npz")
    target = load_target(case / "target", dtype="float32")
    drafter = load_drafter(case / "draft", target, dtype="float32")
    forward = Forward(target, drafter)
    yield from check_first_rounds(vectors, forward)
    groups = sorted({name.split("/")[0] for name in vectors.files if name.startswith("decode_t0")})
    for group in groups:
        yield from check_transcripts(group, vectors, target, drafter)
    if "t1/u" in vectors:
        yield from check_sampled_rounds(vectors, forward)
    if "t1_stats/prompt_ids" in vectors:
        yield from check_statistics(case, vectors, target, drafter)


def play(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    sampling: SamplingParams,
    policy: VerifyPolicy = WHOLE_BLOCKS,
) -> tuple[list[int], list[Any]]:
    """(prompt and new tokens, the round records) of one request, round by round through the compiled round.

    The reference stops once the anchor's position reaches the limit, not the token count: with exactly max_new_tokens
    there it still plays a round whose tokens it cuts off, and its accepted lengths count what is cut. With a block more
    of room the same rounds are played here, none of them cut.
    """
    wanted = len(prompt) + sampling.max_new_tokens
    block = 0 if drafter is None else drafter.config.block_size
    sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens + block + 1)
    # One bucket holds verify lengths of any policy, and compiles in a third of the time.
    whole = (block + 1,) if drafter is not None else None
    config = EngineConfig(1, max(LONGEST, len(prompt) + sampling.max_new_tokens), buckets=whole)
    engine = Engine(target, drafter, config, sampling, policy)
    engine.submit(0, Request(prompt))
    engine.admit()
    records = []
    while bool(engine.state.active[0]) and int(engine.state.length[0]) <= wanted:
        engine.state, record = one_round(engine.loop, engine.params, engine.state, engine.occupancy)
        records.append(jax.tree.map(lambda x: np.asarray(x[0]) if x.ndim else np.asarray(x), record))
    tokens = np.asarray(engine.state.tokens[0, : int(engine.state.length[0])])
    return tokens[:wanted].tolist(), records


class Forward:
    """Whole-sequence passes of target and drafter, jitted once: sequences are right-padded, which causality ignores."""

    def __init__(self, target: Target, drafter: Drafter):
        self.target, self.drafter = target, drafter
        self.shared = shared_tables(target)

        def run(params: dict, tokens: Any) -> Any:
            model = target.model(params)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            out = model(tokens, positions, CausalRows(), drafter.config.target_layer_ids)
            return model.logits(out.hidden), out.taps

        def blocks(params: dict, taps: Any, previous: Any, anchors: Any) -> Any:
            module = drafter.model(params)
            context = module.context(taps)
            hidden = module._block_hidden(self.shared, context, previous[..., 0], anchors)
            base = self.shared.logits(hidden)
            return base, forced_blocks(module, self.shared, context, previous, anchors)

        self._run, self._blocks = jax.jit(run), jax.jit(blocks)

    def __call__(self, sequences: list[list[int]]) -> tuple[Any, Any]:
        """(logits [n, LONGEST, V], taps [n, LONGEST, m D])."""
        width = max(LONGEST, *(len(s) for s in sequences))
        padded = np.zeros((len(sequences), width), np.int32)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence)] = sequence
        return self._run(self.target.params, padded)

    def blocks(self, taps: Any, previous: Any, anchors: Any) -> tuple[Any, Any]:
        """(base logits [n, K, V], BlockOutput) of one block a sequence: previous [n, K], anchors [n]."""
        previous, anchors = np.asarray(previous, np.int32)[:, None], np.asarray(anchors, np.int32)[:, None]
        base, out = self._blocks(self.drafter.params, taps, previous, anchors)
        return base[:, 0], jax.tree.map(lambda x: x[:, 0], out)


def check_first_rounds(vectors: Any, forward: Forward) -> Iterator[Result]:
    """`infer/*`: the drafter's intermediates and the target's verify logits over three greedy rounds."""
    prompt = vectors["infer/prompt_ids"].tolist()
    tokens, records = play(forward.target, forward.drafter, prompt, SamplingParams(NEW_TOKENS, stop_tokens=()))
    logits, taps = forward([tokens])
    yield close("infer/prefill_last_logits", logits[0, len(prompt) - 1], vectors["infer/prefill_last_logits"])
    yield exact("infer/anchor_token", tokens[len(prompt)], vectors["infer/anchor_token"])
    features_from = 0
    for r in range(3):
        name = f"infer/r{r}"
        start, record = int(vectors[f"{name}_start"]), records[r]
        yield exact(f"{name}_start", record.anchors, start)
        yield exact(f"{name}_sampled_tokens", record.draft_tokens, vectors[f"{name}_sampled_tokens"][0])
        yield exact(f"{name}_accepted", record.accepted, vectors[f"{name}_accepted"])
        yield exact(f"{name}_next_token", record.next_token, vectors[f"{name}_next_token"])
        yield close(f"{name}_context_features", taps[:, features_from:start], vectors[f"{name}_context_features"])
        features_from = start
        base, forced = forward.blocks(taps, [[tokens[start], *record.draft_tokens[:-1]]], [start])
        yield close(f"{name}_block_hidden", forced.hidden, vectors[f"{name}_block_hidden"])
        yield close(f"{name}_base_logits", base, vectors[f"{name}_base_logits"])
        if f"{name}_corrected_logits" in vectors:
            yield close(f"{name}_corrected_logits", forced.logits, vectors[f"{name}_corrected_logits"])
        if f"{name}_confidence_logits" in vectors:
            expected = vectors[f"{name}_confidence_logits"]
            yield close(f"{name}_confidence_logits", record.confidence[None], expected)
            yield close(f"{name}_confidence_teacher_forced", forced.confidence, expected)
        block = [*tokens[: start + 1], *record.draft_tokens]
        verify, _ = forward([block])
        yield close(f"{name}_target_logits", verify[:, start : len(block)], vectors[f"{name}_target_logits"])


def check_transcripts(
    group: str, vectors: Any, target: Target, drafter: Drafter, stops_drafting: bool = False
) -> Iterator[Result]:
    """A whole set of greedy transcripts, round by round, with its summary as the reference's evaluator counts it.

    stops_drafting: the reference ends a proposal at a drafted stop token; here the rest of the block, which could never
    be committed, is left out of the counts.
    """
    block = drafter.config.block_size
    policy = Threshold(int(group.rsplit("conf", 1)[1]) / 10) if "_conf" in group else Fixed()
    stops = tuple(vectors[f"{group}/stop_token_ids"].tolist()) if f"{group}/stop_token_ids" in vectors else ()
    sampling = SamplingParams(NEW_TOKENS, stop_tokens=stops)
    played = []
    prompts = sorted(
        {name.split("/")[1] for name in vectors.files if name.startswith(f"{group}/p") and name.count("/") == 2}
    )
    for p in prompts:
        name = f"{group}/{p}"
        tokens, records = play(target, drafter, vectors[f"{name}/prompt_ids"].tolist(), sampling, policy)
        if stops_drafting:
            records = [proposed_to_stop(record, stops) for record in records]
        played.append(records)
        yield exact(f"{name}/output_ids", tokens, vectors[f"{name}/output_ids"])
        if f"{name}/ar_ids" in vectors:
            plain, _ = play(target, None, vectors[f"{name}/prompt_ids"].tolist(), sampling)
            yield exact(f"{name}/ar_ids", plain[-NEW_TOKENS:], vectors[f"{name}/ar_ids"])
        yield from check_rounds(name, vectors, records, block)
    rounds = [r for records in played for r in records]
    lengths = np.array([int(r.verify_lengths) for r in rounds])
    accepted = np.array([int(r.accepted) for r in rounds])
    committed = np.array([int(r.committed) for r in rounds])
    columns = np.arange(block)
    longer, good = lengths[:, None] > columns, accepted[:, None] > columns
    counts = [len(prompts), len(rounds), committed.sum(), lengths.sum()]
    yield exact(f"{group}/summary_counts", counts, vectors[f"{group}/summary_counts"])
    yield exact(f"{group}/proposals_at_pos", longer.sum(0), vectors[f"{group}/proposals_at_pos"])
    yield exact(f"{group}/accepted_at_pos", (good & longer).sum(0), vectors[f"{group}/accepted_at_pos"])
    if len(rounds):
        row = [committed.mean(), lengths.mean(), committed.sum() / (lengths.sum() + len(rounds))]
        yield close(f"{group}/summary_row", row, vectors[f"{group}/summary_row"])
    if f"{group}/calib_ece" in vectors:
        survival = prefix_survival(np.stack([r.confidence for r in rounds]))
        found = calibration_metrics(survival, good, longer)
        names = {"predicted_mean": "pred_mean", "accepted_mean": "target_mean", "observations": "total_weight"}
        for field in found.__dataclass_fields__:
            key = f"{group}/calib_{names.get(field, field)}"
            yield close(key, np.nan_to_num(getattr(found, field), nan=-1.0), vectors[key])


def proposed_to_stop(record: Any, stops: tuple[int, ...]) -> Any:
    """The record with its verify length cut behind the first stop token that was drafted."""
    at = np.flatnonzero(np.isin(record.draft_tokens, stops))
    cut = np.minimum(record.verify_lengths, at[0] + 1) if len(at) else record.verify_lengths
    return record._replace(verify_lengths=cut)


def check_rounds(name: str, vectors: Any, records: list[Any], block: int) -> Iterator[Result]:
    count = len(records)
    proposed = np.full((count, block), -1)
    for row, r in enumerate(records):
        # A stop inside the drafts cuts the effective length; the recorded proposal is the one before that.
        length = (
            int(np.sum(vectors[f"{name}/round_draft_tokens"][row] >= 0))
            if row < len(vectors[f"{name}/round_draft_tokens"])
            else block
        )
        proposed[row, :length] = r.draft_tokens[:length]

    def column(field: str) -> np.ndarray:
        return np.array([int(getattr(r, field)) for r in records], int)

    yield exact(f"{name}/round_draft_tokens", proposed, vectors[f"{name}/round_draft_tokens"])
    yield exact(f"{name}/round_starts", column("anchors"), vectors[f"{name}/round_starts"])
    yield exact(f"{name}/acceptance_lengths", column("committed"), vectors[f"{name}/acceptance_lengths"])
    yield exact(f"{name}/proposal_lengths", column("verify_lengths"), vectors[f"{name}/proposal_lengths"])
    yield exact(f"{name}/accepted_draft_lengths", column("accepted"), vectors[f"{name}/accepted_draft_lengths"])
    # A stop inside the drafts ends the request: the reference still draws a next token there, which nobody ever sees.
    emitted = vectors[f"{name}/acceptance_lengths"] > vectors[f"{name}/accepted_draft_lengths"]
    if len(emitted) == count:
        expected = vectors[f"{name}/round_next_tokens"][emitted]
        yield exact(f"{name}/round_next_tokens", column("next_token")[emitted], expected)
    if f"{name}/round_confidence_logits" in vectors:
        found = np.stack([r.confidence for r in records]) if count else np.zeros((0, block))
        yield close(f"{name}/round_confidence_logits", found, vectors[f"{name}/round_confidence_logits"])


def check_sampled_rounds(vectors: Any, forward: Forward) -> Iterator[Result]:
    """`t1/*`: temperature-1 rounds with the reference's drafts and uniforms."""
    drafts, starts = vectors["t1/draft_tokens"], vectors["t1/start"]
    width = drafts.shape[1] + 1
    sequences = [[*prefix[prefix >= 0], *draft] for prefix, draft in zip(vectors["t1/prefix_ids"], drafts, strict=True)]
    logits, taps = forward(sequences)
    rows = starts[:, None] + np.arange(width)
    params = _params([1.0] * len(drafts))
    law_t = sampling_law(jnp.take_along_axis(logits, rows[..., None], axis=1), params)
    previous = [sequence[start : start + width - 1] for sequence, start in zip(sequences, starts, strict=True)]
    law_d = sampling_law(forward.blocks(taps, previous, starts)[1].logits, params)
    yield close("t1/draft_probs", law_d, vectors["t1/draft_probs"])
    yield close("t1/target_probs", law_t, vectors["t1/target_probs"])
    full = jnp.full((len(drafts),), width - 1)
    found = RejectionSampling()(jnp.asarray(drafts), Dense(law_d), law_t, jnp.asarray(vectors["t1/u"]), full)
    mask = np.arange(width - 1) < np.asarray(found.accepted)[:, None]
    yield exact("t1/accept_prefix_mask", mask.astype(int), vectors["t1/accept_prefix_mask"])
    yield exact("t1/accepted", found.accepted, vectors["t1/accepted"])
    yield close("t1/next_token_dist", found.next_law, vectors["t1/next_token_dist"])


def check_statistics(case: Path, vectors: Any, target: Target, drafter: Drafter) -> Iterator[Result]:
    """`t1_stats/*`: as many one-round samples of our own as the reference drew; exact laws by chi-square, the
    acceptance-length histogram by a two-sample chi-square."""
    meta = json.loads((case / "meta.json").read_text())
    total, prompt = int(meta["t1_stats"]["n"]), vectors["t1_stats/prompt_ids"].tolist()
    slots = 250
    # Anchor and one full round: enough new tokens that no limit cuts the round.
    buckets = (slots * (drafter.config.block_size + 1),)
    config = EngineConfig(slots, len(prompt) + NEW_TOKENS, "fixed", buckets=buckets)
    engine = Engine(target, drafter, config, SamplingParams(NEW_TOKENS, 1.0, stop_tokens=()))
    firsts, seconds, lengths = [], [], []
    for begin in range(0, total, slots):
        for i in range(slots):
            engine.submit(begin + i, Request(prompt))
        engine.admit()
        engine.state, record = one_round(engine.loop, engine.params, engine.state, engine.occupancy)
        tokens = np.asarray(engine.state.tokens)
        firsts.append(tokens[:, len(prompt)])
        seconds.append(tokens[:, len(prompt) + 1])
        lengths.append(np.asarray(record.committed))
        for i in range(slots):
            engine.cancel(begin + i)
    first, second, length = (np.concatenate(x) for x in (firsts, seconds, lengths))
    vocab = target.config.vocab_size
    yield at_least(
        "t1_stats/first_token", chi_square(np.bincount(first, minlength=vocab), vectors["t1_stats/first_token_probs"])
    )
    top = int(vectors["t1_stats/top_first_token"])
    counts = np.bincount(second[first == top], minlength=vocab)
    yield at_least("t1_stats/second_token", chi_square(counts, vectors["t1_stats/second_token_probs_given_top"]))
    expected = vectors["t1_stats/acceptance_length_counts"]
    ours = np.bincount(length, minlength=len(expected))
    yield at_least("t1_stats/acceptance_length", two_sample(ours, expected))


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of counts under a law; cells expecting fewer than 5 are pooled."""
    from scipy.stats import chi2

    law = np.asarray(law, np.float64) / np.sum(law, dtype=np.float64)
    expected = law * counts.sum()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    kept = expected > 0
    if np.any(observed[~kept]):
        return 0.0
    statistic = np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept])
    return float(chi2.sf(statistic, max(kept.sum() - 1, 1)))


def two_sample(first: np.ndarray, second: np.ndarray) -> float:
    """p-value that two histograms come from one law."""
    from scipy.stats import chi2_contingency

    seen = (first + second) > 0
    return float(chi2_contingency(np.stack([first[seen], second[seen]])).pvalue)


def check_sampling(case: Path) -> Iterator[Result]:
    """The `sampling` case: laws at temperatures, acceptance with stops, residuals."""
    vectors = np.load(case / "vectors.npz")
    logits = jnp.asarray(vectors["probs/logits"])
    for temperature, expected in zip(vectors["probs/temperatures"], vectors["probs/out"], strict=True):
        params = _params([temperature] * len(logits))
        yield close(f"probs/temperature {temperature:g}", sampling_law(logits, params), expected)
    p_t, p_d = jnp.asarray(vectors["residual/p_t"]), Dense(jnp.asarray(vectors["residual/p_d"])[:, None])
    residual = normalised(p_d.residual(p_t, jnp.zeros(len(p_t), jnp.int32)), p_t)
    yield close("residual/out", residual, vectors["residual/out"])
    lengths, drafts = vectors["verify/draft_len"], vectors["verify/draft_tokens"]
    params = _params(vectors["verify/temperature"])
    law = sampling_law(jnp.asarray(vectors["verify/target_logits"]), params)
    found = RejectionSampling()(
        jnp.maximum(drafts, 0), Dense(jnp.asarray(vectors["verify/draft_probs"])), law,
        jnp.asarray(vectors["verify/u"]), jnp.asarray(lengths),
    )  # fmt: skip
    mask = np.arange(drafts.shape[1]) < np.asarray(found.accepted)[:, None]
    yield exact("verify/accept_prefix_mask", mask.astype(int), vectors["verify/accept_prefix_mask"])
    stops = np.where(vectors["verify/use_stop"][:, None], vectors["verify/stop_token_ids"][None], -1)
    kept, ended = first_stop(jnp.asarray(drafts), jnp.asarray(stops), found.accepted)
    yield exact("verify/accepted", kept, vectors["verify/accepted"])
    yield exact("verify/terminated_by_stop", ended, vectors["verify/terminated_by_stop"])
    yield exact("verify/effective_len", np.where(ended, kept, lengths), vectors["verify/effective_len"])
    emitted = ~vectors["verify/terminated_by_stop"]  # after a stop the reference draws a token that nobody ever sees
    yield close("verify/next_dist", found.next_law[emitted], vectors["verify/next_dist"][emitted])


def check_calibration(case: Path) -> Iterator[Result]:
    """The `aux` case's confidence metrics."""
    vectors = np.load(case / "vectors.npz")
    observed = np.arange(vectors["conf/probs"].shape[1]) < vectors["conf/lens"][:, None]
    found = calibration_metrics(vectors["conf/probs"], vectors["conf/targets"], observed)
    names = {"predicted_mean": "pred_mean", "accepted_mean": "target_mean", "observations": "total_weight"}
    summary = {"predicted_mean": "pred_mean", "accepted_mean": "target_mean"}
    for field in found.__dataclass_fields__:
        yield close(f"conf/{field}", getattr(found, field), vectors[f"conf/{names.get(field, field)}"])
        key = f"conf/summary_{summary.get(field, field + '_mean')}"
        if key in vectors:
            yield close(key, found.mean(field), vectors[key])


def _params(temperatures: Any) -> SamplingArrays:
    rows = len(temperatures)
    zeros = jnp.zeros((rows,))
    return SamplingArrays(jnp.asarray(temperatures, jnp.float32), zeros.astype(jnp.int32), zeros + 1, zeros)
