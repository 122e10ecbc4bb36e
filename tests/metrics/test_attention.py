import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from jkd.errors import UserError
from jkd.metrics import attention_counts, attention_iou, binarize_attention, class_sum_attention

MAPS = np.array([[[0, 1], [2, 4]], [[4, 1], [2, 0.0]]])
MASKS = arrays(bool, (3, 4, 2, 3))
count, binarize = jax.jit(attention_counts), jax.jit(binarize_attention)
ious_of = jax.jit(lambda counts: (counts.all_iou, counts.iou))
iou = jax.jit(attention_iou, static_argnames="per_image")
attend = jax.jit(class_sum_attention, static_argnums=3)


@pytest.fixture(scope="module")
def network():
    draw = np.random.default_rng(0)
    return draw.normal(size=(16, 3, 3, 4)), draw.normal(size=(4, 5)), draw.normal(size=5)


def test_by_hand():
    masks = np.asarray(binarize_attention(MAPS))
    np.testing.assert_array_equal(masks, [[[0, 0], [1, 1]], [[1, 0], [1, 0]]])
    assert attention_iou(masks[:, None]) == pytest.approx(1 / 3)
    # 0.4 itself is off.
    np.testing.assert_array_equal(binarize(np.array([[[0, 2], [5, 2.1]]])), [[[0, 0], [1, 1]]])


def test_attention_is_the_sum_of_class_activation_maps(network):
    feat, kernel, bias = network
    cams = np.einsum("bhwc,ck->bhwk", feat, kernel) + bias
    np.testing.assert_allclose(class_sum_attention(*network, 3), cams.sum(-1), rtol=1e-5, atol=1e-5)


def test_resizing_has_half_pixel_centers():
    feat = np.array([0, 1.0]).reshape(1, 1, 2, 1)
    wide = attend(feat, np.ones((1, 1)), np.zeros(1), (1, 4))
    np.testing.assert_allclose(wide, [[[0, 0.25, 0.75, 1]]], atol=1e-6)


def test_resizing_agrees_with_torch(network):
    torch = pytest.importorskip("torch")
    maps = torch.tensor(np.asarray(class_sum_attention(*network, 3)))[:, None]
    for size in ((7, 5), (2, 2)):
        expected = torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(class_sum_attention(*network, size), expected[:, 0], rtol=1e-4, atol=1e-5)


def test_masks_do_not_depend_on_bias_or_scale(network):
    feat, kernel, bias = network
    masks = np.asarray(binarize(attend(feat, kernel, bias, 7)))
    assert 0 < masks.mean() < 1
    np.testing.assert_array_equal(masks, binarize(attend(feat, kernel, bias + 3, 7)))
    np.testing.assert_array_equal(masks, binarize(attend(4 * feat, kernel, bias, 7)))


def test_constant_maps_and_nan_give_empty_masks_that_are_counted():
    flat, broken = np.full((2, 3), 5.0), np.array([[0, 1, 2], [3, 4, np.nan]])
    masks = np.asarray(binarize(np.stack([flat, broken])))
    assert not masks.any()
    pairs = np.stack([masks, masks])
    assert iou(pairs) == 1
    counts = count(pairs)
    assert (counts.all_empty, counts.images) == (2, 2)
    np.testing.assert_array_equal(counts.empty, 2)
    assert iou(np.stack([masks, ~masks])) == 0


@given(masks=MASKS)
def test_iou_against_a_loop(masks):
    both, some = masks.all(0), masks.any(0)
    each = [1 if not s.any() else b.sum() / s.sum() for b, s in zip(both, some, strict=True)]
    np.testing.assert_allclose(iou(masks, per_image=True), each, rtol=1e-6)
    counts = count(masks)
    whole, pairs = map(np.asarray, ious_of(counts))
    counts = jax.tree.map(np.asarray, counts)
    assert whole == pytest.approx(1 if not some.any() else both.sum() / some.sum())
    assert iou(masks) == whole
    for i, j in itertools.product(range(3), repeat=2):
        assert counts.intersection[i, j] == (masks[i] & masks[j]).sum()
        assert counts.union[i, j] == (masks[i] | masks[j]).sum()
        assert counts.empty[i, j] == (~(masks[i] | masks[j]).any(axis=(1, 2))).sum()
        assert pairs[i, j] == iou(masks[[i, j]])
        assert whole <= pairs[i, j] + 1e-6
    np.testing.assert_array_equal(np.diag(pairs), 1)


@given(masks=MASKS, where=arrays(bool, 4))
def test_counts_add_up_and_where_is_a_slice(masks, where):
    part, rest = (jax.tree.map(np.asarray, count(masks, chosen)) for chosen in (where, ~where))
    both = jax.tree.map(np.add, part, rest)
    jax.tree.map(np.testing.assert_array_equal, both, count(masks))
    assert part.images == where.sum()
    assert part.all_union == masks[:, where].any(axis=0).sum()


def test_bfloat16_features_and_one_image(network):
    feat, kernel, bias = network
    att = attend(feat[:1].astype(jnp.bfloat16), kernel, bias, 4)
    assert (att.dtype, att.shape) == (jnp.float32, (1, 4, 4))


def test_eight_devices_equal_one(network, over_devices):
    feat, kernel, bias = network

    @jax.jit
    def evaluate(feat):
        maps = [class_sum_attention(f, kernel, bias, 7) for f in (feat, feat[::-1], -feat)]
        return attention_counts(jnp.stack([binarize_attention(m) for m in maps]))

    jax.tree.map(np.testing.assert_array_equal, evaluate(*over_devices(feat)), evaluate(feat))


@pytest.mark.usefixtures("unchecked")
def test_mistakes(network):
    feat, kernel, bias = network
    with pytest.raises(UserError, match=r"got \[16, 3, 3, 4\], \[5, 4\], \[5\]"):
        class_sum_attention(feat, kernel.T, bias, 7)
    with pytest.raises(UserError, match="out_size must be positive, .* got 0"):
        class_sum_attention(feat, kernel, bias, 0)
    with pytest.raises(UserError, match="threshold must lie"):
        binarize_attention(MAPS, 1.5)
    with pytest.raises(UserError, match="eps must be positive"):
        binarize_attention(MAPS, eps=0.0)
    with pytest.raises(UserError, match=r"att must have the shape .* got \[2, 2\]"):
        binarize_attention(MAPS[0])
    with pytest.raises(UserError, match=r"at least two maps of every image, got \[1, 2, 2, 2\]"):
        attention_iou(np.ones((1, 2, 2, 2), bool))
    with pytest.raises(UserError, match="masks must be boolean, got float32"):
        attention_counts(np.ones((2, 2, 2, 2), np.float32))
    with pytest.raises(UserError, match=r"where must have the shape \[2\], got \[3\]"):
        attention_counts(np.ones((2, 2, 2, 2), bool), np.ones(3, bool))
