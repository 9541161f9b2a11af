"""DeepSeek-V4 on machines that are not here: memory of a chip, collectives and copies of the compiled programs.

    python -m infer.studies.v4_plans --results docs/results/v4_plans.json
    python -m infer.studies.v4_plans --repository Flash-DSpark --machines v5p:2x2x1 --results docs/results/v4_plans.json

Weights lie as they are stored (fp8 and fp4 codes), state in bfloat16. Programs are compiled by libtpu (extra `aot`) or
the CUDA compiler (`aot-cuda`) with a few layers of each kind, training steps with one and two of three stages, and
carried on to the whole depth; without the compiler, memory is counted. Each program takes minutes: one that the file
has is not compiled again, so that a call goes on where an earlier one ended.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dspark_jax.config.cli import load_config, parse, program
from dspark_jax.config.schema import TrainConfig
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output, read_results
from dspark_jax.planning.v4_plans import (
    DEPTHS,
    MACHINES,
    STAGES,
    Machine,
    carried_on,
    compiled_figures,
    counted,
    expert_figures,
    published,
    step_arguments,
    step_figures,
    widened_experts,
)

ROWS = 48
"""Rows of the layer of experts that is compiled alone: 8 requests, blocks of 5 and their anchors."""


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
    parts: tuple[Literal["experts", "loop", "step"], ...] = ()
    """Only these: one layer's experts, the decode loop, the training step of the DSpark module."""
    compile: bool = True
    """Compile the programs; without, memory is counted alone."""


@program
def main(argv: list[str]) -> None:
    settings = parse(V4PlansSettings, argv, description=__doc__)
    checked(settings.machines)
    make_output(settings.results.parent)
    plans = read_results(settings.results)

    for repository, machine, part in wanted(settings):
        key = f"{repository} on {machine.name}, {part}"
        mesh = machine.step_mesh if part == "step" else machine.mesh
        stored = plans.get(key, {})
        # The file may have programs for requests of another length, or of a mesh that the machine had before.
        same = {"longest": settings.longest, "mesh": mesh}
        stored = stored if all(stored.get(name, value) == value for name, value in same.items()) else {}
        plan: dict[str, Any] = {"made": {}} | stored | {"memory_gib": machine.memory_gib, "mesh": mesh}
        figures: Callable[[int], dict[str, Any]]
        depths: tuple[int, ...]

        if part == "step":
            figures, depths, whole = partial(step_figures, step_config(repository), machine), STAGES, 3
            plan["arguments_gib"] = step_arguments(step_config(repository), machine)
            # Nothing is left to ask a compiler where the arguments alone are too large.
            depths = depths if plan["arguments_gib"] <= machine.memory_gib else ()
        elif part == "experts":
            plan["widened_gib"] = widened_experts(repository, machine)
            figures, depths, whole = partial(expert_figures, repository, machine), (ROWS,), 0
        else:
            sizes = repository, machine, int(part.removeprefix("R = ")), settings.longest
            plan |= {"longest": settings.longest, "counted_gib": counted(*sizes)}
            figures, depths = partial(compiled_figures, *sizes), DEPTHS[repository]
            whole = published(repository)["num_hidden_layers"]

        # Of depths that are no longer taken nothing is carried on; the whole depth follows from what is left.
        plan["made"] = {depth: found for depth, found in plan["made"].items() if int(depth) in depths}
        plan.pop("whole_depth", None)

        for depth in depths if settings.compile else ():
            if str(depth) not in plan["made"]:
                try:
                    plan["made"][str(depth)] = figures(depth)
                except UserError as refused:
                    plan["refused"] = str(refused)
                    break
            # After each, since a compilation takes minutes and the next one may not fit.
            plans = add_results(settings.results, {key: plan})

        if len(plan["made"]) == len(depths):
            plan.pop("refused", None)
            plan |= {"whole_depth": carried_on(plan["made"], whole)} if len(depths) == 2 else {}
        plans = add_results(settings.results, {key: plan})

    plans = in_order(plans)
    print(decoding_table(plans), step_table(plans), expert_table(plans), *too_large(plans), sep="\n\n")


def step_config(repository: str) -> TrainConfig:
    """The configuration that trains the repository's DSpark module."""
    config = load_config(f"deepseek_v4_{repository.lower().replace('-', '_')}")
    assert isinstance(config, TrainConfig)
    return config


def wanted(settings: V4PlansSettings) -> Iterator[tuple[str, Machine, str]]:
    """(repository, machine, part) of each plan, cheap ones first."""
    loops = [f"R = {slots}" for slots in settings.slots]
    for part in settings.parts or ("experts", "loop", "step"):
        for repository, machines in MACHINES.items():
            for machine in machines if settings.repository in ("", repository) else ():
                if machine.name in (settings.machines or (machine.name,)):
                    for one in loops if part == "loop" else (part,):
                        yield repository, machine, one


