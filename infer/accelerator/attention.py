"""The part about attention over what is held: the kernel, by slot and by page, beside the einsum form, by capacity.

Axes: R requests, W rows of a block, Q query heads, G kv heads, S positions of a slot, H head dim.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import jax
import jax.numpy as jnp

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.serving.settings import DEFAULT_ENGINE
from dspark_jax.targets.attention import KeysValues, Prefix, block_attention, causal_block
from dspark_jax.targets.kernels.forms import FORM
from dspark_jax.targets.pages import PagedLayer

from .pairs import Shape, target_config
from .report import Report

CALLS = 64  # calls that one dispatch makes, each on the result of the one before
REPEATS = 5


def attention(report: Report, part: str, shape: Shape) -> None:
    """Seconds of one layer's attention over the cache by einsum and by kernel, the latter also over pages: plain rounds
    and blocks of 8 rows, a slot's capacity as decoded with and four times that, an eighth of it held and half of it.
    Medians of alternating runs."""
    config = target_config(shape)
    heads, layer, dtype = config.num_heads, config.layers[0], DTYPES[shape.dtype]
    forms = {"einsum": ("einsum", False), "kernel": ("auto", False), "pages": ("auto", True)}

    for requests in sorted({shape.requests[0], min(8, shape.requests[-1])}):
        for size in (shape.longest, 4 * shape.longest):
            for width in (1, 8):
                if report.out_of_time(part):
                    return
                sizes = (requests, width, heads, layer.num_kv_heads, size, layer.head_dim)
                runs = {name: _timed(*form, *sizes, dtype) for name, form in forms.items()}
                for held in (size // 8, size // 2):
                    seconds: dict[str, list[float]] = {form: [] for form in forms}
                    for _ in range(REPEATS):
                        for form, run in runs.items():
                            seconds[form].append(run(held))

                    einsum, kernel, pages = (median(seconds[form]) for form in forms)
                    moved = 2 * requests * held * layer.num_kv_heads * layer.head_dim * jnp.dtype(dtype).itemsize
                    figures = {
                        "einsum_seconds": einsum,
                        "kernel_seconds": kernel,
                        "pages_seconds": pages,
                        "kernel_over_einsum": kernel / einsum,
                        "pages_over_kernel": pages / kernel,
                    }
                    figures["kernel_gigabytes_per_second"] = moved / kernel / 1e9
                    report.add(part, **{f"R={requests} W={width} S={size} held={held}": figures})


def _timed(
    form: str, paged: bool, requests: int, width: int, heads: int, groups: int, size: int, head_dim: int, dtype: type
) -> Callable[[int], float]:
    """A function of the positions held that returns the seconds of one call; compiled, and warm."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def made(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    q = made(requests, width, heads, head_dim)
    own = (requests, width, groups, head_dim)
    block = KeysValues(made(*own), made(*own))
    cache: Prefix
    if paged:
        # As many pages as hold the same, in an order without any order.
        page, count = DEFAULT_ENGINE.page, -(-size // DEFAULT_ENGINE.page)
        tables = jax.random.permutation(next(keys), requests * count).reshape(requests, count)
        pools = [made(requests * count, page, groups * head_dim) for _ in "kv"]
        cache = PagedLayer(pools[0], pools[1], tables.astype(jnp.int32), groups)
    else:
        cache = KeysValues(*(made(requests, groups, size, head_dim) for _ in "kv"))
    within = causal_block(width)[None]

    @jax.jit
    def calls(count: jax.Array, q: jax.Array, block: KeysValues, cache: Prefix, lengths: jax.Array) -> jax.Array:
        def call(_: int, q: jax.Array) -> jax.Array:
            return block_attention(q, block, cache, lengths, None, within, scale=head_dim**-0.5)

        return jax.lax.fori_loop(0, count, call, q)

    def seconds(count: int, held: int) -> float:
        operands = jnp.asarray(count), q, block, cache, jnp.full((requests,), held)
        started = time.perf_counter()
        calls(*operands).block_until_ready()
        return time.perf_counter() - started

    with _forced(form):
        seconds(1, 1)
    # A dispatch of no call is what the host and the device take for any.
    return lambda held: max(seconds(CALLS, held) - seconds(0, held), 1e-9) / CALLS


@contextmanager
def _forced(form: str) -> Iterator[None]:
    """Attention traced within takes this form."""
    before = os.environ.get(FORM)
    os.environ[FORM] = form
    try:
        yield
    finally:
        os.environ.pop(FORM)
        if before is not None:
            os.environ[FORM] = before
