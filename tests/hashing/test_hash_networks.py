"""Losses of given codes and the networks that learn them: values by hand, PyTorch, masks, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jkd import hashing, nn
from jkd.errors import UserError

WORDS, DIM, BITS = 7, 5, 4
TEXT = hashing.TextCNNHash(BITS, widths=(1, 2, 3), filters=6, dropout=0.25)

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def text():
    variables = nn.init(TEXT, KEY, (WORDS, DIM))
    words = np.asarray(jax.random.normal(KEY, (3, WORDS, DIM)))
    mask = np.arange(WORDS) < np.array([[7], [4], [1]])
    return variables, words, mask


apply = jax.jit(functools.partial(TEXT.apply, train=False))


# --- losses ---


def test_bce_by_hand():
    codes = np.array([[1], [1], [-1]], np.int8)
    found = hashing.hash_bce(np.array([[0.0], [2.0], [2.0]], np.float32), codes, reduction="none")
    np.testing.assert_allclose(found, [0.693147, 0.126928, 2.126928], rtol=1e-5)
    two = hashing.hash_bce(np.array([[0.0, 2.0]], np.float32), np.array([[1, -1]]))
    np.testing.assert_allclose(two, (0.693147 + 2.126928) / 2, rtol=1e-5)


def test_regression_and_agreement_by_hand():
    logits, codes = np.array([[0.0, 50.0], [-50, 50]], np.float32), np.array([[1, 1], [1, 1]])
    np.testing.assert_allclose(hashing.hash_regression(logits, codes, reduction="none"), [0.5, 2], rtol=1e-6)
    other = np.array([[0.0, -50.0], [-50, 50]], np.float32)
    np.testing.assert_allclose(hashing.hash_agreement(logits, other, reduction="none"), [2, 0], atol=1e-6)
    np.testing.assert_allclose(hashing.hash_agreement(logits, other), 1, rtol=1e-6)


@pytest.mark.parametrize("loss", [hashing.hash_bce, hashing.hash_regression])
def test_losses_of_extreme_logits_are_finite_and_lead_to_the_codes(loss):
    codes = np.array([[1, -1, 1, -1]], np.int8)
    for scale in (0.0, 1.0, 1e4):
        logits = scale * np.array([[1.0, 1, -1, -1]], np.float32)
        value, gradient = jax.value_and_grad(loss)(logits, codes)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient) * codes <= 0).all()
    assert hashing.hash_bce(logits.astype(jnp.bfloat16), codes).dtype == jnp.float32


# --- texts ---


def test_convolutions_are_those_of_pytorch(text):
    torch = pytest.importorskip("torch")
    variables, words, mask = text
    params, x = variables["params"], torch.tensor(words * mask[..., None])
    maxima = []
    for width in (1, 2, 3):
        kernel = torch.tensor(np.asarray(params[f"conv{width}"]["kernel"]).transpose(2, 1, 0).copy())
        bias = torch.tensor(np.asarray(params[f"conv{width}"]["bias"]))
        padded = torch.nn.functional.pad(x.transpose(1, 2), ((width - 1) // 2, width // 2))
        found = torch.relu(torch.nn.functional.conv1d(padded, kernel, bias))
        maxima.append(found.masked_fill(~torch.tensor(mask)[:, None], -1).max(2).values)
    pool = torch.cat(maxima, 1).numpy()
    out = apply(variables, words, mask=mask)
    np.testing.assert_allclose(out.features["pool"], pool, atol=1e-5)
    head = variables["params"]["head"]
    np.testing.assert_allclose(out.logits, pool @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), atol=1e-5)


def test_padding_changes_nothing(text):
    variables, words, mask = text
    out = apply(variables, words, mask=mask)
    noise = np.where(mask[..., None], words, 1e3).astype(np.float32)
    np.testing.assert_array_equal(apply(variables, noise, mask=mask).logits, out.logits)
    longer = np.pad(words, ((0, 0), (0, 3), (0, 0)), constant_values=7)
    np.testing.assert_allclose(
        apply(variables, longer, mask=np.pad(mask, ((0, 0), (0, 3)))).logits, out.logits, atol=1e-6
    )
    alone = apply(variables, words[2:, :1], mask=mask[2:, :1])
    np.testing.assert_allclose(alone.logits, out.logits[2:], atol=1e-6)
    whole = apply(variables, words[:1])
    np.testing.assert_allclose(whole.logits, out.logits[:1], atol=1e-6)


def test_a_text_without_words_has_no_code(text):
    variables, words, mask = text
    empty = mask.copy()
    empty[1] = False
    with pytest.raises(UserError, match="no valid word in text 1"):
        TEXT.apply(variables, words, mask=empty)
    logits = apply(variables, words, mask=empty).logits
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[::2]).all()


def test_texts_in_training(text):
    variables, words, mask = text

    @jax.jit
    def loss(params, words):
        out, _ = nn.apply_train(
            functools.partial(TEXT.apply, mask=mask), params, {}, words, {"dropout": jax.random.key(1)}
        )
        return hashing.hash_bce(out.logits, np.ones((3, BITS), np.int8))

    for x in (words, np.zeros_like(words)):
        gradients = flatten_dict(jax.grad(loss)(variables["params"], x), sep="/")
        assert all(np.isfinite(g).all() for g in gradients.values())
        assert np.abs(gradients["head/bias"]).max() > 0
    assert float(loss(variables["params"], words)) != pytest.approx(
        float(hashing.hash_bce(apply(variables, words, mask=mask).logits, np.ones((3, BITS), np.int8)))
    ), "dropout"


def test_low_precision_keeps_logits_whole(text):
    variables, words, mask = text
    out = TEXT.clone(dtype=jnp.bfloat16).apply(variables, words, mask=mask)
    assert out.logits.dtype == out.features["pool"].dtype == jnp.float32
    np.testing.assert_allclose(out.logits, apply(variables, words, mask=mask).logits, atol=0.05)


# --- images and features ---


def test_features_have_one_hidden_layer():
    model = hashing.ImageHashNet(BITS, hidden=6)
    variables = nn.init(model, KEY, (2, 3))
    x = np.asarray(jax.random.normal(KEY, (4, 2, 3)))
    out = model.apply(variables, x)
    hidden, head = variables["params"]["hidden"], variables["params"]["head"]
    pool = np.maximum(x.reshape(4, 6) @ np.asarray(hidden["kernel"]) + np.asarray(hidden["bias"]), 0)
    np.testing.assert_allclose(out.features["pool"], pool, atol=1e-6)
    np.testing.assert_allclose(out.logits, pool @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), atol=1e-6)


def test_a_backbone_ends_in_the_hidden_layer():
    model = hashing.ImageHashNet(BITS, nn.build("cnn", 6, width=2))
    variables = nn.init(model, KEY, (8, 8, 1))
    x = np.asarray(jax.random.normal(KEY, (4, 8, 8, 1)))
    out = model.apply(variables, x)
    assert out.logits.shape == (4, BITS)
    assert out.features["pool"].shape == (4, 6)
    assert {"stem", "block1", "block2"} <= set(out.features)
    _, state = nn.apply_train(model.apply, variables["params"], nn.split(variables)[1], x)
    assert set(state) == {"batch_stats"}
    assert set(variables["params"]) == {"backbone", "head"}


# --- mistakes ---


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: hashing.hash_bce(np.ones((2, 3), np.float32), np.ones((2, 4))), "got [2, 3] and [2, 4]"),
        (lambda: hashing.hash_bce(np.ones((2, 3), np.float32), np.zeros((2, 3))), "codes must be -1 and 1"),
        (lambda: hashing.hash_bce(np.ones((2, 3), np.int32), np.ones((2, 3))), "logits must be floating point"),
        (lambda: hashing.hash_bce(np.ones((0, 3), np.float32), np.ones((0, 3))), "not be empty"),
        (lambda: hashing.hash_agreement(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)), "same shape"),
        (lambda: hashing.TextCNNHash(0), "bits must be at least 1"),
        (lambda: hashing.TextCNNHash(4, widths=()), "widths must be at least one number"),
        (lambda: hashing.TextCNNHash(4, dropout=1.0), "dropout must lie in [0, 1)"),
        (lambda: hashing.ImageHashNet(4, hidden=0), "hidden must be at least 1"),
        (lambda: nn.init(hashing.ImageHashNet(4), KEY, ()), "images must be floating point [batch, ..]"),
        (lambda: nn.init(TEXT, KEY, (DIM,)), "words must be floating point [batch, words, dim]"),
        (
            lambda: TEXT.init(KEY, np.ones((2, 3, 4), np.float32), mask=np.ones((2, 4), bool)),
            "mask must be boolean [2, 3]",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)
