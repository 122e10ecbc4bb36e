"""State dicts of PyTorch models in ours and back, without torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import nn
from jkd.errors import UserError
from jkd.interop.safetensors import load_safetensors
from jkd.interop.torch import from_torch, num_classes, read_state_dict, save_torch, to_torch
from jkd.interop.torch_names import NAMES, module_name, rules, styles

SHAPE = (32, 32, 3)
SMALL = nn.ResNet(10, (1, 1), (4, 4, 6))


def random_variables(model, seed=0):
    """Nothing trivial inside, and no two leaves alike."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: nn.init(model, jax.random.key(0), SHAPE))
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), shapes)


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def state_dict():
    return to_torch(SMALL, random_variables(SMALL))


def test_layouts_by_hand():
    model = nn.CNN(3, 2)
    variables = random_variables(model)
    found = to_torch(model, variables)
    kernel = variables["params"]["stem"]["conv"]["kernel"]  # [height, width, in, out]
    for out, channel, i, j in ((0, 0, 0, 1), (1, 2, 2, 0)):
        assert found["stem.conv.weight"][out, channel, i, j] == kernel[i, j, channel, out]
    np.testing.assert_array_equal(found["head.weight"], variables["params"]["head"]["kernel"].T)
    np.testing.assert_array_equal(found["head.bias"], variables["params"]["head"]["bias"])
    for name, (collection, leaf) in {
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }.items():
        np.testing.assert_array_equal(found[f"stem.norm.{name}"], variables[collection]["stem"]["norm"][leaf])
    assert found["stem.norm.num_batches_tracked"] == 0
    assert found["stem.norm.num_batches_tracked"].dtype == np.int64
    assert len(found) == 3 * (1 + 5) + 2


# One of each family, small.
ROUND = [
    SMALL,
    nn.ResNet(10, (1, 1, 1, 1), (4, 4, 6, 8, 8), "bottleneck", "cifar"),
    nn.ResNet(10, (1, 2), (4, 4, 6), "bottleneck", "imagenet"),
    nn.wrn_16_1(10),
    nn.vgg8(10, width=4),
    nn.ShuffleNetV1(10, units=(2, 1, 1)),
    nn.ShuffleNetV2(10, units=(2, 1, 1)),
    nn.mobilenet(10, width=4),
    nn.MobileNetV2(10, (1, 2), (4, 4, 6, 8)),
    nn.MobileNetV2(10, (1, 2), (4, 4, 6, 8), "cifar"),
    nn.DenseNet(10, (2, 1), (6, 4), 4, 6),
    nn.GoogLeNet(10, (4, 4, 5), (((2, 3, 4, 2, 3, 4),) * 2, ((4, 3, 2, 2, 2, 3),))),
    nn.inception_v3(10, multiplier=0.02),
    nn.mlp(10, hidden=(5, 4)),
]


def test_every_family_has_names():
    families = {type(nn.build(name, 10)) for name in nn.names()} - {nn.CNN, nn.MLP}
    assert families == set(NAMES) == {type(model) for model in ROUND} - {nn.CNN, nn.MLP}


@pytest.mark.parametrize("model", ROUND, ids=lambda model: type(model).__name__)
def test_round_trips(model):
    variables = random_variables(model)
    for style in styles(model):
        found = to_torch(model, variables, style=style)
        assert_equal(from_torch(model, found, image_shape=SHAPE), variables)  # the style is found
        assert_equal(from_torch(model, found, image_shape=SHAPE, style=style), variables)
        assert num_classes(model, found) == 10


