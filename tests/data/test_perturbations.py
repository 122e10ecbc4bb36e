"""Noise, blur, JPEG and crops against Pillow, scipy and numbers worked out by hand."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

from jkd import data
from jkd.data import perturbations
from jkd.errors import UserError

KEY = jax.random.key(0)
STRENGTHS = {"noise": 0.1, "blur": 1.5, "jpeg": 30, "crop": 0.6}
jpeg = jax.jit(data.jpeg, static_argnums=1, static_argnames="subsampling")
perturb = jax.jit(data.perturb, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def photo():
    """Sides that are no multiples of 8, in 255ths."""
    return load_sample_images().images[0][150:217, 200:277]


def as_file(pixels, quality, subsampling=2):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality, subsampling=subsampling)
    return Image.open(file)


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 95, 100])
def test_quantization_tables_equal_pillows(quality, photo):
    for table, theirs in zip(perturbations.TABLES, as_file(photo, quality).quantization.values(), strict=True):
        np.testing.assert_array_equal(perturbations.quantization_table(quality, table).ravel(), theirs)


@pytest.mark.parametrize(("quality", "subsampling"), [(1, True), (10, True), (10, False), (75, True), (95, False)])
def test_jpeg_equals_pillows_files(quality, subsampling, photo):
    want = np.asarray(as_file(photo, quality, 2 if subsampling else 0), float)
    found = 255 * np.asarray(jpeg(photo[None].astype(np.float32) / 255, quality, subsampling=subsampling))[0]
    # What is left comes from rounding (theirs is in whole numbers throughout), and from coefficients it turns over.
    assert np.abs(found - want).mean() < 1.5
    assert quality > 1 or np.abs(found - want).max() < 1.5
    assert np.abs(want - photo).mean() > 2


@pytest.mark.parametrize("quality", [5, 90])
def test_grey_jpeg_equals_pillows_files(quality, photo):
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    found = 255 * np.asarray(jpeg(grey[None, :, :, None].astype(np.float32) / 255, quality))[0, :, :, 0]
    assert np.abs(found - np.asarray(as_file(grey, quality), float)).mean() < 0.5


def test_jpeg_of_a_flat_block_by_hand():
    # 150 of 255 is 22 levels above 128, so the mean's coefficient is 8 x 22 = 176; in steps of 16 (quality 50) that is
    # 11 exactly, and in steps of 80 (quality 10) 2.2, of which 2 are left: 160 / 8 = 20 levels.
    flat = np.full((1, 8, 8, 1), 150 / 255, np.float32)
    for quality, level in ((50, 150), (10, 148)):
        np.testing.assert_allclose(jpeg(flat, quality), level / 255, atol=1e-6)


def test_jpeg_passes_gradients_at_every_quality():
    images = np.random.default_rng(0).uniform(0.3, 0.7, (1, 16, 24, 3)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=images.shape).astype(np.float32)
    slope = jax.jit(jax.grad(lambda x, q, s: (weights * data.jpeg(x, q, subsampling=s)).sum()), static_argnums=(1, 2))
    # Straight through: DCT and colors there and back are the identity, where nothing is cut.
    np.testing.assert_allclose(slope(images, 90, False), weights, atol=1e-4)
    worst = slope(images, 1, True)
    assert np.isfinite(worst).all()
    assert np.abs(worst).max() > 0.1


def test_blur_equals_scipys(photo):
    x = photo[None].astype(np.float32) / 255
    blur = jax.jit(data.gaussian_blur, static_argnums=2)
    want = ndimage.gaussian_filter(x[0].astype(float), 1.7, mode="mirror", radius=4, axes=(0, 1))
    np.testing.assert_allclose(blur(x, 1.7, 9)[0], want, atol=1e-6)
    np.testing.assert_allclose(blur(x, 0.0, 9), x, atol=1e-6)
    slope = jax.jit(jax.grad(lambda s: jnp.square(data.gaussian_blur(x, s, 9)).sum()))
    assert slope(1.7) < 0
    assert np.isfinite(slope(0.0))


def test_noise_has_its_standard_deviation():
    images = np.full((4, 32, 32, 3), 0.5, np.float32)
    noise = np.asarray(jax.jit(data.gaussian_noise)(KEY, images, 0.05)) - 0.5
    assert noise.std() == pytest.approx(0.05, rel=0.03)
    assert abs(noise.mean()) < 0.05 * 4 / np.sqrt(noise.size)
    assert np.abs(np.corrcoef(noise.reshape(4, -1))[np.triu_indices(4, 1)]).max() < 0.08
    np.testing.assert_array_equal(data.gaussian_noise(KEY, images, 0), images)


def test_crops_of_ramps_tell_their_boxes():
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32) / 32, (64, 32, 32))
    crops = np.asarray(perturb(KEY, np.stack([ramp.swapaxes(1, 2), ramp], axis=-1), "crop", 0.5))
    inner = crops[:, 4:28, 4:28]
    # Half the side: half the slope, along each axis; the box's first corner is anywhere in the first half.
    np.testing.assert_allclose(np.diff(inner[..., 0], axis=1), 0.5 / 32, atol=1e-5)
    np.testing.assert_allclose(np.diff(inner[..., 1], axis=2), 0.5 / 32, atol=1e-5)
    centers = crops[:, 15:17, 15:17].mean((1, 2)) * 32 + 0.5
    assert ((centers > 8) & (centers < 24)).all()
    assert (np.ptp(centers, axis=0) > 13).all()
    assert abs(np.corrcoef(centers.T)[0, 1]) < 0.4
    np.testing.assert_allclose(data.crop_resize(KEY, crops, 1.0), crops, atol=1e-6)


@pytest.mark.parametrize("name", data.PERTURBATIONS)
def test_every_perturbation(name, photo):
    images = np.stack([photo[i : i + 32, i : i + 40] for i in range(8)]).astype(np.float32) / 255
    strength = STRENGTHS[name]
    found = perturb(KEY, images, name, strength)
    assert found.shape == images.shape
    assert 0 <= found.min() < found.max() <= 1
    assert np.abs(found - images).mean() > 0.01
    slope = jax.jit(jax.grad(lambda x: jnp.square(data.perturb(KEY, x, name, strength)).sum()))(images)
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0.1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = perturb(KEY, jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))), name, strength)
    np.testing.assert_allclose(split, found, atol=1e-5)
    coarse = perturb(KEY, jnp.asarray(images, jnp.bfloat16), name, strength)
    assert coarse.dtype == jnp.bfloat16
    if name != "jpeg":  # a coefficient between two steps may turn over
        np.testing.assert_allclose(coarse.astype(np.float32), found, atol=0.01 if name != "noise" else 0.3)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    images = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(UserError, match=r"Unknown perturbation 'blurr'. Did you mean 'blur'\?"):
        data.perturb(KEY, images, "blurr", 1)
    for quality in (0, 101, 50.5):
        with pytest.raises(UserError, match=rf"quality must be an integer in \[1, 100\], got {quality}"):
            data.perturb(KEY, images, "jpeg", quality)
    with pytest.raises(UserError, match="1 or 3 channels, got 2"):
        data.jpeg(images[..., :2], 50)
    with pytest.raises(UserError, match="sigma must be finite and >= 0, got -1"):
        data.gaussian_noise(KEY, images, -1.0)
    with pytest.raises(UserError, match="sigma must be finite and >= 0, got nan"):
        data.perturb(KEY, images, "blur", np.nan)
    for size in (4, 17):
        with pytest.raises(UserError, match=rf"size must be odd and in \[1, 2 side - 1\], got {size}"):
            data.gaussian_blur(images, 1.0, size)
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match="share must"):
            data.perturb(KEY, images, "crop", share)
    with pytest.raises(UserError, match=r"images must be \[batch, height, width, channel\], got \[8, 8, 3\]"):
        data.jpeg(images[0], 50)
    with pytest.raises(UserError, match="images must be floating point, got uint8"):
        data.crop_resize(KEY, images.astype(np.uint8), 0.5)
