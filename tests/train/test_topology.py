"""Topologies by name."""

import importlib.util

import pytest

from jkd.errors import UserError
from jkd.train.topology import topology_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jkd[tpu]'"
)


@pytest.mark.parametrize(
    ("spec", "slices", "message"),
    [
        ("v5x:2x2", 1, "Did you mean 'v5.'.*Known: cpu, tpu7x.*v5e:16x16"),
        ("v5e", 1, "no valid layout.*v5e:16x16"),
        ("v5e:0x2", 1, "no valid layout"),
        ("cpu:two", 1, "no valid layout.*cpu:8"),
        ("cpu:9", 1, "has 8 CPU devices: set JAX_NUM_CPU_DEVICES=9"),
        ("cpu:4", 2, "exactly 1 for cpu"),
        ("v5e:2x2", 0, "at least 1"),
    ],
)
def test_wrong_topologies(spec, slices, message):
    with pytest.raises(UserError, match=message):
        topology_devices(spec, slices)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 'jkd\[tpu\]'"):
        topology_devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize(
    ("spec", "slices", "number", "kind"),
    [
        ("v4:2x2x4", 1, 16, "TPU v4"),
        ("v5e:16x16", 1, 256, "TPU v5 lite"),
        ("v5e:1x1", 1, 1, "TPU v5 lite"),
        ("v5e:2x2", 3, 12, "TPU v5 lite"),
        ("v5p:4x4x4", 1, 64, "TPU v5"),
        ("v6e:2x4", 1, 8, "TPU v6 lite"),
        ("tpu7x:2x2x1", 1, 8, "TPU7x"),
    ],
)
def test_tpu_topologies(spec, slices, number, kind):
    devices = topology_devices(spec, slices)
    assert (len(devices), {device.device_kind for device in devices}) == (number, {kind})


@needs_libtpu
def test_tpu_layout_that_does_not_exist():
    with pytest.raises(UserError, match="'v5e:3x5' does not exist: .*not divisible"):
        topology_devices("v5e:3x5")
