"""ResNets, WRN, VGG, ShuffleNets, MobileNet, DenseNet and GoogLeNet against PyTorch modules that have public names."""

import functools

import jax
import numpy as np
import pytest

from jkd import nn
from jkd.interop.torch import from_torch
from jkd.nn.mobilenet import BLOCKS

torch = pytest.importorskip("torch")
F = torch.nn.functional
Module, Sequential, Norm, ReLU = torch.nn.Module, torch.nn.Sequential, torch.nn.BatchNorm2d, torch.nn.ReLU


def conv(inputs, outputs, size, stride=1, groups=1, bias=False):
    return torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def shuffled(x, groups):
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class Numbered(Module):
    """conv1, bn1, conv2, bn2, ... of the given convolutions."""

    def __init__(self, *convs):
        super().__init__()
        for i, layer in enumerate(convs, start=1):
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", Norm(layer.out_channels))

    def run(self, i, x):
        return getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))


class ResidualUnit(Numbered):
    def __init__(self, inputs, mid, stride, bottleneck):
        outputs = 4 * mid if bottleneck else mid
        ends = [conv(inputs, mid, 1), conv(mid, mid, 3, stride), conv(mid, outputs, 1)]
        super().__init__(*(ends if bottleneck else [conv(inputs, mid, 3, stride), conv(mid, mid, 3)]))
        self.count, self.shortcut = 3 if bottleneck else 2, Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = Sequential(conv(inputs, outputs, 1, stride), Norm(outputs))

    def forward(self, x):
        y = self.run(1, x)
        for i in range(2, self.count + 1):
            y = self.run(i, F.relu(y))
        return F.relu(y + self.shortcut(x))


class Residual(Numbered):
    """The second ResNets of the protocol: ImageNet's blocks behind a 3x3 convolution."""

    def __init__(self, model):
        inputs, *widths = model.widths
        super().__init__(conv(3, inputs, 3))
        for b, (count, width) in enumerate(zip(model.units, widths, strict=True), start=1):
            units = []
            for u in range(count):
                units.append(ResidualUnit(inputs, width, 2 if b > 1 and u == 0 else 1, model.block == "bottleneck"))
                inputs = 4 * width if model.block == "bottleneck" else width
            setattr(self, f"layer{b}", Sequential(*units))
        self.linear = torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.run(1, x))))))
        return self.linear(x.mean((2, 3)))


