"""StyleGAN2: published sizes, what each option changes, penalties through the networks, devices, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import gan
from jkd.errors import UserError
from jkd.nn import count_parameters

KEY = jax.random.key(0)
SMALL = {"fmap_base": 32, "fmap_max": 16}
G = gan.StyleGAN2Generator(8, channels=1, latent_dim=6, style_dim=5, mapping_layers=2, **SMALL)
D = gan.StyleGAN2Discriminator(8, channels=1, **SMALL)
BITS = G.clone(style_from="condition", condition_dim=3)
Z = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
X, OTHER = np.random.default_rng(1).normal(size=(2, 4, 8, 8, 1)).astype(np.float32)
CODE = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]], np.float32)


def shapes(module, *args):
    return jax.eval_shape(module.init, KEY, *args)["params"]


def draw(module, *args):
    """Variables whose biases and strengths are drawn too: at their first values much has no effect."""
    variables = jax.jit(module.init)(KEY, *args)
    leaves, tree = jax.tree.flatten(variables)
    source = np.random.default_rng(2)
    return tree.unflatten([leaf + 0.3 * source.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves])


@pytest.fixture(scope="module")
def generator():
    variables = draw(G, Z)
    return variables, jax.jit(G.apply, static_argnames=("method", "train"))


@pytest.fixture(scope="module")
def discriminator():
    return draw(D, X), jax.jit(D.apply, static_argnames="train")


@pytest.mark.parametrize(
    ("resolution", "base", "of_generator", "of_discriminator"), [(1024, 16384, 30_370_060, 29_012_513)]
)
def test_published_sizes(resolution, base, of_generator, of_discriminator):
    images = jax.ShapeDtypeStruct((4, resolution, resolution, 3), jnp.float32)
    generator = gan.StyleGAN2Generator(resolution, fmap_base=base)
    assert count_parameters(shapes(generator, jnp.zeros((4, 512)))) == of_generator
    discriminator = gan.StyleGAN2Discriminator(resolution, fmap_base=base)
    assert count_parameters(shapes(discriminator, images)) == of_discriminator


@pytest.mark.parametrize("resolution", [8, 32])
@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_every_architecture(resolution, architecture):
    options = {"architecture": architecture, **SMALL}
    attention = ((8, "patchwise"), (4, "global"), (4, "tokens"))
    network = gan.StyleGAN2Generator(resolution, attention=attention, latent_dim=6, style_dim=5, **options)
    made, _ = jax.eval_shape(network.init_with_output, KEY, Z)
    sizes = [4 * 2**i for i in range(resolution.bit_length() - 3)] + [resolution]
    names = {f"{size}x{size}": (4, size, size, max(min(64 // size, 16), 1)) for size in sizes}
    assert made.images.shape == (4, resolution, resolution, 3)
    assert {name: x.shape for name, x in made.features.items()} == names
    attention = ((8, "reference"), (4, "dynamic"), (resolution, "patchwise"))
    judge = gan.StyleGAN2Discriminator(resolution, attention=attention, **options)
    judged, _ = jax.eval_shape(judge.init_with_output, KEY, made.images, made.images)
    assert judged.logits.shape == (4,)
    assert {name: x.shape for name, x in judged.features.items()} == names
    encoder = gan.StyleGAN2Encoder(resolution, 11, architecture=architecture, **SMALL)
    out, _ = jax.eval_shape(encoder.init_with_output, KEY, made.images)
    assert (out.shape, out.dtype) == ((4, 11), jnp.float32)


def test_images_are_synthesized_from_mapped_styles(generator):
    variables, apply = generator
    styles = apply(variables, Z, method="mapping")
    assert styles.shape == (4, G.num_styles, 5) == (4, 4, 5)
    np.testing.assert_array_equal(styles[:, 1:], styles[:, :-1])
    made, found = apply(variables, Z), apply(variables, styles, method="synthesize")
    np.testing.assert_allclose(made.images, found.images, rtol=1e-5, atol=1e-5)
    assert jnp.std(made.images, axis=0).min() > 0
    # Latents are normalized: only their direction counts.
    np.testing.assert_allclose(apply(variables, 7 * Z).images, made.images, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(apply(variables, Z, train=True).images, made.images)


def test_each_style_has_its_layers(generator):
    variables, apply = generator
    styles = jnp.asarray(apply(variables, Z, method="mapping"))
    before = apply(variables, styles, method="synthesize")
    for layer, changed in enumerate((("4x4", "8x8"), ("8x8",), ("8x8",), ())):
        after = apply(variables, styles.at[:, layer].add(1.0), method="synthesize")
        assert (before.images != after.images).any()
        found = tuple(name for name, x in before.features.items() if (x != after.features[name]).any())
        assert found == changed


def test_noise_comes_from_its_stream(generator):
    variables, apply = generator
    one, other = (apply(variables, Z, rngs={"noise": jax.random.key(i)}).images for i in (0, 1))
    np.testing.assert_array_equal(one, apply(variables, Z, rngs={"noise": KEY}).images)
    assert (one != other).all()
    np.testing.assert_array_equal(apply(variables, Z).images, apply(variables, Z).images)


def test_a_class_is_embedded_beside_the_latents():
    network = G.clone(condition_dim=3)
    variables = draw(network, Z, CODE)
    assert variables["params"]["mapper"]["embedding"].shape == (3, 6)
    apply = jax.jit(network.apply)
    same, other = apply(variables, Z[:1].repeat(4, 0), CODE).images[:3:2], apply(variables, Z, 1 - CODE).images
    np.testing.assert_array_equal(*same)
    assert (other != apply(variables, Z, CODE).images).all()


def test_styles_are_mixed_from_a_layer_on_that_each_image_draws():
    a, b = jnp.zeros((256, 5, 2)), jnp.ones((256, 5, 2))
    mix = jax.jit(gan.mix_styles, static_argnames="probability")
    np.testing.assert_array_equal(mix(KEY, a, b, probability=0.0), a)
    mixed = np.asarray(mix(KEY, a, b, probability=1.0))[..., 0]
    assert (mixed[:, 0] == 0).all()
    assert (mixed[:, -1] == 1).all()
    assert (np.diff(mixed) >= 0).all()
    np.testing.assert_allclose(np.bincount(mixed.sum(1).astype(int))[1:] / 256, 1 / 4, atol=0.1)
    np.testing.assert_allclose(np.mean(np.asarray(mix(KEY, a, b))[:, -1, 0]), 0.9, atol=0.05)


def test_truncation_by_hand():
    styles, mean = jnp.array([[[2.0, 4.0], [6.0, 0.0]]]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(gan.truncate(styles, mean, 0.5), [[[1.5, 3.0], [3.5, 1.0]]])
    np.testing.assert_allclose(gan.truncate(styles, mean, jnp.array([1.0, 0.0])), [[[2.0, 4.0], [1.0, 2.0]]])


@pytest.mark.parametrize(
    "options", [{}, {"modulated": (8, 8), "architecture": "resnet", "attention": ((8, "patchwise"),)}], ids=["all", "8"]
)
def test_a_baked_generator_makes_the_images_of_its_condition(options):
    network = BITS.clone(**options)
    variables = draw(network, Z, CODE)
    conditional = jax.jit(network.apply)
    modulated = {name for name, layer in variables["params"]["synthesis"].items() if "affine" in layer}
    assert modulated == ({"up8", "conv8", "to_rgb8"} | (set() if options else {"conv4", "to_rgb4"}))
    bake = jax.jit(lambda params, code: gan.bake_fingerprint(network, params, code))
    plain = network.clone(style_from="none", condition_dim=0, modulated=None)
    for code in CODE[:2]:
        params = bake(variables["params"], code)
        made = jax.jit(plain.apply)({"params": params}, Z).images
        np.testing.assert_allclose(made, conditional(variables, Z, np.tile(code, (4, 1))).images, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(plain, Z))
    assert (made != conditional(variables, Z, CODE[[0] * 4]).images).any()


def test_bits_are_the_style_and_latents_the_start(generator):
    del generator
    variables = draw(BITS, Z, CODE)
    apply = jax.jit(BITS.apply, static_argnames="method")
    images = apply(variables, Z[:1].repeat(4, 0), CODE).images
    np.testing.assert_array_equal(images[0], images[2])
    assert (images[0] != images[1]).any()
    styles = apply(variables, Z, CODE, method="mapping")
    np.testing.assert_allclose(
        apply(variables, styles, Z, method="synthesize").images, apply(variables, Z, CODE).images, rtol=1e-5, atol=1e-5
    )


def test_fresh_attention_with_a_gate_is_the_identity(generator, discriminator):
    for module, (_, apply), x in ((G, generator, Z), (D, discriminator, X)):
        attending = module.clone(attention=((8, "global"),))
        more = jax.jit(attending.init)(KEY, x)
        plain = jax.jit(module.init)(KEY, x)
        assert count_parameters(more) > count_parameters(plain)
        np.testing.assert_allclose(jax.jit(attending.apply)(more, x)[0], apply(plain, x)[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def referring():
    module = D.clone(attention=((4, "reference"),))
    return draw(module, X, OTHER), jax.jit(module.apply)


def test_a_reference_attention_of_an_image_with_itself_is_self_attention(referring):
    variables, apply = referring
    trunk = dict(variables["params"]["trunk"])
    trunk["global_attention4"] = trunk.pop("reference_attention4")
    renamed = {"params": variables["params"] | {"trunk": trunk}}
    alone = jax.jit(D.clone(attention=((4, "global"),)).apply)(renamed, X)
    both = apply(variables, X, X)
    np.testing.assert_allclose(both.logits, alone.logits, rtol=1e-4, atol=1e-4)
    for name, x in alone.features.items():
        np.testing.assert_allclose(both.features[name], x, rtol=1e-4, atol=1e-4)


def test_references_say_where_to_look_and_nothing_else(referring):
    variables, apply = referring
    judged = apply(variables, X, OTHER)
    assert (judged.logits != apply(variables, X, X).logits).all()
    assert judged.features["8x8"].shape == (4, 8, 8, 8)
    params = variables["params"]
    gate = {"reference_attention4": params["trunk"]["reference_attention4"] | {"gamma": jnp.zeros(())}}
    closed = {"params": params | {"trunk": params["trunk"] | gate}}
    np.testing.assert_allclose(apply(closed, X, OTHER).logits, apply(closed, X, X).logits, rtol=1e-5)


def test_groups_of_images_are_judged_together(discriminator):
    variables, apply = discriminator
    together = apply(variables, X).logits
    alone = jnp.concatenate([apply(variables, x[None]).logits for x in X])
    assert (jnp.abs(together - alone) > 1e-4).all()
    free = D.clone(minibatch_group=0)
    variables, apply = draw(free, X), jax.jit(free.apply)
    alone = jnp.concatenate([apply(variables, x[None]).logits for x in X])
    np.testing.assert_allclose(apply(variables, X).logits, alone, rtol=1e-4, atol=1e-5)


def test_a_condition_is_projected():
    module = D.clone(condition_dim=3)
    variables = draw(module, X, None, CODE)
    apply = jax.jit(module.apply)
    logits = [
        apply(variables, X, None, code * np.ones((4, 3), np.float32)).logits for code in (*np.eye(3), 0 * CODE[0])
    ]
    of_code = apply(variables, X, None, CODE).logits
    expected = logits[3] + sum(CODE[:, i] * (logits[i] - logits[3]) for i in range(3))
    np.testing.assert_allclose(of_code, expected, rtol=1e-4, atol=1e-4)
    assert jnp.std(jnp.stack(logits), axis=0).min() > 0


def test_an_encoder_has_the_discriminator_s_trunk():
    encoder = shapes(gan.StyleGAN2Encoder(8, 7, channels=1, **SMALL), X)
    free = shapes(D.clone(minibatch_group=0), X)
    assert jax.tree.map(jnp.shape, encoder["trunk"]) == jax.tree.map(jnp.shape, free["trunk"])
    assert encoder["outputs"]["kernel"].shape == (16, 7)


def test_penalties_through_the_networks(generator, discriminator):
    (of_g, _), (of_d, _) = generator, discriminator

    def r1(variables):
        return gan.r1_penalty(lambda x: D.apply(variables, x).logits, jnp.asarray(X))

    def lengths(variables):
        styles = G.apply(variables, jnp.asarray(Z), method="mapping")
        return gan.path_length_penalty(lambda w: G.apply(variables, w, method="synthesize").images, styles, KEY, 0.0)[0]

    for penalty, variables in ((r1, of_d), (lengths, of_g)):
        value, slopes = jax.jit(jax.value_and_grad(penalty))(variables)
        assert value > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
        kernels = [leaf for path, leaf in jax.tree.leaves_with_path(slopes) if path[-1].key == "kernel"]
        assert all(np.abs(leaf).max() > 0 for leaf in kernels)
        np.testing.assert_allclose(penalty(variables), value, rtol=1e-4)


def test_eight_devices_agree_with_one(over_devices):
    with jax.enable_x64(True):
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        network, judge = G.clone(**types), D.clone(attention=((4, "reference"),), **types)
        z, x, other = np.tile(Z, (4, 1)), np.tile(X, (4, 1, 1, 1)), np.tile(OTHER, (4, 1, 1, 1))
        z, x, other = (a.astype(np.float64) + np.arange(16).reshape(-1, *[1] * (a.ndim - 1)) / 8 for a in (z, x, other))
        variables = draw(network, z), draw(judge, x, x)

        @jax.jit
        def loss(variables, z, x, other):
            fake = network.apply(variables[0], z).images
            logits = judge.apply(variables[1], fake, other).logits - judge.apply(variables[1], x, other).logits
            return jax.nn.softplus(logits).mean()

        grad = jax.jit(jax.value_and_grad(loss))
        one, many = grad(variables, z, x, other), grad(variables, *over_devices(z, x, other))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bfloat16(generator, discriminator):
    low = {"dtype": jnp.bfloat16}
    made = jax.eval_shape(G.clone(**low).apply, generator[0], Z)
    slopes = jax.eval_shape(jax.grad(lambda v, z: G.clone(**low).apply(v, z).images.sum()), generator[0], Z)
    assert (made.images.dtype, made.features["4x4"].dtype) == (jnp.float32, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}
    variables, apply = discriminator
    judged = jax.jit(D.clone(**low).apply)(variables, X)
    assert (judged.logits.dtype, judged.features["4x4"].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(judged.logits, apply(variables, X).logits, atol=0.1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (G.clone(resolution=12), [Z], "resolution must be a power of two from 8 to 1024, got 12"),
        (G.clone(attention=((32, "global"),)), [Z], "no maps of 32x32 at resolution 8"),
        (G.clone(attention=((8, "reference"),)), [Z], "Unknown attention 'reference'"),
        (G.clone(architecture="resnets"), [Z], "Unknown architecture 'resnets'. Did you mean 'resnet'"),
        (G.clone(style_from="bits"), [Z], "Unknown style_from 'bits'"),
        (G.clone(style_from="condition"), [Z], "condition_dim must be at least 1.*got 0 with style_from='condition'"),
        (G, [Z[:, :5]], r"latents must be \[batch, 6\], got \[4, 5\]"),
        (G, [Z, CODE], "takes none"),
        (BITS, [Z], r"condition must be \[batch, 3\], got none"),
        (D, [X[:, :4]], r"images must be \[batch, 8, 8, 1\], got \[4, 4, 8, 1\]"),
        (D, [X, X], "references are given"),
        (D.clone(attention=((8, "reference"),)), [X], r"references must be real images \[4, 8, 8, 1\].*got none"),
        (D.clone(attention=((8, "reference"), (4, "reference"))), [X, X], "at most one"),
        (D.clone(condition_dim=3), [X, None, CODE[:, :2]], r"condition must be \[batch, 3\], got \[4, 2\]"),
    ],
)
def test_errors(module, args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, KEY, *args)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_styles():
    with pytest.raises(UserError, match=r"styles must be \[batch, 4, 5\], got \[4, 3, 5\]"):
        jax.eval_shape(functools.partial(G.init, method="synthesize"), KEY, jnp.zeros((4, 3, 5)))
    with pytest.raises(UserError, match="must have the same shape"):
        gan.mix_styles(KEY, jnp.zeros((4, 3, 5)), jnp.zeros((4, 2, 5)))
    with pytest.raises(UserError, match="generator must have style_from='condition', got 'latent'"):
        gan.bake_fingerprint(BITS.clone(style_from="latent"), {}, jnp.zeros(3))
    with pytest.raises(UserError, match="no styles"):
        jax.eval_shape(functools.partial(G.clone(style_from="none").init, method="mapping"), KEY, Z)