@pytest.mark.parametrize(
    ("model", "style", "layer", "module"),
    [  # as public state dicts have them
        (nn.resnet50(), "torchvision", "block3_5/layer3/norm", "layer3.5.bn3"),
        (nn.resnet50(), "torchvision", "block4_0/shortcut/norm", "layer4.0.downsample.1"),
        (nn.resnet50(), "transformers", "block1_0/layer2/conv", "resnet.encoder.stages.0.layers.0.layer.1.convolution"),
        (nn.resnet56(), "mdistiller", "block3_0/shortcut/conv", "layer3.0.downsample.0"),
        (nn.resnet50_cifar(), "mdistiller", "block4_0/shortcut/conv", "layer4.0.shortcut.0"),
        (nn.resnet50_cifar(), "mdistiller", "head", "linear"),
        (nn.mobilenet_v2(), "torchvision", "block1_0/depthwise/conv", "features.1.conv.0.0"),
        (nn.mobilenet_v2(), "torchvision", "block1_0/project/norm", "features.1.conv.2"),
        (nn.mobilenet_v2(), "torchvision", "block2_0/depthwise/norm", "features.2.conv.1.1"),
        (nn.mobilenet_v2(), "torchvision", "block7_0/project/conv", "features.17.conv.2"),
        (nn.mobilenet_v2(), "torchvision", "last/norm", "features.18.1"),
        (nn.mobilenet_v2(), "timm", "block1_0/project/norm", "blocks.0.0.bn2"),
        (nn.mobilenet_v2(), "timm", "block1_0/project/conv", "blocks.0.0.conv_pw"),
        (nn.mobilenet_v2(), "timm", "block3_2/project/norm", "blocks.2.2.bn3"),
        (nn.mobilenet_v2(), "timm", "block3_2/expand/conv", "blocks.2.2.conv_pw"),
        (nn.mobilenet_v2_cifar(), "mdistiller", "block1_0/expand/conv", "blocks.0.0.conv.0"),
        (nn.mobilenet_v2_cifar(), "mdistiller", "block5_2/project/norm", "blocks.4.2.conv.7"),
        (nn.densenet121(), "torchvision", "stem/norm", "features.norm0"),
        (nn.densenet121(), "torchvision", "block2_11/conv1", "features.denseblock2.denselayer12.conv1"),
        (nn.densenet121(), "torchvision", "transition3/norm", "features.transition3.norm"),
        (nn.densenet121(), "torchvision", "norm", "features.norm5"),
        (nn.googlenet(), "torchvision", "stem2/norm", "conv2.bn"),
        (nn.googlenet(), "torchvision", "block1_0/branch1/conv", "inception3a.branch1.conv"),
        (nn.googlenet(), "torchvision", "block2_4/branch3_0/norm", "inception4e.branch3.0.bn"),
        (nn.googlenet(), "torchvision", "block3_1/branch2_1/conv", "inception5b.branch2.1.conv"),
        (nn.googlenet(), "torchvision", "block3_1/branch4/norm", "inception5b.branch4.1.bn"),
        (nn.inception_v3(), "torchvision", "stem3/norm", "Conv2d_2b_3x3.bn"),
        (nn.inception_v3(), "torchvision", "stem5/conv", "Conv2d_4a_3x3.conv"),
        (nn.inception_v3(), "torchvision", "block1_2/branch_pool/norm", "Mixed_5d.branch_pool.bn"),
        (nn.inception_v3(), "torchvision", "block2_0/branch3x3dbl_3/conv", "Mixed_6a.branch3x3dbl_3.conv"),
        (nn.inception_v3(), "torchvision", "block3_2/branch3x3_2b/conv", "Mixed_7c.branch3x3_2b.conv"),
        (nn.cnn(), "jkd", "stem/conv", "stem.conv"),
    ],
)
def test_names_of_other_code(model, style, layer, module):
    assert module_name(layer, rules(model, style)) == module


@pytest.mark.parametrize(
    ("model", "aux"),
    [(nn.GoogLeNet(10, (4, 4, 5), (((2, 3, 4, 2, 3, 4),),)), "aux1.fc1"), (ROUND[-2], "AuxLogits.conv0.bn")],
)
def test_auxiliary_heads_are_left_out(model, aux):
    variables = random_variables(model)
    given = {**to_torch(model, variables), f"{aux}.weight": np.ones(3), f"{aux}.num_batches_tracked": np.zeros(())}
    assert_equal(from_torch(model, given), variables)
    with pytest.raises(UserError, match="auxiliary is unknown"):
        from_torch(model, {**given, "auxiliary": np.ones(3)})


