import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from jkd.errors import UserError
from jkd.metrics import density_coverage, manifold_precision_recall

# Small integers: every distance, and so every tie, is exact.
REAL = arrays(np.float32, (8, 2), elements=st.integers(-4, 4).map(float))
GENERATED = arrays(np.float32, (6, 2), elements=st.integers(-4, 4).map(float))
SETS = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
STATIC = ("k", "max_pairs")
shares = jax.jit(manifold_precision_recall, static_argnames=STATIC)
densities = jax.jit(density_coverage, static_argnames=STATIC)


def squares(a, b):
    return np.array([[np.square(p - q).sum() for q in b.astype(np.float64)] for p in a.astype(np.float64)])


def expected(real, generated, k):
    def radii(x):
        return [sorted(np.delete(row, i))[k - 1] for i, row in enumerate(squares(x, x))]

    def inside(points, centers):
        return squares(points, centers) <= np.array(radii(centers)).reshape(1, -1)

    held = inside(generated, real)
    precision, recall = held.any(1).mean(), inside(real, generated).any(1).mean()
    return (precision, recall), (held.sum() / (k * len(generated)), held.any(0).mean())


def test_by_hand():
    # Radii of the real samples 0, 1, 3 with k = 1: 1, 1, 2. Of the generated 4, 5.5, 20: 1.5, 1.5, 14.5.
    real, generated = np.array([[0.0], [1], [3]]), np.array([[4.0], [5.5], [20]])
    # 4 lies within 2 of 3. 3 lies within 1.5 of 4, 1 and 0 within nothing.
    assert shares(real, generated, k=1) == pytest.approx((1 / 3, 1 / 3))
    assert densities(real, generated, k=1) == pytest.approx((1 / 3, 1 / 3))
    # k = 2: radii 3, 2, 3: 4 and 5.5 lie in the ball of 3 alone, two of 3 x 2.
    assert densities(real, generated, k=2) == pytest.approx((2 / 6, 1 / 3))


def test_the_boundary_lies_inside():
    # Radii 2 and 2; a sample at exactly 2 from 1.
    real = np.array([[-1.0], [1]])
    assert densities(real, np.array([[3.0]]), k=1) == (1, 0.5)
    assert densities(real, np.array([[3.01]]), k=1) == (0, 0)
    # Copies have balls without a radius, which hold copies only.
    copies = np.zeros((3, 2))
    assert shares(copies, copies, k=2) == (1, 1)
    assert densities(copies, np.array([[0.0, 0], [0, 1e-3]]), k=2) == (0.75, 1)


@given(real=REAL, generated=GENERATED, static=st.sampled_from([(1, 20), (4, 2**20)]))
def test_agrees_with_double_loops(real, generated, static):
    k, max_pairs = static
    first, second = expected(real, generated, k)
    assert shares(real, generated, k=k, max_pairs=max_pairs) == pytest.approx(first)
    assert densities(real, generated, k=k, max_pairs=max_pairs) == pytest.approx(second)


def test_agrees_with_scikit_learn():
    real, generated = SETS[0], 0.8 * SETS[1] + 0.3
    radii = NearestNeighbors(n_neighbors=4).fit(real).kneighbors(real)[0][:, -1]
    held = np.sqrt(squares(generated, real)) <= radii[None]
    assert densities(real, generated, k=3) == pytest.approx((held.sum() / 48, held.any(0).mean()))
    assert shares(real, generated, k=3).precision == pytest.approx(held.any(1).mean())
    assert densities(real, generated, k=3, max_pairs=1) == densities(real, generated, k=3)


def test_what_moves_nothing():
    draw = np.random.default_rng(2)
    turn = np.linalg.qr(draw.normal(size=(3, 3)))[0].astype(np.float32)
    real, generated = SETS
    for x, y in (
        (draw.permutation(real), draw.permutation(generated)),
        (3 * real @ turn + 5, 3 * generated @ turn + 5),
    ):
        assert shares(x, y) == shares(real, generated)
        assert densities(x, y) == densities(real, generated)
    assert shares(generated, real) == shares(real, generated)[::-1]


def test_what_they_tell_apart():
    real = SETS[0]
    assert shares(real, real) == (1, 1)
    assert densities(real, real).coverage == 1
    far, collapsed = real + 100, real[:1] + 1e-2 * SETS[1]
    assert shares(real, far) == (0, 0)
    assert densities(real, far) == (0, 0)
    assert shares(real, collapsed).precision == 1
    assert shares(real, collapsed).recall < 0.2


def test_half_precision_is_upcast_and_what_is_not_finite_gives_nan():
    low = SETS.astype(jnp.bfloat16)
    assert shares(*low).precision.dtype == densities(*low).density.dtype == jnp.float32
    for bad in (np.nan, np.inf):
        broken = np.where(np.arange(48).reshape(16, 3) == 7, np.float32(bad), SETS[0])
        for pair in ((broken, SETS[1]), (SETS[1], broken)):
            assert np.isnan([*shares(*pair), *densities(*pair)]).all()


def test_eight_devices_equal_one(over_devices):
    assert shares(*over_devices(*SETS)) == shares(*SETS)
    assert densities(*over_devices(*SETS)) == densities(*SETS)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    x = SETS[0]
    with pytest.raises(UserError, match=r"k must lie in \[1, samples - 1\], got 4 for 4 samples"):
        manifold_precision_recall(x, x[:4], k=4)
    with pytest.raises(UserError, match=r"k must lie in \[1, samples - 1\], got 16 for 16 samples"):
        density_coverage(x, x[:1], k=16)
    with pytest.raises(UserError, match="got 0 for 16 samples"):
        density_coverage(x, x, k=0)
    with pytest.raises(UserError, match=r"real and generated must have features of the same length"):
        density_coverage(x, x[:, :2])
    with pytest.raises(UserError, match=r"generated must have the shape \[samples, dim\] .* got \[3\]"):
        manifold_precision_recall(x, x[0])
    with pytest.raises(UserError, match="real must be floating point, got int32"):
        density_coverage(x.astype(np.int32), x)
    with pytest.raises(UserError, match="max_pairs must be positive, got -1"):
        density_coverage(x, x, max_pairs=-1)
