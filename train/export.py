"""Writes the drafter of a run's latest checkpoint to RUN/drafter, whether or not the run is finished.

    python -m train.export --config NAME [--option value ...]

The options are those that the run was started with. infer.export writes a drafter in other layouts.
"""

from dspark_jax.config.cli import parse_training, program, to_json
from dspark_jax.devices import announce
from dspark_jax.distributed import barrier, bounded_by_peers, initialize_from_environment, is_first, require_same
from dspark_jax.storage.places import shown
from dspark_jax.training.fitting import export_run


@program
def main(argv: list[str]) -> None:
    config = parse_training(argv, "train.export", __doc__)
    initialize_from_environment()
    announce(config.compute_dtype)
    require_same({"they were given different configurations": to_json(config)})

    # A process that waits for one that has died ends with a sentence, not by hanging.
    with bounded_by_peers():
        step, drafter = export_run(config)
        barrier("the end of the export")

    if is_first():
        print(f"Step {step} is exported to {shown(drafter)}.")


if __name__ == "__main__":
    main()
