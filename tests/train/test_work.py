"""FLOPs and bytes of loop bodies, against counts by hand and the compiler's own."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.train.hlo import Program
from jkd.train.plan import report
from jkd.train.topology import topology_devices
from jkd.train.work import flops_of, loop_factors

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jkd[tpu]'"
)
convolve = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
BATCH, STEPS = 256, 4


def matmul_flops(compiled):
    program = Program(compiled.as_text())
    return sum(flops_of(program, one) for one in program.instructions if one.opcode in ("dot", "convolution"))


@pytest.mark.parametrize(
    ("options", "image", "kernel", "products"),
    [
        # Of 3 taps at each of 5 positions, those at both ends see padding once: 13 a side; 5 images, 3 -> 4 channels.
        ({"window_strides": (1, 1), "padding": "SAME"}, (5, 5, 5, 3), (3, 3, 3, 4), 5 * 3 * 4 * 13 * 13),
        # Stride 2 with one column of padding at each side: positions -1, 1, 3 of 6: 8 of 9 taps are inside.
        ({"window_strides": (2, 2), "padding": ((1, 1), (1, 1))}, (2, 6, 6, 3), (3, 3, 3, 4), 2 * 3 * 4 * 8 * 8),
        # Taps two apart without padding: 6 positions on 10, all inside.
        (
            {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 2)},
            (1, 10, 10, 2),
            (3, 3, 2, 2),
            2 * 2 * 18 * 18,
        ),
        # A hole after each value: of 3 taps at 5 positions, 7 hit one of the 3 values.
        (
            {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)},
            (1, 3, 3, 2),
            (3, 3, 2, 2),
            2 * 2 * 7 * 7,
        ),
        # Two groups: each of 4 channels of the result sees 2 of the 4 of the image.
        (
            {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 2},
            (1, 4, 4, 4),
            (3, 3, 2, 4),
            2 * 4 * 6 * 6,
        ),
    ],
)
def test_convolutions_by_hand_and_as_the_compiler_counts_them(options, image, kernel, products):
    compiled = jax.jit(partial(convolve, **options)).lower(jnp.zeros(image), jnp.zeros(kernel)).compile()
    assert matmul_flops(compiled) == 2 * products
    assert compiled.cost_analysis()["flops"] == 2 * products


def test_gradients_of_convolutions_as_the_compiler_counts_them():
    def loss(kernel, image):
        return convolve(image, kernel, (2, 2), "SAME", feature_group_count=2).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradients.lower(jnp.zeros((3, 3, 2, 6)), jnp.zeros((4, 9, 9, 4))).compile()
    assert matmul_flops(compiled) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


def step_of_micro_batches(scanned, params, x, y):
    """One step whose gradient is the mean over STEPS parts of the batch."""

    def loss(params, x, y):
        maps = jax.nn.relu(convolve(x, params["kernel"], (1, 1), "SAME"))
        return jnp.mean((jnp.tanh(maps.reshape(len(x), -1) @ params["a"]) @ params["b"] - y) ** 2)

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *part)), None

    # Every device keeps its own rows: part k has rows k, k + STEPS, ...
    parts = jax.tree.map(lambda v: v.reshape(-1, STEPS, *v.shape[1:]).swapaxes(0, 1), (x, y))
    total = jax.tree.map(jnp.zeros_like, params)
    if scanned:
        total, _ = jax.lax.scan(add, total, parts)
    else:
        for k in range(STEPS):
            total, _ = add(total, jax.tree.map(lambda v, k=k: v[k], parts))
    return jax.tree.map(lambda p, g: p - 0.1 / STEPS * g, params, total)


def planned(scanned, devices):
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(
        partial(step_of_micro_batches, scanned), in_shardings=(whole, rows, rows), out_shardings=whole, donate_argnums=0
    )
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"kernel": f32((3, 3, 8, 16)), "a": f32((16 * 64, 256)), "b": f32((256, 64))}
    return report(step.lower(params, f32((BATCH, 8, 8, 8)), f32((BATCH, 64))).compile(), devices)


def check_micro_batches(devices):
    scanned, unrolled = planned(True, devices), planned(False, devices)
    assert list(scanned.loops.values()) == [STEPS]
    assert unrolled.loops == {}
    # Three passes, but no gradient of the images; 22 of the 24 taps of a row of 8 lie inside.
    convolutions = 2 * 2 * BATCH * 8 * 16 * 22 * 22
    matmuls = 6 * BATCH * (1024 * 256 + 256 * 64)
    for plan in (scanned, unrolled):
        assert plan.flops == pytest.approx((convolutions + matmuls) / len(devices), rel=0.05)
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.02)
    assert scanned.bytes_accessed == pytest.approx(unrolled.bytes_accessed, rel=0.5)


def test_a_scan_over_micro_batches_costs_what_the_unrolled_step_does():
    check_micro_batches(topology_devices("cpu:4"))


@needs_libtpu
def test_a_scan_over_micro_batches_on_tpu():
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        check_micro_batches(topology_devices("v5e:2x2"))
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


LOOPED = """HloModule step, num_partitions=1

%sliced (p: bf16[4,8,256], i: s32[]) -> bf16[8,256] {
  %p = bf16[4,8,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,8,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,256}
  ROOT %flat = bf16[8,256]{1,0:T(8,128)(2,1)} bitcast(%part)
}

%body (c: (s32[], bf16[4,8,256])) -> (s32[], bf16[4,8,256]) {
  %c = (s32[], bf16[4,8,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = bf16[4,8,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %f = bf16[8,256]{1,0:T(8,128)(2,1)} fusion(%v, %i), kind=kLoop, calls=%sliced
  %d = f32[8,8]{1,0:T(8,128)} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s32[], bf16[4,8,256]{2,1,0:T(8,128)(2,1)}) tuple(%i, %v)
}

%condition (c: (s32[], bf16[4,8,256])) -> pred[] {
  %c = (s32[], bf16[4,8,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %test = pred[] constant(true)
}

ENTRY %main (x: (s32[], bf16[4,8,256]), y: f32[8,8]) -> f32[8,8] {
  %x = (s32[], bf16[4,8,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %y = f32[8,8]{1,0:T(8,128)} parameter(1)
  %loop = (s32[], bf16[4,8,256]{2,1,0}) while(%x), condition=%condition, body=%body, NOTE
  ROOT %z = f32[8,8]{1,0:T(8,128)} add(%y, %y)
}
"""


def test_factors_by_hand():
    note = 'backend_config={"known_trip_count":{"n":"4"}}'
    flops, moved = loop_factors(Program(LOOPED.replace("NOTE", note)))
    outside, dot = 8 * 8, 2 * 8 * 8 * 256
    assert flops == (outside + 4 * dot) / (outside + dot)
    # The fusion reads and writes one slice, and a number; the product reads that slice twice. On a TPU the lines of
    # the 8x8 arrays are filled up to 128.
    padded, part = 4 * 8 * 128, 2 * 8 * 256
    outside, body = 3 * padded, 2 * part + 4 + 2 * part + padded
    assert moved == pytest.approx((outside + 4 * body) / (outside + body))
    assert loop_factors(Program(LOOPED.replace(", NOTE", ""))) == (1, 1)  # trips that are not told count once
