import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from jkd import gan
from jkd.errors import UserError

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
REGISTRY = DRAW.integers(0, 2, (24, 16)).astype(bool)
LOGITS = DRAW.normal(size=(8, 16)).astype(np.float32)
attribute = jax.jit(gan.attribute, static_argnames=("false_positive_rate", "max_pairs"))


def test_fingerprints_are_fair_coins():
    found = np.asarray(gan.sample_fingerprints(KEY, 500, 16))
    assert (found.shape, found.dtype) == ((500, 16), np.float32)
    assert set(np.unique(found)) == {0, 1}
    assert np.abs(found.mean(0) - 0.5).max() < 0.1
    assert np.abs(np.corrcoef(found.T) - np.eye(16)).max() < 0.2
    np.testing.assert_array_equal(found, gan.sample_fingerprints(KEY, 500, 16))


# Losses.

BITS, BIT_LOGITS = np.array([[1, 0, 1, 1]]), np.array([[2, -1, 0.5, -3]], np.float32)
LATENTS, READ = np.array([[1, 2]], np.float32), np.array([[0, 4]], np.float32)
IMAGES = np.array([[[0.5, -0.5]]], np.float32)


@jax.jit
def losses(latents, read, bits, logits, images, others, fake):
    def total(*given):
        found = gan.fingerprint_losses(given[0], given[1], bits, *given[2:])
        return found.total, found

    return jax.value_and_grad(total, tuple(range(6)), has_aux=True)(latents, read, logits, images, others, fake)


def test_losses_by_hand():
    (total, found), _ = losses(LATENTS, READ, BITS, BIT_LOGITS, IMAGES, IMAGES + 1, np.zeros(1, np.float32))
    np.testing.assert_allclose(found[:4], [np.log(2), 2.5, 0.990714, 1], atol=1e-6)
    assert total == found.total == pytest.approx(np.log(2) + 2.5 + 2 * 0.990714 + 2, abs=1e-5)
    weighted = gan.fingerprint_losses(
        LATENTS, READ, BITS, BIT_LOGITS, IMAGES, IMAGES + 1, np.zeros(1, np.float32), weights=(0, 2, 0, 3)
    )
    assert weighted.total == 8


