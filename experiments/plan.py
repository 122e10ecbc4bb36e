"""Compiles the steps of a config for a topology that is not here, and prints what they need.

    python -m experiments.plan --config configs/energy_kd.py:imagenet --topology v5e:16x16 [--slices 2]

Memory, FLOPs and collectives are per device and step. TPU topologies need the `tpu` extra (libtpu) on any machine;
`cpu:8` needs nothing. No data set is read: only its shape, from the config's `data` section.
"""

import json
import os
import re
from typing import Any

from experiments import cli
from experiments.report import table_console
from jkd.errors import UserError, unknown


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, processes=False)
    parser.add_argument("--topology", required=True, metavar="NAME:LAYOUT", help="v5e:16x16, v4:2x2x4, cpu:8, ...")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices joined by the data-center network")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_config(args.config, {**overrides, "data.blank": True})
    _use_cpu_devices(args.topology)
    # With --json the tables go where they are not in its way.
    console = table_console(stderr=args.json)
    reports = plan(config, args.topology, console, slices=args.slices, only=args.stage)
    if args.json:
        print(json.dumps({name: {**r.to_dict(), **more} for name, (r, more) in reports.items()}, indent=1))


def _use_cpu_devices(topology: str) -> None:
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # planning must not wait for, or hold, a real accelerator
    number = re.fullmatch(r"cpu:(\d+)", topology)
    if number and not os.environ.get("JAX_NUM_CPU_DEVICES"):
        try:
            jax.config.update("jax_num_cpu_devices", int(number[1]))
        except RuntimeError:  # the backend is up already, with the devices it has
            return


def plan(config: Any, topology: str, console: Any, *, slices: int = 1, only: str | None = None) -> dict[str, Any]:
    """Compiles and prints every stage's step: {stage: (PlanReport, {"batch_size", "programs_per_step"})}."""
    import jax

    from jkd.train.lower import lower_stages
    from jkd.train.mesh import make_mesh
    from jkd.train.plan import report, topology_devices

    devices = topology_devices(topology, slices)
    mesh = make_mesh(**{**config.mesh, "slices": slices}, devices=devices)
    stages = cli.experiment(config).stages(config)
    if only and only not in [s.name for s in stages]:
        raise unknown("stage", only, [s.name for s in stages])
    # A program for devices that are not here cannot be read back from the compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    found = {}
    for stage in lower_stages(stages, mesh, only=only, log_every=config.log_every):
        made = report(_compile(stage), devices)
        console.print(f"[bold]{stage.name}[/bold]: {stage.batch_size} images a step on {len(devices)} devices")
        console.print(made.table())
        found[stage.name] = (made, {"batch_size": stage.batch_size, "programs_per_step": stage.programs})
    return found


def _compile(stage: Any) -> Any:
    import jax

    try:
        return stage.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0]
        raise UserError(
            f"The step of stage {stage.name!r} does not fit: {line} Use a smaller batch_size, more devices, or "
            "mesh.fsdp to split parameters and optimizer states."
        ) from error


if __name__ == "__main__":
    cli.command(main)
