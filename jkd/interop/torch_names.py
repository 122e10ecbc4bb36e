"""What PyTorch implementations call the layers of our models: one table for each way of naming, for both directions.

A table is an ordered list of (regex, replacement): the first regex that matches the whole path of a layer, such as
`block2_0/layer1/norm`, decides; the replacement is a template (`\\1` is a group) or a function of the match. What a
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
from jkd.nn.mobilenet_v2 import MobileNetV2
from jkd.nn.resnet import ResNet

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

    transformers = [
        ("stem/(conv|norm)", lambda match: f"resnet.embedder.embedder.{_HUGGING[match[1]]}"),
        (r"block(\d+)_(\d+)/layer(\d+)/(conv|norm)", layer),
        (r"block(\d+)_(\d+)/shortcut/(conv|norm)", shortcut),
        ("head", "classifier.1"),
    ]
    return {"torchvision": torchvision, "mdistiller": mdistiller, "transformers": transformers}


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


def _pair(layer: str, module: str) -> Rules:
    """A convolution and its norm as the first two entries of a sequence."""
    return [(f"{layer}/conv", f"{module}.0"), (f"{layer}/norm", f"{module}.1")]


_HUGGING = {"conv": "convolution", "norm": "normalization"}

# Model class -> (model -> its tables by style, the default first).
NAMES: Mapping[type[nn.Module], Callable[[Any], dict[str, Rules]]] = {
    ResNet: _resnet,
    MobileNetV2: _mobilenet_v2,
}
# Regexes of entries that a PyTorch implementation stores and never uses.
UNUSED: Mapping[type[nn.Module], tuple[str, ...]] = {}
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
