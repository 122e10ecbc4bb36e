"""The loop: runs a list of stages with checkpoints, logs, evaluation and exact resumption."""

import functools
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.markup import escape

from jkd.errors import UserError
from jkd.train import workdir as workdirs
from jkd.train.checkpoint import (
    Checkpoints,
    check_no_nan,
    is_stored,
    load_meta,
    load_plain,
    remove_folder,
    save_plain,
)
from jkd.train.context import Context, LoopOptions
from jkd.train.ensemble import member, previous_of, stack
from jkd.train.finite import non_finite
from jkd.train.flops import flops_and_peak
from jkd.train.journal import Journal
from jkd.train.log import Meter, brief, jsonable
from jkd.train.member import Member
from jkd.train.mesh import DEFAULT_RULES, Rules, cross, make_mesh, place, tree_shardings
from jkd.train.outcome import check_run, read_outcome
from jkd.train.passes import Findings, Residents, batch_axis, examine, examine_members
from jkd.train.peers import Peers
from jkd.train.processes import barrier
from jkd.train.profile import Profile, parse_span
from jkd.train.program import split_key, step_program
from jkd.train.signals import Preempted, StopRequest
from jkd.train.stage import Outcome, Stage
from jkd.train.watchdog import STEPPING, Progress, Watchdog


