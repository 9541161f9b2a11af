"""Trains a drafter from a target cache, or from conversations whose states the target computes in each step.

    python -m train.fit --config NAME [--option value ...]

The same command continues a stopped run from its latest checkpoint, to the same parameters. The finished drafter is in
RUN/drafter (DeepSpec-native layout); train.export writes it from the latest checkpoint at any time, and train.plan
estimates the memory of a run.
Several processes are one job where dspark_jax/distributed.py's variables say so; docs/tpu-pods.md has the scripts.
"""

import signal
import sys

from dspark_jax.config.cli import parse_training, program, to_json
from dspark_jax.devices import announce
from dspark_jax.distributed import barrier, bounded_by_peers, initialize_from_environment, is_first, require_same
from dspark_jax.storage.places import shown
from dspark_jax.training.fitting import fit
from dspark_jax.training.guards import Preempted
from dspark_jax.training.summary import table


@program
def main(argv: list[str]) -> None:
    config = parse_training(argv, "train.fit", __doc__)
    initialize_from_environment()
    announce(config.compute_dtype)
    require_same({"they were given different configurations": to_json(config)})

    with bounded_by_peers():
        try:
            fitted = fit(config)
        # The exit code of a process ended by SIGTERM, by which schedulers know that the job is to be run again.
        except Preempted as stop:
            print(stop, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None
        barrier("the end of the run")

    if not is_first():
        return

    # The same command on a finished run trains nothing.
    if fitted.found:
        print(f"The run in {shown(fitted.folder)} is finished; its drafter is in {shown(fitted.drafter)}.")
    else:
        print(table(fitted.summary))


if __name__ == "__main__":
    main()
