"""Models of transformers, and one of the tests, with random weights: the logits agree; and files that torch wrote."""

import functools
import re

import jax
import numpy as np
import pytest

from jkd import nn
from jkd.errors import UserError
from jkd.interop.torch import from_torch, read_state_dict, save_torch, to_torch

torch = pytest.importorskip("torch")


def randomized(peer):
    """In evaluation mode; no statistic is trivial."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in (*peer.named_parameters(), *peer.named_buffers()):
            if name.endswith("running_mean") or name.endswith("bias"):
                leaf.uniform_(-0.2, 0.2, generator=generator)
            elif leaf.is_floating_point() and leaf.ndim < 2:
                leaf.uniform_(0.5, 1.5, generator=generator)
            elif leaf.is_floating_point():
                leaf.normal_(0, (1.5 / leaf[0].numel()) ** 0.5, generator=generator)
    return peer.eval()


def arrays(peer):
    return {name: leaf.numpy() for name, leaf in peer.state_dict().items()}


def assert_same_logits(model, variables, peer, size):
    images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = peer(torch.tensor(images).permute(0, 3, 1, 2))
    wanted = getattr(wanted, "logits", wanted).numpy()
    found = jax.jit(functools.partial(model.apply, train=False))(variables, images).logits
    assert np.ptp(wanted, axis=0).min() > 0.01  # the images reach every logit
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_transformers_resnets(kind):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    # 16 is the narrowest stage that reduces to whole channels in a bottleneck.
    config = {"depths": [1, 2], "hidden_sizes": [16, 24], "embedding_size": 8, "layer_type": kind, "num_labels": 10}
    peer = randomized(transformers.ResNetForImageClassification(transformers.ResNetConfig(**config)))
    widths = (8, 16, 24) if kind == "basic" else (8, 4, 6)
    model = nn.ResNet(10, (1, 2), widths, kind, "imagenet")
    variables = from_torch(model, arrays(peer))
    # Odd sizes: every padding counts.
    assert_same_logits(model, variables, peer, 37)
    back = to_torch(model, variables, style="transformers")
    peer.load_state_dict({name: torch.tensor(leaf) for name, leaf in back.items()}, strict=True)


PLACES = [f"block{b}_{u}" for b, count in enumerate(nn.MobileNetV2.units, start=1) for u in range(count)]
# transformers' MobileNetV2 has other paddings and another eps by default: it is no style of ours.
RENAMES = (
    (r"mobilenet_v2\.conv_stem\.first_conv", "stem"),
    (r"mobilenet_v2\.conv_stem", "block1_0"),
    (r"mobilenet_v2\.layer\.(\d+)", lambda match: PLACES[1 + int(match[1])]),
    (r"mobilenet_v2\.conv_1x1", "last"),
    ("expand_1x1", "expand"),
    ("conv_3x3", "depthwise"),
    ("reduce_1x1", "project"),
    ("convolution", "conv"),
    ("normalization", "norm"),
    ("classifier", "head"),
)


def test_transformers_mobilenet_v2():
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    config = transformers.MobileNetV2Config(num_labels=10, depth_multiplier=0.5, tf_padding=False, layer_norm_eps=1e-5)
    peer = randomized(transformers.MobileNetV2ForImageClassification(config))
    state = {}
    for name, leaf in arrays(peer).items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = leaf
    model = nn.mobilenet_v2(10, multiplier=0.5)
    assert_same_logits(model, from_torch(model, state, style="jkd"), peer, 33)


class Inverted(torch.nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden, norm, relu = inputs * expansion, torch.nn.BatchNorm2d, torch.nn.ReLU
        layers = [torch.nn.Conv2d(inputs, hidden, 1, bias=False), norm(hidden), relu()]
        layers += [torch.nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), norm(hidden), relu()]
        self.conv = torch.nn.Sequential(*layers, torch.nn.Conv2d(hidden, outputs, 1, bias=False), norm(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2OfTheProtocol(torch.nn.Module):
    """The CIFAR-100 distillation protocol's, with its names."""

    def __init__(self, model):
        super().__init__()

        def first(inputs, outputs, size, stride):
            conv = torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
            return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())

        stem, *widths, last = model.widths
        self.conv1, self.blocks, inputs = first(3, stem, 3, 2), torch.nn.ModuleList(), stem
        for b, (count, width) in enumerate(zip(model.units, widths, strict=True)):
            strides = [(1, 1, 2, 2, 1, 2, 1)[b]] + [1] * (count - 1)
            units = []
            for stride in strides:
                units.append(Inverted(inputs, width, stride, 6 if b else 1))
                inputs = width
            self.blocks.append(torch.nn.Sequential(*units))
        self.conv2 = first(inputs, last, 1, 1)
        self.classifier = torch.nn.Sequential(torch.nn.Linear(last, model.num_classes))

    def forward(self, x):
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


def test_the_protocols_mobilenet_v2_and_its_size():
    model = nn.MobileNetV2(10, (1, 2, 1, 2), (8, 4, 6, 8, 8, 16), "cifar")
    peer = randomized(MobileNetV2OfTheProtocol(model))
    variables = from_torch(model, arrays(peer))
    assert_same_logits(model, variables, peer, 32)
    peer.load_state_dict({name: torch.tensor(leaf) for name, leaf in to_torch(model, variables).items()}, strict=True)
    whole = MobileNetV2OfTheProtocol(nn.mobilenet_v2_cifar(100))
    assert sum(leaf.numel() for leaf in whole.parameters()) == 812_836


@pytest.fixture(scope="module")
def small():
    model = nn.ResNet(10, (1, 1), (4, 4, 6))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: nn.init(model, jax.random.key(0), (8, 8, 3)))
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_torch_wrote(zipped, small, tmp_path):
    model, variables = small
    state = {name: torch.tensor(leaf) for name, leaf in to_torch(model, variables).items()}
    state["fc.weight"] = torch.nn.Parameter(state["fc.weight"].T.contiguous().T)  # strided
    state["fc.bias"] = torch.stack([torch.zeros(10), state["fc.bias"]])[1]  # part of a storage
    for tree in (
        state,
        {"model": state, "epoch": 3},
        {"state_dict": {f"module.{n}": leaf for n, leaf in state.items()}},
    ):
        torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        found = from_torch(model, read_state_dict(tmp_path / "x.pth"))
        jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_whole_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"asks for torch.nn.modules.linear.Linear, which is refused"):
        read_state_dict(tmp_path / "x.pth")


def test_torch_reads_what_we_write(small, tmp_path):
    reader = pytest.importorskip("safetensors.torch")
    model, variables = small
    save_torch(tmp_path / "x.safetensors", model, variables)
    found, wanted = reader.load_file(tmp_path / "x.safetensors"), to_torch(model, variables)
    assert set(found) == set(wanted)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf.numpy(), wanted[name])
