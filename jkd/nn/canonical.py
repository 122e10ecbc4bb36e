"""Convolutions in the one layout that XLA's CPU backend is fast at, where it does not bring them there itself.

Derivatives of convolutions come as convolutions whose batch is channels, or whose kernel is an image. The backend
transposes them into its own layout, but for those inside of branches and loops, which take some ten times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jkd.nn import platform, winograd

INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "closed_call": "call_jaxpr"}


def canonical_convolutions(fn: Callable) -> Callable:
    """The function `fn(*args)` with all convolutions in NHWC and HWIO, for use inside of `lax.cond` on a CPU.

    The same values to rounding; transposes are added around convolutions of other layouts, and none is filtered
    (`winograd.direct_only`), for branches are what is seldom taken. Differentiate inside of `fn`: the result holds no
    custom derivatives. On accelerators, `fn` itself.
    """

    def canonical(*args: Any) -> Any:
        if platform.target() != "cpu":
            return fn(*args)
        leaves, tree = jax.tree.flatten(args)
        trees = []

        def flat(*leaves: Any) -> list[Any]:
            outs, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(tree, leaves)))
            trees.append(out_tree)
            return outs

        leaves = [jnp.asarray(x) for x in leaves]
        with winograd.direct_only():
            closed = jax.make_jaxpr(flat)(*leaves)
        return jax.tree.unflatten(trees[-1], _run(closed, leaves))

    return canonical


def _run(closed: Any, args: Sequence[Any]) -> list[Any]:
    """What the jaxpr computes."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if name == "conv_general_dilated":
            outs = [_convolve(*operands, **equation.params)]
        elif name in INLINED:
            outs = _run(equation.params[INLINED[name]], operands)
        else:
            inputs = {var: read(var) for var in equation.invars if not isinstance(var, core.Literal)}
            alone = jaxpr.replace(constvars=[], invars=list(inputs), outvars=equation.outvars, eqns=[equation])
            outs = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*inputs.values())
        values |= zip(equation.outvars, outs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _convolve(x: jax.Array, w: jax.Array, *, window_strides: Any, dimension_numbers: Any, **options: Any) -> jax.Array:
    (batch, channels, *window), (outputs, inputs, *size), out = dimension_numbers
    last = x.ndim - 1
    x, w = x.transpose(batch, *window, channels), w.transpose(*size, inputs, outputs)
    inner = range(1, last)
    layout = lax.ConvDimensionNumbers((0, last, *inner), (last, last - 1, *range(last - 1)), (0, last, *inner))
    y = lax.conv_general_dilated(x, w, window_strides, dimension_numbers=layout, **options)
    place = dict(zip(out, (0, last, *inner), strict=True))
    return y.transpose([place[axis] for axis in range(y.ndim)])
