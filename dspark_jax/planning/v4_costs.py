"""The least cost of a pass and of a draft of DeepSeek-V4, counted from the shapes and stored forms of its published
tensors.

Dense weights are read once a pass. Of a layer's routed experts those are read that some row chooses: under even routing
E (1 - (1 - K / E)^n) of E, so that verifying more rows reads more bytes, unlike on a dense target. Hash-routed layers
count like the others.

Letters: n rows of a pass, R requests, c positions cached a request, γ drafts, E experts of which a row chooses K, m
tokens of a compressed entry.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dspark_jax.checkpoints.deepseek_v4_published import StoredTensor, published_tensors
from dspark_jax.roofline.decoding import LAW_FLOPS, LOGIT, distinct_experts
from dspark_jax.roofline.hardware import Term
from dspark_jax.targets.deepseek_v4.config import V4Config, v4_config

KEY = 2  # bytes of a cached number: keys and entries are held in bfloat16
RAW = 4  # bytes of a number that waits to be compressed


@dataclass(frozen=True)
class Weights:
    """Some weights: their bytes as stored, and how many they are."""

    bytes: float
    parameters: float

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, StoredTensor]]) -> "Weights":
        """The weights in these (name, stored form)s; scales are bytes without being parameters."""
        found = list(tensors)
        # An I8 holds two codes of 4 bits.
        counts = (math.prod(t.shape) * (2 if t.dtype == "I8" else 1) for name, t in found if not name.endswith("scale"))
        return cls(sum(t.nbytes for _, t in found), sum(counts))

    def term(self, name: str, rows: float, times: float = 1.0) -> Term:
        """Their products with `rows` rows, the weights read `times` times."""
        return Term(name, 2.0 * rows * self.parameters, times * self.bytes)


@dataclass(frozen=True)
class V4Costs:
    """The counted costs of a V4 target and of its drafter.

    Attributes:
        config: of the target.
        block: γ, the drafts of a block; 0 without a drafter.
        dense: weights of the target's layers without routed experts.
        expert: one routed expert; all are alike.
        head: the output head, which the drafter shares.
        draft_dense: weights of the drafter's blocks without routed experts, and of the projection of its inputs.
        draft_layers: blocks of the drafter.
        markov: the table that each drafted token reads; nothing for MTP-1.
    """

    config: V4Config
    block: int
    dense: Weights
    expert: Weights
    head: Weights
    draft_dense: Weights
    draft_layers: int
    markov: Weights

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], drafter: str | None) -> "V4Costs":
        """Counts a repository.

        Args:
            hf_config: its config.json.
            drafter: 'dspark', 'mtp', or None.
        """
        config, tensors = v4_config(hf_config), published_tensors(hf_config, drafter)

        def those(pattern: str) -> Weights:
            return Weights.of((name, t) for name, t in tensors.items() if re.search(pattern, name))

        # Tables of which a row reads one line are left out: embeddings, hashed choices, the Markov head's first table.
        routed, table = r"\.ffn\.experts\.", r"tid2eid|markov_w"
        return cls(
            config,
            0 if drafter is None else hf_config["dspark_block_size"] if drafter == "dspark" else 1,
            dense=those(rf"^layers\.(?!.*({routed}|{table}))"),
            expert=those(r"^layers\.0\.ffn\.experts\.0\."),
            head=those(r"^head\."),
            draft_dense=those(rf"^mtp\.(?!.*({routed}|{table}))"),
            draft_layers=0 if drafter is None else config.drafter_blocks,
            markov=those(r"markov_w2"),
        )

    def verify(self, rows: float, requests: float, context: float) -> list[Term]:
        """The terms of a pass of the target over `rows` rows of R requests, c positions cached of each."""
        config, vocab = self.config, self.config.vocab_size
        return [
            self.dense.term("verify: dense weights", rows),
            self._experts("verify: routed experts", rows, config.num_layers),
            self._cache(rows, requests, context),
            # The head's product, and its logits written out, which at this vocabulary count.
            self.head.term("verify: head", rows) + Term("", 0.0, LOGIT * rows * vocab),
            Term("sampling laws", LAW_FLOPS * rows * vocab, 2 * LOGIT * rows * vocab),
        ]

    def draft(self, requests: float) -> list[Term]:
        """The terms of drafting a block for R requests; none without a drafter."""
        if not self.block:
            return []
        # MTP-1 runs on the rows that a round has committed, two where its draft was accepted; DSpark on its own γ rows.
        rows, vocab = requests * max(self.block, 2), self.config.vocab_size
        laws = requests * self.block * vocab

        return [
            self.draft_dense.term("draft: dense weights", rows),
            self._experts("draft: routed experts", rows, self.draft_layers),
            self.head.term("draft: head", requests * self.block) + Term("", 0.0, LOGIT * laws),
            self.markov.term("draft: Markov head", requests * self.block, self.block),
            Term("draft: sampling laws", LAW_FLOPS * laws, 2 * LOGIT * laws),
        ]

    def _experts(self, name: str, rows: float, layers: int) -> Term:
        assert self.config.experts is not None
        chosen, count = self.config.experts.per_token, self.config.experts.count
        read = distinct_experts(count, chosen, rows)
        return Term(name, 2.0 * rows * chosen * self.expert.parameters, read * self.expert.bytes).times(layers)

    def _cache(self, rows: float, requests: float, context: float) -> Term:
        """Attention over windows and entries. A request's rows share its window and the index rows that they score."""
        config = self.config
        width, flops, moved = rows / max(requests, 1), 0.0, 0.0

        for layer in config.layers:
            entries = context / layer.ratio if layer.ratio else 0.0
            seen = min(entries, config.index_top) if layer.indexed else entries
            # Scores and mixing of one key that is a value too: two products, of 2 operations each.
            flops += 4.0 * rows * config.num_heads * config.head_dim * (min(context, config.window) + seen)
            # Each row selects entries of its own, until all are read.
            keys = min(context, config.window) + (min(width * seen, entries) if layer.indexed else seen)
            moved += requests * keys * config.head_dim * KEY

            if layer.indexed:
                flops += 2.0 * rows * config.index_heads * config.index_dim * entries
                moved += requests * entries * config.index_dim * KEY
            if layer.ratio:
                # A value and a weight of each new row are written, and read again when its entry closes.
                series = 2 if layer.indexed else 1
                channels = config.head_dim + (config.index_dim if layer.indexed else 0)
                moved += 2 * rows * 2 * series * channels * RAW

        return Term("verify: attention, windows and entries", flops, moved)
