"""WRN, VGG, ShuffleNets, MobileNets, DenseNet, Inceptions, bottleneck ResNet: sizes, taps, layers, initial values."""

import collections
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import nn
from jkd.errors import UserError
from jkd.nn import densenet, resnet, shufflenet, vgg, wide_resnet
from jkd.nn.googlenet import WIDTHS
from jkd.nn.mobilenet import SeparableUnit
from jkd.nn.mobilenet_v2 import InvertedUnit
from jkd.trees import path_name

KEY = jax.random.key(0)
BF16 = jnp.bfloat16
# One small network of each family, and the sides of its images.
SMALL = {
    "wrn": (nn.WideResNet(5, 10, (4, 4, 6, 8)), 8),
    "vgg": (nn.VGG(5, (1, 2, 1, 1, 1), (4, 6, 6, 6, 6)), 8),
    "shufflenet_v1": (nn.ShuffleNetV1(5, 12, (2, 1, 1)), 8),
    "shufflenet_v2": (nn.ShuffleNetV2(5, (4, 8, 8, 12, 10), (2, 1, 1)), 8),
    "mobilenet": (nn.mobilenet(5, width=4), 32),
    "mobilenet_v2": (nn.MobileNetV2(5, (1, 2, 1), (4, 6, 4, 8, 12)), 16),
    "densenet": (nn.DenseNet(5, (2, 1), (6, 4), 3, 4), 8),
    "googlenet": (nn.GoogLeNet(5, (3, 4, 5), (((2, 3, 4, 2, 3, 4),), ((4, 3, 2, 2, 2, 3),))), 8),
    "inception_v3": (nn.InceptionV3(5, False, (2,) * 5, (((2,) * 7,), ((2,) * 4, (3,) * 10))), 75),
}
# Units, and images that they halve.
UNITS = {
    "wrn": wide_resnet.PreactUnit(6, 2),
    "shufflenet_v1": shufflenet.ShuffleUnit(36, 2, 1, 3),
    "shufflenet_v2": shufflenet.SplitUnit(8, 2),
    "mobilenet": SeparableUnit(8, 2),
    "mobilenet_v2": InvertedUnit(8, 2, expansion=2),
    "densenet": densenet.Transition(6),
}
small = pytest.mark.parametrize(("model", "side"), SMALL.values(), ids=SMALL)
units = pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)


def layer(size, inputs, outputs, groups=1):
    """Parameters of a convolution without bias and a normalization."""
    return size * size * inputs * outputs // groups + 2 * outputs


