"""The slim network is inside the wide one, in every family of networks."""

import jax
import numpy as np
import pytest

from jkd import nn
from jkd.prune import build_masks, extract_slim

# One small network of each family with odd widths, a rate, and the shape of its images.
FAMILIES = {
    "cnn": (nn.CNN(5, 5), 0.5, (4, 4, 3)),
    "mlp": (nn.MLP((7, 5), 4), 0.4, (3, 2, 2)),
    "resnet": (nn.ResNet(5, (2, 1), (5, 5, 7), stem="imagenet"), 0.5, (8, 8, 3)),
    "bottleneck": (nn.ResNet(5, (2, 1), (4, 3, 5), "bottleneck"), 0.5, (4, 4, 1)),
    "wide_resnet": (nn.WideResNet(5, 10, (4, 4, 6, 7)), 0.6, (4, 4, 3)),
    "vgg": (nn.VGG(5, (1, 2, 1, 1, 1), (4, 5, 7, 6, 6)), 0.5, (8, 8, 3)),
    "mobilenet": (nn.mobilenet(5, width=3), 0.5, (32, 32, 3)),
    "mobilenet_v2": (nn.MobileNetV2(5, (1, 2, 1), (5, 7, 4, 9, 11)), 0.5, (16, 16, 3)),
    "densenet": (nn.DenseNet(5, (2, 2, 1), (7, 5, 6), 3, 5), 0.5, (16, 16, 3)),
    "googlenet": (
        nn.GoogLeNet(5, (3, 5, 4), (((4, 3, 5, 2, 3, 7),), ((2, 3, 4, 3, 5, 1),))),
        0.5,
        (16, 16, 3),
    ),
    "inception_v3": (
        nn.InceptionV3(5, False, (3, 4, 2, 5, 6), (((4, 3, 5, 2, 3, 7, 4),), ((5, 2, 3, 4),))),
        0.5,
        (75, 75, 3),
    ),
}
families = pytest.mark.parametrize(("model", "rate", "shape"), FAMILIES.values(), ids=FAMILIES)


@families
def test_slim_equivalence(model, rate, shape, random_variables):
    """The wide network without its reset weights computes what the slim one does."""
    narrower = nn.narrow(model, rate)
    channels = nn.shared_channels(model, narrower, shape)
    variables = _louder(random_variables(model, shape))
    masks = build_masks(variables["params"], channels=channels)
    assert jax.tree.structure(masks) == jax.tree.structure(variables["params"])
    slim = jax.tree.map(np.asarray, extract_slim(variables, channels))
    images = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    cut = _cut(variables, masks, channels)
    small = np.asarray(jax.jit(narrower.apply)(slim, images).logits)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(cut, images).logits, small, rtol=1e-5, atol=1e-6 * np.abs(small).max())
    # What was cut out does matter, and so do the images.
    assert np.abs(np.asarray(apply(variables, images).logits) - small).max() > 1e-3
    assert np.ptp(small, axis=0).max() > 1e-3


def _louder(variables):
    """Smaller variances: through many layers of few channels, nothing of the images would be left."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x) / 4 if path[-1].key == "var" else x, variables
    )


def _cut(variables, masks, channels):
    """Zeros where a weight is reset, and where a normalization is of a reset channel (but its variance)."""

    def cut(path, leaf, *mask):
        names = [key.key for key in path]
        layer = channels["/".join(names[1:-1])]
        shared = np.isin(np.arange(leaf.shape[-1]), layer.outputs)
        if names[-1] in ("scale", "mean") or (names[-1] == "bias" and names[-2].startswith("norm")):
            return np.where(shared, leaf, 0)
        return np.where(mask[0], leaf, 0) if mask else np.asarray(leaf)

    found = jax.tree_util.tree_map_with_path(cut, {"params": variables["params"]}, {"params": masks})
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return found | jax.tree_util.tree_map_with_path(cut, rest)
