"""DeepSeek-V4 on machines that are not here: memory of a chip, collectives and copies of the decode loop.

    python -m infer.studies.v4_plans --results docs/results/v4_plans.json
    python -m infer.studies.v4_plans --repository Flash-DSpark --machines v5p:2x2x1 --results docs/results/v4_plans.json

Weights lie as they are stored (fp8 and fp4 codes), state in bfloat16. TPU loops are compiled by libtpu (extra `aot`),
with a few layers of each kind, and carried on to the whole depth; where no compiler is at hand, memory is counted.
Results of earlier calls stay in the file, so that machines can be planned one by one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_jax.config.cli import parse, program
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output, read_results
from dspark_jax.planning.v4_plans import MACHINES, compiled_plan, counted
from dspark_jax.report import table


@dataclass(frozen=True)
class V4PlansSettings:
    """Plans DeepSeek-V4's published pairs."""

    results: Path
    """JSON file of all plans."""
    repository: Literal["", "Flash-DSpark", "Pro-DSpark"] = ""
    """Only this one."""
    machines: tuple[str, ...] = ()
    """Only these."""
    slots: tuple[int, ...] = (8, 64)
    """Requests decoded at once, one plan for each."""
    longest: int = 4096
    """Positions of a request."""
    compile: bool = True
    """Compile the loops; without, memory is counted alone."""


@program
def main(argv: list[str]) -> None:
    settings = parse(V4PlansSettings, argv, description=__doc__)
    make_output(settings.results.parent)
    # Earlier plans stay, the same ones made anew are replaced.
    plans = read_results(settings.results)

    checked(settings.machines)
    for repository, machines in MACHINES.items():
        for machine in machines:
            wanted = settings.repository in ("", repository) and machine.name in (settings.machines or (machine.name,))
            # One program for each number of requests: the verify bucket follows it.
            for slots in settings.slots if wanted else ():
                key = f"{repository} on {machine.name}, R = {slots}"
                sizes = repository, machine, slots, settings.longest
                plan: dict[str, Any] = {"memory_gib": machine.memory_gib, "mesh": machine.mesh}
                plan["counted_gib"] = counted(*sizes)
                if settings.compile and machine.topology:
                    plan |= compiled_plan(*sizes)
                # After each, since a compilation may take minutes and a later one may not fit.
                plans = add_results(settings.results, {key: plan})

    print(shown(plans))


def checked(machines: tuple[str, ...]) -> None:
    """UserError for a machine that is not planned for."""
    known = {machine.name for machines in MACHINES.values() for machine in machines}
    if unknown := set(machines) - known:
        raise UserError(f"--machines names {sorted(unknown)[0]}; plans are made for {', '.join(sorted(known))}.")


def shown(plans: dict[str, Any]) -> str:
    """The plans as a table; figures of the whole depth but for copies, which were looked for in the compiled ones."""
    body = []
    for key, plan in plans.items():
        held, whole = plan["counted_gib"], plan.get("whole_depth")
        # Held for good, and the most that a dispatch takes beside it.
        together = sum(held.values()) + (whole["temporary"] if whole else 0)
        row = [key, plan["mesh"], *(f"{held[name]:.1f}" for name in ("target", "drafter", "state"))]
        if whole is None:
            row += ["", f"{together:.1f} of {plan['memory_gib']}", "", "", ""]
        else:
            copied = sum(figures["copies"] for figures in plan["by_layers"].values())
            row += [f"{whole['temporary']:.1f}", f"{together:.1f} of {plan['memory_gib']}"]
            row += [f"{whole['collectives']} of {whole['collective_mib']:.0f} MiB", str(copied)]
            row += [f"{whole['compile_cpu_seconds']:.0f}"]
        body.append(row)

    header = ["GiB a chip", "mesh", "target", "drafter", "state", "temporary", "together", "collectives", "copies"]
    return table([*header, "CPU seconds to compile"], body)


if __name__ == "__main__":
    main()
