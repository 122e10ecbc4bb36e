"""Outcomes of finished stages, read back onto any mesh."""

import os

import numpy as np
from etils import epath
from jax.sharding import Mesh

from jkd.errors import UserError
from jkd.train.checkpoint import is_stored, load_plain
from jkd.train.mesh import DEFAULT_RULES, Rules, make_mesh
from jkd.train.stage import Outcome


def load_outcome(
    workdir: str | os.PathLike, name: str, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES
) -> Outcome:
    """Loads a finished stage's outcome by name, onto any mesh, without the code that made it."""
    mesh = make_mesh() if mesh is None else mesh
    found = sorted((epath.Path(workdir) / "stages").glob(f"[0-9][0-9]-{name}"))
    if not found or not is_stored(found[0] / "outcome"):
        raise UserError(f"{workdir} holds no finished stage {name!r}; finish its training first.")
    return read_outcome(found[0], mesh, rules)


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
