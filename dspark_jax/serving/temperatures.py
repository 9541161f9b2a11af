"""Sequential Temperature Scaling (SPEC section 4): the fit, and sts.json, which says what it is valid for.

Axes: n proposals, K block position.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.serving_tables import StsTable, read_sts
from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.readers import SEAL, check_seal, read_object, sealed
from dspark_jax.scheduling.calibration import ECE_BINS, position_metrics, sigmoid
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.targets.target import Target

TEMPERATURES = np.exp(np.linspace(np.log(0.1), np.log(10.0), 121))


def fit_temperatures(logits: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """float64 [K]: for k = 1..K in order, the t_k of a grid (a factor 10 either way) that minimises the ECE of the
    cumulative product, earlier positions fixed.

    The ECE of finite samples has many shallow minima; of the temperatures within its noise of the best the one of least
    Brier score is taken. A position without both outcomes keeps 1.

    Args:
      logits: [n, K] confidence logits.
      accepted: [n, K] 1 where the whole prefix x_<=k was accepted.
      observed: [n, K] bool, where x_k was verified.
    """
    temperatures = np.ones(logits.shape[1])
    survival = np.ones(len(logits))
    for k in range(logits.shape[1]):
        z = np.asarray(logits[:, k], np.float64)
        rows = np.asarray(observed[:, k], bool)
        label = accepted[rows, k]
        if len(label) and 0 < np.sum(label) < len(label):
            scores = np.array([position_metrics(survival[rows] * sigmoid(z[rows] / t), label) for t in TEMPERATURES])
            ece, brier = scores[:, 0], scores[:, 2]
            noise = 0.1 * np.sqrt(ECE_BINS * np.mean(label) * (1 - np.mean(label)) / len(label))
            temperatures[k] = TEMPERATURES[np.argmin(np.where(ece <= ece.min() + noise, brier, np.inf))]
        survival = survival * sigmoid(z / temperatures[k])
    return temperatures


def fit_shift(logits: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> float:
    """The one number that, added to every confidence logit, makes conditional acceptance likeliest: for the bias of a
    head that is too sure of itself by the same amount everywhere, which no temperature mends. Arguments as
    `fit_temperatures`."""
    before = np.concatenate([np.ones((len(logits), 1), bool), np.asarray(accepted, bool)[:, :-1]], axis=1)
    reached = np.asarray(observed, bool) & before  # x_k judged, with all before it accepted
    z, label = np.asarray(logits, np.float64)[reached], np.asarray(accepted, np.float64)[reached]
    shift = 0.0
    for _ in range(50):
        p = sigmoid(z + shift)
        shift += float(np.clip(np.sum(label - p) / max(np.sum(p * (1 - p)), 1e-9), -1, 1))
    return shift


def validity(target: Target, drafter: Drafter, sampling: SamplingParams) -> dict[str, Any]:
    """What a calibration holds for: these weights, and these sampling settings, which decide what is accepted."""
    return {
        "target": fingerprint(target.params),
        "target_name": target.name,
        "drafter": fingerprint(drafter.params),
        "drafter_name": drafter.name,
        "temperature": float(sampling.temperature),
        "top_k": int(sampling.top_k),
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p),
    }


def fingerprint(params: Mapping[str, Any]) -> str:
    """Of the names, shapes and some 64 values of every array, in bfloat16: the same whichever dtype was loaded, another
    after any training, and cheap for a model of any size."""
    seen = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        flat = jnp.ravel(leaf)
        some = np.asarray(flat[:: max(1, flat.shape[0] // 64)][:64].astype(jnp.bfloat16))
        seen.update(jax.tree_util.keystr(path).encode() + str(leaf.shape).encode() + some.tobytes())
    return seen.hexdigest()[:32]


def write_calibration(path: Path, table: StsTable, valid_for: Mapping[str, Any]) -> None:
    """sts.json with the fields that servers read, and `valid_for`."""
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    # The hash stands under `valid_for`: servers read the fields beside it, and only those they know.
    content = sealed(fields)
    seal = content.pop(SEAL)
    write_json(path, {**content, "valid_for": {**valid_for, SEAL: seal}})


def read_calibration(path: Path, valid_for: Mapping[str, Any]) -> np.ndarray:
    """[K] temperatures.

    Raises:
      UserError: a file that is no calibration, or one made for other weights or sampling settings than `validity` says.
    """
    table, content = read_sts(path), read_object(path)
    made_for = content.pop("valid_for", None)
    if not isinstance(made_for, dict):
        raise UserError(f"{path} does not say what it is valid for; calibrate with infer.calibrate.")
    for name, expected in valid_for.items():
        if not name.endswith("_name") and made_for.get(name) != expected:
            said, here = (facts.get(f"{name}_name", facts.get(name)) for facts in (made_for, valid_for))
            same = " (of the same name, but other weights)" if said == here else ""
            raise UserError(
                f"{path} was calibrated for {name.replace('_', '-')} {said}, this is {here}{same}; calibrate "
                "again with infer.calibrate."
            )
    seal = {SEAL: made_for[SEAL]} if SEAL in made_for else {}
    check_seal({**content, **seal}, str(path), cure="calibrate again with infer.calibrate")
    return np.asarray(table.temperatures)
