"""Backbones and the doors through which pure functions call them."""

from jkd.channels import Channels
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
from jkd.nn.densenet import DenseNet, densenet121, densenet169
from jkd.nn.from_nnx import from_nnx
from jkd.nn.googlenet import GoogLeNet, googlenet
from jkd.nn.inception import InceptionV3, fid_images, inception_v3
from jkd.nn.mlp import MLP, mlp
from jkd.nn.mobilenet import MobileNet, mobilenet
from jkd.nn.mobilenet_v2 import MobileNetV2, mobilenet_v2, mobilenet_v2_cifar
from jkd.nn.outputs import Outputs
from jkd.nn.registry import build, names
from jkd.nn.resnet import (
    ResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet18,
    resnet18_cifar,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34,
    resnet44,
    resnet50,
    resnet50_cifar,
    resnet56,
    resnet110,
)
from jkd.nn.shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenet_v1, shufflenet_v2
from jkd.nn.vgg import VGG, vgg8, vgg11, vgg13, vgg16, vgg19
from jkd.nn.wide_resnet import WideResNet, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2
from jkd.nn.width import narrow, shared_channels

__all__ = [
    "CNN",
    "MLP",
    "VGG",
    "ApplyFn",
    "Channels",
    "DenseNet",
    "GoogLeNet",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "Outputs",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "Variables",
    "WideResNet",
    "apply_eval",
    "apply_train",
    "build",
    "cnn",
    "count_parameters",
    "densenet121",
    "densenet169",
    "fid_images",
    "from_nnx",
    "googlenet",
    "inception_v3",
    "init",
    "mlp",
    "mobilenet",
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "names",
    "narrow",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet18_cifar",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet50_cifar",
    "resnet56",
    "resnet110",
    "shared_channels",
    "shufflenet_v1",
    "shufflenet_v2",
    "split",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
