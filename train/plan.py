"""Memory and compiled program of a training run, without its hardware.

    python -m train.plan --config NAME                                   for the devices of this machine
    python -m train.plan --config NAME --devices 64 --mesh data=16,fsdp=4      for devices that it lacks
    python -m train.plan --config NAME --topology v5e:4x4                the real step, compiled by the TPU compiler
                                                                         (extra `aot`)
Nothing is trained and nothing is written. Options of the configuration apply as in train.fit.
"""

import dataclasses
from dataclasses import dataclass

import jax

from dspark_jax.config.cli import divide_options, mesh_settings, parse, parse_training, program
from dspark_jax.errors import UserError
from dspark_jax.planning.compiled import compiled, figures, topology_mesh, wide_products
from dspark_jax.planning.estimate import describe, estimate, passed_twice
from dspark_jax.planning.traffic import collectives_of
from dspark_jax.planning.training import AbstractRun
from dspark_jax.report import gibibytes, listing, table
from dspark_jax.sharding import abstract_mesh


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan."""

    devices: int = 0
    """Devices to plan for; 0: those of this machine, or of the topology."""
    mesh: str = ""
    """Devices along the mesh axes, as in data=16,fsdp=4; empty: those of the configuration."""
    topology: str = ""
    """TPUs to compile the step for, as in v5e:4x4, v5p:2x2x2 or v6e:4x4; empty: an estimate, nothing compiled."""


@program
def main(argv: list[str]) -> None:
    # Two sets of options on one command line: the plan's, and the configuration's.
    mine, rest = divide_options(argv, PlanOptions)
    options = parse(PlanOptions, mine)
    config = parse_training(rest, "train.plan", __doc__)
    if options.mesh:
        config = dataclasses.replace(config, mesh=mesh_settings(options.mesh, config.mesh))

    sizes = config.mesh.sizes

    # A topology is described to the TPU compiler, which runs here: the figures are of the real program.
    if options.topology:
        if options.devices:
            raise UserError("A topology has its own number of devices; leave out --devices.")

        run = AbstractRun.of(config, topology_mesh(options.topology, *sizes))
        step = compiled(run.lower("tpu"), "The step")
        kind = run.placement.mesh.devices.flat[0].device_kind
        print(listing(describe(run) | {"device": kind} | figures(step, kind, passed_twice(run))))

        return

    # An abstract mesh has any number of devices: shapes and shardings are known without one.
    run = AbstractRun.of(config, abstract_mesh(options.devices or jax.device_count(), *sizes))
    # Lowered, not compiled: what the compiler is asked to multiply in float32, at half the rate or less.
    wide, products = wide_products(run.lower("tpu").as_text())
    print(listing(describe(run) | {"float32 products": f"{wide} of {products}, with an operand over 1 MiB"}))
    print()
    print(listing({name: f"{gibibytes(count):>13}" for name, count in estimate(run).items()}))

    # Counted, not read: what the step asks for on this mesh.
    if found := collectives_of(run):
        body = [[x.name, x.kind, f"{x.devices}", f"{x.times}", f"{x.size / 2**20:,.1f}", f"{x.sent / 1e9:.3f}"]
                for x in found]  # fmt: skip
        print(f"\n{table(['collectives of a step', 'kind', 'devices', 'times', 'MiB each', 'GB sent a device'], body)}")


if __name__ == "__main__":
    main()
