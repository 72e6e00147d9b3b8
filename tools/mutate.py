"""Changes the code on purpose, and counts what the tests notice: `python -m tools.mutate --each 40 --out DIR`.

The changes are cosmic-ray's (`pip install cosmic-ray`), one at a time, a random sample of each part, made in a
clone of the last commit. A change is tried with the tests of its own module first; where those pass, with all tests of
its part. What survives is kept with its difference in DIR/mutants.json: a test is missing, or the change changes
nothing. A program that is called again goes on where it was stopped.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Of each part its modules and all of its tests.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "losses": (["kd_jax/losses/*.py"], ["tests/losses"]),
    "methods": (["kd_jax/methods/*.py"], ["tests/methods", "tests/test_distill.py", "tests/test_schemes.py"]),
    "train": (
        ["kd_jax/train/*.py", "kd_jax/distill.py", "kd_jax/schemes.py", "kd_jax/teacher.py"],
        ["tests/train", "tests/test_distill.py", "tests/test_schemes.py", "tests/test_teacher.py"],
    ),
    "stats": (["kd_jax/stats.py"], ["tests/test_stats.py"]),
    "evaluate": (
        ["kd_jax/evaluate.py", "kd_jax/likelihood.py"],
        ["tests/test_evaluate.py", "tests/test_likelihood.py"],
    ),
    "data": (["kd_jax/data/*.py"], ["tests/data"]),
    "comparison": (["kd_jax/compare.py", "kd_jax/comparison.py", "kd_jax/seeds.py"], ["tests/test_compare.py"]),
}
# One change of each kind of place: others of the same place are killed by the same tests.
OPERATORS = {
    f"core/{name}"
    for names in (
        "ReplaceBinaryOperator_Add_Sub ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_Div",
        "ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_FloorDiv_Mul ReplaceBinaryOperator_Mod_Mul",
        "ReplaceBinaryOperator_Pow_Mul ReplaceBinaryOperator_BitAnd_BitOr ReplaceBinaryOperator_BitOr_BitAnd",
        "ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq ReplaceComparisonOperator_Lt_LtE",
        "ReplaceComparisonOperator_LtE_Lt ReplaceComparisonOperator_Gt_GtE ReplaceComparisonOperator_GtE_Gt",
        "ReplaceComparisonOperator_Lt_GtE ReplaceComparisonOperator_Gt_LtE ReplaceComparisonOperator_Is_IsNot",
        "ReplaceComparisonOperator_IsNot_Is ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Invert",
        "ReplaceUnaryOperator_Delete_Not AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr",
        "ReplaceOrWithAnd ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer NumberReplacer",
        "RemoveDecorator ZeroIterationForLoop",
    )
    for name in names.split()
}


def main() -> None:
    """Draws the changes, tries those that have no result yet, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=40, help="changes of each part (40)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--own", action="store_true", help="the tests of its own module alone; none of modules without")
    parser.add_argument(
        "--again", action="store_true", help="what survived and has `noticed_by` in mutants.json, with the tests there"
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one change (900)")
    parser.add_argument("--minutes", type=float, default=600, help="no change is begun after this time (600)")
    parser.add_argument("--out", type=Path, required=True, help="folder of mutants.json")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "mutants.json"
    results: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    ends = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        (Path(temporary) / "shared").symlink_to((ROOT / ".." / "shared").resolve())
        os.chdir(clone)
        if given.again:
            for one in (one for one in results if one.get("noticed_by")):
                found, _ = outcome(one, one["noticed_by"], given.timeout)
                print(found, *(one[name] for name in ("module", "line", "operator", "noticed_by")), flush=True)
            return
        for part in given.parts:
            done = {key(one) for one in results}
            for mutation in drawn(part, given.each, given.seed, own=given.own):
                if time.monotonic() > ends:
                    return
                if key(mutation) in done:
                    continue
                results.append(mutation | tried(part, mutation, given.timeout, own=given.own))
                kept.write_text(json.dumps(results, indent=1) + "\n")
                print(*(results[-1][name] for name in ("outcome", "module", "line", "operator", "seconds")), flush=True)


def key(mutation: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a change from others."""
    return tuple(mutation[name] for name in ("module", "operator", "occurrence"))


def drawn(part: str, count: int, seed: int, *, own: bool) -> list[dict[str, Any]]:
    """A sample of the changes of a part; a larger one begins with a smaller one's."""
    files = sorted(path for pattern in PARTS[part][0] for path in Path().glob(pattern))
    files = [path for path in files if not own or own_tests(path).exists()]
    everything = [one for path in files for one in changes(path)]
    random.Random(f"{part} {seed}").shuffle(everything)
    return everything[:count]


def changes(path: Path) -> Iterator[dict[str, Any]]:
    """All changes of a file but those of annotations."""
    from cosmic_ray.commands.init import _all_work_items

    annotated = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                spot = range(annotation.lineno, annotation.end_lineno + 1)
                annotated |= {(line, annotation.col_offset, annotation.end_col_offset) for line in spot}
    for item in _all_work_items([path], {}):
        (own,) = item.mutations
        line, column = own.start_pos
        if own.operator_name in OPERATORS and not any(
            line == at and start <= column < end for at, start, end in annotated
        ):
            yield {
                "module": str(path), "operator": own.operator_name.removeprefix("core/"), "occurrence": own.occurrence,
                "line": line, "definition": own.definition_name,
            }  # fmt: skip


def tried(part: str, mutation: dict[str, Any], timeout: float, *, own: bool) -> dict[str, Any]:
    """What the tests find of a change: `killed` with the tests that did, `survived`, or `timeout`."""
    started = time.monotonic()
    for tests in tests_of(part, Path(mutation["module"]))[: 1 if own else None]:
        found, difference = outcome(mutation, " ".join(tests), timeout)
        if found != "survived":
            break
    return {
        "outcome": found, "tests": tests, "seconds": round(time.monotonic() - started),
        "difference": "\n".join(line for line in difference.splitlines() if line[:1] in "+-@"),
    }  # fmt: skip


def outcome(mutation: dict[str, Any], tests: str, timeout: float) -> tuple[str, str]:
    """What pytest finds of a change with such arguments, and the change as a difference."""
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import MutationSpec

    operator = f"core/{mutation['operator']}"
    change = MutationSpec(mutation["module"], operator, mutation["occurrence"], (1, 0), (1, 1), {}, None)
    command = f"{sys.executable} -B -m pytest -x -q -p no:cacheprovider -p no:xdist {tests}"
    found = mutate_and_test([change], command, timeout)
    said = found.test_outcome.value if found.test_outcome else found.worker_outcome.value
    return "timeout" if found.output == "timeout" else str(said), found.diff or ""


def tests_of(part: str, module: Path) -> list[list[str]]:
    """First the tests of the module, then those of its part."""
    own = own_tests(module)
    return [*([[str(own)]] if own.exists() else []), PARTS[part][1]]


def own_tests(module: Path) -> Path:
    """Where a module's own tests are, if there are any."""
    return Path("tests") / module.relative_to("kd_jax").parent / f"test_{module.name}"


if __name__ == "__main__":
    main()
