r"""What PyTorch implementations call the layers of our models: one table for each way of naming, for both directions.

A table is an ordered list of (regex, replacement): the first regex that matches the whole path of a layer, such as
`block2_0/layer1/norm`, decides; the replacement is a template (`\1` is a group) or a function of the match. What a
style names has OUR arithmetic (paddings, pooling, the eps of the norms): other checkpoints would load and give other
logits, so there is no style for them.

  torchvision    also timm's names where there is no style of that name.
  timm           timm's names where they differ.
  mdistiller     the CIFAR-100 distillation protocol (github.com/megvii-research/mdistiller, and RepDistiller).
  transformers   Hugging Face's ...ForImageClassification.
  jkd            every model: its own paths, with dots.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from jkd.errors import UserError, unknown
from jkd.nn.densenet import DenseNet
from jkd.nn.googlenet import GoogLeNet
from jkd.nn.inception import InceptionV3
from jkd.nn.mobilenet import BLOCKS, MobileNet
from jkd.nn.mobilenet_v2 import MobileNetV2
from jkd.nn.resnet import ResNet
from jkd.nn.shufflenet import ShuffleNetV1, ShuffleNetV2
from jkd.nn.vgg import VGG
from jkd.nn.wide_resnet import WideResNet

Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]


def _resnet(model: ResNet) -> dict[str, Rules]:
    stem = [("stem/conv", "conv1"), ("stem/norm", "bn1")]
    layers = [
        (r"block(\d+)_(\d+)/layer(\d+)/conv", r"layer\1.\2.conv\3"),
        (r"block(\d+)_(\d+)/layer(\d+)/norm", r"layer\1.\2.bn\3"),
    ]
    torchvision = [*stem, *layers, *_pair(r"block(\d+)_(\d+)/shortcut", r"layer\1.\2.downsample"), ("head", "fc")]
    second = [*stem, *layers, *_pair(r"block(\d+)_(\d+)/shortcut", r"layer\1.\2.shortcut"), ("head", "linear")]
    # The protocol has a second family: the blocks of ImageNet behind the stem of CIFAR.
    mdistiller = second if model.stem == "cifar" and len(model.units) == 4 else torchvision

    def layer(match: re.Match) -> str:
        block, unit, number, part = int(match[1]) - 1, match[2], int(match[3]) - 1, match[4]
        return f"resnet.encoder.stages.{block}.layers.{unit}.layer.{number}.{_HUGGING[part]}"

    def shortcut(match: re.Match) -> str:
        return f"resnet.encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.shortcut.{_HUGGING[match[3]]}"

    transformers: Rules = [
        ("stem/(conv|norm)", lambda match: f"resnet.embedder.embedder.{_HUGGING[match[1]]}"),
        (r"block(\d+)_(\d+)/layer(\d+)/(conv|norm)", layer),
        (r"block(\d+)_(\d+)/shortcut/(conv|norm)", shortcut),
        ("head", "classifier.1"),
    ]
    return {"torchvision": torchvision, "mdistiller": mdistiller, "transformers": transformers}


def _wide_resnet(model: WideResNet) -> dict[str, Rules]:
    del model
    units = [
        (r"block(\d+)_(\d+)/(conv\d+)", r"block\1.layer.\2.\3"),
        (r"block(\d+)_(\d+)/norm(\d+)", r"block\1.layer.\2.bn\3"),
        (r"block(\d+)_(\d+)/shortcut", r"block\1.layer.\2.convShortcut"),
    ]
    return {"mdistiller": [("stem", "conv1"), *units, ("norm", "bn1"), ("head", "fc")]}


def _vgg(model: VGG) -> dict[str, Rules]:
    del model

    def layer(match: re.Match) -> str:
        # Each convolution is followed by a norm and a ReLU in one sequence.
        return f"block{match[1] or 0}.{3 * int(match[2]) + (match[3] == 'norm')}"

    return {"mdistiller": [(r"(?:stem|block(\d+))_(\d+)/(conv|norm)", layer), ("head", "classifier")]}


_SHUFFLENET: Rules = (
    ("stem/conv", "conv1"),
    ("stem/norm", "bn1"),
    (r"block(\d+)_(\d+)/layer(\d+)/conv", r"layer\1.\2.conv\3"),
    (r"block(\d+)_(\d+)/layer(\d+)/norm", r"layer\1.\2.bn\3"),
    ("head", "linear"),
)


def _shufflenet_v1(model: ShuffleNetV1) -> dict[str, Rules]:
    del model
    return {"mdistiller": _SHUFFLENET}


def _shufflenet_v2(model: ShuffleNetV2) -> dict[str, Rules]:
    del model

    def first(match: re.Match) -> str:
        # The two branches of a block's first unit are numbered through.
        number = int(match[3]) + (2 if match[2] == "layer" else 0)
        return f"layer{match[1]}.0.{_SHORT[match[4]]}{number}"

    last = [("last/conv", "conv2"), ("last/norm", "bn2")]
    return {"mdistiller": [(r"block(\d+)_0/(left|layer)(\d+)/(conv|norm)", first), *last, *_SHUFFLENET]}


def _mobilenet(model: MobileNet) -> dict[str, Rules]:
    del model
    places = [(b, u) for b, units in enumerate(BLOCKS, start=1) for u in range(len(units))]

    def layer(match: re.Match) -> str:
        # The units of all blocks in one sequence behind the stem; convolution, norm, ReLU, twice, in each.
        unit = places.index((int(match[1]), int(match[2]))) + 1
        return f"model.{unit}.{3 * int(match[3]) - 3 + (match[4] == 'norm')}"

    stem = _pair("stem", "model.0")
    return {"mdistiller": [*stem, (r"block(\d+)_(\d+)/layer(\d+)/(conv|norm)", layer), ("head", "fc")]}


def _mobilenet_v2(model: MobileNetV2) -> dict[str, Rules]:
    # torchvision numbers the units of all blocks in one sequence, after the stem.
    first = [1 + sum(model.units[:b]) for b in range(len(model.units))]

    def torchvision(match: re.Match) -> str:
        block, unit, layer, part = int(match[1]), int(match[2]), match[3], match[4]
        at = ["expand", "depthwise", "project"].index(layer) - (block == 1)
        inner = {"conv": ".0", "norm": ".1"}[part]
        if layer == "project":
            at, inner = at + (part == "norm"), ""
        return f"features.{first[block - 1] + unit}.conv.{at}{inner}"

    def timm(match: re.Match) -> str:
        block, unit, layer, part = int(match[1]), int(match[2]), match[3], match[4]
        at = ["expand", "depthwise", "project"].index(layer) - (block == 1)
        conv = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pw" if block == 1 else "conv_pwl"}[layer]
        return f"blocks.{block - 1}.{unit}.{conv if part == 'conv' else f'bn{at + 1}'}"

    def mdistiller(match: re.Match) -> str:
        at = 3 * ["expand", "depthwise", "project"].index(match[3]) + (match[4] == "norm")
        return f"blocks.{int(match[1]) - 1}.{match[2]}.conv.{at}"

    unit = r"block(\d+)_(\d+)/(\w+)/(conv|norm)"
    if model.form == "cifar":
        ends = [*_pair("stem", "conv1"), *_pair("last", "conv2"), ("head", "classifier.0")]
        return {"mdistiller": [*ends, (unit, mdistiller)]}
    last = f"features.{1 + sum(model.units)}"
    ends = [*_pair("stem", "features.0"), *_pair("last", last), ("head", "classifier.1")]
    stem = [("stem/conv", "conv_stem"), ("stem/norm", "bn1")]
    ends_timm = [*stem, ("last/conv", "conv_head"), ("last/norm", "bn2"), ("head", "classifier")]
    return {"torchvision": [*ends, (unit, torchvision)], "timm": [*ends_timm, (unit, timm)]}


def _densenet(model: DenseNet) -> dict[str, Rules]:
    def unit(match: re.Match) -> str:
        return f"features.denseblock{match[1]}.denselayer{int(match[2]) + 1}.{match[3]}"

    ends = [("stem/(conv|norm)", r"features.\g<1>0"), ("norm", f"features.norm{len(model.units) + 1}")]
    transition = (r"transition(\d+)/(conv|norm)", r"features.transition\1.\2")
    return {"torchvision": [*ends, (r"block(\d+)_(\d+)/(\w+)", unit), transition, ("head", "classifier")]}


def _googlenet(model: GoogLeNet) -> dict[str, Rules]:
    del model

    def unit(match: re.Match) -> str:
        # Numbered as in the paper, whose stem has numbers 1 and 2; the branches are sequences but for the first.
        name = f"inception{int(match[1]) + 2}{chr(ord('a') + int(match[2]))}.branch{match[3]}"
        place = match[4] or ("" if match[3] == "1" else "1")
        return f"{name}{'.' * bool(place)}{place}.{_SHORT[match[5]]}"

    stem = (r"stem(\d)/(conv|norm)", lambda match: f"conv{match[1]}.{_SHORT[match[2]]}")
    return {"torchvision": [stem, (r"block(\d+)_(\d+)/branch(\d)(?:_(\d))?/(conv|norm)", unit), ("head", "fc")]}


def _inception_v3(model: InceptionV3) -> dict[str, Rules]:
    del model
    # Lettered by the size of the map: the units of our first block come after the stem's layers 1 to 4.
    first = {"1": (5, "b"), "2": (6, "a"), "3": (7, "a")}
    stem = dict(zip("12345", ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"), strict=True))

    def unit(match: re.Match) -> str:
        number, letter = first[match[1]]
        return f"Mixed_{number}{chr(ord(letter) + int(match[2]))}.{match[3]}.{_SHORT[match[4]]}"

    layer = (r"stem(\d)/(conv|norm)", lambda match: f"Conv2d_{stem[match[1]]}.{_SHORT[match[2]]}")
    return {"torchvision": [layer, (r"block(\d)_(\d+)/(\w+)/(conv|norm)", unit), ("head", "fc")]}


def _pair(layer: str, module: str) -> Rules:
    """A convolution and its norm as the first two entries of a sequence."""
    return [(f"{layer}/conv", f"{module}.0"), (f"{layer}/norm", f"{module}.1")]


_SHORT = {"conv": "conv", "norm": "bn"}
_HUGGING = {"conv": "convolution", "norm": "normalization"}

# Model class -> (model -> its tables by style, the default first).
NAMES: Mapping[type[nn.Module], Callable[[Any], dict[str, Rules]]] = {
    ResNet: _resnet,
    WideResNet: _wide_resnet,
    VGG: _vgg,
    ShuffleNetV1: _shufflenet_v1,
    ShuffleNetV2: _shufflenet_v2,
    MobileNet: _mobilenet,
    MobileNetV2: _mobilenet_v2,
    DenseNet: _densenet,
    GoogLeNet: _googlenet,
    InceptionV3: _inception_v3,
}
# Of heads that take part in training only; our models have none.
UNUSED: Mapping[type[nn.Module], str] = {GoogLeNet: r"aux[12]\..+", InceptionV3: r"AuxLogits\..+"}
OWN: Rules = ((".*", lambda match: match[0].replace("/", ".")),)


def styles(model: nn.Module) -> dict[str, Rules]:
    """The tables of a model by style; the first is its default."""
    tables = NAMES[type(model)](model) if type(model) in NAMES else {}
    return {**tables, "jkd": OWN}


def rules(model: nn.Module, style: str | None) -> Rules:
    """The table of one style; of the default for None.

    Raises:
      UserError: for a style that the model does not have.
    """
    tables = styles(model)
    style = style or next(iter(tables))
    if style not in tables:
        raise unknown(f"style of torch names for a {type(model).__name__}", style, tables)
    return tables[style]


def module_name(layer: str, table: Rules) -> str:
    """What a table calls the layer of a path.

    Raises:
      UserError: if no rule matches.
    """
    for pattern, replacement in table:
        match = re.fullmatch(pattern, layer)
        if match:
            return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    raise UserError(f"The table of torch names has no rule for the layer {layer}.")
