"""DCGAN against PyTorch, conditions, spectral normalization, statistics over the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import gan
from jkd.errors import UserError

KEY = jax.random.key(0)
G = gan.DCGANGenerator(16, 2, latent_dim=5, width=4)
D = gan.DCGANDiscriminator(16, 2, width=4)
DRAW = np.random.default_rng(0)
Z = DRAW.normal(size=(8, 5)).astype(np.float32)
X = DRAW.normal(size=(8, 16, 16, 2)).astype(np.float32)
CODE = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 0, 1]]


def draw(module, *args):
    """Variables that are drawn wide enough to matter: their first values are small."""
    variables = jax.jit(module.init)(KEY, *args)
    leaves, tree = jax.tree.flatten(variables["params"])
    source = np.random.default_rng(2)
    params = [leaf + 0.2 * source.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return variables | {"params": tree.unflatten(params)}


def training(module):
    return jax.jit(lambda *args: module.apply(*args, train=True, mutable=["batch_stats"]))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_a_generator_in_pytorch(torch):
    F = torch.nn.functional
    variables = draw(G, Z)
    made, state = training(G)(variables, Z)
    p = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), variables["params"])
    x = (torch.from_numpy(Z) @ p["start"]["kernel"]).reshape(-1, 4, 4, 8).permute(0, 3, 1, 2)
    for size in (4, 8):
        norm = p[f"norm{size}"]["norm"]
        x = F.relu(F.batch_norm(x, None, None, norm["scale"], norm["bias"], training=True))
        np.testing.assert_allclose(made.features[f"{size}x{size}"], x.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
        up = p[f"up{2 * size}"]
        kernel = up["kernel"].permute(2, 3, 0, 1).flip(2, 3)  # ours does not turn the kernel
        x = F.conv_transpose2d(x, kernel, up.get("bias"), stride=2, padding=1)
    np.testing.assert_allclose(made.images, x.tanh().permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert (state["batch_stats"]["norm4"]["norm"]["mean"] != 0).all()


def test_a_discriminator_in_pytorch(torch):
    F = torch.nn.functional
    variables = draw(D, X)
    judged, _ = training(D)(variables, X)
    p = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), variables["params"])
    x = torch.from_numpy(X).permute(0, 3, 1, 2)
    for size in (8, 4):
        down = p[f"down{size}"]
        x = F.conv2d(x, down["kernel"].permute(3, 2, 0, 1), down.get("bias"), stride=2, padding=1)
        if size == 4:
            x = F.batch_norm(x, None, None, p["norm4"]["norm"]["scale"], p["norm4"]["norm"]["bias"], training=True)
        x = F.leaky_relu(x, 0.2)
        np.testing.assert_allclose(judged.features[f"{size}x{size}"], x.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    logits = x.permute(0, 2, 3, 1).flatten(1) @ p["logits"]["kernel"] + p["logits"]["bias"]
    np.testing.assert_allclose(judged.logits, logits[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8, 28, 64])
@pytest.mark.parametrize("condition_dim", [0, 3])
@pytest.mark.parametrize("norm", ["batch", "spectral", "none"])
def test_sizes(size, condition_dim, norm):
    options = {"width": 4, "max_width": 16, "condition_dim": condition_dim}
    code = CODE if condition_dim else None
    network = gan.DCGANGenerator(size, 1, latent_dim=5, **options)
    made, variables = jax.eval_shape(network.init_with_output, KEY, Z, code)
    assert made.images.shape == (8, size, size, 1)
    assert "batch_stats" in variables
    judge = gan.DCGANDiscriminator(size, 1, norm=norm, **options)
    judged, _ = jax.eval_shape(judge.init_with_output, KEY, made.images, None, code)
    sizes = {8: [4], 28: [7, 14], 64: [4, 8, 16, 32]}[size]
    widths = {f"{n}x{n}": (8, n, n, min(4 * size // (2 * n), 16)) for n in sizes}
    assert {name: x.shape for name, x in made.features.items()} == widths
    assert {name: x.shape for name, x in judged.features.items()} == widths
    assert judged.logits.shape == (8,)


def test_images_are_bounded_and_evaluation_uses_running_statistics():
    variables, apply = draw(G, Z), jax.jit(G.apply)
    assert (jnp.abs(apply(variables, 100 * Z).images) <= 1).all()
    np.testing.assert_allclose(apply(variables, Z[:3]).images, apply(variables, Z).images[:3], rtol=1e-4, atol=1e-5)
    step, state = training(G), variables
    for _ in range(60):
        state = variables | step(state, Z)[1]
    np.testing.assert_allclose(apply(state, Z).images, step(state, Z)[0].images, atol=0.02)


def test_a_condition_scales_and_shifts_after_each_normalization():
    network = G.clone(condition_dim=3)
    variables = draw(network, Z, CODE)
    norm = variables["params"]["norm4"]
    assert set(norm) == {"scale", "bias"}
    step = training(network)
    one, other = (step(variables, Z, code)[0] for code in (CODE, CODE[::-1]))
    assert (one.images != other.images).any(axis=(1, 2, 3)).sum() >= 5
    x = (Z @ np.asarray(variables["params"]["start"]["kernel"])).reshape(8, 4, 4, 8)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    scale, bias = (np.asarray(CODE @ norm[name]["kernel"]).reshape(8, 1, 1, 8) for name in ("scale", "bias"))
    np.testing.assert_allclose(one.features["4x4"], np.maximum((1 + scale) * x + bias, 0), rtol=1e-3, atol=1e-4)


def test_a_condition_is_projected():
    judge = D.clone(condition_dim=3, norm="none")
    variables = draw(judge, X, None, CODE)
    judged = jax.jit(judge.apply)(variables, X, None, CODE)
    outputs = np.asarray(judged.features["4x4"]).reshape(8, -1) @ variables["params"]["logits"]["kernel"]
    outputs = outputs + variables["params"]["logits"]["bias"].reshape(1, -1)
    expected = outputs[:, 0] + outputs[np.arange(8), 1 + CODE.argmax(1)]
    np.testing.assert_allclose(judged.logits, expected, rtol=1e-4, atol=1e-4)


def test_spectral_normalization_brings_the_largest_singular_value_to_one():
    judge = D.clone(norm="spectral")
    variables = draw(judge, X)
    step = training(judge)
    for _ in range(50):
        variables = variables | step(variables, X)[1]
    judged = jax.jit(judge.apply)(variables, X)
    kernel = np.asarray(variables["params"]["down8"]["kernel"])
    largest = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)[0]
    bare = jax.jit(D.clone(norm="none").apply)
    first = variables["params"] | {"down8": {**variables["params"]["down8"], "kernel": kernel / largest}}
    np.testing.assert_allclose(judged.features["8x8"], bare({"params": first}, X).features["8x8"], rtol=1e-3, atol=1e-4)
    scaled = variables["params"] | {"down8": {**variables["params"]["down8"], "kernel": 5 * kernel}}
    for _ in range(50):
        variables = variables | {"params": scaled} | step(variables | {"params": scaled}, X)[1]
    again = jax.jit(judge.apply)(variables, X)
    np.testing.assert_allclose(again.logits, judged.logits, rtol=1e-3, atol=1e-4)


def test_eight_devices_agree_with_one(over_devices):
    with jax.enable_x64(True):
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        network, judge = G.clone(**types), D.clone(norm="none", **types)
        z, x = np.tile(Z, (2, 1)).astype(np.float64), np.tile(X, (2, 1, 1, 1)).astype(np.float64)
        z += np.arange(16).reshape(-1, 1) / 8
        variables = draw(network, z), draw(judge, x)

        @jax.jit
        def loss(variables, z):
            made, state = network.apply(variables[0], z, train=True, mutable=["batch_stats"])
            penalty = gan.r1_penalty(lambda x: judge.apply(variables[1], x).logits, made.images)
            return judge.apply(variables[1], made.images).logits.mean() + penalty, state

        grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
        one, many = grad(variables, z), grad(variables, *over_devices(z))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_bfloat16(norm):
    low = {"dtype": jnp.bfloat16}
    judge = D.clone(norm=norm, **low)
    variables = jax.eval_shape(judge.init, KEY, X)
    judged = jax.eval_shape(judge.apply, variables, X)
    assert (judged.logits.dtype, judged.features["4x4"].dtype) == (jnp.float32, jnp.bfloat16)
    made, variables = jax.eval_shape(G.clone(**low).init_with_output, KEY, Z)
    assert (made.images.dtype, made.features["4x4"].dtype) == (jnp.float32, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (G.clone(image_size=12), [Z], "image_size must be 28, or 4 times a power of two and at least 8, got 12"),
        (G.clone(image_size=4), [Z], "image_size must be 28"),
        (G, [Z[:, :4]], r"latents must be \[batch, 5\], got \[8, 4\]"),
        (G.clone(condition_dim=3), [Z], r"condition must be \[batch, 3\], got none"),
        (G, [Z, CODE], "condition is given, but the model has condition_dim=0"),
        (D.clone(norm="spectrum"), [X], "Unknown norm 'spectrum'. Did you mean 'spectral'"),
        (D, [X[:, :8]], r"images must be \[batch, 16, 16, 2\], got \[8, 8, 16, 2\]"),
        (D, [X, X], "references are given"),
    ],
)
def test_errors(module, args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, KEY, *args)
