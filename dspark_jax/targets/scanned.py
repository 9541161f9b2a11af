"""A target's layers in a loop, each one's parameters gathered while the layer before it computes.

For meshes that split parameters between uses: unrolled, a compiler may gather many layers long before they run, and its
program has every layer of its own. Parameters lie stacked, alike layers in one array; a layer is gathered from its
slice, after the layer two before it has ended, and is dropped after its use. Two layers are in memory at once.

Axes: B batch row, T position, D hidden, L layer, m tapped layers.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dspark_jax.sharding import ShardingRules, gathered, is_gathered, split
from dspark_jax.targets.attention import Attend
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.decoder import TargetOutput
from dspark_jax.targets.layers import Rope, layer_ropes
from dspark_jax.targets.registry import TARGETS, target_module


@dataclass(frozen=True, eq=False)
class LayerLoop:
    """The loop over a target's layers; `params` of its methods have `layers` as `stacked` gives them.

    Attributes:
        config: of the target.
        period: layers l and l + period are alike; parameters of layers with the same remainder lie in one array.
        graphdef: of the first `period` layers with embedding, norm and head.
        whole: by remainder, the shardings of one layer's parameters in use; None: as they lie.
    """

    config: TargetConfig
    period: int
    graphdef: nnx.GraphDef
    whole: dict[int, Any] | None

    @classmethod
    def of(cls, config: TargetConfig, params: dict, rules: ShardingRules) -> "LayerLoop | None":
        """The loop of a target with these parameters (or shapes), layer by layer and with shardings over a mesh.

        None where it has nothing to gain: parameters that no mesh axis splits for storage, layers that do not repeat,
        mixtures of experts, and families with a model of their own.
        """
        if config.experts is not None or TARGETS[config.model_type].model is not None:
            return None
        count = period_of(config)
        split_up = any(is_gathered(x.shape, x.sharding, rules) for x in jax.tree.leaves(params["layers"]))
        if not split_up or 2 * count > config.num_layers:
            return None
        first = replace(config, layers=config.layers[:count])
        module = nnx.eval_shape(lambda: target_module(first, rngs=nnx.Rngs(0)))
        whole = {at: jax.tree.map(lambda x: gathered(x.sharding, rules), params["layers"][at]) for at in range(count)}
        return cls(config, count, split(module)[0], whole)

    def __call__(
        self, params: dict, tokens: Int[Array, "b t"], positions: Int[Array, "b t"], attend: Attend,
        tap_layers: tuple[int, ...],
    ) -> TargetOutput:  # fmt: skip
        """`DecoderModel.__call__` of the stacked parameters, without keys and values. Not differentiable in them."""
        rest = {name: value for name, value in params.items() if name != "layers"}
        first = {at: jax.tree.map(lambda x: x[0], layer) for at, layer in params["layers"].items()}
        model, ropes = nnx.merge(self.graphdef, {**rest, "layers": first}), layer_ropes(self.config, positions)
        x = model.embed(tokens)

        # A pass of the loop ends with the parameters that it began with, so that no copy of them is carried: an even
        # number of layers, whose gathered forms take turns in two buffers.
        width = self.period if self.period % 2 == 0 else 2 * self.period
        passes = (self.config.num_layers - 1) // width
        slots = _slots(tap_layers, self.config.num_layers)
        taps = jnp.zeros((len(tap_layers) + 1, *x.shape), x.dtype).at[slots[-1]].set(x)

        def run(x: Array, taps: Array, mine: Any, layer: Any, offset: int, last: bool) -> tuple[Array, Array, Any]:
            """One layer, and the gathered parameters of the one behind it."""
            # The slice waits for this layer's input: no gather starts earlier, however the program is ordered.
            x, ahead = jax.lax.optimization_barrier((x, layer + 1))
            following = None if last else self._gathered(params, ahead, offset + 1)
            made = self._layer(rest, first, mine, offset, x, ropes, attend)
            if any(number % width == offset for number in tap_layers if number >= 0):
                # Layers that are not tapped write behind the tapped ones.
                taps = jax.lax.dynamic_update_index_in_dim(taps, made, jnp.asarray(slots)[layer], axis=0)
            return made, taps, following

        def step(number: Array, carried: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            for offset in range(width):
                carried = run(*carried, number * width + offset, offset, False)
            return carried

        carried: tuple[Array, Array, Any] = jax.lax.fori_loop(
            0, passes, step, (x, taps, self._gathered(params, jnp.int32(0), 0))
        )
        for layer in range(passes * width, self.config.num_layers):
            last = layer == self.config.num_layers - 1
            carried = run(*carried, jnp.int32(layer), layer - passes * width, last)

        x, taps, _ = carried
        features = jnp.moveaxis(taps[:-1], 0, -2).reshape(*x.shape[:-1], -1) if tap_layers else x[..., :0]
        return TargetOutput(model.final_norm(x), features, ())

    def _gathered(self, params: dict, layer: Array, offset: int) -> Any:
        """The parameters of a layer in use; `offset` is its number but for whole periods."""
        at = offset % self.period
        mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer // self.period, keepdims=False),
                            params["layers"][at])  # fmt: skip
        return mine if self.whole is None else jax.tree.map(jax.lax.with_sharding_constraint, mine, self.whole[at])

    def _layer(
        self, rest: dict, first: dict, mine: Any, offset: int, x: Array, ropes: tuple[Rope, ...], attend: Attend
    ) -> Array:
        at = offset % self.period
        model = nnx.merge(self.graphdef, {**rest, "layers": first | {at: mine}})
        return model.layers[at](x, ropes[at], attend)[0]


def period_of(config: TargetConfig) -> int:
    """The least number of layers after which their kinds repeat, to the end; all of them where they do not."""
    kinds, count = config.layers, config.num_layers
    fits = (n for n in range(1, count) if count % n == 0 and all(kinds[i] == kinds[i % n] for i in range(count)))
    return next(fits, count)


def stacked(params: dict, period: int) -> dict:
    """The parameters with layers [L / period, ...] by remainder in place of every layer's own, on their devices.

    Takes the layers out of `params` as it goes, so that no more than one stack is held twice.
    """
    layers = params.pop("layers")
    kinds = {at: [layers[number] for number in range(at, len(layers), period)] for at in range(period)}
    leaves = {at: [jax.tree.flatten(layer) for layer in same] for at, same in kinds.items()}
    del layers, kinds

    made = {}
    for at, same in leaves.items():
        structure: Any = same[0][1]
        stacks = []
        for number in range(structure.num_leaves):
            parts = [flat[number] for flat, _ in same]
            for flat, _ in same:
                flat[number] = None
            stacks.append(jax.jit(lambda *xs: jnp.stack(xs), out_shardings=_of_stack(parts[0].sharding))(*parts))
        made[at] = jax.tree.unflatten(structure, stacks)
    return {**params, "layers": made}


def stacked_shapes(params: dict, period: int) -> dict:
    """The shapes of `stacked`, with its shardings."""
    count = len(params["layers"]) // period

    def stack(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=_of_stack(x.sharding))

    return {**params, "layers": {at: jax.tree.map(stack, params["layers"][at]) for at in range(period)}}


def _of_stack(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _slots(tap_layers: tuple[int, ...], count: int) -> list[int]:
    """Where each layer's output is kept: its place among the taps, or behind them all; the last is the embedding's."""
    return [tap_layers.index(number) if number in tap_layers else len(tap_layers) for number in [*range(count), -1]]
