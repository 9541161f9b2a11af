"""Strategies of a load study: the policies and caps that are compared, and which of them adapt."""

from typing import Any, Literal

from dspark_jax.serving.settings import PolicyName

Strategy = Literal[
    "plain", "fixed-1", "mtp", "fixed", "threshold", "causal", "look-ahead", "asynchronous", "retrospective"
]  # fmt: skip
STATIC = ("plain", "fixed-1", "mtp", "fixed", "threshold")
ADAPTIVE = ("causal", "look-ahead", "asynchronous", "retrospective")
WIDTHS = (1, 2, 4)  # tokens a request for which verify buckets are compiled, beside the whole block


def ladder(slots: int, block: int) -> tuple[int, ...]:
    """Token buckets of the verify pass, ascending."""
    # Multiples of the slots: fixed verification fills such a bucket exactly, and adaptive ones find steps between.
    return tuple(sorted({slots * width for width in (*WIDTHS, block + 1) if width <= block + 1}))


def policy_name(strategy: str) -> PolicyName:
    """The verify policy of a strategy, whose other parts are its drafter and its cap."""
    return strategy if strategy in ("plain", "threshold", *ADAPTIVE) else "fixed"  # type: ignore[return-value]


def verdict(closed: dict[str, Any]) -> dict[str, Any]:
    """Throughput of each adaptive strategy relative to the best static one and to fixed verification, by users."""
    found: dict[str, Any] = {}
    for users, rows in closed.items():
        static = {name: row["tokens_per_second"] for name, row in rows.items() if name in STATIC}
        # The best of this load: an adaptive strategy has to match each static one where that is at its best.
        best = max(static, key=lambda name: static[name]) if static else None
        found[users] = {"best_static": best}
        for name in ADAPTIVE:
            if name in rows and best is not None:
                speed = rows[name]["tokens_per_second"]
                found[users][name] = {"over_best_static": speed / static[best], "budget": rows[name]["verify_budget"]}
                if "fixed" in static:
                    found[users][name]["over_fixed"] = speed / static["fixed"]

    return found
