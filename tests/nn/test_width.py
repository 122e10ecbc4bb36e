"""Narrower networks: their sizes, and the channels they share with the wide ones."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen

from jkd import nn
from jkd.errors import UserError
from jkd.prune import build_masks

CNN, MLP = (nn.CNN(5, 5), (4, 4, 3)), (nn.MLP((7, 5), 4), (3, 2, 2))
DENSE = nn.DenseNet(5, (2, 2, 1), (7, 5, 6), 3, 5), (16, 16, 3)


@pytest.mark.parametrize(("model", "shape"), [CNN, MLP], ids=["cnn", "mlp"])
def test_the_whole_width_shares_everything(model, shape):
    params = jax.eval_shape(lambda: nn.init(model, jax.random.key(0), shape)["params"])
    masks = build_masks(params, channels=nn.shared_channels(model, model, shape))
    assert all(leaf.all() for leaf in jax.tree.leaves(masks))


def test_channels_by_hand():
    """A concatenation shares the leading channels of each part."""
    model, shape = DENSE
    found = nn.shared_channels(model, nn.narrow(model, 0.5), shape)
    assert found["stem/conv"].inputs.tolist() == [0, 1, 2]
    assert found["stem/conv"].outputs.tolist() == [0, 1, 2, 3]
    assert found["block1_0/conv1"].inputs.tolist() == [0, 1, 2, 3]
    assert found["block1_1/norm1"].inputs is None
    assert found["block1_1/norm1"].outputs.tolist() == [0, 1, 2, 3, 7, 8]
    assert found["transition1/conv"].inputs.tolist() == [0, 1, 2, 3, 7, 8, 10, 11]
    assert found["head"].outputs.tolist() == [0, 1, 2, 3, 4]
    found = nn.shared_channels(nn.mobilenet(5, width=3), nn.mobilenet(5, width=2), (32, 32, 3))
    assert found["block1_0/layer1/conv"].inputs is None
    assert found["block1_0/layer1/conv"].outputs.tolist() == [0, 1]


def test_flattened_maps_keep_their_channels():
    class Flat(linen.Module):
        width: int

        @linen.compact
        def __call__(self, images, train=False):
            x = linen.Conv(self.width, (3, 3), name="conv")(images)
            return linen.Dense(2, name="head")(x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]))

    found = nn.shared_channels(Flat(3), Flat(2), (2, 1, 1))
    assert found["head"].inputs.tolist() == [0, 1, 3, 4]


def test_parameters_of_resnet18():
    for rate, count in ((1.0, 11_227_812), (0.5, 2_824_580)):
        model = nn.narrow(nn.resnet18(100), rate)
        variables = jax.eval_shape(lambda model=model: nn.init(model, jax.random.key(0), (32, 32, 3)))
        assert nn.count_parameters(variables["params"]) == count


def test_every_width_is_rounded_up():
    assert nn.narrow(nn.cnn(10, width=5), 0.5).width == 3
    assert nn.narrow(nn.mlp(10, hidden=(100, 7)), 0.29).hidden == (29, 3)
    assert nn.narrow(nn.mlp(10, hidden=(100,)), 0.07).hidden == (7,)  # 0.07 * 100 is 7.000000000000001
    assert nn.narrow(nn.resnet18(10), 1e-9).widths == (1, 1, 1, 1, 1)
    dense = nn.narrow(nn.densenet121(10), 0.3)
    assert (dense.widths, dense.growth, dense.bottleneck) == ((20, 39, 77, 154), 10, 39)
    assert nn.narrow(nn.googlenet(), 0.5) == nn.googlenet(multiplier=0.5)
    assert nn.narrow(nn.shufflenet_v1(10), 0.5).width == 12
    assert nn.narrow(nn.resnet20(10, dtype=jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_every_family_can_be_narrowed():
    for name in nn.names():
        assert nn.narrow(nn.build(name, 10), 1.0) == nn.build(name, 10)


def test_faults_are_named():
    for rate in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"rate must lie in \(0, 1\], got"):
            nn.narrow(nn.cnn(), rate)
    with pytest.raises(UserError, match=r"no ShuffleNetV1 of 0.6 of the widths .*'width': 24.*multiple of 12"):
        nn.narrow(nn.shufflenet_v1(), 0.6)
    with pytest.raises(UserError, match="which fields of a Dense are widths. Known: CNN, DenseNet"):
        nn.narrow(linen.Dense(3), 0.5)

    def shared(wide, slim, shape=(8, 8, 3)):
        return nn.shared_channels(wide, slim, shape)

    small = nn.ShuffleNetV2(5, (4, 8, 8, 12, 10), (2, 1, 1))
    with pytest.raises(UserError, match=r"block1_1/layer1/conv reads 2 .*0 .*: channel shuffles and splits"):
        shared(small, nn.narrow(small, 0.5))
    with pytest.raises(UserError, match="KELS needs ordinary or depthwise .* block1_0/layer3/conv has 3 groups"):
        shared(nn.ShuffleNetV1(5, 24, (1, 1, 1)), nn.ShuffleNetV1(5, 12, (1, 1, 1)))
    with pytest.raises(UserError, match="stem/conv has weights .* 4.*, and .* 6"):
        shared(nn.cnn(width=4), nn.cnn(width=6))
    with pytest.raises(UserError, match="other layers: hidden2 are in one"):
        shared(nn.mlp(hidden=(4, 4)), nn.mlp(hidden=(4,)))
    # Widths that become equal bring a shortcut that the wide network does not have.
    wide = nn.MobileNetV2(5, (1, 1), (4, 5, 6, 7), "cifar")
    with pytest.raises(UserError, match="reads sums or channels of other layers"):
        shared(wide, wide.clone(widths=(4, 4, 4, 4)))


def test_unknown_layers_are_named():
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, images, train=False):
            return linen.LayerNorm(name="norm")(images)

    class Twice(linen.Module):
        @linen.compact
        def __call__(self, images, train=False):
            layer = linen.Dense(3, name="same")
            return layer(layer(images))

    for model, message in ((Normed(), "Only convolutions, .* not 'norm'"), (Twice(), "same runs more than once")):
        with pytest.raises(UserError, match=message):
            nn.shared_channels(model, model, (3,))