def test_prefixes_counters_and_dtypes(state_dict):
    wanted = from_torch(SMALL, state_dict)
    wrapped = {f"module.{name}": leaf for name, leaf in state_dict.items() if "num_batches" not in name}
    assert_equal(from_torch(SMALL, wrapped), wanted)
    assert_equal(from_torch(SMALL, {f"_orig_mod.{name}": leaf for name, leaf in wrapped.items()}), wanted)
    half = SMALL.clone(param_dtype=jnp.bfloat16)
    found = from_torch(half, state_dict)
    assert found["params"]["stem"]["conv"]["kernel"].dtype == jnp.bfloat16
    assert found["batch_stats"]["stem"]["norm"]["mean"].dtype == jnp.float32


def changed(state_dict, **changes):
    """Entries replaced, or with None left out; `__` is a dot."""
    found = {**state_dict, **{name.replace("__", "."): leaf for name, leaf in changes.items()}}
    return {name: leaf for name, leaf in found.items() if leaf is not None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fc__bias": None}, "does not fit this ResNet by its torchvision names: fc.bias is missing."),
        ({"extra__weight": np.ones(3)}, "torchvision names: extra.weight is unknown."),
        ({"fc__bias": np.ones(7)}, "torchvision names: fc.bias is [7], not [10]."),
        (
            {"layer1__0__conv1__weight": np.ones((4, 4, 1, 1)), "bn1__bias": None, "aux": np.ones(1)},
            "layer1.0.conv1.weight is [4, 4, 1, 1], not [4, 4, 3, 3]; bn1.bias is missing; aux is unknown.",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, says, state_dict):
    with pytest.raises(UserError) as error:
        from_torch(SMALL, changed(state_dict, **changes))
    assert str(error.value).endswith(says)


def test_long_lists_are_cut_and_styles_are_checked(state_dict):
    with pytest.raises(UserError, match=r"names: ([\w.]+ is missing; ){4}[\w.]+ is missing \(and 26 more\)\.$"):
        from_torch(SMALL, {"fc.bias": state_dict["fc.bias"]}, style="torchvision")
    with pytest.raises(UserError, match="Unknown style of torch names for a ResNet 'torchvison'. Did you mean 'torchv"):
        to_torch(SMALL, random_variables(SMALL), style="torchvison")
    with pytest.raises(UserError, match="has no rule for the layer elsewhere/conv"):
        to_torch(SMALL, {"params": {"elsewhere": {"conv": {"kernel": np.ones((1, 1))}}}})
    with pytest.raises(UserError, match=r"params/stem/weird has no counterpart in PyTorch"):
        to_torch(SMALL, {"params": {"stem": {"weird": np.ones(1)}}})
    assert num_classes(SMALL, {}) is None
    with pytest.raises(UserError, match=r"not \[7, 6\]\. It has 10 classes and the model 7\.$"):
        from_torch(SMALL.clone(num_classes=7), state_dict)
    assert rules(SMALL, None) == rules(SMALL, "torchvision")


def test_files_for_readers_without_jkd(tmp_path, state_dict):
    numpy_format = pytest.importorskip("safetensors.numpy")
    variables = from_torch(SMALL, state_dict)
    save_torch(tmp_path / "a.safetensors", SMALL, variables, metadata={"stage": "kd"})
    found = numpy_format.load_file(tmp_path / "a.safetensors")
    assert_equal(found, state_dict)
    assert_equal(from_torch(SMALL, read_state_dict(tmp_path / "a.safetensors")), variables)
    assert load_safetensors(tmp_path / "a.safetensors")[1] == {"format": "pt", "stage": "kd"}
