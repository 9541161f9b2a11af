"""Peaks of accelerators, and the least time that given operations and bytes take on one.

Peaks are from the makers' data sheets: dense bfloat16 products, traffic of the device's own memory, and links in one
direction. A TPU's are those of both ways round a ring of one axis of its torus; of an axis too short to close into a
ring, half of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        kind: the beginning of jax's `device_kind`.
        flops: bfloat16 FLOP/s, dense.
        bandwidth: bytes/s of its memory.
        memory_gib: GiB of its memory.
        links: bytes/s that it can send to others near it: around a ring of its pod, or of a machine of GPUs.
        network: bytes/s between machines of GPUs; of TPUs, whose pod has none, the links again.
    """

    kind: str
    flops: float
    bandwidth: float
    memory_gib: int
    links: float
    network: float


# The first match is taken, so longer names stand before their prefixes.
DEVICES = (
    Device("TPU v4", 275e12, 1.228e12, 32, 90e9, 90e9),
    Device("TPU v5 lite", 197e12, 0.819e12, 16, 90e9, 90e9),
    Device("TPU v5e", 197e12, 0.819e12, 16, 90e9, 90e9),
    Device("TPU v5", 459e12, 2.765e12, 95, 180e9, 180e9),  # v5p calls itself both "TPU v5" and "TPU v5p"
    Device("TPU v6 lite", 918e12, 1.64e12, 32, 180e9, 180e9),
    Device("TPU v6e", 918e12, 1.64e12, 32, 180e9, 180e9),
    Device("NVIDIA A100", 312e12, 2.039e12, 80, 300e9, 25e9),
    Device("NVIDIA H100 PCIe", 756e12, 2.0e12, 80, 64e9, 50e9),
    Device("NVIDIA H100", 989e12, 3.35e12, 80, 450e9, 50e9),
    Device("NVIDIA H200", 989e12, 4.8e12, 141, 450e9, 50e9),
)


def known_device(kind: str) -> Device | None:
    """The device of a `device_kind`; None for what is not in the table, as CPUs are not."""
    return next((device for device in DEVICES if kind.startswith(device.kind)), None)


def peak_flops(kind: str, compute_dtype: str) -> float | None:
    """FLOP/s of one device; None on a CPU, and in float32, whose peak depends on the precision setting."""
    device = known_device(kind)
    # On TPUs a float32 product takes one, three or six bfloat16 passes, by the precision setting.
    return None if device is None or compute_dtype != "bfloat16" else device.flops


@dataclass(frozen=True)
class Term:
    """A part of some work.

    Attributes:
        name: for tables.
        flops: operations that it needs.
        bytes: traffic if every operand is read once and every result written once.
        again: further operations of a program that recomputes instead of storing; no part of the floor.
    """

    name: str
    flops: float
    bytes: float
    again: float = 0.0

    def __add__(self, other: "Term") -> "Term":
        return Term(self.name, self.flops + other.flops, self.bytes + other.bytes, self.again + other.again)

    def times(self, count: float) -> "Term":
        """The term repeated `count` times."""
        return Term(self.name, self.flops * count, self.bytes * count, self.again * count)

    def seconds(self, device: Device) -> float:
        """The least seconds on one device: products and traffic overlap perfectly within a term."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


def total(terms: Iterable[Term], name: str = "together") -> Term:
    """The sum of terms under a new name."""
    # Sums over terms of any names take the name given here.
    return sum(terms, Term(name, 0.0, 0.0))


def floor_seconds(terms: Iterable[Term], device: Device) -> float:
    """The floor, in seconds, of terms that run one after the other."""
    return sum(term.seconds(device) for term in terms)


def terms_table(terms: Iterable[Term], device: Device | None) -> str:
    """A table by term: Gflop, Gflop recomputed, GB, and on a known device the floor and its bound."""
    rows = [("term", "Gflop", "again", "GB", *(("floor ms", "bound by") if device else ()))]

    listed = list(terms)

    for term in (*listed, total(listed)):
        row = [term.name, f"{term.flops / 1e9:,.1f}", f"{term.again / 1e9:,.1f}", f"{term.bytes / 1e9:,.3f}"]
        if device is not None:
            products = term.flops / device.flops >= term.bytes / device.bandwidth
            last = term.name == "together"
            # The last row adds the terms' floors: the floor of their sum would let terms overlap.
            seconds = floor_seconds(listed, device) if last else term.seconds(device)
            row += [f"{1e3 * seconds:,.3f}", "" if last else "products" if products else "memory"]

        rows.append(tuple(row))

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(w) if i in (0, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )

    return "\n".join(line.rstrip() for line in lines)
