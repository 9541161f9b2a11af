"""Compares this library with golden vectors of the reference implementation.

    python -m tests.golden DIR [DIR ...] [--verbose]

Every folder below DIR that holds a case (a meta.json) is checked; one line a case: the check that came closest to its
tolerance, and ok or FAIL. Exits with 1 if any case failed, 2 if there is none. Families that the library does not have
yet are listed as "not covered", never counted as passed.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Result = tuple[str, float, float, bool]
Check = Callable[[Path], Iterator[Result]]


def checks_of(case: Path) -> list[Check] | None:
    """The checks that fit a case, told by its files; None for a family that is not covered."""
    from dspark_jax.drafters.registry import kind_name
    from dspark_jax.errors import UserError
    from tests import golden_data, golden_decode, golden_eagle3, golden_train, golden_v4

    if (case / "draft" / "config.json").exists():
        config = json.loads((case / "draft" / "config.json").read_text())
        try:
            kind = kind_name(config)
        except UserError:
            return None
        if kind == "eagle3":
            return [golden_eagle3.check_train, golden_eagle3.check_decode]
        return [golden_train.check_train, golden_decode.check_decode]
    if (case / "cache" / "manifest.json").exists():
        return [golden_data.check_target_cache]
    if (case / "vectors.json").exists():
        return [golden_data.check_chat]
    if (case / "target" / "config.json").exists():
        config = json.loads((case / "target" / "config.json").read_text())
        return golden_v4.checks(case) if config.get("model_type") == "deepseek_v4" else None
    arrays = json.loads((case / "meta.json").read_text()).get("arrays", {})
    if "e4m3/bytes" in arrays or "fp8/square/weight_bytes" in arrays or "fp4/up/weight_bytes" in arrays:
        return [golden_v4.check_formats]
    if "verify/u" in arrays or "residual/out" in arrays:
        return [golden_decode.check_sampling]
    if "lr/a" in arrays or "conf/ece" in arrays:
        return [golden_train.check_schedule, golden_decode.check_calibration]
    return None


def run_case(case: Path, verbose: bool) -> bool | None:
    """Prints the case's line (and its failures); None if it is not covered."""
    checks = checks_of(case)
    if checks is None:
        print(f"{case.name:32s} {'-':>12s} {'-':>12s} not covered", flush=True)
        return None
    results = [result for check in checks for result in check(case)]
    shown = results if verbose else [r for r in results if not r[3]]
    for name, error, tolerance, ok in shown:
        print(f"    {name}: {error:.3e} (tolerance {tolerance:.3e}) {'ok' if ok else 'FAIL'}")
    passed = bool(results) and all(r[3] for r in results)
    # Exact checks have tolerance 0; among the others the one nearest to its tolerance speaks for the case.
    _, error, tolerance, _ = max(
        results, key=lambda r: (not r[3], r[1] / r[2] if r[2] else 0.0), default=("", 0.0, 0.0, False)
    )
    verdict = f"{'ok' if passed else 'FAIL'}  ({len(results)} checks)"
    print(f"{case.name:32s} {error:12.3e} {tolerance:12.3e} {verdict}", flush=True)
    return passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--verbose", action="store_true", help="print every check, not only the failures")
    options = parser.parse_args(argv)
    cases = sorted({meta.parent for folder in options.directories for meta in folder.rglob("meta.json")})
    if not cases:
        print(f"No case (a folder with meta.json) below {', '.join(map(str, options.directories))}.", file=sys.stderr)
        return 2
    print(f"{'case':32s} {'max_abs_err':>12s} {'tolerance':>12s}")
    verdicts = [run_case(case, options.verbose) for case in cases]
    failed, absent = verdicts.count(False), verdicts.count(None)
    print(f"{verdicts.count(True)} ok, {failed} failed, {absent} not covered")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
