import importlib.util
import io
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jkd.train.collectives import Collective, collectives
from jkd.train.hlo import Program
from jkd.train.plan import PlanReport, largest_multiple, report
from jkd.train.topology import topology_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jkd[tpu]'"
)
BATCH, D_IN, D_HIDDEN, D_OUT = 256, 128, 256, 64
PARAMETER_BYTES = 4 * (D_IN * D_HIDDEN + D_HIDDEN * D_OUT)
# Forward, gradient of the kernel and gradient of the input are 2 B d_in d_out each; the first layer lacks the last.
MATMUL_FLOPS = 6 * BATCH * (D_IN * D_HIDDEN + D_HIDDEN * D_OUT) - 2 * BATCH * D_IN * D_HIDDEN


def train_step(params, x, y):
    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def repeated_step(params, x, y):
    return jax.lax.fori_loop(2, 7, lambda _, p: train_step(p, x, y), params)


def compile_step(step, devices, shard_params=False):
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    kept = rows if shard_params else replicated
    jitted = jax.jit(step, in_shardings=(kept, rows, rows), out_shardings=kept, donate_argnums=0)
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"a": float32((D_IN, D_HIDDEN)), "b": float32((D_HIDDEN, D_OUT))}
    return jitted.lower(params, float32((BATCH, D_IN)), float32((BATCH, D_OUT))).compile()


