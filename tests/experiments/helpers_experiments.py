"""What the tests of the commands share."""

import jax
import numpy as np

from experiments import train
from jkd import train as jkd_train

SMOKE = "configs/energy_kd.py:smoke"
# Every kind of arm once: the others differ from these in numbers.
SMOKE_ARMS = ("ce", "kd", "energy_kd", "energy_dkd", "kd_he_da")
QUIET = ("--config.loop.progress=false", "--config.loop.tensorboard=false")


def listing(folder):
    """Every file below a folder with its size and time of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def run(workdir, *changes):
    """The smoke config with some fields changed, by the command's own main."""
    train.main(["--config", SMOKE, "--workdir", str(workdir), *QUIET, *(f"--config.{change}" for change in changes)])
    return workdir


def published(workdir, stage):
    """What a finished stage published, as numpy arrays."""
    return jax.tree.map(np.asarray, jkd_train.load_outcome(workdir, stage).published)
