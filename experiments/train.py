"""Trains the stages of a config, or goes on where a killed run was.

python -m experiments.train --config configs/energy_kd.py --workdir runs/energy_kd [--config.arms.kd.lr=0.02]
"""

import dataclasses
import json
import platform
from importlib import metadata
from typing import Any

from etils import epath

from experiments import cli, report
from jkd import train
from jkd.errors import UserError
from jkd.train.log import jsonable
from jkd.train.mesh import check_batch_size
from jkd.train.workdir import storage_errors, write_text

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="a folder of this run alone; gs:// works")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_config(args.config, overrides)
    cli.initialize(args)
    cli.use_compilation_cache()
    run(config, args.workdir)


def run(config: Any, workdir: str, *, show: bool = True) -> dict[str, Any]:
    """Runs a config to its end, writes `results.json` and the plot, and returns the results."""
    import jax

    module = cli.experiment(config)
    if config.get("data", {}).get("blank"):
        raise UserError("data.blank stands in for the data in plans only: there is nothing to train on.")
    mesh = train.make_mesh(**config.mesh)
    for name in ("batch_size", "eval_batch_size"):  # before anything is written
        if name in config:
            check_batch_size(config[name], mesh, name)
    options = {f.name: config.loop[f.name] for f in dataclasses.fields(train.LoopOptions) if f.name in config.loop}
    found = train.run(
        module.stages(config),
        workdir=workdir,
        seed=config.seed,
        config=config.to_dict(),
        mesh=mesh,
        log_every=config.log_every,
        options=train.LoopOptions(**options),
    )
    results = {
        "method": config.method,
        "config": jsonable(config.to_dict()),
        "stages": jsonable(found),
        "results": report.summarize(found, baseline=module.BASELINE),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
    }
    if jax.process_index() == 0:
        with storage_errors(epath.Path(workdir)):
            write_text(epath.Path(workdir) / "results.json", json.dumps(results, indent=1) + "\n")
            if show:
                report.show(results, workdir)
    return results


if __name__ == "__main__":
    cli.command(main)
