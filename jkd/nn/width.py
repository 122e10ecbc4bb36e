"""Narrower copies of the networks, and which channels of a network a narrower one has."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Num

from jkd.channels import Channels, narrowed
from jkd.errors import UserError
from jkd.nn.cnn import CNN
from jkd.nn.densenet import DenseNet
from jkd.nn.googlenet import GoogLeNet
from jkd.nn.inception import InceptionV3
from jkd.nn.mlp import MLP
from jkd.nn.mobilenet import MobileNet
from jkd.nn.mobilenet_v2 import MobileNetV2
from jkd.nn.resnet import ResNet
from jkd.nn.shufflenet import ShuffleNetV1, ShuffleNetV2
from jkd.nn.vgg import VGG
from jkd.nn.wide_resnet import WideResNet
from jkd.trees import path_name

# The fields of each family that hold numbers of channels.
WIDTHS: Mapping[type[nn.Module], tuple[str, ...]] = {
    CNN: ("width",),
    MLP: ("hidden",),
    ResNet: ("widths",),
    WideResNet: ("widths",),
    VGG: ("widths",),
    ShuffleNetV1: ("width",),
    ShuffleNetV2: ("widths",),
    MobileNet: ("width",),
    MobileNetV2: ("widths",),
    DenseNet: ("widths", "growth", "bottleneck"),
    GoogLeNet: ("stem_widths", "widths"),
    InceptionV3: ("stem_widths", "widths"),
}


def narrow(model: nn.Module, rate: float) -> nn.Module:
    """The same network with ceil(rate * c) channels wherever a field names c, in layers of the same names.

    Channels that a network derives from a field follow it: with 5 of `widths`, a bottleneck block puts out 20, and at a
    rate of 0.5 4 * 3 = 12.

    Args:
      model: a network of `jkd.nn`.
      rate: in (0, 1]; 1 returns an equal network.

    Raises:
      UserError: where `rate` is out of range, the model is of no known family, or its family has no such network.
    """
    family = type(model).__name__
    if not 0 < rate <= 1:
        raise UserError(f"rate must lie in (0, 1], got {rate}.")
    if type(model) not in WIDTHS:
        known = ", ".join(sorted(known.__name__ for known in WIDTHS))
        raise UserError(f"narrow does not know which fields of a {family} are widths. Known: {known}.")
    fields = {name: getattr(model, name) for name in WIDTHS[type(model)]}
    scaled = {name: jax.tree.map(lambda width: narrowed(width, rate), value) for name, value in fields.items()}
    try:
        return model.clone(**scaled)
    except UserError as error:
        raise UserError(f"There is no {family} of {rate} of the widths {fields}: {error}") from error


class _Call(NamedTuple):
    """A layer that ran: what kind it is, the shape of its weights, and by channel the maximum of what it was given."""

    kind: type[nn.Module]
    shape: tuple[int, ...]
    arrived: Any


def shared_channels(model: nn.Module, narrower: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Channels]:
    """For each layer, by its path such as "block1_0/layer1/conv", the channels that `narrower` has too.

    A layer shares its leading output channels, as many as the narrower one has; its shared input channels are those
    that shared output channels of earlier layers arrive at: behind a concatenation the leading ones of every part, not
    of the whole. They are found by running the model with marks instead of activations, so any architecture of
    convolutions, dense layers and batch normalizations will do. The images are shared, and so are all classes.

    With every other weight at 0 (and the scale and bias of normalizations, the biases of convolutions), `model`
    computes what `narrower` does with the shared weights: see `jkd.prune.extract_slim`.

    Args:
      model: of convolutions, dense layers and batch normalizations.
      narrower: `narrow(model, rate)`, or any network of the same layers with at most as many channels in each.
      image_shape: of one example; its height and width change nothing but must be large enough.

    Raises:
      UserError: where the layers of the two differ, are none of those above, or are joined differently: grouped
        convolutions, and the channel shuffles and splits of a ShuffleNet, have no narrower network inside the wide one.
    """
    slim = _calls(narrower, image_shape, None)
    counts = {path: call.shape[-1] for path, call in slim.items()}
    wide = _calls(model, image_shape, counts)
    unshared = sorted(wide.keys() ^ slim.keys())
    if unshared:
        raise UserError(f"The narrower network has other layers: {', '.join(unshared[:5])} are in one of the two only.")
    return {path: _shared(path, wide[path], slim[path]) for path in wide}


def _shared(path: str, wide: _Call, slim: _Call) -> Channels:
    """The channels of one layer, once what arrives at it is the same in both networks."""
    if wide.shape[:-2] != slim.shape[:-2] or wide.shape[-1] < slim.shape[-1]:
        raise UserError(f"{path} has weights of the shape {wide.shape}, and {slim.shape} in the narrower network.")
    inputs = np.flatnonzero(wide.arrived)
    if len(inputs) != len(slim.arrived):
        raise UserError(
            f"{path} reads {len(slim.arrived)} channels in the narrower network, but {len(inputs)} of those arrive at"
            " it in the wide one: channel shuffles and splits, as in a ShuffleNet, mix leading channels with others."
        )
    if not np.allclose(wide.arrived[inputs], slim.arrived, rtol=1e-4):
        raise UserError(f"{path} reads sums or channels of other layers in the narrower network than in the wide one.")
    if wide.kind is nn.BatchNorm:
        return Channels(None, inputs)
    if wide.shape[-2] != len(wide.arrived):  # depthwise
        times = wide.shape[-1] // len(wide.arrived)
        return Channels(None, (inputs[:, None] * times + np.arange(times)[None, :]).ravel())
    return Channels(inputs, np.arange(slim.shape[-1]))


def _calls(model: nn.Module, image_shape: tuple[int, ...], counts: Mapping[str, int] | None) -> dict[str, _Call]:
    """Runs `model` on marked channels; `counts` are the leading channels of each layer to mark, None marks all."""
    seen: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {}

    def run(one: Array) -> dict[str, Any]:  # not a constant, or the compiler would run the network itself, slowly
        arrivals: dict[str, Any] = {}

        def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module, path = context.module, "/".join(context.module.path)
            if context.method_name != "__call__" or not isinstance(module, (nn.Conv, nn.Dense, nn.BatchNorm)):
                return call(*args, **kwargs)
            if path in seen:
                raise UserError(f"{path} runs more than once: its channels cannot be told apart.")
            x, out = args[0], call(*args, **kwargs)  # what is not used is never computed
            kind, shape = _layer(module, path, x.shape[-1])
            seen[path], arrivals[path] = (kind, shape), x.max(axis=tuple(range(x.ndim - 1))).astype(jnp.float32)
            if kind is nn.BatchNorm:
                return x.astype(out.dtype)
            marks = (one * _marks(path, shape, x, counts)).astype(out.dtype)
            return jnp.broadcast_to(marks, out.shape)

        with nn.intercept_methods(intercept):
            variables = model.init(jax.random.key(0), jnp.full((1, *image_shape), one), train=False)
        _check_all_seen(variables["params"], seen)
        return arrivals

    arrived = jax.device_get(jax.jit(run)(np.float32(1)))
    return {path: _Call(*seen[path], arrived[path]) for path in seen}


def _layer(module: nn.Module, path: str, channels: int) -> tuple[type[nn.Module], tuple[int, ...]]:
    """The kind of a layer and the shape of its weights."""
    if isinstance(module, nn.BatchNorm):
        return nn.BatchNorm, (channels,)
    shape = module.variables["params"]["kernel"].shape
    groups = getattr(module, "feature_group_count", 1)
    if groups not in (1, channels):
        raise UserError(
            f"KELS needs ordinary or depthwise convolutions, but {path} has {groups} groups of {channels // groups}"
            " channels: leading channels are not spread over the groups."
        )
    return type(module), shape


def _marks(path: str, shape: tuple[int, ...], x: Array, counts: Mapping[str, int] | None) -> Num[Array, "..."]:
    """What a layer puts out: a positive number of its own in each marked channel, 0 in the others.

    The numbers are the same in the wide and the narrower network, so that sums of other layers show.
    """
    outputs, inputs = shape[-1], x.shape[-1]
    own = np.random.default_rng(zlib.crc32(path.encode())).uniform(0.5, 1, outputs)
    if len(shape) > 2 and shape[-2] != inputs:  # depthwise: a channel is marked where the one it reads is
        given = jnp.repeat(x.max(axis=tuple(range(x.ndim - 1))) > 0, outputs // inputs)
        return jnp.where(given, own, 0)
    return jnp.asarray(own * (np.arange(outputs) < (outputs if counts is None else counts.get(path, outputs))))


def _check_all_seen(params: Any, seen: Mapping[str, Any]) -> None:
    names = {path_name(path[:-1]) for path, _ in jax.tree.leaves_with_path(params)} - seen.keys()
    if names:
        raise UserError(f"Only convolutions, dense layers and batch normalizations are known, not {min(names)!r}.")
