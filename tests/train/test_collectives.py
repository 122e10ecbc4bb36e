"""Collectives and loops, off the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.train.collectives import Collective, collectives
from jkd.train.hlo import Program


def module(body, header="num_partitions=8", before=""):
    return f"HloModule jit_step, {header}\n\n{before}ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"


def only(text):
    (found,) = collectives(Program(text))
    return found


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


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
        (one.kind, one.group_size): (one.bytes, one.wire_bytes) for one in collectives(Program(jitted_text(sharded, x)))
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
        ("mesh['a'=1,'b'=4,'c'=64], device_ids=([64,4]T(1,0)) {'b'}", 4),
        ("{}", 8),
    ],
)
def test_forms_of_groups(groups, size):
    text = module(f"  ROOT %x = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert only(text).group_size == size


def test_unknown_text_is_refused():
    with pytest.raises(ValueError, match="device groups in x"):
        collectives(Program(module("  ROOT %x = f32[8]{0} all-reduce(%p), replica_groups=new_form")))
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("not a program")


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
    found = collectives(Program(module(body, before=before)))
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
    assert set(collectives(Program(module("\n".join([*sends, "  ROOT %r = f32[] add(%p, %p)"]))))) == {
        Collective("all-reduce", "f32", 1, 256, 384, 4, True),
        Collective("all-gather", "f32", 1, 1024, 768, 4, True),
        Collective("all-to-all", "f32", 1, 256, 192, 4, True),
        Collective("collective-permute", "f32", 1, 256, 256, 2, True),
    }
