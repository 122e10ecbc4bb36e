import importlib.util
import io
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jkd.errors import UserError
from jkd.train.plan import Collective, collectives, report, topology_devices

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


def module(body, header="num_partitions=8", before=""):
    return f"HloModule jit_step, {header}\n\n{before}ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"


def only(text):
    (found,) = collectives(text)
    return found


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


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
    found = {one.kind: one for one in collectives(compile_step(train_step, topology_devices("cpu:4"), True))}
    assert found["all-gather"] == Collective("all-gather", "f32", 2, PARAMETER_BYTES, 3 * PARAMETER_BYTES // 4, 4)


def test_a_loop_multiplies_its_collectives():
    devices = topology_devices("cpu:4")
    plan = report(compile_step(repeated_step, devices), devices)
    assert list(plan.loops.values()) == [5]
    assert [(one.count, one.bytes) for one in plan.collectives] == [(5, 5 * PARAMETER_BYTES)]


def test_collectives_of_one_shard_map_are_told_apart():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def exchange(x):  # every collective of a shard_map has the same channel id
        lax = jax.lax
        scattered = lax.psum_scatter(x * 2, "b", tiled=True)
        gathered = lax.all_gather(x * 3, "a", tiled=True)
        swapped = lax.ppermute(x * 5, "a", [(0, 1), (1, 0)])
        turned = lax.all_to_all(x * 7, "b", 0, 0, tiled=True)
        return lax.psum(x, "a"), lax.psum(x * x, "b"), scattered, gathered, swapped, turned

    spec = P(("a", "b"))
    sharded = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 16, 32), jnp.float32, sharding=NamedSharding(mesh, spec))
    size = 4 * 16 * 32
    assert {
        (one.kind, one.group_size): (one.bytes, one.wire_bytes) for one in collectives(jitted_text(sharded, x))
    } == {
        ("all-reduce", 2): (size, size),
        ("all-reduce", 4): (size, 3 * size // 2),
        ("reduce-scatter", 4): (size, 3 * size // 4),
        ("all-gather", 2): (2 * size, size),
        ("collective-permute", 8): (size, size),
        ("all-to-all", 4): (size, 3 * size // 4),
    }


def jitted_text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("(f32[8,4]{1,0}, /*index=1*/f32[3]{0}) all-reduce(%p, %q)", ("all-reduce", "f32", 140, 210)),
        ("(f32[8]{0}, bf16[8]{0}) all-reduce(%p, %q)", ("all-reduce", "bf16+f32", 48, 72)),
        ("(f32[8]{0:T(8,128)S(1)}, f32[8]{0}) all-reduce-start(%p, %q)", ("all-reduce", "f32", 64, 96)),
        ("(bf16[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)(2,1)}) all-gather-start(%p)", ("all-gather", "bf16", 128, 96)),
        (
            "((f32[2], s8[2]), (f32[8], s8[8]), u32[]) all-gather-start(%p, %q)",
            ("all-gather", "f32+s8", 40, 30),
        ),
        ("((f32[8]), f32[2], u32[]) reduce-scatter-start(%p)", ("reduce-scatter", "f32", 32, 24)),
        ("f32[2]{0} reduce-scatter(%p)", ("reduce-scatter", "f32", 32, 24)),
        ("(pred[4]{0}, pred[4]{0}) all-to-all(%p, %q)", ("all-to-all", "pred", 8, 6)),
        ("u4[6]{0} all-gather(%p)", ("all-gather", "u4", 3, 2)),
    ],
)
def test_shapes_of_collectives(instruction, expected):
    found = only(module(f"  ROOT %x = {instruction}, channel_id=1, {GROUPS}"))
    assert (found.kind, found.dtype, found.bytes, found.wire_bytes) == expected
    assert (found.count, found.group_size) == (1, 4)


def test_permute_start_and_done_are_one():
    pairs = "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    text = module(
        f"  %s = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%p), channel_id=2, {pairs}\n"
        "  ROOT %d = f32[8]{0} collective-permute-done(%s)"
    )
    assert only(text) == Collective("collective-permute", "f32", 1, 32, 32, 4)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{1,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,2,2]T(2,0,1)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_forms_of_groups(groups, size):
    text = module(f"  ROOT %x = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert only(text).group_size == size


def test_unknown_text_is_refused():
    with pytest.raises(ValueError, match="device groups in x"):
        collectives(module("  ROOT %x = f32[8]{0} all-reduce(%p), replica_groups=new_form"))
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("not a program")


COUNTED_LOOP = """
%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %by = s32[] constant(3)
  %next = s32[] add(%i, %by)
  %v = f32[8]{0} get-tuple-element(%c), index=1
  %r = f32[8]{0} all-reduce(%v), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %r)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(11)
  ROOT %test = pred[] compare(%i, %end), direction=LT
}

"""
LOOP = """  %one = s32[] constant(1)
  %from = s32[] copy(%one)
  %start = (s32[], f32[8]{0}) tuple(%from, %p)
  ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body"""


@pytest.mark.parametrize(
    ("body", "before", "trips"),
    [
        (LOOP, COUNTED_LOOP, 4),  # 1, 4, 7, 10
        (LOOP, COUNTED_LOOP.replace("constant(11)", "constant(1)"), 0),
        (LOOP, COUNTED_LOOP.replace("direction=LT", "direction=NE"), None),
        (LOOP, COUNTED_LOOP.replace("add(%i, %by)", "multiply(%i, %by)"), None),
        (LOOP, COUNTED_LOOP.replace("add(%i, %by)", "add(%elsewhere, %by)"), None),
        (LOOP, COUNTED_LOOP.replace("constant(11)", "parameter(1)"), None),
        (LOOP + ', backend_config={"known_trip_count":{"n":"9"}}', COUNTED_LOOP, 9),
    ],
)
def test_trips_without_a_note(body, before, trips):
    found = collectives(module(body, before=before))
    count = 1 if trips is None else trips
    assert sum(one.count for one in found) == count
    assert sum(one.bytes for one in found) == 32 * count


def test_nested_loops_multiply():
    inner = COUNTED_LOOP.replace("%body", "%inner_body").replace("%condition", "%inner_condition")
    loop = LOOP.replace("ROOT %loop", "%inner").replace("%body", "%inner_body").replace("=%cond", "=%inner_cond")
    outer = COUNTED_LOOP.replace("  %r = f32[8]{0} all-reduce(%v), replica_groups={}, to_apply=%add\n", loop + "\n")
    assert only(module(LOOP, before=inner + outer.replace("tuple(%next, %r)", "tuple(%next, %v)"))).count == 16


def test_tpu_repeats_of_one_collective_count_once():
    gather = "  ROOT %x = bf16[8]{0} all-gather(%p), channel_id=1, replica_groups={}"
    pieces = [("start", 0), ("carry", 0), ("done", 0), ("start2", 1), ("done2", 1)]
    before = "".join(
        f'%{name} (p: f32[]) -> f32[] {{\n{gather}, frontend_attributes={{chain_id="{chain}"}}\n}}\n\n'
        for name, chain in pieces
    )
    calls = "\n".join(f"  %f.{name} = f32[] fusion(%p), kind=kCustom, calls=%{name}" for name, _ in pieces)
    text = module(f"{calls}\n{gather.replace('%x', '%y')}", before=before)
    assert only(text).count == 3


def test_tpu_fused_reduce_scatter_and_traffic_between_slices():
    fused = "%all-reduce-scatter.2 (p: f32[]) -> f32[] {\n  ROOT %x = f32[8]{0} all-reduce(%p), channel_id=1, "
    text = module("  ROOT %f = f32[1]{0} fusion(%p), calls=%all-reduce-scatter.2", before=f"{fused}{GROUPS}\n}}\n\n")
    assert only(text) == Collective("reduce-scatter", "f32", 1, 32, 24, 4)
    send = "  %{0} = (f32[8,8]{{1,0:T(8,128)}}, u32[], token[]) send(%p), frontend_attributes={{{1}}}"
    targets = {
        "ALL_REDUCE": '"{1,2,3,4}x{0:3}"',
        "ALL_GATHER": '"{1,2,3,4}x{0:3}"',
        "ALL_TO_ALL": "{{100000,200000,300000,400000},{100001,200001,300001,400001}}",
        "ONE_TO_ONE": "{{100000->200000},{200000->100000}}",
    }
    attributes = (f'_xla_megascale_target={at},_xla_megascale_transfer_type="{kind}"' for kind, at in targets.items())
    sends = [send.format(f"s{i}", attribute) for i, attribute in enumerate(attributes)]
    assert set(collectives(module("\n".join([*sends, "  ROOT %r = f32[] add(%p, %p)"])))) == {
        Collective("all-reduce", "f32", 1, 256, 384, 4, True),
        Collective("all-gather", "f32", 1, 1024, 768, 4, True),
        Collective("all-to-all", "f32", 1, 256, 192, 4, True),
        Collective("collective-permute", "f32", 1, 256, 256, 2, True),
    }


def test_report_as_json_and_table(cpu_plan):
    plain = json.loads(cpu_plan.to_json())
    assert plain == cpu_plan.to_dict()
    assert plain["collectives"][0]["wire_bytes"] == 3 * PARAMETER_BYTES // 2
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(cpu_plan.table())
    text = console.export_text()
    assert "all-reduce" in text
    assert "0.28 MiB" in text
    assert "unknown" in text


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
    found = {one.kind: one for one in collectives(compile_step(train_step, devices, True))}
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
    across = [one for one in collectives(compiled) if one.across_slices]
    # Each device exchanges the quarter which its slice has reduced for it.
    assert [(one.kind, one.bytes, one.group_size) for one in across] == [("all-reduce", 4 * 512 * 512 // 4, 2)]
