"""Anchor graphs: the similarity of rows through a few anchors, in factors of [rows, anchors] and never [rows, rows]."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jkd.checks import Scalar, Tensor, as_float, check_positive, concrete
from jkd.errors import UserError

HIGHEST = jax.lax.Precision.HIGHEST  # three digits, a TPU's default, are too few for distances and orthogonal columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseRows:
    """A matrix [rows, columns] with equally many entries in each row, all others 0.

    Attributes:
      indices: the columns of the entries, different in each row, int32[rows, entries].
      values: the entries, [rows, entries].
      columns: how many there are; static.
    """

    indices: Any  # also what jax puts in the place of arrays when it traces
    values: Any
    columns: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.values.shape[0], self.columns

    def dense(self) -> Float[Array, "rows columns"]:
        """The matrix with its zeros."""
        empty = jnp.zeros(self.columns, self.values.dtype)
        return jax.vmap(lambda index, values: empty.at[index].set(values))(self.indices, self.values)

    def times(self, right: Float[Array, "columns width"]) -> Float[Array, "rows width"]:
        """The product with a matrix on the right."""
        return jnp.einsum("rs,rsw->rw", self.values, right[self.indices], precision=HIGHEST)

    def transposed_times(self, right: Float[Array, "rows width"]) -> Float[Array, "columns width"]:
        """The product of the transpose with a matrix: sums over rows, which may be sharded."""
        products = self.values[:, :, None] * right[:, None, :]
        return jnp.zeros((self.columns, right.shape[1]), products.dtype).at[self.indices].add(products)

    def gram(self) -> Float[Array, "columns columns"]:
        """The product of the transpose with the matrix."""
        products = self.values[:, :, None] * self.values[:, None, :]
        empty = jnp.zeros((self.columns, self.columns), products.dtype)
        return empty.at[self.indices[:, :, None], self.indices[:, None, :]].add(products)

    def column_sums(self) -> Float[Array, " columns"]:
        """The sum of every column."""
        return jnp.zeros(self.columns, self.values.dtype).at[self.indices].add(self.values)


def _features(name: str, x: Tensor, least: int = 1) -> Array:
    """A matrix of finite features.

    Raises:
      UserError: if it is none, has fewer than `least` rows, or is known to hold NaN or inf.
    """
    if jnp.ndim(x) != 2 or jnp.shape(x)[0] < least or jnp.shape(x)[1] < 1:
        raise UserError(f"{name} must have the shape [rows, dim] with at least {least} rows, got {list(jnp.shape(x))}.")
    known = concrete(x)
    if known is not None and not np.isfinite(np.asarray(known, np.float64)).all():
        raise UserError(f"{name} must be finite, but holds NaN or inf.")
    return as_float(name, x)


def _squares(x: Array, centers: Array) -> Float[Array, "rows centers"]:
    """|x_i - c_j|^2 as one matrix product; both are moved to the centers' mean first, which keeps the error small."""
    middle = centers.mean(0, keepdims=True)
    x, centers = x - middle, centers - middle
    products = jnp.matmul(x, centers.T, precision=HIGHEST)
    return jnp.maximum(jnp.square(x).sum(1)[:, None] - 2 * products + jnp.square(centers).sum(1)[None], 0)


def kmeans(
    key: Key[Array, ""], x: Float[Tensor, "rows dim"], clusters: int, *, iters: int = 20
) -> Float[Array, "clusters dim"]:
    """The centers of k-means by Lloyd's rounds, from random different rows; float32 at least.

        a_i = argmin_j |x_i - c_j|^2,    c_j = mean of the rows with a_i = j

    Ties go to the first center; a center without rows stays where it is. Rows may be sharded: sums over them are
    [clusters, dim]. Memory is that of [rows, clusters] distances. A traced NaN gives NaN centers.

    Args:
      key: draws the rows that centers start from.
      x: at least `clusters` rows.
      clusters: >= 1; static.
      iters: rounds, >= 0; static.

    Raises:
      UserError: if there are fewer rows than clusters, the features are no floating point matrix, or they are known
        not to be finite; for `clusters` or `iters` below these bounds.

    Reference: Lloyd, Least squares quantization in PCM, IEEE Transactions on Information Theory 28, 1982.
    """
    if clusters < 1 or iters < 0:
        raise UserError(f"clusters must be >= 1 and iters >= 0, got {clusters} and {iters}.")
    rows = _features("x", x)
    if len(rows) < clusters:
        raise UserError(f"clusters={clusters} needs at least as many rows, got {len(rows)}.")

    def lloyd(_: Array | int, centers: Array) -> Array:
        own = jax.nn.one_hot(_squares(rows, centers).argmin(1), clusters, dtype=rows.dtype)
        counts, sums = own.sum(0)[:, None], jnp.matmul(own.T, rows, precision=HIGHEST)
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centers)

    start = rows[jax.random.choice(key, len(rows), (clusters,), replace=False)]
    return jax.lax.fori_loop(0, iters, lloyd, start)


