"""Pictures of penultimate features: the plane that a few classes of a linear head span, seen in two dimensions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from jkd.checks import Tensor, as_float, concrete
from jkd.distill.diffusion import class_centroids
from jkd.errors import UserError

HIGHEST = jax.lax.Precision.HIGHEST


def _class_ids(class_ids: ArrayLike | Sequence[int], classes: int | None = None) -> np.ndarray:
    ids = concrete(class_ids) if isinstance(class_ids, jax.Array) else np.asarray(class_ids)
    if ids is None:
        raise UserError("class_ids must be known when this is called: give a list of integers.")
    if ids.ndim != 1 or ids.size < 2 or len(set(ids.tolist())) < ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"class_ids must be at least 2 different integers, got {ids.tolist()}.")
    if ids.min() < 0 or (classes is not None and ids.max() >= classes):
        raise UserError(f"class_ids must lie in [0, {classes}), got {ids.tolist()}.")
    return ids


def head_plane_basis(
    head_kernel: Float[Tensor, "features classes"],
    head_bias: Float[Tensor, " classes"] | None,
    class_ids: Sequence[int] | Integer[Tensor, " chosen"],
    append_bias: bool = True,
) -> Float[Array, "rows chosen"]:
    """An orthonormal basis of the space that the weights of some classes span.

        Q R = A,    A = [W[:, ids]; beta[ids]],    diag R > 0

    Projecting features on it keeps the logits of these classes: (X Q) R = X A. In float32 at least.

    Args:
      head_kernel: W.
      head_bias: beta, or None where `append_bias` is False.
      class_ids: at least 2 classes, such as two similar ones and another; static.
      append_bias: whether the biases are a last row of A, which a constant feature 1 meets. The authors' code
        has it and their pseudo-code does not. (That code takes the biases of classes 0, 1 and 2
        whatever the classes; here kernel and bias are of the same ones.)

    Raises:
      UserError: if the shapes or classes do not fit, or the bias is needed and not given.

    Reference: Müller, Kornblith and Hinton, When Does Label Smoothing Help?, NeurIPS 2019; Chandrasegaran et al.,
      Revisiting Label Smoothing and Knowledge Distillation Compatibility: What was Missing?, ICML 2022.
    """
    if jnp.ndim(head_kernel) != 2:
        raise UserError(f"head_kernel must have the shape [features, classes], got {list(jnp.shape(head_kernel))}.")
    columns = as_float("head_kernel", head_kernel)
    classes = columns.shape[1]
    ids = _class_ids(class_ids, classes)
    if append_bias:
        if head_bias is None or jnp.shape(head_bias) != (classes,):
            got = "None" if head_bias is None else list(jnp.shape(head_bias))
            raise UserError(f"head_bias must have the shape [{classes}] with append_bias, got {got}.")
        columns = jnp.concatenate([columns, as_float("head_bias", head_bias)[None, :]])
    if ids.size > columns.shape[0]:
        raise UserError(f"{ids.size} class_ids need at least as many rows of the head, got {columns.shape[0]}.")
    basis, triangle = jnp.linalg.qr(columns[:, ids])
    return basis * jnp.where(jnp.diagonal(triangle) < 0, -1, 1)[None, :]


def _project(name: str, x: Tensor, basis: Array) -> Float[Array, "examples chosen"]:
    rows = basis.shape[0]
    if jnp.ndim(x) != 2 or jnp.shape(x)[1] not in (rows, rows - 1):
        raise UserError(
            f"{name} must have the shape [examples, features] with {rows} features, or {rows - 1} where the basis has "
            f"a row for the bias, got {list(jnp.shape(x))}."
        )
    features = as_float(name, x)
    if features.shape[1] < rows:
        features = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
    return jnp.matmul(features, basis, precision=HIGHEST)


class _PCA(NamedTuple):
    mean: Float[Array, "1 chosen"]
    axes: Float[Array, "2 chosen"]

    def __call__(self, points: Array) -> Array:
        return jnp.matmul(points - self.mean, self.axes.T, precision=HIGHEST)


def _fit(points: Float[Array, "examples chosen"]) -> _PCA:
    if points.shape[0] < 2:
        raise UserError(f"fit_on must hold at least 2 examples, got {points.shape[0]}.")
    mean = points.mean(axis=0, keepdims=True)
    axes = jnp.linalg.svd(points - mean, full_matrices=False)[2][:2]
    largest = jnp.take_along_axis(axes, jnp.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    return _PCA(mean, axes * jnp.where(largest < 0, -1, 1))


def _basis(basis: Tensor) -> Float[Array, "rows chosen"]:
    if jnp.ndim(basis) != 2 or jnp.shape(basis)[1] < 2:
        raise UserError(f"basis must have the shape [rows, at least 2], got {list(jnp.shape(basis))}.")
    return as_float("basis", basis)


def project_and_pca(
    x: Float[Tensor, "examples features"],
    basis: Float[Tensor, "rows chosen"],
    fit_on: Float[Tensor, "examples_fitted features"],
) -> Float[Array, "examples 2"]:
    """Features projected on a basis, then on the two main axes of other features.

    Both take raw features: where the basis has a row more than there are features, a constant 1 is appended
    here. The largest loading of each axis is positive, so that pictures do not flip.

    Args:
      x: what to show.
      basis: from `head_plane_basis`.
      fit_on: what the axes are fitted on. For pictures that compare, the same for all of them.

    Raises:
      UserError: if the shapes do not fit, a dtype is not floating point, or `fit_on` has fewer than 2 examples.
    """
    q = _basis(basis)
    return _fit(_project("fit_on", fit_on, q))(_project("x", x, q))


class HeadPlane(NamedTuple):
    """A picture: points of the training and the validation set, and the centroid of each class."""

    train: Float[Array, "train_examples 2"]
    validation: Float[Array, "validation_examples 2"]
    centroids: Float[Array, "chosen 2"]


def head_plane(
    train: Float[Tensor, "train_examples features"],
    train_labels: Integer[Tensor, " train_examples"],
    validation: Float[Tensor, "validation_examples features"],
    basis: Float[Tensor, "rows chosen"],
    class_ids: Sequence[int] | Integer[Tensor, " chosen"],
) -> HeadPlane:
    """The picture of a few classes: axes fitted on their training features and centroids, shown for both sets.

    Args:
      train: raw training features of the chosen classes (the authors take 150 images of each).
      train_labels: their classes, all among `class_ids`.
      validation: raw validation features of the same classes.
      basis: from `head_plane_basis`.
      class_ids: as given to it; `centroids` follow this order.

    Raises:
      UserError: if the shapes do not fit, a dtype is not floating point, a label is known not to be among
        `class_ids`, or one of those has no example.

    Reference: Chandrasegaran et al., Revisiting Label Smoothing and Knowledge Distillation Compatibility: What
      was Missing?, ICML 2022.
    """
    q, ids = _basis(basis), _class_ids(class_ids)
    known = concrete(train_labels)
    if known is not None and set(known.tolist()) != set(ids.tolist()):
        raise UserError(f"train_labels must hold the classes {ids.tolist()} and no others, got {np.unique(known)}.")
    position = jnp.argmax(jnp.asarray(train_labels)[:, None] == ids[None, :], axis=1)
    points = _project("train", train, q)
    # The projection is linear: centroids of projections are projections of centroids.
    centroids = class_centroids(points, position, ids.size).centroids
    pca = _fit(jnp.concatenate([points, centroids]))
    return HeadPlane(pca(points), pca(_project("validation", validation, q)), pca(centroids))
