"""Trains the stages of a config, or goes on where a killed run was.

python -m experiments.train --config configs/energy_kd.py --workdir runs/energy_kd [--config.arms.kd.lr=0.02]

With --dry-run it checks all that a run checks and prints what every stage would hold on the devices that are here:
nothing is compiled, trained or written, and --workdir may be left out (and the data: --config.data.blank=True).
"""

import dataclasses
import json
import platform
import sys
from importlib import metadata
from typing import Any

from etils import epath
from jax.sharding import Mesh

from experiments import cli, dry_run, report
from jkd import train
from jkd.errors import UserError
from jkd.train.log import jsonable
from jkd.train.mesh import check_batch_size
from jkd.train.workdir import storage_errors, write_text

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    dry = "--dry-run" in (sys.argv[1:] if argv is None else argv)
    parser.add_argument("--workdir", required=not dry, help="a folder of this run alone; gs:// works")
    parser.add_argument("--dry-run", action="store_true", help="check and print what would run, and stop")
    parser.add_argument(
        "--profile", default="", metavar="[STAGE:]START:STOP", help="write a trace of these steps to WORKDIR/profile"
    )
    args, overrides = cli.parse(parser, argv)
    config = cli.load_config(args.config, overrides)
    cli.initialize(args)
    if args.dry_run:
        options(config)  # for its checks
        dry_run.show(config, make_mesh(config), args.workdir)
        return
    cli.use_compilation_cache()
    run(config, args.workdir, profile=args.profile)


def make_mesh(config: Any) -> Mesh:
    """The mesh of a config, on the devices that are here.

    Raises:
      UserError: if they cannot form it, or it cannot split the config's batches.
    """
    mesh = train.make_mesh(**config.mesh)
    for name in ("batch_size", "eval_batch_size"):  # before anything is written
        if name in config:
            check_batch_size(config[name], mesh, name)
    if "adapt" in config:
        check_batch_size(config.adapt.batch_size, mesh, "adapt.batch_size")
    parts = config.get("microbatches", 1)
    if parts > 1 and config.batch_size % parts == 0:  # the rest is for the method to refuse
        check_batch_size(config.batch_size // parts, mesh, "batch_size / microbatches")
    return mesh


def options(config: Any, profile: str = "") -> train.LoopOptions:
    """How the config's `loop` section says to execute."""
    fields = [field.name for field in dataclasses.fields(train.LoopOptions) if field.name in config.loop]
    return train.LoopOptions(**{name: config.loop[name] for name in fields}, profile=profile)


def run(config: Any, workdir: str, *, show: bool = True, profile: str = "") -> dict[str, Any]:
    """Runs a config to its end, writes `results.json` and the plot, and returns the results."""
    import jax

    module = cli.experiment(config)
    if config.get("data", {}).get("blank"):
        raise UserError("data.blank stands in for the data in plans only: there is nothing to train on.")
    mesh = make_mesh(config)
    found = train.run(
        module.stages(config),
        workdir=workdir,
        seed=config.seed,
        config=config.to_dict(),
        mesh=mesh,
        log_every=config.log_every,
        options=options(config, profile),
    )
    results = {
        "method": config.method,
        "config": jsonable(config.to_dict()),
        "stages": jsonable(found),
        "results": report.summarize(found, module.BASELINE, report.Measure.of(module)),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
    }
    if jax.process_index() == 0:
        with storage_errors(epath.Path(workdir)):
            write_text(epath.Path(workdir) / "results.json", json.dumps(results, indent=1) + "\n")
            if show:
                report.show(results, workdir, report.Measure.of(module))
    return results


if __name__ == "__main__":
    cli.command(main)
