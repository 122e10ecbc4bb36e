"""ResNets: sizes, PyTorch's conventions, taps, dtypes."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import nn
from jkd.errors import UserError
from jkd.nn.layers import ConvNorm

KEY = jax.random.key(0)


def layer(size, inputs, outputs):
    """Parameters of a convolution without bias and a normalization."""
    return size * size * inputs * outputs + 2 * outputs


def cifar_count(depth, widths, classes):
    """Basic blocks of (depth - 2) / 6 units; only a block's first unit may change the channels."""
    total = layer(3, 3, widths[0])
    for block, (before, after) in enumerate(itertools.pairwise(widths)):
        total += layer(3, before, after) + (2 * ((depth - 2) // 6) - 1) * layer(3, after, after)
        if block > 0 or before != after:
            total += layer(1, before, after)
    return total + (widths[-1] + 1) * classes


def parameters(model, shape):
    return nn.count_parameters(jax.eval_shape(lambda: nn.init(model, KEY, shape))["params"])


# The networks of the CIFAR-100 distillation benchmarks; papers print 0.08, 0.28, 0.86, 1.74, 1.23, 7.43 M.
@pytest.mark.parametrize(
    ("name", "depth", "widths", "published"),
    [
        ("resnet8", 8, (16, 16, 32, 64), 83_892),
        ("resnet14", 14, (16, 16, 32, 64), 181_108),
        ("resnet20", 20, (16, 16, 32, 64), 278_324),
        ("resnet32", 32, (16, 16, 32, 64), 472_756),
        ("resnet44", 44, (16, 16, 32, 64), 667_188),
        ("resnet56", 56, (16, 16, 32, 64), 861_620),
        ("resnet110", 110, (16, 16, 32, 64), 1_736_564),
        ("resnet8x4", 8, (32, 64, 128, 256), 1_233_540),
        ("resnet32x4", 32, (32, 64, 128, 256), 7_433_860),
    ],
)
def test_cifar_parameter_counts(name, depth, widths, published):
    assert cifar_count(depth, widths, 100) == published
    assert parameters(nn.build(name, 100), (32, 32, 3)) == published


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_imagenet_parameter_counts(name, published):
    assert parameters(nn.build(name, 1000), (224, 224, 3)) == published


@pytest.mark.parametrize(
    ("name", "shape", "maps"),
    [
        ("resnet20", (32, 32, 3), [(32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64)]),
        ("resnet8x4", (32, 32, 3), [(32, 32, 32), (32, 32, 64), (16, 16, 128), (8, 8, 256)]),
        (
            "resnet50",
            (224, 224, 3),
            [(56, 56, 64), (56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)],
        ),
        ("resnet18", (65, 65, 1), [(17, 17, 64), (17, 17, 64), (9, 9, 128), (5, 5, 256), (3, 3, 512)]),
    ],
)
def test_features_are_named_and_shaped(name, shape, maps):
    model = nn.build(name, 10)
    out, _ = jax.eval_shape(lambda key: model.init_with_output(key, jnp.zeros((2, *shape)), False), KEY)
    names = ["stem"] + [f"block{i}" for i in range(1, len(maps))]
    assert {k: v.shape for k, v in out.features.items()} == {
        **{k: (2, *m) for k, m in zip(names, maps, strict=True)},
        "pool": (2, maps[-1][-1]),
    }
    assert out.logits.shape == (2, 10)


def test_strided_convolution_pads_both_sides():
    """Output (i, j) reads rows 2i - 1 .. 2i + 1: on an even size "SAME" would read 2i .. 2i + 2."""
    model = ConvNorm(features=2, size=3, stride=2)
    image = np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype(np.float32)
    got, variables = jax.jit(functools.partial(model.init_with_output, train=False))(KEY, image)
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    padded = np.pad(image[0].astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    want = np.zeros((3, 3, 2))
    for i in range(3):
        for j in range(3):
            want[i, j] = np.einsum("hwc,hwco->o", padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    # Untrained running statistics: mean 0, variance 1.
    np.testing.assert_allclose(got[0], want / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-5)


def test_where_the_bottleneck_strides():
    """v1.5: in three 3x3 convolutions (and three shortcuts, and the stem), never in a unit's first 1x1."""
    model = nn.resnet50(10, width=2)

    def logits(key):
        return model.init_with_output(key, jnp.zeros((1, 64, 64, 3)), False)[0].logits

    found = collections.Counter(
        e.invars[1].aval.shape[0]
        for e in equations(jax.make_jaxpr(logits)(KEY).jaxpr)
        if e.primitive.name == "conv_general_dilated" and e.params["window_strides"] == (2, 2)
    )
    assert found == {7: 1, 3: 3, 1: 3}


def test_initial_values_follow_pytorch():
    conv = ConvNorm(features=256, size=3)
    variables = jax.jit(functools.partial(conv.init, train=False))(KEY, np.zeros((1, 4, 4, 64), np.float32))
    params = jax.tree.map(np.asarray, variables["params"])
    kernel = params["conv"]["kernel"]
    assert kernel.shape == (3, 3, 64, 256)
    # 147k draws: the sample deviation is within 1 % of sqrt(2 / fan_out), and normal, not truncated.
    deviation = np.sqrt(2 / (9 * 256))
    assert kernel.std() == pytest.approx(deviation, rel=0.01)
    assert np.abs(kernel).max() > 4 * deviation
    assert (params["norm"]["scale"] == 1).all()
    assert (params["norm"]["bias"] == 0).all()


def test_the_head_starts_like_pytorch():
    head = jax.tree.map(np.asarray, nn.init(nn.mlp(100, hidden=()), KEY, (256,))["params"]["head"])
    # U(-1 / 16, 1 / 16), fan_in 256: the deviation is 1 / 16 / sqrt(3), and the bias is not zero.
    for values in (head["kernel"], head["bias"]):
        assert 0.9 / 16 < np.abs(values).max() <= 1 / 16
        assert abs(values.mean()) < 0.2 / 16
    assert head["kernel"].std() == pytest.approx(1 / 16 / np.sqrt(3), rel=0.02)


def test_running_statistics_stay_float32_in_bfloat16():
    model = nn.resnet8(10, width=4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    images = jnp.zeros((2, 8, 8, 3))

    def train(key):
        variables = nn.init(model, key, (8, 8, 3))
        out, state = nn.apply_train(model.apply, *nn.split(variables), images)
        return variables["params"], out, state

    jaxpr, (params, out, state) = jax.make_jaxpr(train, return_shape=True)(KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert out.logits.dtype == jnp.float32
    assert {k: v.dtype for k, v in out.features.items()} == {
        **dict.fromkeys(("stem", "block1", "block2", "block3"), jnp.bfloat16),
        "pool": jnp.float32,
    }
    convolutions = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "conv_general_dilated"]
    assert convolutions
    assert {v.aval.dtype for e in convolutions for v in (*e.invars, *e.outvars)} == {jnp.dtype(jnp.bfloat16)}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if inner := getattr(value, "jaxpr", None):
                yield from equations(inner)


def test_float64_models_are_float64_throughout():
    with jax.enable_x64(True):
        model = nn.resnet8(10, width=4, dtype=jnp.float64, param_dtype=jnp.float64)

        def train(key):
            variables = nn.init(model, key, (8, 8, 3))
            images = jnp.zeros((2, 8, 8, 3), jnp.float64)
            return variables, nn.apply_train(model.apply, *nn.split(variables), images)

        leaves = jax.tree.leaves(jax.eval_shape(train, jax.random.key(0)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}


def test_faults_are_named():
    with pytest.raises(UserError, match="num_classes must be at least 2, got 1"):
        nn.ResNet(1, (1,), (4, 4))
    with pytest.raises(UserError, match="widths must name the stem and each block: 2"):
        nn.ResNet(10, (1,), (4,))
    with pytest.raises(UserError, match="width must be at least 1"):
        nn.resnet8(10, width=0)
    with pytest.raises(UserError, match=r"Unknown block 'botleneck'\. Did you mean 'bottleneck'"):
        nn.ResNet(10, (1,), (4, 4), block="botleneck")
    with pytest.raises(UserError, match="Unknown stem"):
        nn.ResNet(10, (1,), (4, 4), stem="mnist")
    model = nn.resnet8(10, width=4)
    with pytest.raises(UserError, match=r"images must be \[batch, height, width, channels\]"):
        model.init(KEY, jnp.zeros((8, 8, 3)))
    with pytest.raises(UserError, match="floating point, got uint8"):
        model.init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8))
