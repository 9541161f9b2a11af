"""A program for jobs: train.fit, whose second process is sent SIGTERM after its second step, and the first is not."""

import os
import signal
import time

import pytest

from dspark_jax.training.guards import Preemption
from train import fit


def main(argv: list[str]) -> None:
    """argv: this process's number, and the arguments of train.fit."""
    process, *arguments = argv
    ask = Preemption.requested

    def requested(self: Preemption, step: int) -> bool:
        if process == "1" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        # The word goes round beside the steps, and those of a tiny drafter take no time.
        time.sleep(0.1 if step >= 2 else 0)
        return ask(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preemption, "requested", requested)
        fit.main(arguments)
