"""Devices that are not here, to compile for: a TPU topology is described by libtpu alone, on any machine."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jkd.errors import UserError, unknown
from jkd.train.chips import TPUS, Chip

# What libtpu reads when it loads. The accelerator type has to be a valid one; the topology's name decides.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_EXAMPLES = f"Examples: {', '.join(chip.example for chip in TPUS.values())}, cpu:8."


def topology_devices(spec: str, slices: int = 1) -> list[jax.Device]:
    """The devices to compile for: `"v5e:16x16"` is a TPU topology, `"cpu:8"` the first 8 local CPU devices.

    TPU devices can be compiled for but not run on. A `tpu7x` chip is two devices, any other chip is one. Sets
    libtpu's variables in this process's environment where they are not set.

    Args:
        spec: `NAME:LAYOUT`; the layout counts chips along each dimension of one slice, `cpu:` takes a number.
        slices: number of equal TPU slices joined by the data-center network.

    Raises:
        UserError: an unknown name, a layout that the TPU does not have, libtpu missing, too few CPU devices.
    """
    name, _, layout = spec.partition(":")
    if slices < 1 or (name == "cpu" and slices > 1):
        raise UserError(f"slices must be at least 1, and exactly 1 for cpu: got {slices} for {spec!r}.")
    if name not in TPUS and name != "cpu":
        raise UserError(f"{unknown('topology', name, [*TPUS, 'cpu'])} {_EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*" if name == "cpu" else r"[1-9]\d*(x[1-9]\d*)+", layout):
        raise UserError(f"Topology {spec!r} has no valid layout. {_EXAMPLES}")
    return _cpu_devices(int(layout)) if name == "cpu" else _tpu_devices(spec, TPUS[name], slices)


def _cpu_devices(number: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if number > len(devices):
        reason = f"this process has {len(devices)} CPU devices: set JAX_NUM_CPU_DEVICES={number}"
        raise UserError(f"Topology 'cpu:{number}' is too large: {reason}.")
    return devices[:number]


def _tpu_devices(spec: str, chip: Chip, slices: int) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(f"Topology {spec!r} needs libtpu: pip install 'jkd[tpu]'.")
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if re.search(r":1(x1)+$", spec):  # a host of one chip; the default host has 2x2
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(spec, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Topology {spec!r} does not exist: {reason}. {_EXAMPLES}") from error
