"""Tests the claims of the papers: tuned arms, paired seeds, intervals, a verdict each.

    python -m experiments.reproduce energy_kd --out runs/reproduce [--budget MINUTES] [--jobs N]

METHOD runs the studies of a method, METHOD:STUDY one of them; some run only where they are named (cmimh:fashion).
Every cell of a study is a run of its own below OUT/cells: what is finished is kept, what was interrupted goes on.
Writes OUT/results.json, OUT/report.html and OUT/claims.md. --config.NAME=VALUE changes a field of every study's config.
On a CPU cells run in several processes at once, those of two studies side by side.
"""

import concurrent.futures
import contextlib
import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from experiments import cells, cli, html, markdown
from experiments.cells import Cell
from experiments.report import Measure
from experiments.studies import Study, run_study
from jkd.errors import UserError, unknown
from jkd.train import Preempted
from jkd.train.log import console, jsonable
from jkd.train.workdir import check_writable, folder_of, write_text

METHODS = (
    "kd_fidelity",
    "label_smoothing_kd",
    "energy_kd",
    "cosine_kd",
    "r2kd",
    "learnable_levels",
    "lottery_tickets",
    "knowledge_evolution",
    "quantized_distillation",
    "dual_contrastive_gan",
    "gan_fingerprinting",
    "fewshot_dcl",
    "cmimh",
    "dcsh",
    "mhsan",
)
OWN_FIELDS = ("seed", "only", "teacher.workdir", "start.workdir")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    known = f"of: {', '.join(METHODS)}; all by default"
    parser.add_argument("methods", nargs="*", metavar="METHOD[:STUDY]", help=known)
    parser.add_argument("--out", required=True, type=epath.Path, help="folder of the report and the cells")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no cell after so many minutes")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at once (on a CPU by default one a core)")
    args, overrides = cli.parse(parser, argv)
    check(args.methods or METHODS, overrides)
    if args.budget is not None and not args.budget >= 0:
        raise UserError(f"--budget must be >= 0 minutes, got {args.budget}.")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be >= 1, got {args.jobs}.")
    cli.use_compilation_cache()
    deadline = None if args.budget is None else time.monotonic() + 60 * args.budget
    reproduce(args.methods or METHODS, args.out, deadline, overrides, args.jobs or cells.default_jobs())


def studies_of(method: str) -> Any:
    """The studies that a method's module declares."""
    return importlib.import_module(f"experiments.{method}").STUDIES


def chosen(names: Iterable[str]) -> list[tuple[str, Study]]:
    """The studies that METHOD and METHOD:STUDY stand for, each once, with their methods.

    Raises:
      UserError: for methods and studies that there are not.
    """
    found = {}
    for name in names:
        method, _, wanted = name.partition(":")
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        studies = {study.name: study for study in studies_of(method)}
        if wanted and wanted not in studies:
            raise unknown(f"study of {method}", wanted, studies)
        for study in [studies[wanted]] if wanted else studies.values():
            if wanted or not study.extra:
                found[method, study.name] = (method, study)
    return list(found.values())


def check(names: Iterable[str], overrides: Mapping[str, Any]) -> None:
    """Raises UserError for studies that there are not, and overrides that one cannot run with; runs nothing."""
    for name in overrides:
        if name in OWN_FIELDS or (name.startswith("arms.") and name.endswith(".lr")):
            raise UserError(f"--config.{name} is set by the studies themselves: leave it out.")
    for _, study in chosen(names):
        config = cli.load_config(study.config, overrides)
        if config.seeds < 2:
            raise UserError(f"seeds={config.seeds}: differences between arms need at least 2 paired seeds.")
        if study.rates and config.data.get("validation_examples", 1) < 1:
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
    names: Iterable[str],
    out: epath.Path,
    deadline: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Runs the `chosen` studies and writes the report; a study that cannot run says why.

    What the folder's report holds of other methods, and of studies that cannot run now, is kept.
    """
    out = folder_of(out)
    results = earlier_results(out)
    if jobs > 1:
        overrides = {"loop.progress": False, **(overrides or {})}  # bars of several processes
    tasks = chosen(names)
    # Threads outside: they wait for cells, which are told to stop when the processes are.
    with _side_by_side(jobs) as each, cells.workers(jobs) as run_cells:
        outcomes = each(lambda task: _study(task[0], task[1], out, deadline, overrides or {}, run_cells), tasks)
        for (method, study), found in zip(tasks, outcomes, strict=True):
            kept = results.setdefault(method, {})
            if "claims" in found or "claims" not in kept.get(study.name, {}):
                kept[study.name] = found
            else:
                console.print(f"{method}/{study.name}: the report keeps the earlier result.", soft_wrap=True)
            write_text(out / "results.json", json.dumps(jsonable(results), indent=1) + "\n")
            write_text(out / "report.html", html.page(results))
            write_text(out / "claims.md", markdown.page(results))
    html.print_claims(results)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    return results


@contextlib.contextmanager
def _side_by_side(jobs: int) -> Iterator[Callable]:
    """Gives a `map` of two studies at once: where one waits for its last cell, processes go on with the other's."""
    if jobs == 1:
        yield map
        return
    threads = concurrent.futures.ThreadPoolExecutor(2)
    try:
        yield threads.map
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _study(
    method: str,
    study: Study,
    out: epath.Path,
    deadline: float | None,
    overrides: Mapping[str, Any],
    run_cells: Callable,
) -> dict[str, Any]:
    def run(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        folder = str(out / "cells")
        made = [
            Cell(name, f"{method}/{study.name}/{name}", study.config, {**overrides, **changes}, folder, deadline)
            for name, changes in cells.items()
        ]
        return dict(zip(cells, run_cells(made), strict=True))

    try:
        config = cli.load_config(study.config, overrides)
        arms = [name for name in config.arms if name in (study.arms or config.arms)]
        module, shared = cli.experiment(config), list(study.shared or config.get("teachers", ()))
        found = run_study(study, run, shared, arms, study.measure or Measure.of(module))
        return {**found, "baseline": module.BASELINE}
    except Preempted:
        raise
    except UserError as error:
        console.print(f"{method}/{study.name}: {error}", soft_wrap=True)
        return {"config": study.config, "not_run": str(error)}


if __name__ == "__main__":
    cli.command(main)
