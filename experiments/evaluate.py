"""Evaluates the stages of a finished run again, on whatever devices are here, beside what the run stored.

    python -m experiments.evaluate --workdir runs/energy_kd [--stage kd ...] [--json metrics.json]

Nothing in the run's folder is written. The config is the run's; --config.NAME=VALUE sets mesh.*, loop.*,
eval_batch_size and data.data_dir only.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments import cli, report
from jkd import train
from jkd.errors import UserError, unknown
from jkd.train.log import jsonable
from jkd.train.mesh import check_batch_size
from jkd.train.passes import Residents
from jkd.train.workdir import write_text


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False)
    parser.add_argument("--workdir", required=True, help="the folder of a run; gs:// works")
    parser.add_argument("--stage", action="append", metavar="NAME", help="once or more; all finished ones by default")
    parser.add_argument("--json", metavar="FILE", help="also write every seed's metrics, to a new file")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_run(args.workdir, overrides)
    file = cli.new_file(args.json) if args.json else None
    cli.initialize(args)
    cli.use_compilation_cache()
    found = evaluate(config, args.workdir, args.stage)
    if jax.process_index() == 0:
        report.table_console().print(table(found))
        if file is not None:
            write_text(file, json.dumps(jsonable(found), indent=1) + "\n")


def evaluate(config: Any, workdir: str, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Evaluates finished stages of a run: {stage: {metric: {"stored", "now", "difference"}}}, a value a seed.

    Raises:
      UserError: for a stage that is unknown or not finished, or if none is.
    """
    stages = {stage.name: stage for stage in cli.experiment(config).stages(config)}
    for name in names or ():
        if name not in stages:
            raise unknown("stage", name, stages)
    names = names or list(train.finished_stages(workdir))
    if not names:
        raise UserError(f"{workdir} holds no finished stage; finish its training first.")
    mesh = train.make_mesh(**config.mesh)
    check_batch_size(config.eval_batch_size, mesh, "eval_batch_size")
    outcomes = {name: train.load_outcome(workdir, name, mesh=mesh) for name in names}
    residents = Residents(mesh)
    return {
        name: _compare(outcome.metrics, train.evaluate_outcome(stages[name], outcome, mesh=mesh, residents=residents))
        for name, outcome in outcomes.items()
    }


def _compare(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    compared = {}
    for name, value in now.items():
        new, old = np.asarray(value, float), np.asarray(stored.get(name, np.nan), float)
        compared[name] = {"stored": old, "now": new, "difference": new - old}
    return compared


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Means over seeds, and the largest difference of a seed."""
    made = Table(title="evaluated again (means over seeds; the largest difference of a seed)")
    made.add_column("stage")
    made.add_column("metric")
    for column in ("stored", "now", "difference", "seeds"):
        made.add_column(column, justify="right")
    for stage, metrics in found.items():
        for name, row in metrics.items():
            each = np.atleast_1d(row["difference"])
            largest = each[np.abs(each).argmax()]
            numbers = (f"{np.mean(row['stored']):.4f}", f"{np.mean(row['now']):.4f}", f"{largest:+.2g}")
            made.add_row(stage, name, *numbers, str(len(each)))
    return made


if __name__ == "__main__":
    cli.command(main)
