"""Backbones and the doors through which pure functions call them."""

from jkd.nn.apply import (
    ApplyFn,
    Variables,
    apply_eval,
    apply_train,
    count_parameters,
    init,
    split,
)
from jkd.nn.cnn import CNN, cnn
from jkd.nn.from_nnx import from_nnx
from jkd.nn.mlp import MLP, mlp
from jkd.nn.outputs import Outputs
from jkd.nn.registry import build, names
from jkd.nn.resnet import (
    ResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
)

__all__ = [
    "CNN",
    "MLP",
    "ApplyFn",
    "Outputs",
    "ResNet",
    "Variables",
    "apply_eval",
    "apply_train",
    "build",
    "cnn",
    "count_parameters",
    "from_nnx",
    "init",
    "mlp",
    "names",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "split",
]
