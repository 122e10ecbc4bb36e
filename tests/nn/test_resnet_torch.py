"""ResNets against the same arithmetic written with PyTorch's own functions."""

import functools

import jax
import numpy as np
import pytest

from jkd import nn

torch = pytest.importorskip("torch")
F = torch.nn.functional


def tensor(x):
    return torch.tensor(np.asarray(x))


def conv_norm(params, stats, x, stride, train):
    kernel = tensor(params["conv"]["kernel"]).permute(3, 2, 0, 1)
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    norm = tensor(params["norm"]["scale"]), tensor(params["norm"]["bias"])
    mean, var = tensor(stats["norm"]["mean"]), tensor(stats["norm"]["var"])
    return F.batch_norm(x, mean, var, *norm, training=train, momentum=0.1, eps=1e-5)


def unit(params, stats, x, stride, train):
    layers = sorted(name for name in params if name.startswith("layer"))
    # The 3x3 convolution strides: the first of two, the second of three.
    strides = (stride, 1) if len(layers) == 2 else (1, stride, 1)
    y = x
    for name, s in zip(layers, strides, strict=True):
        y = conv_norm(params[name], stats[name], y, s, train)
        y = y if name == layers[-1] else F.relu(y)
    if "shortcut" in params:
        x = conv_norm(params["shortcut"], stats["shortcut"], x, stride, train)
    return F.relu(x + y)


def oracle(model, variables, images, train):
    params, stats = variables["params"], variables["batch_stats"]
    stem_stride = 2 if model.stem == "imagenet" else 1
    x = tensor(images).permute(0, 3, 1, 2)
    x = F.relu(conv_norm(params["stem"], stats["stem"], x, stem_stride, train))
    if model.stem == "imagenet":
        x = F.max_pool2d(x, 3, 2, 1)
    for b, count in enumerate(model.units, start=1):
        for u in range(count):
            name = f"block{b}_{u}"
            x = unit(params[name], stats[name], x, 2 if b > 1 and u == 0 else 1, train)
    pooled = x.mean((2, 3))
    return F.linear(pooled, tensor(params["head"]["kernel"]).T, tensor(params["head"]["bias"])).numpy()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("model", "size"),
    [
        (nn.resnet14(10, width=4), 12),
        (nn.ResNet(10, (1, 2), (4, 4, 6), "bottleneck", "imagenet"), 38),
    ],
)
def test_logits_equal_pytorch(random_variables, model, size, train):
    # Nothing trivial inside: an exchange of mean, variance, scale or bias would show.
    variables = random_variables(model, (size, size, 3))
    images = jax.random.normal(jax.random.key(3), (4, size, size, 3))
    apply = jax.jit(functools.partial(model.apply, train=train, mutable=["batch_stats"]))
    out, _ = apply(variables, images)
    np.testing.assert_allclose(out.logits, oracle(model, variables, images, train), rtol=1e-4, atol=1e-4)
