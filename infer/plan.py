"""Prints the memory of a decoding device and the floor of a round, without weights or the hardware.

python -m infer.plan --config qwen3_4b_dspark --slots 8 --longest 4096         compiled for this machine's device
python -m infer.plan --target DIR --drafter DIR --topology v5e:2x2 --mesh tensor=4    by the TPU compiler (`aot`)
python -m infer.plan --config qwen3_4b_dspark --topology H200      by the CUDA compiler (`aot-cuda`, Python 3.12)
python -m infer.plan --config qwen3_4b_dspark --no-compile --device "NVIDIA H200"     the floor of a round alone
"""

from typing import Any

from dspark_jax.config.cli import parse, program
from dspark_jax.planning.decoding import DecodePlan, PlanOptions
from dspark_jax.report import table
from dspark_jax.roofline.hardware import known_device, terms_table


@program
def main(argv: list[str]) -> None:
    options = parse(PlanOptions, argv, description=__doc__)
    plan = DecodePlan.of(options)
    rows, kind = plan.describe(), options.device or plan.device_kind
    if options.compile:
        rows |= plan.compile()

    print(table(["decoding", ""], [[name, shown(value)] for name, value in rows.items()]))

    # The floor needs shapes alone, so it is printed for devices that this machine lacks as well.
    # About the mean while an answer fills its slot.
    context = options.context or options.longest // 2
    terms = plan.floor(context)
    if terms is not None:
        print(f"\nThe floor of a round on one device, {context} positions cached a request")
        print(terms_table(terms, known_device(kind)))


def shown(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