@pytest.fixture
def no_cache():
    """A program for devices that are not there can be written to the compilation cache but not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def cpu_plan():
    devices = topology_devices("cpu:4")
    return report(compile_step(train_step, devices), devices)


def found_in(compiled):
    return collectives(Program(compiled.as_text()))


def test_data_parallel_step_by_hand(cpu_plan):
    assert cpu_plan.collectives == (
        Collective("all-reduce", "f32", 1, PARAMETER_BYTES, 2 * 3 * PARAMETER_BYTES // 4, 4),
    )
    assert cpu_plan.flops == pytest.approx(MATMUL_FLOPS / 4, rel=0.03)
    assert cpu_plan.arguments == PARAMETER_BYTES + 4 * BATCH * (D_IN + D_OUT) // 4
    assert cpu_plan.aliased == PARAMETER_BYTES
    sizes = cpu_plan.arguments + cpu_plan.outputs + cpu_plan.temporaries + cpu_plan.generated_code
    assert cpu_plan.total == sizes - cpu_plan.aliased
    assert cpu_plan.loops == {}
    assert cpu_plan.hbm_limit is None


def test_sharded_parameters_are_gathered():
    found = {one.kind: one for one in found_in(compile_step(train_step, topology_devices("cpu:4"), True))}
    assert found["all-gather"] == Collective("all-gather", "f32", 2, PARAMETER_BYTES, 3 * PARAMETER_BYTES // 4, 4)


def test_a_loop_multiplies_its_collectives_and_its_flops():
    devices = topology_devices("cpu:4")
    plan = report(compile_step(repeated_step, devices), devices)
    assert list(plan.loops.values()) == [5]
    assert [(one.count, one.bytes) for one in plan.collectives] == [(5, 5 * PARAMETER_BYTES)]
    assert plan.flops == pytest.approx(5 * MATMUL_FLOPS / 4, rel=0.03)


def test_report_as_json_and_table(cpu_plan):
    plain = json.loads(cpu_plan.to_json())
    assert plain == cpu_plan.to_dict()
    assert PlanReport.from_dict(plain) == cpu_plan
    assert (plain["roofline"], plain["num_devices"], plain["num_chips"]) == (None, 4, None)
    assert plain["collectives"][0]["wire_bytes"] == 3 * PARAMETER_BYTES // 2
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(cpu_plan.table())
    text = console.export_text()
    assert "all-reduce" in text
    assert "0.28 MiB" in text
    assert "unknown" in text


def made_report(kind, flops=0.0, moved=0.0, sent=0, sent_across=0, devices=8, chips=8):
    found = (
        Collective("all-reduce", "f32", 1, sent, sent, 4),
        Collective("all-reduce", "f32", 1, sent_across, sent_across, 2, across_slices=True),
    )
    return PlanReport(devices, chips, kind, 0, 0, 0, 0, 0, 0, 2**34, flops, moved, found, {})


@pytest.mark.parametrize(
    ("report", "times", "bound"),
    [
        # v5e: 197 TFLOP/s, 819 GB/s, 200 GB/s to its slice; 6.4 Tb/s a pod are 3.125 GB/s a chip.
        (made_report("TPU v5 lite", flops=394e9, moved=0.819e9, sent=100_000_000), (2, 1, 0.5, 0), "compute"),
        (made_report("TPU v5 lite", moved=4.095e9, sent=200_000_000, sent_across=3125000), (0, 5, 1, 1), "memory"),
        (made_report("TPU v5 lite", flops=197e9, sent=600_000_000), (1, 0, 3, 0), "network"),
        (made_report("TPU v5 lite", flops=197e9, sent_across=12500000), (1, 0, 0, 4), "between_slices"),
        (made_report("TPU7x", flops=2307e9, chips=4), (2, 0, 0, 0), "compute"),  # half a chip's 2,307 TFLOP/s
        (made_report("TPU v4", flops=275e9, sent_across=10**12), (1, 0, 0, None), "compute"),
    ],
)
def test_rooflines_by_hand(report, times, bound):
    found = report.roofline()
    names = ("compute", "memory", "network", "between_slices")
    assert tuple(getattr(found, name) for name in names) == tuple(
        time if time is None else pytest.approx(time) for time in times
    )
    assert (found.bound, found.total) == (bound, getattr(found, bound))


def test_the_table_tells_devices_from_chips_and_marks_the_bound():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(made_report("TPU7x", flops=2307e9, sent_across=10, chips=4).table())
    text = console.export_text()
    assert "8 devices on 4 chips: TPU7x" in text
    assert "2  <- bound" in text


@given(best=st.integers(0, 40), most=st.integers(1, 250), unit=st.sampled_from([1, 4, 6]))
def test_the_largest_multiple_is_exact(best, most, unit):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= best * unit

    found = largest_multiple(fits, unit, most)
    assert found == min(best, most // unit) * unit
    assert all(size % unit == 0 and 0 < size <= most for size in asked)
    assert len(set(asked)) == len(asked)
    if found:
        assert found in asked
        assert found + unit in asked or found + unit > most


def test_the_search_comes_from_above():
    asked = []
    assert largest_multiple(lambda size: asked.append(size) or size <= 100, 1, 1000) == 100
    assert asked[:4] == [1000, 500, 250, 125]
    assert sum(size <= 100 for size in asked) <= 4  # those that are compiled to the end


@needs_libtpu
@pytest.mark.usefixtures("no_cache")
def test_data_parallel_step_on_tpu_by_hand():
    devices = topology_devices("v5e:2x2")
    plan = report(compile_step(train_step, devices), devices)
    assert plan.collectives == (Collective("all-reduce", "f32", 1, PARAMETER_BYTES, 2 * 3 * PARAMETER_BYTES // 4, 4),)
    assert plan.flops == pytest.approx(MATMUL_FLOPS / 4, rel=0.03)
    assert plan.hbm_limit == 15.75 * 2**30


@needs_libtpu
@pytest.mark.usefixtures("no_cache")
def test_loops_and_sharded_parameters_on_tpu():
    devices = topology_devices("v5e:2x2")
    plan = report(compile_step(repeated_step, devices), devices)
    assert list(plan.loops.values()) == [5]
    assert [(one.count, one.bytes) for one in plan.collectives] == [(5, 5 * PARAMETER_BYTES)]
    assert plan.flops == pytest.approx(5 * MATMUL_FLOPS / 4, rel=0.03)
    found = {one.kind: one for one in found_in(compile_step(train_step, devices, True))}
    assert found["reduce-scatter"].wire_bytes == 3 * PARAMETER_BYTES // 4
    assert (found["all-gather"].count, found["all-gather"].dtype) == (2, "bf16")
    assert found["all-gather"].bytes == PARAMETER_BYTES // 2


@needs_libtpu
@pytest.mark.usefixtures("no_cache")
def test_gradients_cross_slices_on_tpu():
    devices = topology_devices("v5e:2x2", slices=2)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("slice", "data"))
    rows = NamedSharding(mesh, P(("slice", "data")))
    kept = NamedSharding(mesh, P())
    jitted = jax.jit(lambda x: x.T @ x, in_shardings=rows, out_shardings=kept)
    compiled = jitted.lower(jax.ShapeDtypeStruct((1024, 512), jnp.float32)).compile()
    across = [one for one in found_in(compiled) if one.across_slices]
    # Each device exchanges the quarter which its slice has reduced for it.
    assert [(one.kind, one.bytes, one.group_size) for one in across] == [("all-reduce", 4 * 512 * 512 // 4, 2)]