def run(
    stages: Sequence[Stage],
    *,
    workdir: str | os.PathLike,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    log_every: int = 50,
    options: LoopOptions | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs the stages in order and returns, for each, `{"steps", "metrics", "history"}`.

    Killed anywhere and called again with the same arguments it goes on where it was and ends with the same
    bits (on the same mesh and number of processes). A finished run returns at once.

    Args:
      stages: the run; each stage may need earlier ones.
      workdir: a folder of this run alone, local or remote (`gs://...`).
      seed: the run's seed; a stage's key is derived from it and the stage's name, unless it has its own.
      config: what decides the result, kept in `config.json`: a workdir of another config is refused.
      mesh: by default all devices on the data axis.
      rules: how parameters, optimizer states and constants are split; see `jkd.train.mesh`.
      log_every: steps in a log window; the logged metrics are means over it.
      options: how to execute.

    Raises:
      UserError: for mistakes in the stages, the config or the workdir, before anything is compiled.
      NonFiniteError: when a metric is not finite; a bundle for debugging is in `workdir/debug`.
      Preempted: after SIGTERM, when the state is saved.
    """
    check_run(stages, log_every, workdir)
    options = options or LoopOptions()
    span = parse_span(options.profile, stages)
    mesh = make_mesh() if mesh is None else mesh
    folder = workdirs.folder_of(workdir)
    progress = Progress()
    peers = Peers(progress, options.peer_timeout)
    with StopRequest() as stop, peers, Watchdog(progress, options.hang_timeout, peers.tell):
        fresh = workdirs.claim(folder, {"seed": seed, "log_every": log_every, **(config or {})})
        key = jax.random.key(seed)
        ctx = Context(folder, mesh, rules, key, log_every, options, Residents(mesh), stop, progress, span=span)
        try:
            with workdirs.storage_errors(folder):
                return _run_stages(ctx, stages)
        except UserError as error:
            if fresh and not ctx.begun and not isinstance(error, Preempted):
                workdirs.disclaim(folder)
            raise


def _run_stages(ctx: Context, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    results = {}
    for index, stage in enumerate(stages):
        ctx.residents.next_stage()
        results[stage.name] = _StageRun(ctx, stages, index).result()
        ctx.begun = True
    return results


class _StageRun:
    """One stage of a run, from whatever is on disk to its outcome."""

    def __init__(self, ctx: Context, stages: Sequence[Stage], index: int):
        self.ctx, self.stages, self.stage = ctx, stages, stages[index]
        self.index = index
        self.folder = workdirs.stage_folder(ctx.workdir, index, self.stage.name)
        self.journal = Journal(ctx, self.stage.name, self.folder.name)
        self.t = self.stage.first_step
        self._open: Any = None  # the last dispatched step's (t, reports), not read yet

    # --- the stage as a whole ---

    def result(self) -> dict[str, Any]:
        """Finishes the stage if it is not, and returns its numbers."""
        checkpoints = self.ctx.workdir / "checkpoints" / self.folder.name
        if not is_stored(self.folder / "outcome"):
            self._train(checkpoints)
        if self.ctx.chief:
            remove_folder(checkpoints)
        info = load_meta(self.folder / "outcome")
        return {"steps": self.stage.num_steps, "metrics": info["metrics"], "history": info["history"]}

    def _train(self, checkpoint_folder: epath.Path) -> None:
        ctx, stage = self.ctx, self.stage
        ctx.progress.at("prepare", stage=stage.name, step=stage.first_step, saved=stage.first_step)
        previous = self._previous()
        key = self._key()
        ctx.stop_if_asked(f"prepare of stage {stage.name!r}")
        members = self._members(key, previous, self._prepared(key, previous))
        ctx.stop_if_asked(f"init of stage {stage.name!r}")
        self.members = members
        ctx.progress.at("init, or restoring a checkpoint")
        self.checkpoints = Checkpoints(checkpoint_folder, keep=ctx.options.keep)
        try:
            self.journal.open(self._resume_or_create(), self.t)
            self._steps()
            self._settle()
            self._check_state()
            self._evaluate(final=True)
            self._save_outcome()
        finally:
            self.journal.close()
            self.checkpoints.close()
        ctx.say(f"Stage {stage.name} is done: {brief(self.journal.metrics)}")

    def _key(self) -> jax.Array:
        if self.stage.key is not None:
            return self.stage.key
        return jax.random.fold_in(self.ctx.key, zlib.crc32(self.stage.name.encode()))

    def _previous(self) -> dict[str, Outcome]:
        names = [s.name for s in self.stages]
        folders = {n: workdirs.stage_folder(self.ctx.workdir, names.index(n), n) for n in self.stage.needs}
        return {n: read_outcome(f, self.ctx.mesh, self.ctx.rules) for n, f in folders.items()}

    def _prepared(self, key: jax.Array, previous: Mapping[str, Outcome]) -> Any:
        # Always read back from disk, so that a first run and a resumed one see the same arrays.
        folder, stage = self.folder / "consts", self.stage
        if not is_stored(folder):
            prepare_key = split_key(key)[0]
            if stage.looped:
                each = (previous_of(previous, k, stage.members) for k in range(stage.members))
                consts = stack([stage.prepare(prepare_key[k], p, self.ctx.sweep) for k, p in enumerate(each)])
            else:
                consts = stage.prepare(prepare_key, previous, self.ctx.sweep)
            save_plain(folder, consts, {}, mesh=self.ctx.mesh, rules=self.ctx.rules)
        return load_plain(folder, mesh=self.ctx.mesh, rules=self.ctx.rules)[0]

    def _members(self, key: jax.Array, previous: Mapping[str, Outcome], consts: Any) -> list[Member]:
        ctx, stage = self.ctx, self.stage
        if not stage.looped:
            return [Member(ctx, stage, key, previous, consts)]
        return [
            Member(
                ctx,
                stage,
                key[k],
                previous_of(previous, k, stage.members),
                place(member(consts, k), ctx.mesh, ctx.rules),
            )
            for k in range(stage.members)
        ]

    # --- where to begin ---

    def _resume_or_create(self) -> Mapping[str, Any]:
        """Sets the carries and the step, and returns what was stored beside them."""
        restored = self.checkpoints.restore_newest([m.target() for m in self.members], self.ctx.say)
        if restored is None:
            init = self.members[0].initializer(self.stage)
            for m in self.members:
                m.create(init)
            return self._stored_before()
        carries, meta = restored
        for m, carry in zip(self.members, carries, strict=True):
            m.carry = carry
        self.t = meta["t"]
        self.ctx.progress.at("the first step", step=self.t, saved=self.t)
        self.ctx.say(f"Stage {self.stage.name}: resuming at step {self.t}.")
        return meta

    def _stored_before(self) -> Mapping[str, Any]:
        if self.index == 0:
            return {}
        last = workdirs.stage_folder(self.ctx.workdir, self.index - 1, self.stages[self.index - 1].name)
        return {**load_meta(last / "outcome"), "history": {}}

    # --- stepping ---

    def _steps(self) -> None:
        stage, ctx = self.stage, self.ctx
        if not stage.has_steps:
            return
        source = self.members[0].source
        images = 0 if source is None else source.batch_size * max(stage.members, 1)
        meter = Meter(stage.name, self.t, stage.num_steps, images, show=ctx.options.progress and ctx.chief)
        self.meter = meter
        profile = Profile(ctx.span, stage.name, ctx.workdir / "profile" / self.folder.name)
        axis = 0 if source is None else batch_axis(source)
        assemble = None if source is None else source.assemble
        assert stage.step is not None
        program = step_program(stage.step, assemble, axis, ctx.log_every, ctx.mesh, tuple(ctx.rules))
        streams = [m.crossings(self.t, stage.num_steps) for m in self.members]
        call = None
        try:
            while self.t < stage.num_steps:
                self._stop_if_asked()
                with profile.step(self.t, self._open):
                    began = time.perf_counter()
                    crossed = [next(stream) for stream in streams]
                    meter.stall(time.perf_counter() - began)
                    t = np.int32(self.t)
                    reports = []
                    for m, rows in zip(self.members, crossed, strict=True):
                        rows = rows if source is None else cross(rows, ctx.mesh, source.batch_size, axis)
                        args = (m.carry, rows, m.consts, m.resident, m.step_key, t)
                        if call is None:
                            call = program.jitted(*args)
                            meter.account(*flops_and_peak(call, args, len(self.members), ctx.mesh))
                        ctx.begun = True
                        m.carry, report = call(*args)
                        reports.append(report)
                    self.t += 1
                    ctx.progress.at(STEPPING, step=self.t)
                    self._settle()
                    self._open = (self.t, reports)
                meter.update(self.t)
                self._boundary()
        finally:
            meter.close(self.t)
            profile.close(self._open)

    def _settle(self) -> None:
        """Waits for the step before the one just dispatched, and logs it where a window ends."""
        if self._open is None:
            return
        (t, reports), self._open = self._open, None
        if t % self.ctx.log_every and t != self.stage.num_steps:
            jax.block_until_ready(reports[-1].count)  # bounds how far the host runs ahead
            return
        values = self._read(reports)
        self._check_finite(values)
        metrics = {n: s / values.count[0] for n, s in values.sums.items()}
        self.journal.write(t, {"train": self._by_member(metrics)}, self.meter.window())

    def _read(self, reports: list[Any]) -> Any:
        host = jax.device_get(reports)
        return jax.tree.map(lambda *xs: np.stack(xs), *host)

    def _by_member(self, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {n: v if self.stage.looped else v[0] for n, v in values.items()}

    def _check_finite(self, values: Any) -> None:
        if not (values.bad_step >= 0).any():
            return
        last = max(self.checkpoints.steps(), default=None)
        sources = [m.source for m in self.members]
        bad = {n: v if self.stage.looped else v[0] for n, v in values.bad.items()}
        raise non_finite(self.stage.name, values.bad_step, bad, sources, last, self.ctx.workdir)

    # --- what happens between steps ---

    def _boundary(self) -> None:
        stage, t, every = self.stage, self.t, self.ctx.options.checkpoint_every
        if t in stage.snapshots:
            self._settle()
            with self.meter.aside():
                self._snapshot(self.folder / f"snapshot-{t:08d}")
        if t == stage.num_steps:
            return
        if any(e.every and t % e.every == 0 for e in stage.evaluators.values()):
            self._settle()
            with self.meter.aside():
                self._evaluate(final=False)
        if every and t % every == 0:
            self._settle()
            with self.meter.aside():
                self._save()

    def _snapshot(self, folder: epath.Path) -> None:
        if not is_stored(folder):
            kept = self._shown(self.stage.snapshot or self.stage.publish)
            save_plain(folder, kept, {}, mesh=self.ctx.mesh, rules=self.ctx.rules)

    def _stop_if_asked(self) -> None:
        if not self.ctx.stop.reached():
            return
        if self.t not in self.checkpoints.steps():
            self._save()
        self.checkpoints.wait()
        raise Preempted(
            f"Stopped on request at step {self.t} of stage {self.stage.name!r}; the state is saved in "
            f"{self.ctx.workdir}. Run the same command again to go on."
        )

    def _save(self) -> None:
        """Saves a checkpoint, once the metrics of all steps so far are seen to be finite."""
        self._settle()
        self._check_finite(self._read([m.carry.report for m in self.members]))
        meta = {"t": self.t, "stage": self.stage.name, **self.journal.stored()}
        self.ctx.progress.at("saving a checkpoint")
        saved = self.checkpoints.save(self.t, [m.carry for m in self.members], meta)
        self.ctx.progress.at(STEPPING, saved=saved)

    def _check_state(self) -> None:
        for m in self.members:
            check_no_nan(m.carry.state, f"After the last step of stage {self.stage.name!r}")

    def _publish(self) -> Any:
        return self._shown(self.stage.publish)

    def _shown(self, view: Callable) -> Any:
        outs = []
        for m in self.members:
            shapes = jax.eval_shape(view, m.carry.state)
            shardings = tree_shardings(shapes, self.ctx.mesh, self.ctx.rules)
            outs.append(jax.jit(view, out_shardings=shardings)(m.carry.state))
        return stack(outs) if self.stage.looped else outs[0]

    def _evaluate(self, *, final: bool) -> None:
        published = self._publish()
        found = {}
        for name, evaluator in self.stage.evaluators.items():
            if final or (evaluator.every and self.t % evaluator.every == 0):
                one = self._evaluate_one(name, published)
                found.update({f"{name}/{metric}": value for metric, value in one.metrics.items()})
                self.journal.show(self.t, {f"{name}-{what}": picture for what, picture in one.pictures.items()})
                for text in one.warnings:
                    self.ctx.say(f"[yellow]Stage {self.stage.name}, step {self.t}: {escape(text)}[/yellow]")
        if found:
            self.journal.remember(self.t, found)
            self.journal.write(self.t, {"evaluation": found}, {})

    def _evaluate_one(self, name: str, published: Any) -> Findings:
        evaluator = self.stage.evaluators[name]
        watch = functools.partial(self.ctx.progress.at, f"evaluator {name}")
        named: Any = {"mesh": self.ctx.mesh, "residents": self.ctx.residents, "watch": watch}
        sources = [m.evaluation_sources[name] for m in self.members]
        if self.stage.looped:
            consts = [m.consts for m in self.members]
            return examine_members(evaluator, published, consts, sources=sources, **named)
        consts = self.members[0].consts
        return examine(evaluator, published, consts, source=sources[0], **named)

    def _save_outcome(self) -> None:
        info = {
            "metrics": jsonable(self.journal.metrics),
            "members": self.stage.members,
            **self.journal.stored(),
        }
        self.ctx.progress.at("saving the outcome")
        save_plain(self.folder / "outcome", self._publish(), info, mesh=self.ctx.mesh, rules=self.ctx.rules)
        barrier(f"outcome-{self.index}")
