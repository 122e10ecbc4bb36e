import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import nn, retrieval, train
from jkd.errors import UserError
from jkd.train.mesh import tree_shardings

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
MAPS = DRAW.normal(size=(3, 4, 4, 6)).astype(np.float32)
WORDS = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [5, 1, 2, 3]], np.int32)
MASK = WORDS > 0
SIZES = {"dim": 8, "heads": 3, "hidden": 5}
MODEL = retrieval.MHSAN(
    retrieval.ImageEncoder(**SIZES), retrieval.TextEncoder(**SIZES, layers=1, vocabulary=6, word_dim=7)
)
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


@functools.cache
def variables():
    return jax.jit(MODEL.init)(KEY, MAPS, WORDS, MASK)


apply = jax.jit(MODEL.apply)


def test_what_comes_out():
    out = apply(variables(), MAPS, WORDS, MASK)
    for one, positions in ((out.image, 16), (out.text, 4)):
        assert one.vector.shape == (3, 8)
        close(np.linalg.norm(one.vector, axis=1), 1)
        assert one.attention.shape == (3, 3, positions)
        close(one.attention.sum(-1), 1)
        shapes = {name: x.shape for name, x in one.features.items()}
        assert shapes == {"positions": (3, positions, 8), "heads": (3, 3, 8), "projected": (3, 8)}
    np.testing.assert_array_equal(out.text.attention[~np.broadcast_to(MASK[:, None], (3, 3, 4))], 0)
    image = MODEL.apply(variables(), MAPS, method="encode_image")
    text = MODEL.apply(variables(), WORDS, MASK, method="encode_text")
    jax.tree.map(close, retrieval.MatchedPairs(image, text), out)


def test_numpy_agrees():
    params = jax.tree.map(np.asarray, variables()["params"]["image"])
    flat = MAPS.reshape(3, 16, 6) @ params["positions"]["kernel"] + params["positions"]["bias"]
    pool, projection = params["head"]["pool"], params["head"]["projection"]
    scores = np.maximum(flat @ pool["w1"].T, 0) @ pool["w2"].T
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    joined = np.einsum("bpr,bpd->brd", weights, flat).reshape(3, -1)
    vector = joined @ projection["kernel"] + projection["bias"]
    found = apply(variables(), MAPS, WORDS, MASK).image
    close(found.vector, vector / np.linalg.norm(vector, axis=1, keepdims=True))


def test_nothing_depends_on_the_number_of_positions():
    large = DRAW.normal(size=(3, 7, 5, 6)).astype(np.float32)
    flat = large.reshape(3, 35, 6)
    found, wanted = apply(variables(), flat, WORDS, MASK), apply(variables(), large, WORDS, MASK)
    close(found.image.vector, wanted.image.vector)
    longer = np.pad(WORDS, ((0, 0), (0, 3)))
    close(apply(variables(), large, longer, longer > 0).text.vector, wanted.text.vector)
    moved = apply(variables(), flat[:, ::-1], WORDS, MASK)
    close(moved.image.vector, wanted.image.vector)


def test_a_word_vector_that_begins_with_zero_is_a_word():
    """The reference finds a text's end by it."""
    encoder = retrieval.TextEncoder(**SIZES, layers=1)
    vectors = DRAW.normal(size=(1, 3, 4)).astype(np.float32)
    vectors[0, 1, 0] = 0
    found, params = encoder.init_with_output(KEY, vectors, np.ones((1, 3), bool))
    assert (np.asarray(found.attention) > 0).all()
    junk = np.concatenate([vectors, np.full((1, 2, 4), np.nan, np.float32)], 1)
    mask = np.array([[True] * 3 + [False] * 2])
    close(encoder.apply(params, junk, mask).vector, found.vector)


def test_mean_pooling_looks_everywhere_alike():
    image = retrieval.ImageEncoder(**SIZES, pool="mean")
    out, params = image.init_with_output(KEY, MAPS)
    close(out.attention, 1 / 16)
    close(out.features["heads"][:, 0], out.features["positions"].mean(1))
    assert "pool" not in params["params"]["head"]
    text = retrieval.TextEncoder(**SIZES, layers=1, vocabulary=6, word_dim=7, pool="mean")
    out = text.init_with_output(KEY, WORDS, MASK)[0]
    close(out.attention[:, 0], MASK / MASK.sum(1, keepdims=True))


def test_dropout_draws_only_in_training():
    first, second = (
        apply(variables(), MAPS, WORDS, MASK, rngs={"dropout": jax.random.key(k)}).image.vector for k in (1, 2)
    )
    np.testing.assert_array_equal(first, second)
    train_apply = jax.jit(functools.partial(MODEL.apply, train=True))
    first, second = (train_apply(variables(), MAPS, WORDS, MASK, rngs={"dropout": jax.random.key(k)}) for k in (1, 2))
    for one, other in zip(first, second, strict=True):
        assert np.abs(one.vector - other.vector).max() > 1e-3
        # Heads are means of the features themselves: dropout moved their weights alone.
        close(np.einsum("brp,bpd->brd", one.attention, one.features["positions"]), one.features["heads"])


