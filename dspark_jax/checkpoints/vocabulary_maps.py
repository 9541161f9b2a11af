"""A pruned draft vocabulary in files of drafters: the tensors `d2t` and `t2d` (docs/algorithm.md, rule 92)."""

import numpy as np

from dspark_jax.checkpoints.tensors import TensorFolder
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.errors import UserError


def maps_of(vocabulary: DraftVocabulary | None, size: int) -> dict[str, np.ndarray]:
    """`d2t` and `t2d` of a pruned vocabulary, or of the identity over `size` ids."""
    member = np.ones(size, np.bool_) if vocabulary is None else vocabulary.member
    ids = np.flatnonzero(member)
    # d2t holds differences, t2d membership: the speculators library's convention (docs/algorithm.md, rule 92).
    return {"d2t": ids - np.arange(len(ids)), "t2d": member}


def stored_vocabulary(tensors: TensorFolder, size: int, whole: int) -> DraftVocabulary:
    """The draft vocabulary of `size` among `whole` ids that the tensors `d2t` and `t2d` describe.

    `d2t[i]` is the difference between target id and draft id i; some files hold the target ids themselves. Where a
    table can be either, `t2d` decides.

    Raises:
        UserError: no `d2t`, one that is neither, one that contradicts `t2d`, or one that can be either without a `t2d`.
    """
    if "d2t" not in tensors.names:
        raise UserError(
            f"{tensors.folder} has a vocabulary reduced to {size} of {whole} tokens and no tensor d2t that says to "
            "which; copy its weights again."
        )

    # Both readings, of which low ids, or differences that grow with every id, allow either.
    # int64: differences may be stored unsigned, and a sum of small integers would wrap.
    table = np.asarray(tensors.raw("d2t")[:]).astype(np.int64)
    readings = (table + np.arange(size), table) if table.shape == (size,) else ()
    found = [
        DraftVocabulary.of(ids, whole)
        for ids in readings
        if np.all(np.diff(ids) > 0) and ids[0] >= 0 and ids[-1] < whole
    ]
    if not found:
        raise UserError(
            f"The tensor d2t in {tensors.folder} does not name {size} different target ids below {whole} in ascending "
            "order; copy its weights again."
        )

    if "t2d" in tensors.names:
        member = np.asarray(tensors.raw("t2d")[:]).astype(bool)
        found = [vocabulary for vocabulary in found if np.array_equal(vocabulary.member, member)]
        if not found:
            raise UserError(
                f"The tensors d2t and t2d in {tensors.folder} contradict each other; copy its weights again."
            )

    # A guess would show only as short accepted lengths.
    if len(set(found)) > 1:
        raise UserError(
            f"The tensor d2t in {tensors.folder} can be read as target ids and as their differences from draft ids; "
            "give weights with the tensor t2d, which tells the two apart."
        )
    return found[0]
