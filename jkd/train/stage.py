"""The contract between a method and the loop: a run is a list of stages with named needs."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jkd.errors import UserError, unknown

KINDS = ("sum", "gather")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished stage leaves to later ones.

    Attributes:
      published: the result of `Stage.publish`; a plain tree (dicts, lists, tuples, arrays).
      snapshots: `{step: tree}` for the steps that the stage asked for: what `Stage.snapshot` returned.
      consts: what `Stage.prepare` returned.
      metrics: `{evaluator/name: value}` of the last evaluation.
      members: the number of seeds of an ensemble (a leading axis of every array), 0 for a single run.
    """

    published: Any
    snapshots: Mapping[int, Any]
    consts: Any
    metrics: Mapping[str, Any]
    members: int = dataclasses.field(default=0, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A measurement over a whole source.

    Attributes:
      source: a `jkd.data` source, or a function of the stage's consts that makes one; read in order.
      collect: `collect(published, consts, batch, mask) -> tree`, traced. `mask` bool[B] is False on the rows
        that pad the last batch.
      kind: "sum" adds the trees of all batches (`collect` must leave masked rows out); "gather" joins their
        rows in the order of the source, without padding.
      finish: `finish(tree) -> {name: float}` on the host, from numpy arrays.
      every: steps between evaluations; 0 evaluates only at the end of the stage (which always happens).
      draw: `draw(tree) -> {name: uint8[height, width] or uint8[height, width, 3]}` on the host, from what `finish`
        gets: pictures for the run's folder and TensorBoard.
      warn: `warn(metrics) -> str | None` on the host, from what `finish` returns: what the run says aloud.
    """

    source: Any
    collect: Callable
    finish: Callable[[Any], Mapping[str, Any]]
    kind: str = "sum"
    every: int = 0
    draw: Callable[[Any], Mapping[str, Any]] | None = None
    warn: Callable[[Mapping[str, Any]], str | None] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("evaluator kind", self.kind, KINDS)
        if self.every < 0:
            raise UserError(f"Evaluator.every must be >= 0 steps, got {self.every}.")


def _no_consts(key: Any, previous: Any, sweep: Any) -> dict:
    return {}


def _no_data(consts: Any) -> None:
    return None


def _nothing() -> None:
    return None


def _identity(state: Any) -> Any:
    return state


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training phase of a run; the loop owns its sharding, checkpoints, logs and resumption.

    Attributes:
      name: letters, digits, `_` and `-`; unique in a run.
      num_steps: where the stage ends: `step` is called for t = first_step .. num_steps - 1. 0 only prepares and
        publishes.
      init: `init(key, previous, consts) -> state`, traced; the state is created sharded.
      step: `step(key, state, consts, batch, t) -> (state, metrics)`, traced. The key is the stage's key folded
        with t; t and key come from the loop and are never part of the state. `metrics` is a dict of scalars.
      needs: names of the stages whose outcomes `previous` holds: exactly these.
      prepare: `prepare(key, previous, sweep) -> consts`, on the host, once, before `init`; a plain tree of
        arrays. `sweep(fn, args, source, key=None)` runs `fn(args, batch, key) -> rows` jitted and sharded over
        one pass of a source and returns all rows as numpy arrays.
      data: `data(consts) -> Source`, or None for a stage whose step works on no batch.
      evaluators: measurements by name.
      snapshots: steps (first_step + 1 .. num_steps) after which a snapshot is kept for later stages.
      publish: `publish(state)`, traced -> what later stages, evaluation and export see; a plain tree.
      snapshot: `snapshot(state)`, traced -> what `snapshots` keep, a plain tree; by default what `publish` returns.
        `train.plain_state` keeps all that a stage needs to go on.
      first_step: the first t. A stage that goes on from a snapshot of another at step t begins at t: with that
        stage's key and data it sees the batches and keys that the other saw from there on.
      key: the stage's key; by default derived from the run's seed and the stage's name. An ensemble holds one
        key a member.
      members: the number of seeds in an ensemble, 0 for a single run.
      looped: whether the loop runs the members one by one.
      check: `check()`, called before anything is written unless the stage is finished: raises UserError where
        what it reads from elsewhere is missing or does not fit.
    """

    name: str
    num_steps: int
    init: Callable
    step: Callable | None = None
    needs: Sequence[str] = ()
    prepare: Callable = _no_consts
    data: Callable = _no_data
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    snapshots: Sequence[int] = ()
    publish: Callable = _identity
    snapshot: Callable | None = None
    first_step: int = 0
    key: Any = None
    members: int = 0
    looped: bool = False
    check: Callable[[], None] = _nothing

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"Stage name {self.name!r} may hold letters, digits, '_' and '-' only.")
        if self.num_steps < 0:
            raise UserError(f"Stage {self.name!r}: num_steps must be >= 0, got {self.num_steps}.")
        if not 0 <= self.first_step <= self.num_steps:
            raise UserError(
                f"Stage {self.name!r}: first_step must lie in 0..{self.num_steps} (num_steps), got {self.first_step}."
            )
        if self.has_steps and self.step is None:
            raise UserError(f"Stage {self.name!r} has num_steps={self.num_steps} but no step function.")
        outside = [t for t in self.snapshots if not self.first_step < t <= self.num_steps]
        if outside:
            raise UserError(
                f"Stage {self.name!r}: snapshots {outside} are outside {self.first_step + 1}..{self.num_steps}."
            )

    @property
    def has_steps(self) -> bool:
        """Whether `step` is called at all."""
        return self.first_step < self.num_steps


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises UserError unless the names are unique and every need names an earlier stage."""
    seen: list[str] = []
    for stage in stages:
        if stage.name in seen:
            raise UserError(f"Two stages are named {stage.name!r}; give each its own name.")
        for need in stage.needs:
            if need not in seen:
                raise UserError(
                    f"Stage {stage.name!r} needs {need!r}, which is not an earlier stage; "
                    f"earlier ones: {', '.join(seen) or 'none'}."
                )
        seen.append(stage.name)
