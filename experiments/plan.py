"""Compiles the steps of a config for a topology that is not here, and prints what they need and how fast they could be.

    python -m experiments.plan --config configs/energy_kd.py:imagenet --topology v5e:16x16 [--slices 2]

Memory, FLOPs and collectives are per device and step; a tpu7x chip is two devices. The roofline is the least time that
the chip's peaks allow. With --largest-batch, batch_size is the largest with which every stage fits into memory. TPU
topologies need the `tpu` extra (libtpu) on any machine; `cpu:8` needs nothing. No data set is read: only its shape,
from the config's `data` section. Plans are kept in the user's cache folder.

Some programs overflow the stack of libtpu itself (seen for tpu7x): `ulimit -s unlimited` before the command helps.
Others take it very long (large generators): with JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 in the environment it optimizes
less and compiles in a fraction of the time; the plan is then of a program that is somewhat slower than it could be.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from experiments import cli, plan_cache
from experiments.report import table_console
from jkd.errors import UserError, unknown
from jkd.train.workdir import flatten


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, processes=False)
    parser.add_argument("--topology", required=True, metavar="NAME:LAYOUT", help="v5e:16x16, v4:2x2x4, cpu:8, ...")
    parser.add_argument("--slices", type=int, help="TPU slices joined by the data-center network")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--largest-batch", action="store_true", help="search the largest batch_size that fits")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="compile again what was planned before")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_config(args.config, {**overrides, "data.blank": True})
    if args.slices is not None:
        if config.mesh.slices not in (1, args.slices):
            raise UserError(f"--slices {args.slices} and mesh.slices={config.mesh.slices} differ: give one of them.")
        config.mesh.slices = args.slices
    use_cpu_devices(args.topology)
    # With --json the tables go where they are not in its way.
    console = table_console(stderr=args.json)
    if args.largest_batch:
        made = largest_batch(config, args.topology, console, only=args.stage, cache=args.cache)
    else:
        made = plan(config, args.topology, only=args.stage, cache=args.cache)
    plans = {}
    for name, one in made:
        show(name, one, console)
        plans[name] = one
    if args.json:
        print(json.dumps({name: one.to_dict() for name, one in plans.items()}, indent=1))


def use_cpu_devices(topology: str) -> None:
    """Plans on CPU devices, as many as `cpu:8` asks for; only a process that has not used JAX heeds this."""
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # planning must not wait for, or hold, a real accelerator
    number = re.fullmatch(r"cpu:(\d+)", topology)
    if number and not os.environ.get("JAX_NUM_CPU_DEVICES"):
        try:
            jax.config.update("jax_num_cpu_devices", int(number[1]))
        except RuntimeError:  # the backend is up already, with the devices it has
            return


class TooLarge(UserError):
    """A step that does not fit into the memory of a device."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of one stage's step.

    Attributes:
      report: a `jkd.train.plan.PlanReport`.
      batch_size: images in one call of the program.
      programs: how often the program is called in one step.
      model_flops: of a device in one call, as the step is written: its products and convolutions. The program's own
        may be more: padding, rematerialization, elementwise work.
      cached: whether it was made before.
      searched: of `largest_batch`: {"batch_size", "next", "refused"}: the next candidate, and why it is none.
    """

    report: Any
    batch_size: int
    programs: int
    model_flops: float
    cached: bool
    searched: dict[str, Any] | None = None

    def images_per_second(self) -> float | None:
        """Of the whole topology at the bound of the roofline; None where the chip is not known."""
        roofline = self.report.roofline()
        return 1e3 * self.batch_size / roofline.total if roofline and roofline.total else None

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        rate = self.images_per_second()
        rates = None if rate is None else {"total": rate, "per_device": rate / self.report.num_devices}
        found = {
            **self.report.to_dict(),
            "batch_size": self.batch_size,
            "programs_per_step": self.programs,
            "model_flops": self.model_flops,
            "images_per_second": rates,
            "cached": self.cached,
        }
        return found if self.searched is None else {**found, "largest_batch": self.searched}


def show(name: str, one: StagePlan, console: Any) -> None:
    """Prints the tables of a plan."""
    cached = " (planned before)" if one.cached else ""
    console.print(f"[bold]{name}[/bold]: {one.batch_size} images a step{cached}")
    console.print(one.report.table())
    if rate := one.images_per_second():
        each = rate / one.report.num_devices
        console.print(f"At the bound: {each:,.0f} images/s a device, {rate:,.0f} images/s in all.")
    if found := one.searched:
        console.print(f"Largest batch_size: {found['batch_size']}. {found['refused']}", soft_wrap=True)


def plan(config: Any, topology: str, *, only: str | None = None, cache: bool = True) -> Iterator[tuple[str, StagePlan]]:
    """Yields the plan of every stage that has steps, or of one, by name.

    Raises:
      TooLarge: if a step does not fit.
      UserError: for a stage, topology or mesh that does not exist, or a batch that the mesh cannot split.
    """
    stages = cli.experiment(config).stages(config)
    # What is in the folder of a run may change.
    cache = cache and not any(value for name, value in flatten(config.to_dict()).items() if name.endswith("workdir"))
    keys = {name: plan_cache.key_of(config, topology, name) for name in _planned(stages, only)}
    kept = {name: plan_cache.load(key) if cache else None for name, key in keys.items()}
    for name, entry in kept.items():
        if entry is not None and "too_large" in entry:
            _stage_plan(name, entry, cached=True)  # raises, before others are compiled
    lowered = _lowered(config, topology, stages, [name for name, entry in kept.items() if entry is None])
    for name, entry in kept.items():
        if entry is None:
            made = _compile(*next(lowered))
            if cache:
                plan_cache.save(keys[name], made)
        yield name, _stage_plan(name, entry or made, cached=entry is not None)


def _planned(stages: Any, only: str | None) -> list[str]:
    from jkd.train.lower import has_steps

    names = [stage.name for stage in stages if has_steps(stage)]
    if only is not None and only not in [stage.name for stage in stages]:
        raise unknown("stage", only, names)
    chosen = names if only is None else [name for name in names if name == only]
    if not chosen:
        raise UserError(f"There is nothing to plan: {only or 'no stage'} has no steps of its own.")
    return chosen


def _lowered(config: Any, topology: str, stages: Any, names: list[str]) -> Iterator[tuple[Any, Any]]:
    """Yields (LoweredStage, devices)."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from jkd.train.lower import lower_stages
    from jkd.train.mesh import make_mesh
    from jkd.train.topology import topology_devices

    if not names:
        return
    devices = topology_devices(topology, config.mesh.slices)
    mesh = make_mesh(**config.mesh, devices=devices)
    # A program for devices that are not here cannot be read back from the compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # heeds the switch even if programs were compiled before
    for stage in lower_stages(stages, mesh, only=names, log_every=config.log_every):
        yield stage, devices