def test_nothing_read_and_nothing_changed():
    (_, found), slopes = losses(LATENTS, LATENTS, BITS, 0 * BIT_LOGITS, IMAGES, IMAGES, np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(found[1:4], [0, np.log(2), 0], atol=1e-7)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_gradients_reach_everything():
    given = tuple(DRAW.normal(size=shape) for shape in ((3, 2), (3, 2), (3, 4), (3, 2, 2), (3, 2, 2), (3,)))
    bits = REGISTRY[:3, :4]
    with jax.enable_x64(True):
        _, slopes = losses(*given[:2], bits, *given[2:])
        check_grads(
            jax.jit(lambda *x: gan.fingerprint_losses(*x[:2], bits, *x[2:]).total), given, order=1, modes=["rev"]
        )
    assert all(np.abs(slope).max() > 1e-3 for slope in slopes)


def test_losses_in_bfloat16_and_of_nan():
    arrays = [x.astype(jnp.bfloat16) for x in (LATENTS, READ, BIT_LOGITS, IMAGES, IMAGES + 1, np.zeros(1))]
    (_, low), _ = losses(*arrays[:2], BITS, *arrays[2:])
    assert all(term.dtype == jnp.float32 for term in low)
    np.testing.assert_allclose(low[:4], [np.log(2), 2.5, 0.990714, 1], atol=1e-6)
    (total, _), _ = losses(LATENTS, READ * np.nan, BITS, BIT_LOGITS, IMAGES, IMAGES, np.zeros(1, np.float32))
    assert np.isnan(total)


# Attribution.


def brute_force(logits, registry):
    """Of each source [images, bits]: the nearest user, the matches, and ln p by scipy."""
    rows = []
    for images in logits:
        matches = [int(((images > 0) == user[None]).sum()) for user in registry]
        k, n = max(matches), images.size
        log_miss = stats.binom.logcdf(k - 1, n, 0.5)
        rows.append((matches.index(k), k, np.log(-np.expm1(len(registry) * log_miss)) if k else 0.0))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("max_pairs", [1, 50, 10_000])
def test_brute_force_agrees(max_pairs):
    for shape in ((8, 16), (4, 2, 16)):
        found = attribute(LOGITS.reshape(shape), REGISTRY, max_pairs=max_pairs)
        user, matched, log_p = brute_force(LOGITS.reshape(shape[0], -1, 16), REGISTRY)
        np.testing.assert_array_equal(found.user, user)
        np.testing.assert_array_equal(found.matched, matched)
        np.testing.assert_allclose(found.log_p, log_p, rtol=1e-5)


def test_users_are_found_again():
    sure = np.where(REGISTRY, 3, -3).astype(np.float32)
    found = attribute(sure, REGISTRY.astype(np.float32))
    np.testing.assert_array_equal(found.user, np.arange(24))
    np.testing.assert_array_equal(found.matched, 16)
    np.testing.assert_allclose(found.log_p, np.log(-np.expm1(24 * np.log1p(-(2.0**-16)))), rtol=1e-5)


def test_images_of_one_source_are_evidence_together():
    noisy = np.where(REGISTRY[:, None], 1, -1) + 2 * DRAW.normal(size=(24, 9, 16))
    with jax.enable_x64(True):
        alone, together = attribute(noisy[:, 0], REGISTRY), attribute(noisy, REGISTRY)
    assert (alone.user != np.arange(24)).any()
    np.testing.assert_array_equal(together.user, np.arange(24))
    assert (together.log_p < alone.log_p).all()


def test_nobody_is_accused_without_evidence():
    logits = np.concatenate([np.where(REGISTRY[:1], 1.0, -1.0), LOGITS]).astype(np.float32)
    logits[3, 5] = np.nan
    found = attribute(logits, REGISTRY, false_positive_rate=1e-3)
    np.testing.assert_array_equal(found.user, [0] + 8 * [-1])
    assert (found.matched[3], np.isnan(found.log_p[3])) == (-1, True)
    assert np.isfinite(np.delete(found.log_p, 3)).all()
    # A NaN is nobody's even where everybody is accepted, and takes the whole source with it.
    np.testing.assert_array_equal(attribute(logits, REGISTRY).user[3], -1)
    np.testing.assert_array_equal(
        attribute(logits[1:].reshape(4, 2, 16), REGISTRY).user == -1, [False, True, False, False]
    )


def test_ties_and_zeros():
    # Bits 0 and 0: both users are one bit away.
    found = gan.attribute(np.zeros((1, 2), np.float32), np.array([[1, 0], [0, 1]]))
    assert [int(part[0]) for part in found[:2]] == [0, 1]


def test_devices_agree(over_devices):
    with jax.enable_x64(True):
        logits = LOGITS.astype(np.float64)
        alone = attribute(logits, REGISTRY, max_pairs=60)
        users = attribute(logits, *over_devices(REGISTRY), max_pairs=60)
        both = attribute(*over_devices(logits, REGISTRY), max_pairs=60)
    assert alone.log_p.dtype == jnp.float64
    for found in (users, both):
        np.testing.assert_array_equal(found.user, alone.user)
        np.testing.assert_array_equal(found.matched, alone.matched)
        np.testing.assert_array_equal(found.log_p, alone.log_p)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(UserError, match="n_bits must be positive, got 0"):
        gan.sample_fingerprints(KEY, 2, 0)
    with pytest.raises(UserError, match="batch must be positive, got 0"):
        gan.sample_fingerprints(KEY, 0, 2)
    fake = np.zeros(1, np.float32)
    with pytest.raises(UserError, match="bits must be 0 or 1"):
        gan.fingerprint_losses(LATENTS, READ, 2 * BITS - 1, BIT_LOGITS, IMAGES, IMAGES, fake)
    with pytest.raises(UserError, match=r"bits and bit_logits must have the same shape, got \[1, 3\] and \[1, 4\]"):
        gan.fingerprint_losses(LATENTS, READ, BITS[:, :3], BIT_LOGITS, IMAGES, IMAGES, fake)
    with pytest.raises(UserError, match=r"images and other_images must have the same shape"):
        gan.fingerprint_losses(LATENTS, READ, BITS, BIT_LOGITS, IMAGES, IMAGES[:, 0], fake)
    with pytest.raises(UserError, match="weights must be four numbers, got 3"):
        gan.fingerprint_losses(LATENTS, READ, BITS, BIT_LOGITS, IMAGES, IMAGES, fake, weights=(1, 1, 2))


@pytest.mark.usefixtures("unchecked")
def test_errors_of_attribution():
    with pytest.raises(UserError, match="every fingerprint once, but users 1 and 24 share one"):
        gan.attribute(LOGITS, np.concatenate([REGISTRY, REGISTRY[1:2]]))
    with pytest.raises(UserError, match="registry must be 0 or 1"):
        gan.attribute(LOGITS, np.where(REGISTRY, 1, -1))
    with pytest.raises(
        UserError, match=r"registry must have the shape \[users, bits\] and not be empty, got \[24, 0\]"
    ):
        gan.attribute(LOGITS, REGISTRY[:, :0])
    with pytest.raises(UserError, match="logits have 15 bits and the registry's fingerprints 16"):
        gan.attribute(LOGITS[:, :15], REGISTRY)
    with pytest.raises(UserError, match=r"\[sources, images, bits\] and not be empty, got \[16\]"):
        gan.attribute(LOGITS[0], REGISTRY)
    with pytest.raises(UserError, match="logits must be floating point, got int"):
        gan.attribute(LOGITS.astype(np.int32), REGISTRY)
    with pytest.raises(UserError, match="max_pairs must be positive, got 0"):
        gan.attribute(LOGITS, REGISTRY, max_pairs=0)
    with pytest.raises(UserError, match="16 bits are too few to tell at a false positive rate of 1e-06"):
        gan.attribute(LOGITS, REGISTRY, false_positive_rate=1e-6)
