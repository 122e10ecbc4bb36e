"""Makes `toys` importable, and keeps tests that start processes from running beside each other."""

import fcntl
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
CACHE = pathlib.Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="module")
def alone():
    """At most one module that starts processes at a time, over all workers."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "processes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
