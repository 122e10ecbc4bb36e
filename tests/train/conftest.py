"""Makes `toys` importable, and keeps tests that start processes from running beside each other."""

import fcntl
import pathlib
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

sys.path.insert(0, str(pathlib.Path(__file__).parent))
CACHE = pathlib.Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="module")
def alone():
    """At most one module that starts processes at a time, over all workers."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "processes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def no_cache():
    """A program for devices that are not there can be written to the compilation cache but not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
