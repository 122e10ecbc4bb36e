"""Layers of StyleGAN2 against numbers by hand and PyTorch; both forms of resampled convolutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd.errors import UserError
from jkd.gan import layers, modulation, resampling

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(2, 6, 4, 3)).astype(np.float32)
KERNEL3, KERNEL4 = (DRAW.normal(size=(n, n, 3, 5)).astype(np.float32) for n in (3, 4))
KEY = jax.random.key(0)
FORMS = {
    "filtered up": (resampling.filtered_conv_up, resampling.filtered_up_with_gaps, KERNEL3),
    "filtered down": (resampling.filtered_conv_down, resampling.filtered_down_with_stride, KERNEL3),
    "up": (resampling.conv_up, resampling.up_with_gaps, KERNEL4),
    "down": (resampling.conv_down, resampling.down_with_stride, KERNEL4),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peer(torch):
    """PyTorch in NHWC: what each function computes, written with its convolutions."""
    F = torch.nn.functional
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

    def blur(x, padding, gain=1.0):
        window = gain * (taps.reshape(4, 1) * taps.reshape(1, 4))
        depthwise = window.reshape(1, 1, 4, 4).repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(F.pad(x, padding), depthwise, groups=x.shape[1])

    def spread(x):
        zeros = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        zeros[:, :, ::2, ::2] = x
        return zeros

    # conv_transpose2d takes [in, out, height, width] and turns the kernel by 180 degrees; ours does not turn it.
    def transposed(x, kernel, padding):
        return F.conv_transpose2d(x, kernel.transpose(0, 1).flip(2, 3), stride=2, padding=padding)

    functions = {
        "upsample": lambda x: blur(spread(x), (2, 1, 2, 1), 4),
        "downsample": lambda x: blur(x, (1, 1, 1, 1))[:, :, ::2, ::2],
        "filtered up": lambda x, k: blur(transposed(x, k, 0), (1, 1, 1, 1), 4),
        "filtered down": lambda x, k: F.conv2d(blur(x, (2, 2, 2, 2)), k, stride=2),
        "up": lambda x, k: transposed(x, k, 1),
        "down": lambda x, k: F.conv2d(x, k, stride=2, padding=1),
    }

    def call(name, x, *kernel):
        arrays = [torch.from_numpy(x.transpose(0, 3, 1, 2))]
        arrays += [torch.from_numpy(k.transpose(3, 2, 0, 1)) for k in kernel]
        return functions[name](*arrays).numpy().transpose(0, 2, 3, 1)

    return call


def test_resampling_by_hand():
    x = jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(resampling.upsample(x)[0, 0, :, 0], 0.75 * np.array([0.75, 1.25, 1.75, 1.5]))
    # Both pixels with 3 / 8 of the rows, which are one pixel and three rows of zeros.
    x = jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 4, 1)
    expected = 0.375 * np.array([[3 * 1 + 3 * 2 + 3, 2 + 3 * 3 + 3 * 4]]) / 8
    np.testing.assert_allclose(resampling.downsample(x)[0, :, :, 0], expected)


def test_resampling_in_pytorch(peer):
    np.testing.assert_allclose(jax.jit(resampling.upsample)(X), peer("upsample", X), atol=1e-6)
    np.testing.assert_allclose(jax.jit(resampling.downsample)(X), peer("downsample", X), atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_resampled_convolutions_in_pytorch(name, peer):
    ours, _, kernel = FORMS[name]
    np.testing.assert_allclose(ours(jnp.asarray(X), jnp.asarray(kernel)), peer(name, X, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_agree_in_value_slope_and_slope_of_slopes(name):
    def slopes(form, x, kernel):
        def penalty(x, kernel):
            return jnp.square(jax.grad(lambda x: jnp.tanh(form(x, kernel)).sum())(x)).sum()

        return form(x, kernel), jax.grad(penalty, (0, 1))(x, kernel)

    *forms, kernel = FORMS[name]
    with jax.enable_x64(True):
        x, kernel = X.astype(np.float64), kernel.astype(np.float64)
        found = [jax.tree.leaves(jax.jit(functools.partial(slopes, form))(x, kernel)) for form in forms]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_resampled_convolutions_keep_float32_gradients_of_weights(name):
    form, _, kernel = FORMS[name]
    x = jnp.asarray(X, jnp.bfloat16)

    def both(x, kernel):
        out, pull_back = jax.vjp(form, x, kernel)
        return out, pull_back(out)

    out, slopes = jax.eval_shape(both, x, kernel)
    assert out.dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in slopes] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("demodulate", [True, False])
def test_a_modulated_up_convolution_equals_weights_for_each_example(demodulate, peer):
    styles = DRAW.normal(size=(2, 3)).astype(np.float32)
    found = jax.jit(modulation.modulated_conv, static_argnames=("demodulate", "up"))(
        X, KERNEL3, styles, demodulate=demodulate, up=True
    )
    for i, style in enumerate(styles):
        kernel = KERNEL3 * style.reshape(1, 1, 3, 1)
        kernel = kernel / np.sqrt(np.square(kernel).sum((0, 1, 2)) + 1e-8) if demodulate else kernel
        np.testing.assert_allclose(found[i : i + 1], peer("filtered up", X[i : i + 1], kernel), rtol=1e-4, atol=1e-4)


def test_activation_and_pixel_norm_by_hand():
    np.testing.assert_allclose(layers.leaky_relu(jnp.array([1.0, -1.0])), [2**0.5, -0.2 * 2**0.5], rtol=1e-6)
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(layers.normalize_pixels(x), [[0.848528, 1.131371], [0, 0]], atol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: layers.normalize_pixels(x).sum())(x)).all()


def test_a_dense_layer_by_hand():
    layer = layers.EqualizedDense(1, lr_multiplier=0.5)
    params = {"kernel": jnp.array([[1.0], [2.0], [3.0], [4.0]]), "bias": jnp.array([6.0])}
    # (1 + 2 + 3 + 4) * 0.5 / sqrt(4) + 0.5 * 6
    np.testing.assert_allclose(layer.apply({"params": params}, jnp.ones((1, 4))), [[5.5]])
    np.testing.assert_allclose(
        layer.clone(activate=True).apply({"params": params}, -jnp.ones((1, 4))), [[0.5 * 2**0.5]]
    )


@pytest.mark.parametrize("multiplier", [1.0, 0.01])
def test_equalized_layers_keep_the_variance_of_their_inputs(multiplier):
    layer = layers.EqualizedDense(256, lr_multiplier=multiplier, bias_init=0.5)
    x = jax.random.normal(KEY, (64, 128))
    variables, out = jax.jit(lambda: (v := layer.init(KEY, x), layer.apply(v, x)))()
    np.testing.assert_allclose(jnp.std(variables["params"]["kernel"]), 1 / multiplier, rtol=0.02)
    np.testing.assert_allclose([out.mean(), out.std()], [0.5, 1], atol=0.05)


def test_short_cuts_resample_before_or_after_their_1x1_convolution():
    for resample, function in (("up", resampling.upsample), ("down", resampling.downsample)):
        layer = layers.EqualizedConv(5, 1, resample, activate=False)
        variables = {"params": {"kernel": KERNEL3[:1, :1]}}
        plain, found = (jax.jit(module.apply)(variables, X) for module in (layer.clone(resample="none"), layer))
        np.testing.assert_allclose(plain, X @ KERNEL3[0, 0] / 3**0.5, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found, function(plain), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def styled():
    module = layers.StyledConv(5, up=True)
    style = DRAW.normal(size=(2, 4)).astype(np.float32)
    params = jax.jit(module.init)(KEY, X, style)["params"]
    apply = jax.jit(lambda params, style, rngs=None: module.apply({"params": params}, jnp.asarray(X), style, rngs=rngs))
    return params, style, apply


def test_a_styled_convolution_by_its_parts(styled):
    params, style, apply = styled
    assert (params["affine"]["bias"] == 1).all()
    scales = style @ params["affine"]["kernel"] / 2 + 1
    y = modulation.modulated_conv(jnp.asarray(X), params["kernel"] / 27**0.5, scales, up=True)
    np.testing.assert_allclose(apply(params, style), layers.leaky_relu(y), rtol=1e-4, atol=1e-5)


def test_noise_is_the_same_in_every_image_unless_it_is_drawn(styled):
    params, style, apply = styled
    np.testing.assert_array_equal(apply(params, style, {"noise": KEY}), apply(params, style))  # strength 0
    silent = params | {"kernel": jnp.zeros_like(params["kernel"]), "noise_strength": jnp.ones(())}
    fixed, one, other = apply(silent, style), *(apply(silent, style, {"noise": jax.random.key(i)}) for i in (0, 1))
    np.testing.assert_array_equal(fixed[0], fixed[1])
    assert fixed.shape == (2, 12, 8, 5)
    assert (fixed[..., :1] == fixed).all()
    assert jnp.std(fixed) > 0.5
    assert (one[0] != one[1]).mean() > 0.9
    assert (one != other).mean() > 0.9


def test_layers_have_noise_of_their_own():
    class Two(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x):
            return [layers.StyledConv(1, activate=False, name=name)(x, None) for name in ("conv8", "conv16")]

    layer = {"kernel": jnp.zeros((3, 3, 3, 1)), "bias": jnp.zeros(1), "noise_strength": jnp.ones(())}
    one, other = jax.jit(Two().apply)({"params": {"conv8": layer, "conv16": layer}}, X)
    assert abs(np.corrcoef(one[0].ravel(), other[0].ravel())[0, 1]) < 0.7


def test_deviation_of_groups_by_hand():
    x = jnp.array([0.0, 2.0, 1.0, 5.0]).reshape(4, 1, 1, 1)
    with_channel = layers.group_deviation(x, group=2)
    np.testing.assert_allclose(with_channel[..., :1], x)
    np.testing.assert_allclose(with_channel[:, 0, 0, 1], [1, 1, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(layers.group_deviation(x, group=4)[:, 0, 0, 1], [3.5**0.5] * 4, rtol=1e-6)
    # Three is the largest number up to four that divides six.
    x = jnp.array([0.0, 3.0, 6.0, 1.0, 1.0, 1.0]).reshape(6, 1, 1, 1)
    np.testing.assert_allclose(layers.group_deviation(x, group=4)[:, 0, 0, 1], [6**0.5] * 3 + [1e-4] * 3, rtol=1e-4)
    np.testing.assert_allclose(layers.group_deviation(x[:1], group=4)[:, 0, 0, 1], [1e-4], rtol=1e-4)


def test_equal_images_have_finite_slopes():
    slope = jax.jit(jax.grad(lambda x: layers.group_deviation(x, group=4).sum()))(jnp.ones((4, 2, 2, 3)))
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("group", [2, 4])
def test_eight_devices_find_the_deviations_that_one_finds(group, over_devices):
    with jax.enable_x64(True):
        x = DRAW.normal(size=(16, 2, 2, 3))
        find = jax.jit(functools.partial(layers.group_deviation, group=group))
        (spread,) = over_devices(x)
        np.testing.assert_allclose(find(spread), find(jax.device_put(x, jax.devices()[0])), rtol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.group_deviation(X, group=0), "group must be at least 1, got 0"),
        (lambda: layers.EqualizedConv(4, 5).init(KEY, X), "size must be 1 or 3, got 5"),
        (
            lambda: layers.EqualizedConv(4, resample="down_").init(KEY, X),
            "Unknown resample 'down_'. Did you mean 'down'",
        ),
        (lambda: layers.self_attention("patch", 8, dtype=X.dtype, param_dtype=X.dtype, name="a"), "Unknown attention"),
        (lambda: modulation.modulated_conv(X, KERNEL4, jnp.ones((2, 3)), up=True), "up needs a kernel of 3x3"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(call)