def checked(machines: tuple[str, ...]) -> None:
    """UserError for a machine that is not planned for."""
    known = {machine.name for machines in MACHINES.values() for machine in machines}
    if unknown := set(machines) - known:
        raise UserError(f"--machines names {sorted(unknown)[0]}; plans are made for {', '.join(sorted(known))}.")


def in_order(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans by repository, machine and number of requests, whichever was compiled first."""
    names = [f"{repository} on {machine.name}" for repository, machines in MACHINES.items() for machine in machines]

    def place(key: str) -> tuple[int, int]:
        name, _, part = key.rpartition(", ")
        return names.index(name) if name in names else len(names), int(part.removeprefix("R = ") if "=" in part else 0)

    return {key: plans[key] for key in sorted(plans, key=place)}


def too_large(plans: dict[str, Any]) -> list[str]:
    """A sentence for each program that a compiler refused, and for each that needs more than a chip has."""
    found = []
    for key, plan in plans.items():
        needed, given, of = together(plan), plan.get("arguments_gib", 0.0), plan["memory_gib"]
        if given > of:
            found.append(f"{key}: does not fit, as state and batch alone take {given:.1f} GiB of a chip of {of}.")
        elif "refused" in plan:
            found.append(f"{key}: {plan['refused']}")
        elif needed is not None and needed > of:
            found.append(f"{key}: does not fit, as a chip of {of} GiB would have to hold {needed:.1f}.")
    return found


def together(plan: dict[str, Any]) -> float | None:
    """GiB that a chip holds for good and the most that a dispatch takes beside it; None for a layer of experts, and
    for a step that was not compiled."""
    whole = plan.get("whole_depth", {})
    if "counted_gib" in plan:
        return sum(plan["counted_gib"].values()) + whole.get("temporary_gib", 0.0)
    return whole["arguments_gib"] + whole["temporary_gib"] if whole else None


def decoding_table(plans: dict[str, Any]) -> str:
    """The decode loops; figures of the whole depth but for copies, which were looked for in the compiled programs."""
    body = []
    for key, plan in plans.items():
        if "counted_gib" not in plan:
            continue
        held, whole, of = plan["counted_gib"], plan.get("whole_depth"), plan["memory_gib"]
        row = [key, plan["mesh"], *(f"{held[name]:.1f}" for name in ("target", "drafter", "state"))]

        if whole is None:
            row += ["", f"{together(plan):.1f} of {of}", "", "", ""]
        else:
            row += [f"{whole['temporary_gib']:.2f}", f"{together(plan):.1f} of {of}", exchanged(whole)]
            row += [str(whole["copies"]), f"{whole['compile_cpu_seconds']:.0f}"]
        body.append(row)

    header = ["GiB a chip", "mesh", "target", "drafter", "state", "temporary", "together"]
    return table([*header, "collectives", "copies", "CPU seconds to compile"], body)


def step_table(plans: dict[str, Any]) -> str:
    """The training steps; figures of three stages."""
    body = []
    for key, plan in plans.items():
        if key.endswith("step") and (whole := plan.get("whole_depth")) is not None:
            row = [key, plan["mesh"], f"{whole['arguments_gib']:.1f}", f"{whole['temporary_gib']:.1f}"]
            body.append([*row, f"{together(plan):.1f} of {plan['memory_gib']}", exchanged(whole),
                         f"{whole['compile_cpu_seconds']:.0f}"])  # fmt: skip

    header = ["GiB a chip", "mesh", "state and batch", "temporary", "together", "collectives"]
    return table([*header, "CPU seconds to compile"], body)


def expert_table(plans: dict[str, Any]) -> str:
    """One layer's experts: temporaries below the widened stack show that no program holds it."""
    body = []
    for key, plan in plans.items():
        for made in plan["made"].values() if key.endswith("experts") else ():
            sizes = made["weights_gib"], made["temporary_gib"], plan["widened_gib"]
            body.append([key, plan["mesh"], *(f"{1024 * size:.1f}" for size in sizes)])

    return table(["MiB a chip", "mesh", "as stored", "temporary", "experts in bfloat16"], body)


def table(header: list[str], body: list[list[str]]) -> str:
    """The rows as a Markdown table, as docs/deepseek-v4.md has them."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))


def exchanged(whole: dict[str, Any]) -> str:
    """The collectives of a program by name."""
    return ", ".join(f"{name} {number} ({size} MiB)" for name, (number, size) in whole["collectives"].items())


if __name__ == "__main__":
    main()
