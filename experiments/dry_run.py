"""What `experiments.train --dry-run` prints: the stages of a run, and what each would hold on a device."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from experiments import cli, report
from jkd import train
from jkd.train.lower import AbstractStage, abstract_stages
from jkd.train.mesh import BATCH_AXES, tree_shardings
from jkd.train.program import abstract, evaluation_sources
from jkd.train.workdir import check_claim, folder_of
from jkd.trees import path_name

TOP = 8  # leaves of a state that are listed, the largest first
PARTS = ("state", "constants", "needed", "resident", "batch")


def show(config: Any, mesh: Mesh, workdir: str | None = None) -> None:
    """Checks a config as a run would and prints its stages; nothing is compiled or written.

    Raises:
      UserError: where the run would.
    """
    stages = cli.experiment(config).stages(config)
    train.check_run(stages, config.log_every, workdir)
    if workdir is not None:
        given = {"seed": config.seed, "log_every": config.log_every, **config.to_dict()}
        check_claim(folder_of(workdir), given)
    found, ensembles = [], {stage.name for stage in stages if stage.members}
    for stage in abstract_stages(stages, mesh):
        sources = evaluation_sources(stage.stage, stage.plan.carry.state, stage.plan.consts, mesh)
        found.append((stage, sizes(stage, sources, ensembles, mesh)))
    if jax.process_index() == 0:
        _print(found, mesh, report.table_console())


def sizes(
    found: AbstractStage, evaluation: Mapping[str, Any], ensembles: Collection[str], mesh: Mesh
) -> dict[str, int]:
    """Bytes on one device: the state and constants of all members, needed outcomes, data sets, and one batch.

    Activations, gradients and other temporary memory of a step are not counted: `experiments.plan` compiles it.

    Args:
      found: the stage.
      evaluation: the sources of its evaluators.
      ensembles: names of the stages that have a member for each seed.
      mesh: of the run.
    """
    plan = found.plan
    members = max(found.stage.members, 1) if found.stage.looped else 1
    resident = {id(s.resident): s.resident for s in (found.source, *evaluation.values()) if s is not None}
    return {
        "state": members * _bytes(plan.carry, plan.shardings),
        "constants": members * _laid_out(plan.consts, mesh),
        "needed": sum(
            (members if name in ensembles else 1) * _laid_out((of.published, of.snapshots, of.consts), mesh)
            for name, of in found.previous.items()
        ),
        "resident": sum(x.nbytes for tree in resident.values() for x in jax.tree.leaves(tree)),
        "batch": members * _batch_bytes(found, mesh),
    }


def _laid_out(tree: Any, mesh: Mesh) -> int:
    return _bytes(tree, tree_shardings(tree, mesh))


def _bytes(tree: Any, shardings: Any) -> int:
    return sum(jax.tree.leaves(jax.tree.map(_leaf_bytes, tree, shardings)))


def _leaf_bytes(leaf: Any, sharding: Any) -> int:
    return math.prod(sharding.shard_shape(tuple(np.shape(leaf)))) * leaf.dtype.itemsize


def batch_shapes(found: AbstractStage) -> dict[str, Any]:
    """The shapes of one global batch of a program."""
    if found.source is None:
        return {}
    return jax.eval_shape(found.source.assemble, abstract(found.source.resident), found.plan.crossed)


def _batch_bytes(found: AbstractStage, mesh: Mesh) -> int:
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch_shapes(found))) // ways


def _print(found: list[tuple[AbstractStage, dict[str, int]]], mesh: Mesh, console: Console) -> None:
    shown: dict[Any, str] = {}
    for stage, _ in found:
        kind = str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), stage.plan.carry.state))
        if kind not in shown:
            shown[kind] = stage.stage.name
            console.print(leaves(stage))
    console.print(overview(found, mesh))
    console.print(
        "needed: outcomes of earlier stages; resident: data sets. Activations, gradients and what else a step needs "
        "for a while are not in these numbers: python -m experiments.plan compiles the steps. Nothing was written."
    )


def overview(found: Sequence[tuple[AbstractStage, Mapping[str, int]]], mesh: Mesh) -> Table:
    """Every stage of a run, and what it holds on a device."""
    layout = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    made = Table(title=f"bytes on each of {mesh.size} {mesh.devices.flat[0].platform} devices ({layout})")
    for column in ("stage", "needs", "seeds", "steps", "images of a batch", *PARTS, "total"):
        made.add_column(column, justify="left" if column in ("stage", "needs") else "right", overflow="fold")
    for stage, of in found:
        one = stage.stage
        images = batch_shapes(stage).get("image") if stage.source is not None else None
        seeds = f"{one.members} (loop)" if one.looped else str(max(one.members, 1))
        text = "" if images is None else "x".join(map(str, images.shape))
        numbers = [human(of[part]) for part in PARTS]
        made.add_row(
            one.name,
            ", ".join(one.needs),
            seeds,
            f"{one.num_steps - one.first_step:,}",
            text,
            *numbers,
            human(sum(of.values())),
        )
    return made


def leaves(found: AbstractStage) -> Table:
    """The largest leaves of a stage's state."""
    state, shardings = found.plan.carry.state, found.plan.shardings.state
    paths = jax.tree.leaves_with_path(state)
    rows = [(path_name(path), x, s) for (path, x), s in zip(paths, jax.tree.leaves(shardings), strict=True)]
    rows.sort(key=lambda row: -_leaf_bytes(*row[1:]))
    one = " (of one seed)" if found.stage.looped else ""
    made = Table(title=f"state of {found.stage.name}{one}: {len(rows)} leaves, {human(_bytes(state, shardings))}")
    for column in ("leaf", "shape", "dtype", "split", "bytes"):
        made.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for name, x, sharding in rows[:TOP]:
        split = ", ".join("-" if axis is None else str(axis) for axis in sharding.spec) or "whole"
        made.add_row(name, "x".join(map(str, x.shape)) or "()", str(x.dtype), split, human(_leaf_bytes(x, sharding)))
    if rest := rows[TOP:]:
        made.add_row(f"{len(rest)} smaller ones", "", "", "", human(sum(_leaf_bytes(*row[1:]) for row in rest)))
    return made


def human(size: int) -> str:
    """Bytes as text: 812 B, 3.2 KiB, 1.5 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
