"""Tests the claims of the papers: tuned arms, paired seeds, intervals, a verdict each.

    python -m experiments.reproduce energy_kd --out runs/reproduce [--budget MINUTES]

Every cell of a study is a run of its own below OUT/cells: what is finished is kept, what was interrupted goes on.
Writes OUT/results.json and OUT/report.html. --config.NAME=VALUE changes a field of every study's config; one process
does all the work, on all of its devices.
"""

import importlib
import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments import cli, html, train
from experiments.plan_cache import digest
from experiments.studies import Study, run_study
from jkd.errors import UserError, unknown
from jkd.train import Preempted, forget_programs
from jkd.train.log import console, jsonable
from jkd.train.workdir import check_writable, folder_of, write_text

METHODS = ("kd_fidelity", "label_smoothing_kd", "energy_kd", "cosine_kd", "r2kd")
OWN_FIELDS = ("seed", "only", "teacher.workdir")


class OutOfTimeError(UserError):
    """The budget ends before the next cell."""


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {', '.join(METHODS)}; all by default")
    parser.add_argument("--out", required=True, type=epath.Path, help="folder of the report and the cells")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no cell after so many minutes")
    args, overrides = cli.parse(parser, argv)
    for method in args.methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    check(args.methods or METHODS, overrides)
    if args.budget is not None and not args.budget >= 0:
        raise UserError(f"--budget must be >= 0 minutes, got {args.budget}.")
    cli.use_compilation_cache()
    deadline = None if args.budget is None else time.monotonic() + 60 * args.budget
    reproduce(args.methods or METHODS, args.out, deadline, overrides)


def studies_of(method: str) -> Any:
    """The studies that a method's module declares."""
    return importlib.import_module(f"experiments.{method}").STUDIES


def check(methods: Any, overrides: Mapping[str, Any]) -> None:
    """Raises UserError for overrides that a study cannot run with, before anything is run or written."""
    for name in overrides:
        if name in OWN_FIELDS or (name.startswith("arms.") and name.endswith(".lr")):
            raise UserError(f"--config.{name} is set by the studies themselves: leave it out.")
    for method in methods:
        for study in studies_of(method):
            config = cli.load_config(study.config, overrides)
            if config.seeds < 2:
                raise UserError(f"seeds={config.seeds}: differences between arms need at least 2 paired seeds.")
            if study.rates and config.data.validation_examples < 1:
                raise UserError("data.validation_examples=0: the arms' learning rates are tuned on validation rows.")


def earlier_results(out: epath.Path) -> dict[str, Any]:
    """The results that `out` holds, by method and study; makes the folder.

    Raises:
      UserError: if it is a run's folder, its results are no report's, or it cannot be written.
    """
    file = out / "results.json"
    if (out / "config.json").exists():
        raise UserError(f"{out} is the folder of a training run: give --out a folder of its own.")
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: it holds no JSON. Remove it, or give another --out.") from error
    if not isinstance(found, dict) or not all(isinstance(studies, dict) for studies in found.values()):
        raise UserError(f"{file} is no report of this command: give --out another folder.")
    return found


def reproduce(
    methods: Any, out: epath.Path, deadline: float | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Runs the studies of the methods and writes the report; a study that cannot run says why.

    What the folder's report holds of other methods, and of studies that cannot run now, is kept.
    """
    out = folder_of(out)
    results = earlier_results(out)
    for method in methods:
        for study in studies_of(method):
            found = _study(method, study, out, deadline, overrides or {})
            kept = results.setdefault(method, {})
            if "claims" in found or "claims" not in kept.get(study.name, {}):
                kept[study.name] = found
            else:
                console.print(f"{method}/{study.name}: the report keeps the earlier result.", soft_wrap=True)
            write_text(out / "results.json", json.dumps(jsonable(results), indent=1) + "\n")
            write_text(out / "report.html", html.page(results))
    html.print_claims(results)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    return results


def _study(
    method: str, study: Study, out: epath.Path, deadline: float | None, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    def run(cell: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        config = cell_config(cli.load_config(study.config, {**overrides, **changes}))
        workdir = out / "cells" / f"{cell}-{identity(config)}"
        finished = workdir / "results.json"
        if not finished.exists() and deadline is not None and time.monotonic() > deadline:
            raise OutOfTimeError(f"stopped by --budget before cell {cell}; run the same command again to go on")
        console.print(f"[bold]{method}/{study.name}/{cell}[/bold]")
        if finished.exists():
            return {"workdir": str(workdir), **json.loads(finished.read_text())}
        try:
            return {"workdir": str(workdir), **train.run(config, str(workdir), show=False)}
        finally:
            forget_programs()  # of hundreds of cells, one process could not keep them all

    try:
        config = cli.load_config(study.config, overrides)
        arms = [name for name in config.arms if name in (study.arms or config.arms)]
        return run_study(study, run, list(config.teachers), arms)
    except Preempted:
        raise
    except UserError as error:
        console.print(f"{method}/{study.name}: {error}", soft_wrap=True)
        return {"config": study.config, "not_run": str(error)}


def cell_config(config: ConfigDict) -> ConfigDict:
    """The config of a cell without what it does not use: equal cells of two methods are then one.

    The method is the module that makes its stages; arms and teachers that do not run are left out.
    """
    config.method = cli.experiment(config).stages.__module__.rpartition(".")[2]
    used = {name for arm in config.only if arm in config.arms for name in config.arms[arm].teachers}
    for section, names in (("arms", config.only), ("teachers", {*config.only, *used})):
        config[section] = ConfigDict({name: one for name, one in config[section].items() if name in names})
    return config


def identity(config: ConfigDict) -> str:
    """Eight digits that stand for what a cell computes."""
    fields = config.to_dict() | {"loop": None, "mesh": None, "data": config.data.to_dict() | {"data_dir": None}}
    return digest(jsonable(fields))[:8]


if __name__ == "__main__":
    cli.command(main)
