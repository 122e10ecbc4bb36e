import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from jkd.distill import head_plane, head_plane_basis, project_and_pca
from jkd.errors import UserError

IDS = [4, 0, 2]
pca_of = jax.jit(project_and_pca)
picture_of = jax.jit(lambda train, labels, validation, basis: head_plane(train, labels, validation, basis, IDS))


@pytest.fixture(scope="module")
def head():
    draw = np.random.default_rng(0)
    return draw.normal(size=(8, 5)), draw.normal(size=5)


@pytest.fixture(scope="module")
def features():
    draw = np.random.default_rng(1)
    labels = draw.permutation(np.repeat(IDS, 10))
    return draw.normal(size=(30, 8)) + labels[:, None], labels, draw.normal(size=(7, 8))


def test_the_logits_of_the_classes_survive(head, features):
    kernel, bias = head
    x = features[0]
    for append, rows, logits in ((True, 9, x @ kernel[:, IDS] + bias[IDS]), (False, 8, x @ kernel[:, IDS])):
        basis = np.asarray(head_plane_basis(kernel, bias, IDS, append))
        assert basis.shape == (rows, 3)
        np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
        columns = np.vstack([kernel, bias])[:rows, IDS]
        with_one = np.pad(x, ((0, 0), (0, rows - 8)), constant_values=1)
        triangle = basis.T @ columns
        assert np.all(np.diag(triangle) > 0)
        projected = with_one @ basis
        np.testing.assert_allclose(projected @ triangle, logits, rtol=1e-4, atol=1e-4)
        assert np.all(np.linalg.norm(projected, axis=1) <= np.linalg.norm(with_one, axis=1) + 1e-5)
    np.testing.assert_array_equal(
        head_plane_basis(kernel, None, IDS, False), head_plane_basis(kernel, bias, IDS, False)
    )


def test_pca_agrees_with_scikit_learn(head, features):
    train, _, validation = features
    basis = np.asarray(head_plane_basis(*head, IDS))
    projected, shown = (np.pad(x, ((0, 0), (0, 1)), constant_values=1) @ basis for x in (train, validation))
    pca = PCA(2).fit(projected)
    signs = np.sign(pca.components_[range(2), np.abs(pca.components_).argmax(1)])
    np.testing.assert_allclose(pca_of(validation, basis, train), pca.transform(shown) * signs, atol=1e-4)


def test_a_picture(head, features):
    train, labels, validation = features
    basis = head_plane_basis(*head, IDS)
    picture = jax.tree.map(np.asarray, picture_of(train, labels, validation, basis))
    means = np.stack([train[labels == k].mean(0) for k in IDS])
    fit_on = np.vstack([train, means])
    for points, x in ((picture.train, train), (picture.validation, validation), (picture.centroids, means)):
        np.testing.assert_allclose(points, pca_of(x, basis, fit_on), atol=1e-4)
    np.testing.assert_allclose(picture.centroids[1], picture.train[labels == 0].mean(axis=0), atol=1e-4)


def test_the_order_of_examples_does_not_flip_a_picture(head, features):
    train, labels, validation = features
    basis = head_plane_basis(*head, IDS)
    turned = picture_of(train[::-1], labels[::-1], validation, basis)
    np.testing.assert_allclose(turned.validation, picture_of(train, labels, validation, basis).validation, atol=1e-4)


def test_jit_half_precision_and_one_example(head, features):
    train, labels, validation = features
    basis = head_plane_basis(*head, IDS)
    low = jax.eval_shape(project_and_pca, validation[:1].astype(jnp.bfloat16), basis, train)
    assert (low.dtype, low.shape) == (jnp.float32, (1, 2))
    jitted = picture_of(train, labels, validation, basis)
    np.testing.assert_allclose(jitted.train, head_plane(train, labels, validation, basis, IDS).train, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_mistakes(head, features):
    kernel, bias = head
    train, labels, validation = features
    basis = head_plane_basis(kernel, bias, IDS)
    for ids, message in (
        ([1], "at least 2 different integers"),
        ([1, 1], "at least 2 different integers"),
        ([0, 5], r"class_ids must lie in \[0, 5\), got \[0, 5\]"),
        ([0, -1], r"class_ids must lie in \[0, 5\)"),
    ):
        with pytest.raises(UserError, match=message):
            head_plane_basis(kernel, bias, ids)
    with pytest.raises(UserError, match=r"head_bias must have the shape \[5\] with append_bias, got None"):
        head_plane_basis(kernel, None, IDS)
    with pytest.raises(UserError, match=r"head_kernel must have the shape \[features, classes\], got \[8\]"):
        head_plane_basis(kernel[:, 0], bias, IDS)
    with pytest.raises(UserError, match="3 class_ids need at least as many rows of the head, got 2"):
        head_plane_basis(kernel[:2], None, IDS, False)
    with pytest.raises(UserError, match=r"x must have .* 9 features, or 8 where .* got \[7, 5\]"):
        project_and_pca(validation[:, :5], basis, train)
    with pytest.raises(UserError, match="fit_on must hold at least 2 examples, got 1"):
        project_and_pca(validation, basis, train[:1])
    with pytest.raises(UserError, match=r"basis must have the shape \[rows, at least 2\]"):
        project_and_pca(validation, basis[:, :1], train)
    with pytest.raises(UserError, match=r"train_labels must hold the classes \[4, 0, 2\] and no others"):
        head_plane(train, np.where(labels == 0, 1, labels), validation, basis, IDS)
