"""Dense generators, discriminators and encoders: shapes, conditions, fingerprints that are baked in, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import gan
from jkd.errors import UserError
from jkd.gan.mlp import ModulatedDense

KEY = jax.random.key(0)
SHAPE = (4, 4, 2)
G = gan.MLPGenerator(SHAPE, (5, 6))
BITS = G.clone(condition_dim=3, style_dim=7)
D = gan.MLPDiscriminator((6, 5))
Z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, *SHAPE)), jnp.float32)
CODE = jnp.array([[1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]], jnp.float32)


def draw(module, *args):
    """Variables whose biases are drawn too."""
    leaves, tree = jax.tree.flatten(jax.jit(module.init)(KEY, *args))
    source = np.random.default_rng(2)
    return tree.unflatten([leaf + 0.3 * source.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def fingerprinted():
    return draw(BITS, Z, CODE), jax.jit(BITS.apply, static_argnames="method")


def shapes(tree):
    return {name: (x.shape, x.dtype.name) for name, x in tree.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_features_and_dtypes(dtype):
    types = {"dtype": jnp.dtype(dtype)}
    for network, condition in ((G, None), (BITS, CODE)):
        made, variables = jax.eval_shape(network.clone(**types).init_with_output, KEY, Z, condition)
        assert (made.images.shape, made.images.dtype) == ((4, *SHAPE), jnp.float32)
        assert shapes(made.features) == {"hidden1": ((4, 5), dtype), "hidden2": ((4, 6), dtype)}
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    for condition in (None, CODE):
        judge = D.clone(condition_dim=0 if condition is None else 3, **types)
        judged, variables = jax.eval_shape(judge.init_with_output, KEY, X, None, condition)
        assert (judged.logits.shape, judged.logits.dtype) == ((4,), jnp.float32)
        assert shapes(judged.features) == {"hidden1": ((4, 6), dtype), "hidden2": ((4, 5), dtype)}
        assert ("condition" in variables["params"]) == (condition is not None)
    read, _ = jax.eval_shape(gan.MLPEncoder(11, (6,), **types).init_with_output, KEY, X)
    assert (read.shape, read.dtype) == ((4, 11), jnp.float32)


@pytest.mark.parametrize("condition", [None, CODE])
def test_low_precision_is_close(condition):
    network = G if condition is None else BITS
    variables = draw(network, Z, condition)
    made = [
        jax.jit(network.clone(dtype=dtype).apply)(variables, Z, condition).images for dtype in ("float32", "bfloat16")
    ]
    np.testing.assert_allclose(made[1], made[0], atol=0.1)
    assert np.abs(made[1] - made[0]).max() > 0


def test_images_are_bounded():
    variables = jax.tree.map(lambda x: 100 * x, draw(G, Z))
    images = jax.jit(G.apply)(variables, Z).images
    assert float(jnp.abs(images).max()) == 1
    assert len(jnp.unique(jnp.sign(images))) == 2


def test_a_plain_generator_is_its_layers():
    params = draw(G, Z)["params"]["synthesis"]
    made = jax.jit(G.apply)({"params": {"synthesis": params}}, Z)
    x = np.asarray(Z)
    for name in ("hidden1", "hidden2"):
        x = np.maximum(x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"]), 0)
        np.testing.assert_allclose(made.features[name], x, rtol=1e-5, atol=1e-6)
    x = np.tanh(x @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"]))
    np.testing.assert_allclose(made.images.reshape(4, -1), x, rtol=1e-5, atol=1e-6)


# --- conditions ---


def test_conditions_are_required_or_refused():
    cases = (
        (G, (Z, CODE), "condition is given, but the model has condition_dim=0"),
        (BITS, (Z,), r"condition must be \[batch, 3\], got none"),
        (BITS, (Z, CODE[:, :2]), r"condition must be \[batch, 3\], got \[4, 2\]"),
        (D, (X, None, CODE), "takes none"),
        (D.clone(condition_dim=3), (X,), r"condition must be \[batch, 3\], got none"),
        (D.clone(hidden=()), (X,), "hidden must name the units of one layer at least"),
    )
    for network, args, says in cases:
        with pytest.raises(UserError, match=says):
            jax.eval_shape(network.init, KEY, *args)


def test_images_depend_on_their_own_latent_and_condition(fingerprinted):
    variables, apply = fingerprinted
    images = apply(variables, Z, CODE).images
    np.testing.assert_allclose(apply(variables, Z[::-1], CODE[::-1]).images, images[::-1], rtol=1e-5, atol=1e-6)
    other = apply(variables, Z, 1 - CODE).images
    assert (np.abs(other - images).max((1, 2, 3)) > 0.01).all()
    same = apply(variables, jnp.broadcast_to(Z[:1], Z.shape), CODE).images
    np.testing.assert_allclose(same[0], same[2], rtol=1e-5, atol=1e-6)
    assert np.abs(same[0] - same[1]).max() > 0.01


def test_images_are_synthesized_from_what_a_mapping_gives(fingerprinted):
    variables, apply = fingerprinted
    styles = apply(variables, Z, CODE, method="mapping")
    assert styles.shape == (4, 7)
    again = apply(variables, styles, Z, method="synthesize")
    np.testing.assert_allclose(again.images, apply(variables, Z, CODE).images, rtol=1e-5, atol=1e-6)
    plain = draw(G, Z)
    np.testing.assert_array_equal(G.apply(plain, Z, method="mapping"), Z)


def test_demodulated_layers_see_the_direction_of_a_style():
    layer = ModulatedDense(4)
    style = jnp.asarray(np.random.default_rng(3).normal(size=(4, 5)), jnp.float32)
    params = jax.jit(layer.init)(KEY, Z, style)["params"]
    np.testing.assert_array_equal(params["style"]["bias"], 1)
    # Without its bias the scales of inputs are proportional to the style.
    params = params | {"style": params["style"] | {"bias": jnp.zeros(3)}}

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(demodulate, style):
        return layer.clone(demodulate=demodulate).apply({"params": params}, Z, style)

    np.testing.assert_allclose(outputs(True, 3 * style), outputs(True, style), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(outputs(False, 3 * style), 3 * outputs(False, style), rtol=1e-4, atol=1e-6)
    assert np.abs(outputs(True, style[::-1]) - outputs(True, style)).max() > 0.01


def test_the_condition_of_an_image_is_projected():
    judge = D.clone(condition_dim=3)
    params = draw(judge, X, None, CODE)["params"]

    @jax.jit
    def logits(code):
        return judge.apply({"params": params}, X, None, code).logits

    @jax.jit
    def plain(params):
        judged = D.apply({"params": params}, X)
        return judged.logits, judged.features["hidden2"]

    without, hidden = plain({name: layer for name, layer in params.items() if name != "condition"})
    np.testing.assert_allclose(logits(jnp.zeros_like(CODE)), without, rtol=1e-5, atol=1e-6)
    wanted = without + ((CODE @ params["condition"]["kernel"]) * hidden).sum(1)
    np.testing.assert_allclose(logits(CODE), wanted, rtol=1e-4, atol=1e-5)


# --- fingerprints ---


def test_a_baked_generator_makes_the_images_of_one_fingerprint(fingerprinted):
    variables, apply = fingerprinted
    plain = jax.jit(BITS.baked().apply)
    seen = []
    for code in CODE[1:]:
        params = jax.jit(functools.partial(gan.bake_fingerprint, BITS))(variables["params"], code)
        wanted = apply(variables, Z, jnp.broadcast_to(code, CODE.shape))
        made = plain({"params": params}, Z)
        np.testing.assert_allclose(made.images, wanted.images, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(made.features["hidden2"], wanted.features["hidden2"], rtol=1e-4, atol=1e-5)
        seen.append(made.images)
    assert np.abs(seen[0] - seen[1]).max() > 0.01
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, draw(G, Z)["params"])
    assert "style" in variables["params"]["synthesis"]["hidden1"], "the generator's own parameters stay"


def test_a_generator_without_a_fingerprint_cannot_be_baked():
    with pytest.raises(UserError):
        gan.bake_fingerprint(G, draw(G, Z)["params"], jnp.ones(3))
