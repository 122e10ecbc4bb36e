"""What the tests of the commands share."""

SMOKE = "configs/energy_kd.py:smoke"
QUIET = ("--config.loop.progress=false", "--config.loop.tensorboard=false")


def listing(folder):
    """Every file below a folder with its size and time of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