def wrn_count(depth, k):
    """Every normalization is in front of its convolution; the shortcuts have none."""
    widths, total = (16, 16 * k, 32 * k, 64 * k), 9 * 3 * 16
    for before, after in itertools.pairwise(widths):
        total += 2 * before + 9 * before * after + 2 * after + 9 * after * after
        total += ((depth - 4) // 6 - 1) * 2 * (2 * after + 9 * after * after)
        total += before * after * (before != after)
    return total + 2 * widths[-1] + 100 * (widths[-1] + 1)


def vgg_count(*layers):
    total, inputs = 0, 3
    for count, width in zip(layers, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            total, inputs = total + layer(3, inputs, width) + width, width
    return total + 100 * 513


def shufflenet_v1_count():
    total, inputs = layer(1, 3, 24), 24
    for units, width in ((4, 240), (8, 480), (4, 960)):
        for u in range(units):
            made = width - inputs if u == 0 else width
            mid = made // 4
            total += layer(1, inputs, mid, 1 if inputs == 24 else 3) + layer(3, mid, mid, mid) + layer(1, mid, made, 3)
            inputs = width
    return total + 100 * 961


def shufflenet_v2_count():
    total, inputs = layer(1, 3, 24), 24
    for units, width in ((4, 116), (8, 232), (4, 464)):
        half = width // 2
        branch = layer(3, half, half, half) + layer(1, half, half)
        total += layer(3, inputs, inputs, inputs) + 2 * layer(1, inputs, half) + branch
        total, inputs = total + (units - 1) * (layer(1, half, half) + branch), width
    return total + layer(1, 464, 1024) + 100 * 1025


def mobilenet_count():
    total, inputs = layer(3, 3, 32), 32
    for width in (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024):
        total, inputs = total + layer(3, inputs, inputs, inputs) + layer(1, inputs, width), width
    return total + 1000 * 1025


def mobilenet_v2_count(classes, times, narrow):
    """`narrow`: whether the first unit has no expansion."""
    inputs, first = int(32 * times), not narrow
    total = layer(3, 3, inputs)
    for units, width in zip((1, 2, 3, 4, 3, 3, 1), (16, 24, 32, 64, 96, 160, 320), strict=True):
        for _ in range(units):
            hidden = inputs if width == 16 else 6 * inputs
            total += first * layer(1, inputs, hidden) + layer(3, hidden, hidden, hidden)
            total += layer(1, hidden, int(width * times))
            inputs, first = int(width * times), True
    return total + layer(1, inputs, 1280) + classes * 1281


def densenet_count(*units):
    """A normalization of the inputs of every convolution but the first."""
    total, inputs = layer(7, 3, 64), 64
    for b, count in enumerate(units):
        for _ in range(count):
            total, inputs = total + 2 * inputs + 128 * inputs + 2 * 128 + 9 * 128 * 32, inputs + 32
        if b < 3:
            total, inputs = total + 2 * inputs + inputs * inputs // 2, inputs // 2
    return total + 2 * inputs + 1000 * (inputs + 1)


def googlenet_count():
    total, inputs = layer(7, 3, 64) + layer(1, 64, 64) + layer(3, 64, 192), 192
    for one, reduce2, three2, reduce3, three3, last in (unit for block in WIDTHS for unit in block):
        total += sum(layer(1, inputs, width) for width in (one, reduce2, reduce3, last))
        total, inputs = total + layer(3, reduce2, three2) + layer(3, reduce3, three3), one + three2 + three3 + last
    return total + 1000 * (inputs + 1)


def resnet50_count():
    """The published one for ImageNet: 100 classes instead of 1000, 3x3 instead of 7x7."""
    return 25_557_032 - 900 * 2049 - (49 - 9) * 3 * 64


def halving(side, *channels):
    return [(side >> i, side >> i, c) for i, c in enumerate(channels)]


WRN = {k: [(32, 32, 16), *halving(32, 16 * k, 32 * k, 64 * k)] for k in (1, 2)}
VGG = [*halving(32, 64, 128, 256, 512), (4, 4, 512)]
CIFAR, DENSE = [(32, 32, 64)], [(56, 56, 64)]


# Counts of the protocol's own PyTorch modules (at 100 classes; networks for ImageNet at 1000), and the same by hand.
@pytest.mark.parametrize(
    ("name", "published", "by_hand", "maps"),
    [
        ("wrn_16_1", 180_916, wrn_count(16, 1), WRN[1]),
        ("wrn_16_2", 703_284, wrn_count(16, 2), WRN[2]),
        ("wrn_40_1", 569_780, wrn_count(40, 1), WRN[1]),
        ("wrn_40_2", 2_255_156, wrn_count(40, 2), WRN[2]),
        ("vgg8", 3_965_028, vgg_count(1, 1, 1, 1, 1), VGG),
        ("vgg11", 9_277_284, vgg_count(1, 1, 2, 2, 2), VGG),
        ("vgg13", 9_462_180, vgg_count(2, 2, 2, 2, 2), VGG),
        ("vgg16", 14_774_436, vgg_count(2, 2, 3, 3, 3), VGG),
        ("vgg19", 20_086_692, vgg_count(2, 2, 4, 4, 4), VGG),
        ("shufflenet_v1", 949_258, shufflenet_v1_count(), [(32, 32, 24), *halving(16, 240, 480, 960)]),
        ("shufflenet_v2", 1_355_528, shufflenet_v2_count(), [(32, 32, 24), *halving(16, 116, 232, 464)]),
        ("resnet18_cifar", 11_220_132, 11_689_512 - 900 * 513 - 40 * 3 * 64, CIFAR + halving(32, 64, 128, 256, 512)),
        ("resnet50_cifar", 23_705_252, resnet50_count(), CIFAR + halving(32, 256, 512, 1024, 2048)),
        ("mobilenet", 4_231_976, mobilenet_count(), [(112, 112, 32), *halving(56, 128, 256, 512, 1024)]),
        (
            "mobilenet_v2",
            3_504_872,
            mobilenet_v2_count(1000, 1, narrow=True),
            [(112, 112, 32), (112, 112, 16), *halving(56, 24, 32, 64), (14, 14, 96), *halving(7, 160), (7, 7, 320)],
        ),
        (
            "mobilenet_v2_cifar",
            812_836,
            mobilenet_v2_count(100, 0.5, narrow=False),
            [(16, 16, 16), (16, 16, 8), *halving(16, 12, 16, 32), (4, 4, 48), *halving(2, 80), (2, 2, 160)],
        ),
        ("densenet121", 7_978_856, densenet_count(6, 12, 24, 16), DENSE + halving(56, 256, 512, 1024, 1024)),
        ("densenet169", 14_149_480, densenet_count(6, 12, 32, 32), DENSE + halving(56, 256, 512, 1280, 1664)),
        ("googlenet", 6_624_904, googlenet_count(), [(28, 28, 192), *halving(28, 480, 832, 1024)]),
    ],
)
def test_parameters_and_taps(name, published, by_hand, maps):
    model = getattr(nn, name)()
    shape = (224, 224, 3) if model.num_classes == 1000 else (32, 32, 3)

    out, variables = jax.eval_shape(lambda key: model.init_with_output(key, jnp.zeros((2, *shape)), False), KEY)
    assert nn.count_parameters(variables["params"]) == by_hand == published
    names = ["stem", *(f"block{i}" for i in range(1, len(maps)))]
    assert {k: v.shape for k, v in out.features.items() if k != "pool"} == {
        name: (2, *shape) for name, shape in zip(names, maps, strict=True)
    }
    last = {"shufflenet_v2": 1024, "mobilenet_v2": 1280, "mobilenet_v2_cifar": 1280}
    assert out.features["pool"].shape == (2, last.get(name, maps[-1][-1]))
    assert out.logits.shape == (2, model.num_classes)


def test_width_scales_the_blocks():
    assert nn.wrn_16_2(10, width=4).widths == (4, 8, 16, 32)
    assert nn.vgg8(10, width=4).widths == (4, 8, 16, 32, 32)
    assert nn.shufflenet_v2(10, width=48).widths == (24, 48, 96, 192, 1024)
    assert nn.resnet50_cifar(10, width=4).widths == (4, 4, 8, 16, 32)
    dense = nn.densenet121(10, width=4)
    assert (dense.widths, dense.growth, dense.bottleneck) == ((8, 16, 32, 64), 4, 16)
    half = nn.googlenet(10, multiplier=0.5)
    assert (half.stem_widths, half.widths[1][1]) == ((32, 32, 96), (80, 56, 112, 12, 32, 32))
    assert (nn.shufflenet_v1(10, width=36).width, nn.mobilenet(10, width=8).width) == (36, 8)


def test_multipliers_of_mobilenet_v2():
    """torchvision's channels, in steps of 8 and never under 90 %; the protocol's are rounded down."""
    widths = nn.mobilenet_v2(multiplier=1.4).widths
    assert widths == (48, 24, 32, 48, 88, 136, 224, 448, 1792)
    assert nn.mobilenet_v2(multiplier=0.35).widths == (16, 8, 8, 16, 24, 32, 56, 112, 1280)
    assert nn.mobilenet_v2_cifar(multiplier=0.35).widths == (11, 5, 8, 11, 22, 33, 56, 112, 1280)
    with pytest.raises(UserError, match="width must be at least 1, got 0"):
        nn.mobilenet_v2_cifar(multiplier=0.01)
    with pytest.raises(UserError, match="Unknown form 'cifr'"):
        nn.MobileNetV2(10, form="cifr")
    with pytest.raises(
        UserError, match=r"widths must name the stem, each block and the last.*: 4 of them for units=\(1, 2"
    ):
        nn.MobileNetV2(10, (1, 2))


def test_builders_are_functions_of_their_modules():
    for builder in (
        *resnet.BUILDERS,
        *wide_resnet.BUILDERS,
        *vgg.BUILDERS,
        *shufflenet.BUILDERS,
        *densenet.BUILDERS,
        nn.mobilenet,
    ):
        assert getattr(nn, builder.__name__) is builder
        assert builder.__module__.startswith("jkd.nn.")
        assert "`width`" in builder.__doc__


def test_channel_shuffle():
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
    by_three, by_two, unmoved = jax.jit(lambda x: [shufflenet.channel_shuffle(x, groups) for groups in (3, 2, 1)])(x)
    np.testing.assert_array_equal(by_three[0, 0, 0], [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(by_two[0, 0, 0], [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(unmoved, x)


def test_vgg_pools_large_images_once_more():
    model = nn.vgg8(10, width=2)
    for side, sides in ((62, [62, 31, 15, 7, 7]), (64, [64, 32, 16, 8, 4]), (9, [9, 4, 2, 1, 1])):
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        out, _ = jax.eval_shape(lambda x: model.init_with_output(KEY, x, False), image)
        assert [out.features[k].shape[1] for k in ("stem", "block1", "block2", "block3", "block4")] == sides


def test_wide_resnets_are_tapped_before_the_activation(random_variables):
    model, side = SMALL["wrn"]
    variables = random_variables(model, (side, side, 3))
    images = np.random.default_rng(0).normal(size=(4, side, side, 3)).astype(np.float32)
    out = jax.tree.map(np.asarray, jax.jit(model.apply)(variables, images))
    for name in ("stem", "block1", "block3"):
        assert out.features[name].min() < -0.1
    norm = {k: np.asarray(v) for tree in variables.values() for k, v in tree["norm"].items()}
    active = (out.features["block3"] - norm["mean"]) / np.sqrt(norm["var"] + 1e-5)
    active = active * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(out.features["pool"], np.maximum(active, 0).mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_initial_values():
    """The protocol's: He in VGG and WRN, whose classifiers differ; PyTorch's own in the others."""

    key = jax.random.key(0, impl="rbg")  # compiles faster

    def params(model, side, *paths):
        """Only what is looked at: the rest is traced, but not compiled."""

        def chosen(key):
            found = nn.init(model, key, (side, side, 3))["params"]
            return [functools.reduce(lambda tree, name: tree[name], path.split("/"), found) for path in paths]

        return [np.asarray(leaf) for leaf in jax.jit(chosen)(key)]

    names = ("head/kernel", "head/bias", "block1_0/conv/bias", "block4_0/conv/kernel")
    kernel, bias, early, late = params(nn.vgg8(50, width=16), 8, *names)
    assert kernel.std() == pytest.approx(0.01, rel=0.05)
    assert not bias.any()
    assert not early.any()
    assert late.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    kernel, bias = params(nn.WideResNet(50, 10, (16, 4, 4, 64)), 8, "head/kernel", "head/bias")
    assert not bias.any()
    assert 0.9 / 8 < np.abs(kernel).max() <= 1 / 8
    unit = shufflenet.ShuffleUnit(120, 1, 3, 3)
    found = jax.jit(lambda key: unit.init(key, jnp.zeros((1, 2, 2, 120)), False)["params"])(key)
    for name, fan_in in (("layer1", 40), ("layer2", 9), ("layer3", 10)):
        kernel = np.asarray(found[name]["conv"]["kernel"])
        assert kernel.size // kernel.shape[-1] == fan_in
        assert 0.95 * fan_in**-0.5 < np.abs(kernel).max() <= fan_in**-0.5
        assert kernel.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


@small
def test_bfloat16_computes_low_and_keeps_the_rest_wide(model, side):
    model = model.clone(dtype=BF16)

    def train(key):
        params, state = nn.split(nn.init(model, key, (side, side, 3)))
        return params, nn.apply_train(model.apply, params, state, jnp.zeros((2, side, side, 3)))

    jaxpr, (params, (out, state)) = jax.make_jaxpr(train, return_shape=True)(KEY)
    assert {x.dtype for x in jax.tree.leaves((params, state))} == {jnp.dtype(jnp.float32)}
    assert out.logits.dtype == out.features["pool"].dtype == jnp.float32
    assert {x.dtype for k, x in out.features.items() if k != "pool"} == {jnp.dtype(BF16)}
    convolutions = [e for e in equations(jaxpr.jaxpr) if "conv_general" in e.primitive.name]
    assert convolutions
    assert {v.aval.dtype for e in convolutions for v in (*e.invars, *e.outvars)} == {jnp.dtype(BF16)}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("wrn", 4),
        ("vgg", 6),
        ("shufflenet_v1", 5),
        ("shufflenet_v2", 6),
        ("mobilenet", 14),
        ("mobilenet_v2", 6),
        ("densenet", 5),
        ("googlenet", 3),
        ("inception_v3", 4),
    ],
)
def test_rematerialization_finds_every_unit(name, kept):
    model, side = SMALL[name]
    jaxpr = jax.make_jaxpr(lambda key: nn.init(model, key, (side, side, 3)))(KEY).jaxpr
    found = collections.Counter(e.params["name"] for e in equations(jaxpr) if e.primitive.name == "name")
    assert found == {"block": kept, "logits": 1}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            yield from equations(value) if hasattr(value, "eqns") else ()


@functools.cache
def unit_training(unit):
    """A jitted (variables, x) -> (output, new statistics, gradient) of a unit, and arguments for it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4, 4, 6 if isinstance(unit, shufflenet.SplitUnit) else 12)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: unit.init(KEY, x, False), x)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.3, 1.3, leaf.shape).astype(leaf.dtype), shapes)

    def step(variables, x):
        def loss(params):
            out, new = unit.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), (out, new)

        grads, aux = jax.grad(loss, has_aux=True)(variables["params"])
        return *aux, grads

    return jax.jit(step), variables, x


@units
def test_every_parameter_of_a_unit_is_trained(unit):
    step, variables, x = unit_training(unit)
    out, _, grads = step(variables, x)
    assert out.shape[1:3] == (2, 2)
    flat = jax.tree_util.tree_leaves_with_path(grads)
    idle = {path_name(path) for path, x in flat if np.abs(x).max() < 1e-4}
    # Only what the next normalization takes off again: no ReLU comes between.
    split = isinstance(unit, shufflenet.SplitUnit)
    assert idle == ({"left1/norm/bias", "layer2/norm/bias"} if split else set())
    _, _, grads = step(variables, np.zeros_like(x))  # all normalizations divide by a variance of 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@units
def test_a_sharded_batch_trains_as_one(unit):
    step, variables, x = unit_training(unit)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = step(variables, jax.device_put(x, NamedSharding(mesh, P("data"))))
    chex.assert_trees_all_close(sharded, step(variables, x), rtol=1e-3, atol=1e-3)


def test_faults_are_named():
    with pytest.raises(UserError, match="depth must be 6n [+] 4, such as 16 or 40, got 18"):
        nn.WideResNet(10, 18, (4, 4, 4, 4))
    with pytest.raises(UserError, match="depth must be 6n [+] 4, .* got 4"):
        nn.WideResNet(10, 4, (4, 4, 4, 4))
    with pytest.raises(UserError, match=r"layers must be at least 1 in each stage, got \(1, 1, 0, 1, 1\)"):
        nn.VGG(10, (1, 1, 0, 1, 1), (4, 4, 4, 4, 4))
    with pytest.raises(UserError, match="width must be a multiple of 12, such as 24, for three groups, got 16"):
        nn.shufflenet_v1(10, width=16)
    with pytest.raises(UserError, match=r"widths of the blocks must be even, got \(7, 14, 28\)"):
        nn.shufflenet_v2(10, width=7)
    with pytest.raises(UserError, match=r"units must be at least 1 in each block, got \(1, 0, 1\)"):
        nn.ShuffleNetV1(10, 12, (1, 0, 1))
    with pytest.raises(UserError, match=r"at least 8 pixels a side.*got \(1, 7, 32, 3\)"):
        jax.eval_shape(lambda: nn.init(nn.vgg8(10), KEY, (7, 32, 3)))
    with pytest.raises(UserError, match=r"units must be at least 1 in each block, got \(1, 0\)"):
        nn.DenseNet(10, (1, 0), (4, 4), 2, 2)
    with pytest.raises(UserError, match=r"widths must name what enters each block: 2 of them .* got \(4,\)"):
        nn.DenseNet(10, (1, 1), (4,), 2, 2)
    with pytest.raises(UserError, match=r"at least 29 pixels, got \(1, 28, 64, 3\)"):
        jax.eval_shape(lambda: nn.init(nn.densenet121(10, width=2), KEY, (28, 64, 3)))
    with pytest.raises(UserError, match="widths must name the units of one to three blocks"):
        nn.GoogLeNet(10, widths=())
    with pytest.raises(UserError, match="widths must name the six convolutions of each unit"):
        nn.GoogLeNet(10, widths=(((1, 2, 3),),))
    with pytest.raises(UserError, match=r"stem_widths must name three convolutions, got \(3,\)"):
        nn.GoogLeNet(10, (3,))
    with pytest.raises(UserError, match="multiplier must be positive and finite, got 0.0"):
        nn.googlenet(multiplier=0.0)
    for name in ("wrn_16_1", "vgg8", "shufflenet_v2", "mobilenet", "densenet121"):
        with pytest.raises(UserError, match="width must be at least 1"):
            nn.build(name, 10, width=0)
    for model, side in SMALL.values():
        with pytest.raises(UserError, match="num_classes must be at least 2, got 1"):
            model.clone(num_classes=1)
        with pytest.raises(UserError, match=r"images must be \[batch, height, width, channels\]"):
            model.init(KEY, jnp.zeros((side, side, 3)))
