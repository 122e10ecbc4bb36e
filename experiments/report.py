"""Tables and plots of finished runs."""

import dataclasses
import io
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from jkd import metrics


@dataclasses.dataclass(frozen=True)
class Measure:
    """What the stages of a method are compared by.

    Attributes:
      metric: `evaluator/name` of the final comparison.
      tune: likewise, by which learning rates are chosen: of validation data.
      title: of tables, with the unit.
      lower: whether less is better.
    """

    metric: str = "test/top1"
    tune: str = "validation/top1"
    title: str = "test accuracy, %"
    lower: bool = False

    @classmethod
    def of(cls, module: Any) -> "Measure":
        """That of a method's module: its MEASURE, by default accuracy."""
        return getattr(module, "MEASURE", cls())


def table_console(*, stderr: bool = False) -> Console:
    """Where tables go: as wide as the terminal, and 120 columns in files and pipes."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 120)


def summarize(stages: Mapping[str, Any], baseline: str, measure: Measure | None = None) -> dict[str, Any]:
    """Per stage: mean, interval and seeds of a measure, and the paired difference to the baseline stage.

    With a single seed there is no interval, and `interval` and `difference` are None.
    """
    measure = measure or Measure()
    metric, best = measure.metric, "min" if measure.lower else "max"
    rows: dict[str, Any] = {}
    base = stages.get(baseline, {}).get("metrics", {}).get(metric)
    for name, stage in stages.items():
        if metric not in stage["metrics"]:
            continue
        values = np.atleast_1d(np.asarray(stage["metrics"][metric], float))
        row: dict[str, Any] = {"mean": float(values.mean()), "seeds": len(values), "values": values.tolist()}
        row["best_epoch_mean"] = float(np.mean(stage["history"].get(metric, {best: values})[best]))
        row["interval"] = row["difference"] = None
        if len(values) > 1:
            found = metrics.mean_interval(values)
            row["interval"] = [float(found.low), float(found.high)]
            if base is not None and name not in (baseline, "teacher"):
                pair = metrics.paired_difference(values, np.atleast_1d(np.asarray(base, float)))
                row["difference"] = {"to": baseline, **{k: float(v) for k, v in pair._asdict().items()}}
        rows[name] = row
    return {metric: rows}


def show(results: Mapping[str, Any], workdir: str, measure: Measure | None = None) -> None:
    """Prints the table of a run and saves its plot beside it."""
    title = (measure or Measure()).title
    console = table_console()
    for rows in results["results"].values():
        if not rows:
            continue
        console.print(table(rows, title))
        path = epath.Path(workdir) / "plot.png"
        path.write_bytes(plot(rows, title, results["method"]))
        console.print(f"Results: {epath.Path(workdir) / 'results.json'}   Plot: {path}", soft_wrap=True)


def table(rows: Mapping[str, Any], title: str) -> Table:
    """Mean, 95 % interval and paired difference of every stage."""
    pairs = [row["difference"]["to"] for row in rows.values() if row["difference"]]
    made = Table(title=f"{title} (95 % intervals)")
    made.add_column("stage", no_wrap=True)
    compared = f"minus {pairs[0]}, paired" if pairs else "difference"
    for column in ("mean", "interval", compared, "p", "best epoch", "seeds"):
        made.add_column(column, justify="right", no_wrap=column in ("mean", "interval", "p"))
    for name, row in rows.items():
        pair, shown = row["difference"], ("", "")
        if pair is not None:
            shown = (f"{pair['mean']:+.2f} {_range(pair['low'], pair['high'])}", f"{pair['p_value']:.3f}")
        interval = "" if row["interval"] is None else _range(*row["interval"])
        made.add_row(name, f"{row['mean']:.2f}", interval, *shown, f"{row['best_epoch_mean']:.2f}", str(row["seeds"]))
    return made


def _range(low: float, high: float) -> str:
    return rf"\[{low:.2f}, {high:.2f}]"


def plot(rows: Mapping[str, Any], measured: str, title: str) -> bytes:
    """A PNG: every seed as a point, the mean and its interval as a bar with whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(rows)
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(names) + 1.4), layout="constrained")
    for y, name in enumerate(names):
        row = rows[name]
        axes.plot(row["values"], [y] * row["seeds"], "o", ms=3, color="0.6", zorder=1)
        low, high = row["interval"] or (row["mean"], row["mean"])
        axes.plot([low, high], [y, y], "-", lw=3, color="C0" if name != "teacher" else "C1", zorder=2)
        axes.plot([row["mean"]], [y], "D", ms=6, color="C0" if name != "teacher" else "C1", zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    seeds = max(row["seeds"] for row in rows.values())
    axes.set_xlabel(f"{measured}: mean, 95 % interval, {seeds} seeds")
    axes.set_title(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
