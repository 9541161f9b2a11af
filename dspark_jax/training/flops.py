"""Floating-point operations of a training step, counted from shapes, and what accelerators can do at most.

A product's backward costs one forward for its input and one for its weight: frozen tables have no weight gradient,
taps no input gradient, the target's logits neither. Recomputation is not counted. A query sees T/2 positions on
average.

Letters: B sequences of a step, T padded tokens, N anchors, γ block size, m taps, D hidden, F mlp, Q query heads, G kv
heads, H head dim, V vocab, L draft layers, R Markov rank.
"""

from functools import singledispatch

from dspark_jax.drafters.config import DrafterConfig, DSparkConfig
from dspark_jax.drafters.eagle3 import Eagle3Config
from dspark_jax.drafters.mtp import MTPConfig
from dspark_jax.targets.config import TargetConfig

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets, by the beginning of jax's `device_kind`; the first
# that fits counts, so longer names stand before shorter ones.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p calls itself both "TPU v5" and "TPU v5p"
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
)


def peak_flops(device_kind: str, compute_dtype: str) -> float | None:
    """FLOP/s of one device; None where it is unknown: on a CPU, and in float32, whose peak depends on the precision."""
    if compute_dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_BF16_FLOPS if device_kind.startswith(name)), None)


@singledispatch
def training_flops(config: DrafterConfig, sequences: int, length: int) -> float | None:
    """Operations that one step of B sequences padded to T needs, forward and backward; None: not counted for a kind
    that isn't registered below."""
    return None


@training_flops.register
def _(config: DSparkConfig, sequences: int, length: int) -> float:
    dims = config.backbone
    d, layers, rows = dims.hidden_size, dims.num_layers, config.num_anchors * config.block_size
    layer = dims.layers[0]  # draft layers are all alike
    queries, keys = dims.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    features = 2 * length * len(config.target_layer_ids) * d * d
    context = layers * 2 * length * d * 2 * keys
    block = layers * 2 * rows * d * (2 * queries + 2 * keys + 3 * dims.intermediate_size)
    attention = layers * 2 * 2 * rows * (length / 2 + config.block_size) * queries
    head = 2 * rows * d * dims.vocab_size
    markov = 2 * rows * config.markov_rank * dims.vocab_size
    # forward + backward: fc has a weight gradient only, the draft's head an input gradient only
    return sequences * (2 * features + 3 * (context + block + attention + markov) + 2 * head + head)


@training_flops.register
def _(config: MTPConfig, sequences: int, length: int) -> float:
    dims = config.backbone
    projection = 2 * length * 2 * dims.hidden_size * dims.hidden_size
    trained = projection + _layer(dims, length, dims.hidden_size) + _attention(dims, length, length / 2)
    return sequences * (3 * trained + 3 * 2 * config.num_anchors * dims.hidden_size * dims.vocab_size)


@training_flops.register
def _(config: Eagle3Config, sequences: int, length: int) -> float:
    dims, steps = config.backbone, config.block_size
    d = dims.hidden_size
    features = 2 * length * len(config.target_layer_ids) * d * d
    seen = length / 2 + steps / 2
    trained = steps * (_layer(dims, length, 2 * d) + _attention(dims, length, seen))
    # The target's logits are the same for all steps.
    heads = (2 * steps + 1) * 2 * length * d * dims.vocab_size
    return sequences * (2 * features + 3 * trained + heads)


def _layer(dims: TargetConfig, rows: float, inputs: int) -> float:
    """Forward products of a decoder layer's projections and MLP, attention reading rows of width `inputs`."""
    layer = dims.layers[0]
    queries, keys = dims.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    return 2 * rows * (inputs * (queries + 2 * keys) + dims.hidden_size * (queries + 3 * dims.intermediate_size))


def _attention(dims: TargetConfig, rows: float, seen: float) -> float:
    """Forward products of scores and mixing, each row over `seen` others."""
    return 2 * 2 * rows * seen * dims.num_heads * dims.layers[0].head_dim
