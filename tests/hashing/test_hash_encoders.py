import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import hashing, nn
from jkd.errors import UserError


@pytest.fixture(scope="module")
def features():
    return np.random.RandomState(0).standard_normal((64, 12)).astype(np.float32)


def test_codes_begin_undecided_and_different(features):
    model = hashing.HashEncoder(bits=8, hidden=(16,))
    variables = nn.init(model, jax.random.key(0), (12,))
    found = model.apply(variables, features)
    q = jax.nn.sigmoid(found.logits)
    assert found.logits.shape == (64, 8)
    assert found.features["pool"].shape == (64, 16)
    assert 0.3 < float(q.min()) < float(q.max()) < 0.7
    assert (np.std(found.logits, axis=0) > 1e-3).all()


def test_dropout_is_for_training_alone(features):
    model = hashing.HashEncoder(bits=4, hidden=(32,), dropout=0.5)
    variables = nn.init(model, jax.random.key(0), (12,))
    plain = [model.apply(variables, features).logits for _ in range(2)]
    np.testing.assert_array_equal(*plain)
    one, other = (model.apply(variables, features, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert (one.logits != other.logits).any()


def test_the_mean_of_tokens_is_of_those_that_are_there(features):
    vectors = features.reshape(16, 4, 12)
    mask = np.arange(4) < np.array([4, 1, 0, 2] * 4)[:, None]
    pooled = hashing.pool_tokens(jnp.asarray(vectors), jnp.asarray(mask))
    for row, (of, there) in enumerate(zip(vectors, mask, strict=True)):
        np.testing.assert_allclose(pooled[row], of[there].mean(0) if there.any() else 0, atol=1e-6)
    model = hashing.HashEncoder(bits=4, hidden=())
    variables = nn.init(model, jax.random.key(0), (12,))
    changed = np.where(mask[..., None], vectors, np.nan)
    np.testing.assert_array_equal(
        model.apply(variables, jnp.asarray(vectors), mask=jnp.asarray(mask)).logits,
        model.apply(variables, jnp.asarray(changed), mask=jnp.asarray(mask)).logits,
    )
    slopes = jax.grad(lambda x: hashing.pool_tokens(x, jnp.asarray(mask)).sum())(jnp.asarray(vectors))
    assert np.isfinite(slopes).all()


def test_an_image_comes_through_a_backbone():
    backbone = nn.build("cnn", 10, width=4)
    model = hashing.HashEncoder(bits=6, hidden=(8,), backbone=backbone)
    images = np.random.RandomState(0).rand(3, 8, 8, 1).astype(np.float32)
    variables = nn.init(model, jax.random.key(0), images.shape[1:])
    assert model.apply(variables, images).logits.shape == (3, 6)
    assert "backbone" in variables["params"]


def test_bfloat16_logits_are_wide(features):
    model = hashing.HashEncoder(bits=4, hidden=(8,), dtype=jnp.bfloat16)
    variables = nn.init(model, jax.random.key(0), (12,))
    found = model.apply(variables, features)
    assert found.logits.dtype == found.features["pool"].dtype == jnp.float32
    critic = hashing.CodeCritic(4, dtype=jnp.bfloat16)
    q = jax.nn.sigmoid(found.logits)
    predicted = critic.apply(critic.init(jax.random.key(0), q), q)
    assert predicted.dtype == jnp.float32
    assert predicted.shape == q.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits and hidden widths >= 1"),
        ({"bits": 4, "hidden": (8, 0)}, "hidden widths >= 1"),
        ({"bits": 4, "dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"bits": 4, "norm": "batch"}, "Unknown norm 'batch'"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(UserError, match=message):
        hashing.HashEncoder(**fields)