class WideUnit(Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = Norm(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = Norm(outputs), conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (self.convShortcut(active) if self.convShortcut else x)


class Wide(Module):
    def __init__(self, model):
        super().__init__()
        stem, *widths = model.widths
        self.conv1, inputs = conv(3, stem, 3), stem
        for b, width in enumerate(widths, start=1):
            units = [WideUnit(inputs, width, 1 if b == 1 else 2)]
            units += [WideUnit(width, width, 1) for _ in range((model.depth - 4) // 6 - 1)]
            block, block.layer = Module(), Sequential(*units)
            setattr(self, f"block{b}", block)
            inputs = width
        self.bn1, self.fc = Norm(inputs), torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block.layer(x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class VGG(Module):
    def __init__(self, model):
        super().__init__()
        inputs = 3
        for b, (count, width) in enumerate(zip(model.layers, model.widths, strict=True)):
            layers = []
            for _ in range(count):
                layers += [conv(inputs, width, 3, bias=True), Norm(width), ReLU()]
                inputs = width
            setattr(self, f"block{b}", Sequential(*layers))
        self.classifier = torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        pools = (0, 1, 2, 3) if x.shape[2] == 64 else (0, 1, 2)
        for b in range(5):
            x = getattr(self, f"block{b}")(x)
            x = F.max_pool2d(x, 2) if b in pools else x
        return self.classifier(x.mean((2, 3)))


class ShuffleUnit(Numbered):
    def __init__(self, inputs, outputs, stride, first):
        made = outputs - inputs if stride == 2 else outputs
        mid, groups = made // 4, 1 if first else 3
        super().__init__(
            conv(inputs, mid, 1, groups=groups), conv(mid, mid, 3, stride, mid), conv(mid, made, 1, groups=3)
        )
        self.groups, self.stride = groups, stride

    def forward(self, x):
        y = shuffled(F.relu(self.run(1, x)), self.groups)
        y = self.run(3, F.relu(self.run(2, y)))
        return F.relu(x + y if self.stride == 1 else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class SplitUnit(Numbered):
    def __init__(self, inputs, outputs, stride):
        half = outputs // 2
        right = [conv(half if stride == 1 else inputs, half, 1), conv(half, half, 3, stride, half), conv(half, half, 1)]
        super().__init__(*([] if stride == 1 else [conv(inputs, inputs, 3, 2, inputs), conv(inputs, half, 1)]), *right)
        self.stride = stride

    def forward(self, x):
        if self.stride == 1:
            (left, x), i = x.chunk(2, 1), 1
        else:
            left, i = F.relu(self.run(2, self.run(1, x))), 3
        y = F.relu(self.run(i + 2, self.run(i + 1, F.relu(self.run(i, x)))))
        return shuffled(torch.cat([left, y], 1), 2)


class Shuffle(Numbered):
    """Both versions: the second ends with one more convolution."""

    def __init__(self, model, stem, widths, last, unit):
        super().__init__(conv(3, stem, 1), *([conv(widths[-1], last, 1)] if last else []))
        inputs = stem
        for b, (count, width) in enumerate(zip(model.units, widths, strict=True), start=1):
            first = [unit(inputs, width, 2, b == 1)]
            setattr(self, f"layer{b}", Sequential(*first, *(unit(width, width, 1, False) for _ in range(count - 1))))
            inputs = width
        self.last, self.linear = last, torch.nn.Linear(last or inputs, model.num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.run(1, x)))))
        x = F.relu(self.run(2, x)) if self.last else x
        return self.linear(x.mean((2, 3)))


def shuffle_v1(model):
    return Shuffle(model, model.width, [times * model.width for times in (10, 20, 40)], None, ShuffleUnit)


def shuffle_v2(model):
    stem, *widths, last = model.widths
    return Shuffle(model, stem, widths, last, lambda inputs, outputs, stride, _: SplitUnit(inputs, outputs, stride))


class Mobile(Module):
    def __init__(self, model):
        super().__init__()
        inputs, units = model.width, [Sequential(conv(3, model.width, 3, 2), Norm(model.width), ReLU())]
        for times, stride in (unit for block in BLOCKS for unit in block):
            outputs = times * model.width
            depthwise = [conv(inputs, inputs, 3, stride, inputs), Norm(inputs), ReLU()]
            units.append(Sequential(*depthwise, conv(inputs, outputs, 1), Norm(outputs), ReLU()))
            inputs = outputs
        self.model, self.fc = Sequential(*units), torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        return self.fc(self.model(x).mean((2, 3)))


class DenseLayer(Module):
    def __init__(self, inputs, mid, outputs):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), conv(inputs, mid, 1)
        self.norm2, self.conv2 = Norm(mid), conv(mid, outputs, 3)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class Dense(Module):
    def __init__(self, model):
        super().__init__()
        parts, inputs = torch.nn.ModuleDict({"conv0": conv(3, model.widths[0], 7, 2)}), model.widths[0]
        parts["norm0"] = Norm(inputs)
        for b, (count, width) in enumerate(zip(model.units, model.widths, strict=True)):
            if b:
                parts[f"transition{b}"] = torch.nn.ModuleDict({"norm": Norm(inputs), "conv": conv(inputs, width, 1)})
                inputs = width
            parts[f"denseblock{b + 1}"] = Sequential()
            for u in range(count):
                layer = DenseLayer(inputs, model.bottleneck, model.growth)
                parts[f"denseblock{b + 1}"].add_module(f"denselayer{u + 1}", layer)
                inputs += model.growth
        parts[f"norm{len(model.units) + 1}"] = Norm(inputs)
        self.features, self.classifier = parts, torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        for name, part in self.features.items():
            if name.startswith("transition"):
                x = F.avg_pool2d(part["conv"](F.relu(part["norm"](x))), 2)
            elif name.startswith("norm"):
                x = F.relu(part(x))
                x = F.max_pool2d(x, 3, 2, 1) if name == "norm0" else x
            else:
                x = part(x)
        return self.classifier(x.mean((2, 3)))


class Basic(Module):
    def __init__(self, inputs, outputs, size, stride=1):
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, size, stride), Norm(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Inception(Module):
    def __init__(self, inputs, one, reduce2, three2, reduce3, three3, last):
        super().__init__()
        self.branch1 = Basic(inputs, one, 1)
        self.branch2 = Sequential(Basic(inputs, reduce2, 1), Basic(reduce2, three2, 3))
        self.branch3 = Sequential(Basic(inputs, reduce3, 1), Basic(reduce3, three3, 3))
        self.branch4 = Sequential(torch.nn.MaxPool2d(3, 1, 1), Basic(inputs, last, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Google(Module):
    def __init__(self, model):
        super().__init__()
        first, second, inputs = model.stem_widths
        self.conv1, self.conv2, self.conv3 = Basic(3, first, 7, 2), Basic(first, second, 1), Basic(second, inputs, 3)
        self.units = []
        for b, units in enumerate(model.widths):
            for u, widths in enumerate(units):
                self.units.append((f"inception{b + 3}{'abcde'[u]}", (0, 3, 2)[b] if u == 0 else 0))
                setattr(self, self.units[-1][0], Inception(inputs, *widths))
                inputs = widths[0] + widths[2] + widths[4] + widths[5]
        self.fc = torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        for name, pool in self.units:
            x = F.max_pool2d(x, pool, 2, ceil_mode=True) if pool else x
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


def randomize(net):
    """Nothing trivial inside: an exchange of mean, variance, scale or bias would show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Norm):
                for values, center in zip(
                    (module.weight, module.bias, module.running_mean, module.running_var), (1, 0, 0, 1), strict=True
                ):
                    values.uniform_(center - 0.3, center + 0.3)


def imported(model, net):
    return from_torch(model, {name: value.numpy() for name, value in net.state_dict().items()})


def with_biased_variances(net, images):
    """A training step's logits; PyTorch keeps n / (n - 1) times the biased variance of n values."""
    counts, before = {}, {}
    for module in net.modules():
        if isinstance(module, Norm):
            before[module] = module.running_var.clone()
            module.register_forward_hook(lambda m, x, _: counts.__setitem__(m, x[0].numel() // x[0].shape[1]))
    with torch.no_grad():
        logits = net.train()(images)
        for module, old in before.items():
            n = counts[module]
            module.running_var.copy_(0.9 * old + (module.running_var - 0.9 * old) * (n - 1) / n)
    return logits.numpy()


@pytest.mark.parametrize(
    ("model", "peer", "side"),
    [
        (nn.ResNet(5, (1, 2, 1, 1), (4, 4, 4, 6, 6), "bottleneck"), Residual, 17),
        (nn.ResNet(5, (1, 1, 1, 1), (4, 4, 4, 6, 6)), Residual, 17),
        (nn.WideResNet(5, 16, (4, 4, 6, 8)), Wide, 8),
        (nn.VGG(5, (1, 2, 2, 1, 1), (4, 6, 8, 6, 6)), VGG, 18),
        (nn.VGG(5, (1, 1, 1, 1, 1), (2, 3, 2, 3, 2)), VGG, 64),
        (nn.ShuffleNetV1(5, 12, (2, 2, 1)), shuffle_v1, 18),
        (nn.ShuffleNetV2(5, (4, 8, 12, 16, 10), (2, 3, 1)), shuffle_v2, 18),
        (nn.mobilenet(5, width=4), Mobile, 65),
        (nn.DenseNet(5, (2, 3, 1), (6, 4, 5), 3, 4), Dense, 37),
        (nn.GoogLeNet(5, (4, 3, 6), (((2, 3, 4, 2, 3, 4),), ((4, 3, 2, 2, 2, 3),) * 2, ((3,) * 6,))), Google, 53),
    ],
    ids=[
        "bottleneck",
        "basic",
        "wrn",
        "vgg",
        "vgg_64",
        "shufflenet_v1",
        "shufflenet_v2",
        "mobilenet",
        "densenet",
        "googlenet",
    ],
)
def test_logits_and_statistics_equal_pytorch(model, peer, side):
    net = peer(model)
    randomize(net)
    variables = imported(model, net)
    images = np.asarray(jax.random.normal(jax.random.key(3), (6, side, side, 3)))
    theirs = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = net.eval()(theirs).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images).logits, want, rtol=1e-4, atol=1e-4)
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    out, state = apply(variables, images)
    np.testing.assert_allclose(out.logits, with_biased_variances(net, theirs), rtol=1e-3, atol=1e-3)
    want = imported(model, net)["batch_stats"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), state["batch_stats"], want)
