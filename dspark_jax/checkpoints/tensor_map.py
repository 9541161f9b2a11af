"""Which stored tensor is which parameter, and how the one is laid out as the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.joined import PARTS, Columns, columns_of

ParamPath = tuple[Any, ...]


class Layout(Enum):
    """How a stored tensor (output-first, heads flattened) becomes a parameter here (input-first)."""

    SAME = "same"
    LINEAR = "[out, in] -> [in, out]"
    HEADS_OUT = "[N*H, D] -> [D, N, H]"
    HEADS_IN = "[D, N*H] -> [N, H, D]"
    GROUPS_OUT = "[G*O, I] -> [G, I, O]"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of a parameter of this shape."""
        if self is Layout.LINEAR:
            return shape[::-1]
        if self is Layout.HEADS_OUT:
            return (shape[1] * shape[2], shape[0])
        if self is Layout.HEADS_IN:
            return (shape[2], shape[0] * shape[1])
        if self is Layout.GROUPS_OUT:
            return (shape[0] * shape[2], shape[1])
        return shape

    def read(self, stored: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the parameter of `shape`, read from slices of the stored tensor alone.

        A head is read whole, even where `index` takes a part of it: stored heads are contiguous only as wholes.
        """
        # The part in the parameter's own axes; each layout says which stretch of the stored tensor that is.
        spans = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        lo = [span.start for span in spans]
        hi = [span.stop for span in spans]

        if self is Layout.LINEAR:
            return stored[lo[1] : hi[1], lo[0] : hi[0]].T
        if self is Layout.HEADS_OUT:
            h = shape[2]
            # Head n is the stored rows n·H to (n + 1)·H.
            rows = stored[lo[1] * h : hi[1] * h, lo[0] : hi[0]]
            return rows.reshape(-1, h, rows.shape[-1]).transpose(2, 0, 1)[..., lo[2] : hi[2]]

        if self is Layout.HEADS_IN:
            h = shape[1]
            # The same heads, as stretches of columns.
            columns = stored[lo[2] : hi[2], lo[0] * h : hi[0] * h]
            return columns.reshape(columns.shape[0], -1, h).transpose(1, 2, 0)[:, lo[1] : hi[1]]

        if self is Layout.GROUPS_OUT:
            o = shape[2]
            # Each group's projection follows the one before in the stored rows.
            rows = stored[lo[0] * o : hi[0] * o, lo[1] : hi[1]]
            return rows.reshape(-1, o, rows.shape[-1]).transpose(0, 2, 1)[..., lo[2] : hi[2]]

        return stored[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]

    def write(self, array: np.ndarray) -> np.ndarray:
        """The stored form of a whole parameter, the inverse of `read`."""
        stored = self.stored_shape(array.shape)

        if self is Layout.LINEAR:
            return array.T
        if self is Layout.HEADS_OUT:
            return array.transpose(1, 2, 0).reshape(stored)
        if self is Layout.HEADS_IN:
            return array.transpose(2, 0, 1).reshape(stored)
        if self is Layout.GROUPS_OUT:
            return array.transpose(0, 2, 1).reshape(stored)
        return array.reshape(stored)


@dataclass(frozen=True)
class Stored:
    """Where a parameter is stored. A name with {} stands for one tensor for each index of the first axis (experts).
    `codes`: the parameter keeps a quantised tensor's bytes instead of its values."""

    name: str
    layout: Layout = Layout.SAME
    codes: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the parameter is stored as one tensor for each index of its first axis."""
        return "{}" in self.name

    def parts(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """(name, stored shape) of each tensor that a parameter of this shape is stored in."""
        if self.stacked:
            return [(self.name.format(i), self.layout.stored_shape(shape[1:])) for i in range(shape[0])]
        return [(self.name, self.layout.stored_shape(shape))]

    def read(self, slices: Sequence[Any], shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the parameter of `shape`, from slices of the tensors in `parts`."""
        if self.stacked:
            # The first axis indexes tensors here, so a device opens only its own experts.
            return np.stack([self.layout.read(one, shape[1:], index[1:]) for one in slices[index[0]]])
        return self.layout.read(slices[0], shape, index)

    def write(self, array: np.ndarray) -> list[np.ndarray]:
        """The tensors in `parts` of a whole parameter."""
        return [self.layout.write(part) for part in (array if self.stacked else [array])]


@dataclass(frozen=True)
class StoredApart:
    """Where a joined parameter is stored: each of its parts in a tensor of its own, as `columns` lays them out."""

    names: tuple[str, ...]
    columns: Columns
    layout: Layout = Layout.SAME
    codes: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The tensors' names, for messages."""
        return ", ".join(self.names)

    def parts(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """(name, stored shape) of each tensor that a parameter of this shape is stored in."""
        return [(name, self.layout.stored_shape(part)) for name, part in zip(self.names, self._shapes(shape))]

    def read(self, slices: Sequence[Any], shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the parameter of `shape`, from slices of the tensors in `parts`."""
        # Whole units are read, and cut where the index cuts them.
        lo, hi, _ = index[-1].indices(shape[-1])
        width = self.columns.width
        first, last = lo // width, -(-hi // width)

        found = []
        for one, part, columns in zip(slices, self._shapes(shape), self.columns.widths, strict=True):
            found.append(self.layout.read(one, part, (*index[:-1], slice(first * columns, last * columns))))
        units = Columns(last - first, self.columns.widths)
        return units.join(found)[..., lo - first * width : hi - first * width]

    def write(self, array: np.ndarray) -> list[np.ndarray]:
        """The tensors in `parts` of a whole parameter."""
        return [self.layout.write(part) for part in self.columns.split(array)]

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(*shape[:-1], self.columns.units * width) for width in self.columns.widths]


# Parameter path -> where it is stored.
TensorMap = Mapping[ParamPath, Stored | StoredApart]

# Path below a decoder layer -> its tensor below the layer's prefix, in every family here, targets and drafters alike;
# parts of joined parameters by the names that they would have by themselves.
LAYER_TENSORS: dict[ParamPath, Stored] = {
    ("input_norm", "weight"): Stored("input_layernorm.weight"),
    ("post_attention_norm", "weight"): Stored("post_attention_layernorm.weight"),
    ("pre_feedforward_norm", "weight"): Stored("pre_feedforward_layernorm.weight"),
    ("post_feedforward_norm", "weight"): Stored("post_feedforward_layernorm.weight"),
    ("layer_scalar",): Stored("layer_scalar"),
    ("attention", "q_weight_dp"): Stored("self_attn.q_proj.weight", Layout.LINEAR),
    ("attention", "k_weight_dc"): Stored("self_attn.k_proj.weight", Layout.LINEAR),
    ("attention", "v_weight_dc"): Stored("self_attn.v_proj.weight", Layout.LINEAR),
    ("attention", "o_weight_pd"): Stored("self_attn.o_proj.weight", Layout.LINEAR),
    ("attention", "q_bias_p"): Stored("self_attn.q_proj.bias"),
    ("attention", "k_bias_c"): Stored("self_attn.k_proj.bias"),
    ("attention", "v_bias_c"): Stored("self_attn.v_proj.bias"),
    ("attention", "o_bias_d"): Stored("self_attn.o_proj.bias"),
    ("attention", "q_norm", "weight"): Stored("self_attn.q_norm.weight"),
    ("attention", "k_norm", "weight"): Stored("self_attn.k_norm.weight"),
    ("mlp", "gate_weight_df"): Stored("mlp.gate_proj.weight", Layout.LINEAR),
    ("mlp", "up_weight_df"): Stored("mlp.up_proj.weight", Layout.LINEAR),
    ("mlp", "down_weight_fd"): Stored("mlp.down_proj.weight", Layout.LINEAR),
    ("mlp", "gate_bias_f"): Stored("mlp.gate_proj.bias"),
    ("mlp", "up_bias_f"): Stored("mlp.up_proj.bias"),
    ("mlp", "down_bias_d"): Stored("mlp.down_proj.bias"),
    ("mlp", "router_weight_de"): Stored("mlp.gate.weight", Layout.LINEAR),
    ("mlp", "gate_weight_edf"): Stored("mlp.experts.{}.gate_proj.weight", Layout.LINEAR),
    ("mlp", "up_weight_edf"): Stored("mlp.experts.{}.up_proj.weight", Layout.LINEAR),
    ("mlp", "down_weight_efd"): Stored("mlp.experts.{}.down_proj.weight", Layout.LINEAR),
}


def is_layer_tensor(below: ParamPath) -> bool:
    """Whether a path below a decoder layer is of a parameter that every family stores under the same name."""
    return below in LAYER_TENSORS or below[-1] in PARTS


def layer_tensor(below: ParamPath, prefix: str, config: TargetConfig, index: int) -> Stored | StoredApart:
    """The tensors of the parameter at path `below` decoder layer `index` stored under `prefix`."""
    if below[-1] not in PARTS:
        stored = LAYER_TENSORS[below]
        return Stored(f"{prefix}.{stored.name}", stored.layout)

    # Files keep every matrix by itself.
    parts, columns = columns_of(below[-1], config, index)
    tensors = [LAYER_TENSORS[*below[:-1], part] for part in parts]
    return StoredApart(tuple(f"{prefix}.{one.name}" for one in tensors), columns, tensors[0].layout)


def stored_names(table: TensorMap, leaves: Mapping[ParamPath, Any]) -> set[str]:
    """The names of all tensors in which parameters of these shapes are stored."""
    return {name for path, leaf in leaves.items() for name, _ in table[path].parts(leaf.shape)}
