"""Where the arrays of a training step lie on a mesh, stored and in use."""

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.sharding import AnyMesh, ShardingRules, array_sharding, gathered, is_gathered, replicated
from dspark_jax.training.objective import cast_params


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules that lay arrays over it: masters and optimizer state by `rules`, rows over batch axes."""

    mesh: AnyMesh
    rules: ShardingRules

    @property
    def whole(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return replicated(self.mesh)

    def rows(self, tree: Any, leading: int = 0) -> Any:
        """Constrains the row dimension of every leaf, which follows `leading` others, to the batch axes."""

        def place(x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x, self.rules.rows(self.mesh, x.ndim, leading))

        return jax.tree.map(place, tree)

    def tables(self, shared: SharedTables) -> SharedTables:
        """Shardings of the target's tables, as stored."""
        return jax.tree.map(lambda x: array_sharding(x.shape, ("vocab", "embed"), self.mesh, self.rules), shared)

    def gathered(self, tree: Any, shardings: Any) -> Any:
        """Constrains every leaf to its sharding in use: axes that are split for storage only are gathered."""
        return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, gathered(s, self.rules)), tree, shardings)

    def gathered_as(self, params: dict, dtype: Any, abstract: dict) -> dict:
        """`gathered` parameters; those that computing casts to `dtype` travel, and lie, in it."""

        def place(x: Array, narrow: Array, like: Any) -> Array:
            if not is_gathered(x.shape, like.sharding, self.rules):
                return x
            # Cast where it is stored, or the partitioner might gather first.
            narrow = jax.lax.with_sharding_constraint(narrow, like.sharding)
            return jax.lax.with_sharding_constraint(narrow, gathered(like.sharding, self.rules))

        return jax.tree.map(place, params, cast_params(params, dtype), abstract)


def in_use(
    params: dict, shared: SharedTables, placement: Placement | None, stored: dict | None, dtype: Any
) -> tuple[dict, SharedTables]:
    """Parameters and the target's tables as a step uses them: gathered from the devices that store their parts.

    Args:
        params, shared: as they are stored.
        placement: None on a single device.
        stored: shapes of the parameters with their shardings.
        dtype: in which parameters travel.
    """
    if placement is None or stored is None:
        return params, shared

    # Gathered once per step: the partitioner alone would gather parameters again for every chunk of anchors.
    params = placement.gathered_as(params, dtype, stored)
    tables: Any = placement.tables(shared)
    if shared.tied and is_gathered(shared.embed.shape, tables.embed, placement.rules):
        # One array, although the step takes it twice.
        embed = placement.gathered(shared.embed, tables.embed)
        return params, replace(shared, embed=embed, head=embed)
    return params, placement.gathered(shared, tables)
