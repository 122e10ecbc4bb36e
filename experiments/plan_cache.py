"""Finished plans, kept on disk: compiling for a pod takes minutes, and the same question has the same answer.

A plan is found again by all that decides it: the config, the topology, the stage, the versions of the compilers and of
what traces the step, jkd's own source, and the flags of XLA.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from typing import Any

import jkd

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
FLAGS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT",
    "JAX_MEMORY_FITTING_EFFORT",
)


def folder() -> pathlib.Path:
    """Where plans are kept."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jkd" / "plans"


def key_of(config: Any, topology: str, stage: str) -> str:
    """The name of a plan: a hash of all that decides it."""
    decides = {
        "config": config.to_dict(),
        "topology": topology,
        "stage": stage,
        "versions": {name: _version(name) for name in PACKAGES},
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "source": _source(),
    }
    return digest(decides)


def load(key: str) -> dict[str, Any] | None:
    """The plan of this name; None where there is none, or it is damaged."""
    try:
        entry = json.loads((folder() / f"{key}.json").read_text())
        return entry["plan"] if entry["sha256"] == digest(entry["plan"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(key: str, plan: dict[str, Any]) -> None:
    """Keeps a plan, in one piece; where the folder cannot be written, it is not kept."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".part", delete=False) as file:
            json.dump({"sha256": digest(plan), "plan": plan}, file)
        pathlib.Path(file.name).replace(folder() / f"{key}.json")


def digest(value: Any) -> str:
    """A name for what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _source() -> str:
    """A hash of every Python file of jkd and of the experiments."""
    found = hashlib.sha256()
    for root in (pathlib.Path(jkd.__file__).parent, pathlib.Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            found.update(f"{root.name}/{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()