def test_gradients_are_finite_at_degenerate_inputs():
    @jax.jit
    def gradient(params, maps, mask):
        def loss(params):
            out = MODEL.apply({"params": params}, maps, WORDS, mask)
            return retrieval.vse_hard_negative_loss(out.image.vector, out.text.vector) + sum(
                retrieval.attention_diversity(one.attention) for one in out
            )

        return jax.value_and_grad(loss)(params)

    params = variables()["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    for one, maps, mask in ((params, 0 * MAPS, MASK), (zeros, MAPS, MASK), (params, MAPS, np.zeros_like(MASK))):
        value, found = gradient(one, maps, mask)
        assert np.isfinite(value)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert np.isnan(gradient(params, MAPS + np.float32(np.nan), MASK)[0])


def test_a_backbone_of_the_library():
    network = nn.cnn(2, width=4)
    image = retrieval.ImageEncoder(**SIZES, backbone=network, tap="block2", train_statistics=True)
    pixels = DRAW.normal(size=(2, 8, 8, 1)).astype(np.float32)
    found = jax.jit(image.init)(KEY, pixels)
    out = image.apply(found, pixels)
    assert out.features["map"].shape == (2, 2, 2, 16)
    assert out.attention.shape == (2, 3, 4)
    moved = image.apply(found, pixels, True, mutable=["batch_stats"], rngs={"dropout": KEY})[1]
    assert np.abs(moved["batch_stats"]["backbone"]["stem"]["norm"]["mean"]).max() > 0
    kept = image.clone(train_statistics=False).apply(
        found, pixels, True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )[1]
    np.testing.assert_array_equal(kept["batch_stats"]["backbone"]["stem"]["norm"]["mean"], 0)
    with pytest.raises(UserError, match="'block3'"):
        image.clone(tap="block3").apply(found, pixels)


def test_bfloat16():
    low = retrieval.MHSAN(
        retrieval.ImageEncoder(**SIZES, dtype=jnp.bfloat16),
        retrieval.TextEncoder(**SIZES, layers=1, vocabulary=6, word_dim=7, dtype=jnp.bfloat16),
    )

    def loss(params):
        out = low.apply({"params": params}, MAPS, WORDS, MASK)
        return retrieval.vse_hard_negative_loss(out.image.vector, out.text.vector), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(variables()["params"])
    wanted = apply(variables(), MAPS, WORDS, MASK)
    for one, other in zip(out, wanted, strict=True):
        assert (one.vector.dtype, one.attention.dtype) == (jnp.float32, jnp.float32)
        assert one.features["positions"].dtype == jnp.bfloat16
        close(one.vector, other.vector, atol=0.05)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_projections_are_split_over_the_model_axis():
    mesh = train.make_mesh(data=2, tensor=4)
    model = retrieval.MHSAN(
        retrieval.ImageEncoder(8, heads=4, hidden=5, dropout=0.0),
        retrieval.TextEncoder(8, heads=4, hidden=5, layers=1, vocabulary=6, word_dim=7, dropout=0.0, cell_dropout=0.0),
    )
    params = jax.jit(model.init)(KEY, MAPS, WORDS, MASK)["params"]
    shardings = tree_shardings(params, mesh, retrieval.MODEL_RULES)
    specs = {side: shardings[side]["head"]["projection"]["kernel"].spec for side in ("image", "text")}
    assert {spec[0] for spec in specs.values()} == {"tensor"}
    assert shardings["text"]["sru"]["layer1"]["products"]["kernel"].is_fully_replicated
    encode = jax.jit(model.apply)
    wanted = encode({"params": params}, MAPS, WORDS, MASK)
    found = encode({"params": train.place(params, mesh, retrieval.MODEL_RULES)}, MAPS, WORDS, MASK)
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: retrieval.ImageEncoder(8, heads=0).init(KEY, MAPS), "heads must be at least 1"),
        (lambda: retrieval.ImageEncoder(8, pool="max").init(KEY, MAPS), "pool"),
        (lambda: retrieval.ImageEncoder(8, act="gelu").init(KEY, MAPS), "act"),
        (lambda: retrieval.ImageEncoder(8).init(KEY, MAPS[:, 0, 0]), "must be floating point maps"),
        (lambda: retrieval.ImageEncoder(8).init(KEY, MAPS.astype(np.uint8)), "got uint8"),
        (lambda: retrieval.TextEncoder(8).init(KEY, WORDS, MASK), "vocabulary=0"),
        (lambda: retrieval.TextEncoder(8, vocabulary=6).init(KEY, WORDS, MASK[:, :3]), "the same texts and words"),
        (lambda: retrieval.TextEncoder(8, vocabulary=6).init(KEY, WORDS, WORDS > 4), "nothing of example 0"),
        (lambda: retrieval.TextEncoder(8, vocabulary=6, cell="lstm").init(KEY, WORDS, MASK), "cell"),
        (
            lambda: retrieval.MHSAN(retrieval.ImageEncoder(8), retrieval.TextEncoder(9)).init(KEY, MAPS, WORDS, MASK),
            "one dim, got 8 and 9",
        ),
    ],
)
def test_mistakes(call, says, unchecked):
    with pytest.raises(UserError, match=says):
        call()
