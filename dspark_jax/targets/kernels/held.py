"""The one place where attention over cached positions gets its form: a kernel that reads what requests hold, or einsum.

TPUs, NVIDIA's GPUs and CPUs (float32, dspark_jax/native) take their kernels where the shapes fit, everything else the
einsum form, which is also what the kernels are tested against. The environment variable DSPARK_ATTENTION forces one:
"einsum" everywhere, or "kernel", which has a CPU run the TPU's kernel as plain jax, slowly.

Axes: R requests, W rows of a block, Q query heads, G kv heads, S cached positions, J keys of the own block, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool, Float, Int

from dspark_jax import native
from dspark_jax.sharding import Axis, ShardingRules, Units, array_sharding, traced_mesh
from dspark_jax.targets.kernels import held_gpu, held_tpu
from dspark_jax.targets.kernels.forms import chosen_form
from dspark_jax.targets.kernels.softmax import MASKED

MOST_ROWS = 512
"""Rows that share a kv head from which scores no longer fit beside the keys: those of prompts."""


def held_attention(
    q: Float[Array, "r w q h"],
    own_keys: Float[Array, "r j g h"],
    own_values: Float[Array, "r j g h"],
    cached: Any,
    lengths: Int[Array, " r"],
    lowest: Int[Array, "r #w"] | None,
    within: Bool[Array, "#r w j"] | None,
    scale: float,
    einsum: Callable[[Array, Array], Array],
    apart: bool = False,
) -> Float[Array, "r w q h"]:
    """Attention of a block's rows over what their request holds and over the block, by the platform's form.

    Args:
        q, own_keys, own_values: the block's rows and their own keys and values.
        cached: `keys` and `values` [R, G, S, H]; or pages [P, C, G * H] of both, and `tables` [R, N] of the requests'.
        lengths: positions held; the rows of a request with 0 see their own block alone.
        lowest: first position that each row sees; None: 0.
        within: own keys that each row sees; None: all.
        scale: of the scores.
        einsum: computes the same of own keys and values without a kernel.
        apart: a row whose own key or value is not finite gives NaN, and the others see zeros there; J = W.
    Raises:
        UserError: DSPARK_ATTENTION has an unknown value.
    """
    form = chosen_form()
    keys, values, tables = cached.keys, cached.values, getattr(cached, "tables", None)
    rows = q.shape[1] * q.shape[2] // own_keys.shape[2]
    own, others = (own_keys, own_values), (keys, values, lengths, lowest, within, tables, scale)

    def guarded(attend: Callable[[Array, Array], Array]) -> Callable[[], Array]:
        return partial(_kept_apart, attend, *own) if apart else partial(attend, *own)

    def kernel(attend: Callable[..., Array], interpret: bool = False) -> Callable[[], Array]:
        return guarded(lambda own_keys, own_values: _by_kernel(q, own_keys, own_values, *others, attend, interpret))

    plain = guarded(einsum)
    if form == "einsum" or rows > MOST_ROWS:
        return plain()

    # Only what a platform has of its own is traced for it.
    forms: dict[str, Callable[[], Array]] = {}
    if held_tpu.takes(q, keys, tables):
        forms["tpu"] = kernel(held_tpu.attend)
    if held_gpu.takes(q, keys, own_keys, tables):
        forms["cuda"] = kernel(held_gpu.attend)
    if form == "kernel":
        forms["cpu"] = kernel(held_tpu.attend, interpret=True)
    elif native.attends(q, keys, tables):
        # It keeps rows apart itself: what XLA does around it takes as long as a tenth of a layer's products.
        forms["cpu"] = partial(_by_kernel, q, *own, *others, native.attend, apart=apart)
    return jax.lax.platform_dependent(**forms, default=plain) if forms else plain()


def _kept_apart(attend: Callable[[Array, Array], Array], own_keys: Array, own_values: Array) -> Array:
    """The result of own keys and values with zeros for rows that are not finite, and NaN in those rows.

    In one product with the other rows such a value would reach them all, because its weight of 0 times NaN is NaN.
    """
    sound = jnp.all(jnp.isfinite(own_keys) & jnp.isfinite(own_values), axis=(-2, -1), keepdims=True)  # [R, W, 1, 1]
    return jnp.where(sound, attend(jnp.where(sound, own_keys, 0), jnp.where(sound, own_values, 0)), jnp.nan)


# Compiled calls are traced once for all layers of a shape; a kernel's trace takes longer than all else of a layer's.
@partial(jax.jit, static_argnames=("scale", "attend", "interpret", "apart"))
def _by_kernel(
    q: Array, own_keys: Array, own_values: Array, keys: Array, values: Array, lengths: Array, lowest: Array | None,
    within: Array | None, tables: Array | None, scale: float, attend: Callable[..., Array], interpret: bool = False,
    apart: bool = False,
) -> Array:  # fmt: skip
    """The kernel's result on rows as layers have them; `apart` for a kernel that keeps rows apart itself."""
    requests, width, _, size = q.shape
    rows = q.astype(keys.dtype).reshape(requests, width, own_keys.shape[2], -1, size)
    own = (x.astype(keys.dtype) for x in (own_keys, own_values))
    bounds = None if lowest is None else jnp.broadcast_to(lowest, (requests, width))
    mask = None if within is None else jnp.where(within, 0.0, MASKED).astype(jnp.float32)

    kernel = partial(attend, scale=scale, interpret=interpret, **({"apart": True} if apart else {}))
    return _over_mesh(kernel, rows, keys, values, lengths, *own, bounds, mask, tables).reshape(q.shape).astype(q.dtype)


def _over_mesh(attend: Callable[..., Array], q: Array, *others: Array | None) -> Array:
    """The kernel on each device's requests and kv heads: the partitioner would gather a kernel's operands."""
    mesh = traced_mesh()
    if mesh is None:
        return attend(q, *others)

    rows, by_request = ("batch", None, "kv_heads"), ("batch",)
    cached: tuple[Axis, ...] = ("batch", "kv_heads")
    if others[-1] is not None:
        # Each device has all pages, of its own heads: any request may have any of them.
        cached = (None, None, Units("kv_heads", q.shape[2]))
    axes = (rows, cached, cached, by_request, rows, rows, by_request, by_request, by_request)
    specs = [_spec(x, names, len(q), mesh) for x, names in zip((q, *others), axes, strict=True)]
    # Without the check of replication, which kernels do not take part in.
    split = jax.shard_map(attend, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    return split(q, *others)


def _spec(x: Array | None, axes: tuple[Axis, ...], requests: int, mesh: AbstractMesh) -> Any:
    """How the mesh splits an operand, as it splits the caches between rounds."""
    if x is None:
        return None
    # One mask for all requests is not split.
    names = (axes[0] if len(x) == requests else None, *axes[1:], *[None] * (x.ndim - len(axes)))
    return array_sharding(x.shape, names, mesh, ShardingRules()).spec
