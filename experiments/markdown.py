"""The claims of a reproduction as Markdown tables, for the docs and for reading in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies import measure_of

COLUMNS = ("claim", "the paper", "effect", "95 % interval", "p", "p (Holm)", "seeds", "verdict")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every method's studies: their claims, and the accuracy of every arm at its rate.

    Args:
      results: {method: {study: what `run_study` found, or {"not_run": reason}}}.
    """
    parts = ["# Claims, measured"]
    for method, studies in results.items():
        parts.append(f"## {method}")
        for name, study in studies.items():
            parts += [f"### {name}: `{study['config']}`", *_study(study)]
    return "\n\n".join(parts) + "\n"


def _study(study: Mapping[str, Any]) -> list[str]:
    if "claims" not in study:
        return [f"Not run: {study['not_run']}"]
    claims = table(COLUMNS, [_claim(row) for row in study["claims"]])
    rates = "at the rate tuned for it" if study["tuning"] else "at the rate given, nothing was tuned"
    measure = measure_of(study)
    says = f"{measure.title[:1].upper()}{measure.title[1:]} at the last step, mean over the seeds; every arm {rates}:"
    accuracies = [
        (f"`{name}`", f"{study['rates'][name]:g}" if name in study["rates"] else "", f"{np.mean(found):.2f}")
        for name, stage in study["stages"].items()
        if (found := stage["metrics"].get(measure.metric)) is not None
    ]
    return [claims, says, table(("arm", "rate", "mean"), accuracies)]


def _claim(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["interval"]
    p_values = ("" if row.get(name) is None else f"{row[name]:.3f}" for name in ("p_value", "p_holm"))
    digits = 2 if high - low > 0.05 else 4  # percentage points, or a share
    effect, low, high = (_signed(x, digits) for x in (row["effect"], low, high))
    return (row["claim"], row["paper"], effect, f"{low} .. {high}", *p_values, str(row["seeds"]), row["verdict"])


def _signed(x: float, digits: int) -> str:
    return f"{round(x, digits) + 0:+.{digits}f}"  # never -0.00


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
