"""The cells of a reproduction: training runs of their own, one after another or in several processes."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from experiments import cli, train
from experiments.plan_cache import digest
from jkd.errors import UserError
from jkd.train import NonFiniteError, Preempted, forget_programs
from jkd.train.log import console, jsonable

MOST_JOBS = 8  # by default: every process holds its data and programs


class OutOfTimeError(UserError):
    """The budget ends before the next cell."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: within the study.
      label: for messages.
      config: `configs/<method>.py[:variant]`.
      overrides: fields of the config.
      folder: of all cells, as a path or URL.
      deadline: on the clock of `time.monotonic`, which processes share; None: none.
    """

    name: str
    label: str
    config: str
    overrides: Mapping[str, Any]
    folder: str
    deadline: float | None = None


def run_cell(cell: Cell) -> dict[str, Any] | NonFiniteError:
    """The results of a cell, with its "workdir"; one that is finished is read. A run that diverges is a result, too.

    Raises:
      OutOfTimeError: if the cell would begin after its deadline.
      UserError: as the run itself.
    """
    config, workdir = _located(cell)
    finished = workdir / "results.json"
    if finished.exists():
        return {"workdir": str(workdir), **json.loads(finished.read_text())}
    if cell.deadline is not None and time.monotonic() > cell.deadline:
        raise OutOfTimeError(f"stopped by --budget before cell {cell.name}; run the same command again to go on")
    console.print(f"[bold]{cell.label}[/bold]")
    try:
        return {"workdir": str(workdir), **train.run(config, str(workdir), show=False)}
    except NonFiniteError as error:
        return error
    finally:
        forget_programs()  # of hundreds of cells, one process could not keep them all


def _located(cell: Cell) -> tuple[ConfigDict, epath.Path]:
    """The cell's config and folder; cells of one folder are the same run."""
    config = cell_config(cli.load_config(cell.config, cell.overrides))
    return config, epath.Path(cell.folder) / f"{cell.name}-{identity(config)}"


def cell_config(config: ConfigDict) -> ConfigDict:
    """The config of a cell without what it does not use: equal cells of two methods are then one.

    The method is the module that makes its stages; arms and teachers that do not run are left out.
    """
    config.method = cli.experiment(config).stages.__module__.rpartition(".")[2]
    arms = [config.arms[name] for name in config.only if name in config.arms]
    used = {name for arm in arms for name in (*arm.get("teachers", ()), arm.get("start", ""))}
    for section in ("arms", "teachers"):
        if section in config:
            kept = {name: one for name, one in config[section].items() if name in {*config.only, *used}}
            config[section] = ConfigDict(kept)
    return config


def identity(config: ConfigDict) -> str:
    """Eight digits that stand for what a cell computes."""
    fields = config.to_dict() | {"loop": None, "mesh": None, "data": config.data.to_dict() | {"data_dir": None}}
    return digest(jsonable(fields))[:8]


# --- several at once ---


def default_jobs() -> int:
    """As many as there are cores where JAX runs on them: small networks keep one busy. An accelerator takes one."""
    return min(os.cpu_count() or 1, MOST_JOBS) if jax.default_backend() == "cpu" else 1


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Callable[[Iterable[Cell]], Iterable]]:
    """Gives `run_cells(cells) -> results in their order`, in so many processes; 1 is this one.

    Several threads may call it at once, but for jobs=1; a cell that they share runs once.

    Raises:
      Preempted: after SIGTERM, when all processes have saved where they were.
      UserError: if a process is lost.
    """
    if jobs == 1:
        yield lambda cells: map(run_cell, cells)
        return
    before = signal.signal(signal.SIGTERM, _preempted)
    # Not forked: JAX has threads here.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, cli.use_compilation_cache)
    begun: dict[str, concurrent.futures.Future] = {}
    lock = threading.Lock()

    def run_cells(cells: Iterable[Cell]) -> Iterator:
        found = []
        for cell in cells:
            folder = str(_located(cell)[1])
            with lock:
                if folder not in begun:
                    begun[folder] = pool.submit(_worker, cell)
                found.append(begun[folder])
        return (one.result() for one in found)

    try:
        yield run_cells
    except BrokenProcessPool as error:
        raise UserError("A process of --jobs was killed, perhaps for its memory: try --jobs 1.") from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


_stopped: list[Preempted] = []


def _worker(cell: Cell) -> dict[str, Any] | NonFiniteError:
    if _stopped:  # the pool has one cell more at hand for each process
        raise _stopped[0]
    try:
        return run_cell(cell)
    except Preempted as stop:
        _stopped.append(stop)
        raise


def _preempted(number: int, frame: Any) -> None:
    raise Preempted("asked to stop; run the same command again to go on")
