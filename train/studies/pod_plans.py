"""Memory and collectives of the paper's runs on pods and clusters, for the meshes that compete there; nothing compiled.

    python -m train.studies.pod_plans                                    (docs/results/pod_plans.json)
    python -m train.studies.pod_plans --configs qwen3_4b_dspark --machines v6e:8x8 --sources online

A step of 512 sequences of 4,096 tokens. Memory is `train.plan`'s estimate: stored arrays exactly, activations from the
traced gradient. Collectives are counted (`planning/traffic.py`) with their bytes and the least time on the links; the
floor is that of `train.bench`, without links. Rows are `sequences` of a micro-batch on a device, the most that fit in
four fifths of its memory. Of every machine, the mesh with the least time by count that fits is marked.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_jax.config.cli import load_config, parse, program
from dspark_jax.config.schema import MeshSettings, TrainConfig
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output
from dspark_jax.planning.estimate import activation_bytes, estimate
from dspark_jax.planning.floor import step_floor
from dspark_jax.planning.traffic import collectives_of
from dspark_jax.planning.training import AbstractRun
from dspark_jax.report import table
from dspark_jax.roofline.hardware import Device, floor_seconds, known_device
from dspark_jax.sharding import abstract_mesh

Source = Literal["offline", "online"]


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind: how many, how many of them lie together, and the meshes (fsdp, tensor) to compare."""

    kind: str
    devices: int
    together: int
    meshes: tuple[tuple[int, int], ...]


# A TPU pod's chips are all on its own links.
CLUSTERS = {
    "v5p:4x4x4": Cluster("TPU v5p", 64, 64, ((1, 1), (4, 1), (16, 1), (64, 1), (16, 4))),
    "v6e:8x8": Cluster("TPU v6e", 64, 64, ((1, 1), (8, 1), (64, 1), (8, 8))),
    "8 x H200": Cluster("NVIDIA H200", 8, 8, ((1, 1), (8, 1), (2, 4))),
    "64 x H200": Cluster("NVIDIA H200", 64, 8, ((1, 1), (8, 1), (64, 1), (2, 4))),
}


@dataclass(frozen=True)
class PodSettings:
    """Plans of training runs on clusters that are not here."""

    configs: tuple[str, ...] = ("qwen3_4b_dspark", "qwen3_8b_dspark", "qwen3_14b_dspark", "gemma4_12b_dspark")
    """Training configurations; of published targets."""
    machines: tuple[str, ...] = tuple(CLUSTERS)
    """Clusters, by their names in this program."""
    sources: tuple[Source, ...] = ("offline", "online")
    """Where the target's states come from."""
    result: Path = Path("docs/results/pod_plans.json")
    """The figures; rows of other names stay in it."""


@program
def main(argv: list[str]) -> None:
    settings = parse(PodSettings, argv, description=__doc__)
    if unknown := set(settings.machines) - set(CLUSTERS):
        raise UserError(f"No cluster {min(unknown)!r}; choose among {', '.join(CLUSTERS)}.")
    make_output(settings.result.parent)

    activations: dict[tuple[Any, ...], int] = {}
    for name in settings.configs:
        body = []
        for source in settings.sources:
            for where in settings.machines:
                rows = [
                    row
                    for fsdp, tensor in CLUSTERS[where].meshes
                    if (row := plan(load_config(name), source, where, fsdp, tensor, activations))
                ]
                fitting = [row for row in rows if row["fits"]]
                best = min(fitting, key=lambda row: row["seconds"], default=None)
                for row in rows:
                    row["chosen"] = row is best
                    body.append(line(source, where, row))
                add_results(settings.result, {name: {f"{where}, {source}": rows}, "machine": machine()}, levels=2)
        print(f"{name}\n{table(HEADER, body)}\n")
    print(settings.result)


HEADER = ["states", "devices", "mesh", "sequences", "GiB", "sent GB", "links s", "floor s", "chosen"]


def line(source: str, where: str, row: dict[str, Any]) -> list[str]:
    """A plan as a row of the printed table."""
    fits = f"{row['gib']:.1f}" if row["fits"] else f"{row['gib']:.1f} too many"
    sent = sum(one["sent_gb"] for one in row["collectives"].values())
    return [source, where, row["mesh"], str(row["sequences"]), fits, f"{sent:.1f}", f"{row['link_seconds']:.3f}",
            f"{row['floor_seconds']:.3f}", "*" if row["chosen"] else ""]  # fmt: skip


def plan(
    config: TrainConfig, source: Source, where: str, fsdp: int, tensor: int, activations: dict[tuple[Any, ...], int]
) -> dict[str, Any] | None:
    """The plan with the most sequences a device that fit, or with one where none does; None where a target in the step
    is not counted."""
    cluster = CLUSTERS[where]
    device = known_device(cluster.kind)
    assert device is not None
    mesh = abstract_mesh(cluster.devices, -1, fsdp, tensor)
    groups = cluster.devices // tensor
    most = config.data.global_batch // groups

    found = None
    for sequences in (n for n in (1, 2, 4, 8) if n <= most):
        # Nothing is read: a file of conversations is only named.
        data = dataclasses.replace(
            config.data, source=source, conversations="conversations.jsonl", accumulation_steps=most // sequences
        )
        sizes = MeshSettings(data=-1, fsdp=fsdp, tensor=tensor)
        run = AbstractRun.of(dataclasses.replace(config, data=data, mesh=sizes), mesh)
        # Activations depend on the rows of a device alone.
        key = config.name, source, sequences, tensor
        if key not in activations:
            activations[key] = activation_bytes(run)
        made = figures(run, cluster, device, activations[key])
        if made is None or (found is not None and not made["fits"]):
            break
        found = made | {"sequences": sequences}
    return found


def figures(run: AbstractRun, cluster: Cluster, device: Device, activations: int) -> dict[str, Any] | None:
    """Memory, collectives and least seconds of one plan."""
    floor = step_floor(run)
    if floor is None:
        return None
    parts = estimate(run, activations)
    collectives = collectives_of(run)
    links = sum(one.seconds(device, cluster.together) for one in collectives)
    seconds = floor_seconds(floor, device)
    sizes = run.placement.mesh.shape
    return {
        "mesh": ", ".join(f"{axis}={sizes[axis]}" for axis in ("data", "fsdp", "tensor")),
        "gib": parts["total"] / 2**30,
        "memory_gib": {name: count / 2**30 for name, count in parts.items() if count and name != "total"},
        "fits": parts["total"] <= 0.8 * device.memory_gib * 2**30,
        "micro_batches": run.micro_batches,
        "collectives": {
            one.name: {"kind": one.kind, "devices": one.devices, "times": one.times, "mib": one.size / 2**20,
                       "sent_gb": one.sent / 1e9, "seconds": one.seconds(device, cluster.together)}
            for one in collectives
        },
        "link_seconds": links,
        "floor_seconds": seconds,
        # As if nothing overlapped.
        "seconds": links + seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
