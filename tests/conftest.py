"""Every test runs on 8 virtual CPU devices, with shape checks, strict ranks and a compilation cache."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".cache"
FLAGS = (
    # Eight virtual devices share few cores: a collective may wait long for a thread that is not scheduled.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Programs that run for milliseconds: the time is spent in compiling them.
    "--xla_backend_optimization_level=0",
)
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Every process that a test starts inherits these. One cache a worker: its files are not written in one piece.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "alone"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JKD_DATA_DIR", str(CACHE / "data"))

import jax
import jaxtyping
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
# More devices than cores: steps in flight at once could starve a collective of threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated shape and dtype of the library is checked while tests run.
jaxtyping.install_import_hook("jkd", "beartype.beartype")

settings.register_profile("jkd", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("jkd")

LONGEST_FIRST = ("test_processes", "test_notebooks", "test_energy_kd", "test_resume", "test_cli", "test_random_kills")


def pytest_collection_modifyitems(items):
    """Workers take whole files in this order: the longest must not begin last, nor two that wait for each other."""
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
