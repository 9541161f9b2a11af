"""Accepted length during training: held-out prompts decoded with the current drafter, by the serving loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dspark_jax.checkpoints.huggingface import DTYPES, load_target
from dspark_jax.distributed import from_first
from dspark_jax.drafters.registry import Drafter, skeleton
from dspark_jax.evaluation.acceptance import Acceptance, acceptance_by_domain, macro_tau
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import split
from dspark_jax.targets.target import Target
from dspark_jax.training.objective import cast_params
from dspark_jax.training.run import Heldout
from dspark_jax.training.spec import StepSpec

TAU = "eval_tau"
"""The record's key of the macro-averaged accepted length, by which checkpoints are ranked."""


@dataclass(frozen=True)
class Evaluator:
    """Decodes the held-out prompts: in every process all of them, on one of its devices, with a copy of the target.

    The first call compiles; later calls reuse the same programs.

    Attributes:
        target: with its parameters, on one device.
        prompts, sampling, engine: what is decoded, and how.
        blank: the drafter without parameters.
        gather: training parameters -> whole copies in the decoding dtype.
    """

    target: Target
    prompts: tuple[EncodedPrompt, ...]
    sampling: SamplingParams
    engine: EngineConfig
    blank: Drafter
    gather: Callable[[dict], dict]

    @classmethod
    def of(cls, name: str, target: Target, step: StepSpec, heldout: Heldout) -> "Evaluator":
        """The evaluator of a run; reads the whole target.

        Args:
            name: the run's, which the drafter takes.
            target: the described target.
            step: the drafter's shape, dtype and mesh.
            heldout: the prompts and how they are decoded.
        """
        # The structure alone; the parameters of the moment are put in at each call.
        graphdef, _ = split(skeleton(step.drafter_hf))
        dtype = DTYPES[step.dtype]

        return cls(
            # A second copy of the target: the run itself holds only its embedding and head.
            target=load_target(target.name, dtype=step.dtype),
            prompts=heldout.prompts,
            sampling=SamplingParams(heldout.settings.max_new_tokens, heldout.settings.temperature),
            # Fixed: profiles differ from process to process, and a checkpoint is judged by whole blocks.
            engine=EngineConfig(
                min(heldout.settings.slots, len(heldout.prompts)), policy="fixed", smallest_prompt_bucket=64
            ),
            blank=Drafter(name, step.drafter, graphdef, {}, step.drafter_hf),
            # One whole copy per device, so that the decode loop runs on local arrays.
            gather=jax.jit(lambda params: cast_params(params, dtype), out_shardings=step.placement.whole),
        )

    def __call__(self, params: dict) -> dict[str, float]:
        """The figures of a record, from the run's (split, float32) parameters."""
        with jax.transfer_guard("allow"):
            # After `gather` every device holds a whole copy; one of this process's is enough.
            local = jax.tree.map(lambda x: x.addressable_data(0), self.gather(params))
            drafter = Drafter(self.blank.name, self.blank.config, self.blank.graphdef, local, self.blank.hf_config)
            found = figures(acceptance_by_domain(self.target, drafter, self.prompts, self.sampling, self.engine))

        # Checkpoints are ranked by this figure, so every process must have the same.
        return found | {TAU: from_first(found[TAU])}


def figures(by_domain: dict[str, Acceptance]) -> dict[str, Any]:
    """`eval_tau`, the mean over domains of equal weight; `eval_tau_DOMAIN`; `eval_accept@k`: x_k accepted given x_<k
    were."""
    # Positions are pooled over domains, because one domain alone may rarely come as far as k.
    pooled = Acceptance.pooled(list(by_domain.values()))
    # NaN where no round came as far as k: a record holds numbers only.
    rates = {f"eval_accept@{k}": rate for k, rate in enumerate(pooled.conditional) if not np.isnan(rate)}
    return {TAU: macro_tau(by_domain)} | {f"{TAU}_{name}": a.tau for name, a in by_domain.items()} | rates