def _compile(stage: Any, devices: Any) -> dict[str, Any]:
    """A plan as it is kept: {"report", "batch_size", "programs"}, or {"too_large": why}."""
    import jax

    from jkd.train.plan import report

    try:
        made = report(stage.lowered.compile(), devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"too_large": str(error).splitlines()[0]}
    if made.hbm_limit and made.total > made.hbm_limit:
        return {"too_large": f"it needs {made.total} bytes of {made.hbm_limit}."}
    own = {"batch_size": stage.batch_size, "programs": stage.programs, "model_flops": stage.model_flops / len(devices)}
    return {"report": made.to_dict(), **own}


def _stage_plan(name: str, entry: dict[str, Any], *, cached: bool) -> StagePlan:
    from jkd.train.plan import PlanReport

    if "too_large" in entry:
        raise TooLarge(
            f"The step of stage {name!r} does not fit: {entry['too_large']} Use a smaller batch_size, more devices, or "
            "mesh.fsdp to split parameters and optimizer states."
        )
    own = {name: entry[name] for name in ("batch_size", "programs", "model_flops")}
    return StagePlan(PlanReport.from_dict(entry["report"]), **own, cached=cached)


def largest_batch(
    config: Any, topology: str, console: Any, *, only: str | None = None, cache: bool = True
) -> Iterator[tuple[str, StagePlan]]:
    """Yields what `plan` does, with the largest batch_size with which every stage (or one) fits.

    Raises:
      UserError: as `plan`, for a topology without a limit, or where not even the smallest batch fits.
    """
    from jkd.train.plan import largest_multiple

    if topology.startswith("cpu:"):
        raise UserError(f"--largest-batch needs a TPU topology: {topology!r} has no limit of memory.")
    unit, rows = _unit_and_rows(config, topology, only)
    plans: dict[int, Any] = {}
    refused: dict[int, str] = {}

    def fits(batch_size: int) -> bool:
        config.batch_size = batch_size
        try:
            plans[batch_size] = dict(plan(config, topology, only=only, cache=cache))
        except TooLarge as error:
            refused[batch_size] = str(error)
        console.print(f"batch_size {batch_size}: {'too large' if batch_size in refused else 'fits'}")
        return batch_size in plans

    best = largest_multiple(fits, unit, rows)
    if not best:
        raise UserError(f"Not even batch_size={unit}, the smallest that the mesh can split, fits. {refused[unit]}")
    why = refused.get(best + unit, f"All {rows} training rows are fewer than {best + unit}.")
    searched = {"batch_size": best, "next": best + unit, "refused": why}
    for name, one in plans[best].items():
        yield name, dataclasses.replace(one, searched=searched)


def _unit_and_rows(config: Any, topology: str, only: str | None) -> tuple[int, int]:
    """What every batch_size is a multiple of, and the number of training rows."""
    from jkd.train.mesh import BATCH_AXES, make_mesh
    from jkd.train.topology import topology_devices

    mesh = make_mesh(**config.mesh, devices=topology_devices(topology, config.mesh.slices))
    unit = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    config.batch_size = unit
    stages = cli.experiment(config).stages(config)
    rows = [stage.num_examples for stage, _ in _lowered(config, topology, stages, _planned(stages, only))]
    if not min(rows):
        raise UserError("--largest-batch needs stages that train on batches: one of these has no data.")
    return unit, min(rows)


if __name__ == "__main__":
    cli.command(main)
