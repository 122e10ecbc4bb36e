"""Outcomes of finished stages, read back onto any mesh."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jkd.errors import UserError, nearest
from jkd.train.checkpoint import build_plain, is_stored, load_meta, load_plain
from jkd.train.ensemble import member
from jkd.train.mesh import DEFAULT_RULES, Rules, make_mesh, place
from jkd.train.passes import Residents, evaluate, examine_members
from jkd.train.stage import Outcome, Stage, check_stages
from jkd.train.workdir import folder_of, stage_folder


def load_outcome(
    workdir: str | os.PathLike, name: str, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES
) -> Outcome:
    """Loads a finished stage's outcome by name, onto any mesh, without the code that made it."""
    return read_outcome(_folder(workdir, name), make_mesh() if mesh is None else mesh, rules)


def outcome_shapes(workdir: str | os.PathLike, name: str) -> Outcome:
    """What a finished stage published, as shapes and dtypes, and its number of seeds: no array is read."""
    info = load_meta(_folder(workdir, name) / "outcome")
    arrays = {n: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"])) for n, x in info["leaves"].items()}
    published = jax.eval_shape(lambda arrays: build_plain(arrays, info), arrays)
    return Outcome(published, {}, {}, info["metrics"], info["members"])


def _folder(workdir: str | os.PathLike, name: str) -> epath.Path:
    folders = finished_stages(workdir)
    if name not in folders:
        raise UserError(
            f"{workdir} holds no finished stage {name!r}; finish its training first.{nearest(name, folders)} "
            f"Finished: {', '.join(folders) or 'none'}."
        )
    return folders[name]


def finished_stages(workdir: str | os.PathLike) -> dict[str, epath.Path]:
    """The folders of a run's finished stages by name, in the order of the run."""
    folders = [folder for folder in (folder_of(workdir) / "stages").glob("*-*") if is_stored(folder / "outcome")]
    folders.sort(key=lambda folder: int(folder.name.partition("-")[0]))
    return {folder.name.partition("-")[2]: folder for folder in folders}


def check_run(stages: Sequence[Stage], log_every: int, workdir: str | os.PathLike | None = None) -> None:
    """Raises UserError unless these stages can be run, apart from those that are finished in `workdir`."""
    check_stages(stages)
    if log_every < 1:
        raise UserError(f"log_every must be >= 1 steps, got {log_every}.")
    for index, stage in enumerate(stages):
        folder = None if workdir is None else stage_folder(folder_of(workdir), index, stage.name)
        if folder is None or not is_stored(folder / "outcome"):
            stage.check()


def evaluate_outcome(
    stage: Stage, outcome: Outcome, *, mesh: Mesh | None = None, residents: Residents | None = None
) -> dict[str, Any]:
    """Runs all evaluators of a stage on its outcome: `{evaluator/name: value}`, as at the end of its training.

    Args:
      stage: as it was trained; its step is not run.
      outcome: of `load_outcome`, on `mesh`.
      mesh: by default all devices on the data axis.
      residents: device copies of data to share between several calls.
    """
    mesh = make_mesh() if mesh is None else mesh
    residents = residents or Residents(mesh)
    found: dict[str, Any] = {}
    for name, evaluator in stage.evaluators.items():
        if stage.looped:
            consts = [place(member(outcome.consts, k), mesh) for k in range(stage.members)]
            found_each = examine_members(evaluator, outcome.published, consts, mesh=mesh, residents=residents)
            values = found_each.metrics
        else:
            values = evaluate(evaluator, outcome.published, outcome.consts, mesh=mesh, residents=residents)
        found |= {f"{name}/{metric}": value for metric, value in values.items()}
    return found


def read_outcome(folder: epath.Path, mesh: Mesh, rules: Rules) -> Outcome:
    """Reads the outcome in a stage's folder."""
    published, info = load_plain(folder / "outcome", mesh=mesh, rules=rules)
    consts, _ = load_plain(folder / "consts", mesh=mesh, rules=rules)
    snapshots = {
        int(path.name.split("-")[1]): load_plain(path, mesh=mesh, rules=rules)[0]
        for path in sorted(folder.glob("snapshot-*"))
        if is_stored(path)
    }
    numbers = {name: np.asarray(value) for name, value in info["metrics"].items()}
    return Outcome(published, snapshots, consts, numbers, info["members"])