def sparse_anchor_graph(
    x: Float[Tensor, "rows dim"],
    anchors: Float[Tensor, "anchors dim"],
    nearest: int = 5,
    *,
    bandwidth: Scalar | str = "mean",
) -> SparseRows:
    """`anchor_graph` with the entries that are not 0 only: [rows, nearest] numbers, whatever the number of anchors.

    Takes and raises what `anchor_graph` does.
    """
    rows, centers = _features("x", x), _features("anchors", anchors)
    if rows.shape[1] != centers.shape[1]:
        raise UserError(f"x and anchors must have equally long rows, got {rows.shape[1]} and {centers.shape[1]}.")
    if not 1 <= nearest <= len(centers):
        raise UserError(f"nearest must lie in [1, anchors], got {nearest} of {len(centers)} anchors.")
    if isinstance(bandwidth, str) and bandwidth != "mean":
        raise UserError(f'bandwidth must be "mean" or a positive number, got {bandwidth!r}.')
    negative, indices = jax.lax.top_k(-_squares(rows, centers), nearest)
    if isinstance(bandwidth, str):
        mean = -negative.mean()
        scale = jnp.where(mean == 0, 1, mean)  # all rows on their anchors: equal weights
    else:
        check_positive("bandwidth", bandwidth)
        scale = jnp.asarray(bandwidth, negative.dtype)
    # A softmax: far from all anchors every exp(-d^2 / t) would be 0.
    return SparseRows(indices, jax.nn.softmax(negative / scale, axis=1), len(centers))


def anchor_graph(
    x: Float[Tensor, "rows dim"],
    anchors: Float[Tensor, "anchors dim"],
    nearest: int = 5,
    *,
    bandwidth: Scalar | str = "mean",
) -> Float[Array, "rows anchors"]:
    """How near each row is to its nearest anchors: weights that sum to 1 in each row, float32 at least.

        Z_ij = exp(-|x_i - u_j|^2 / t) / sum_k exp(-|x_i - u_k|^2 / t)    over the s nearest anchors, else 0

    Equal distances go to the anchor with the lower index. A traced NaN gives NaN in its row (and, by way of the mean
    distance, in all).

    Args:
      x: one example a row.
      anchors: u, such as the centers of `kmeans` on training rows.
      nearest: s; static.
      bandwidth: t > 0, in the square of the features' unit; "mean" takes the mean of the kept squared distances.

    Raises:
      UserError: if the two are no floating point matrices with equally long rows, a value is known not to be finite,
        `nearest` is not in [1, anchors], or `bandwidth` is neither "mean" nor positive.

    Reference: Liu, Wang, Kumar and Chang, Hashing with Graphs, ICML 2011.
    """
    return sparse_anchor_graph(x, anchors, nearest, bandwidth=bandwidth).dense()


def graph_factor(
    graph: Float[Tensor, "rows anchors"] | SparseRows,
) -> Float[Array, "rows anchors"] | SparseRows:
    """H = Z Lambda^(-1/2), whose H H^T is the similarity of all rows; of the same form as `graph`.

        Lambda = diag(Z^T 1),    A = Z Lambda^-1 Z^T = H H^T

    A is symmetric and doubly stochastic with eigenvalues in [0, 1], the largest of which belongs to the constant
    vector. The column of an anchor that is nobody's neighbor is 0, which changes A as little as removing it.

    Args:
      graph: Z of `anchor_graph` or `sparse_anchor_graph`: >= 0, rows that sum to 1.

    Raises:
      UserError: if it is no floating point matrix, or known to hold NaN, inf or a negative number.
    """
    if isinstance(graph, SparseRows):
        _check_weights(graph.values)
        scale = _inverse_root(graph.column_sums())
        return dataclasses.replace(graph, values=graph.values * scale[graph.indices])
    weights = _features("graph", graph)
    _check_weights(weights)
    return weights * _inverse_root(weights.sum(0))[None]


def _check_weights(values: Array) -> None:
    known = concrete(values)
    if known is not None and not (np.isfinite(known) & (known >= 0)).all():
        raise UserError("graph must be finite and >= 0: the weights of an anchor graph.")


def _inverse_root(sums: Array) -> Array:
    return jnp.where(sums == 0, 0, jax.lax.rsqrt(jnp.where(sums == 0, 1, sums)))
