"""Rematerialization between named values: the backward pass computes one segment of the forward pass again at a time.

One `jax.checkpoint` around a whole loss, with a policy that keeps named values, saves nothing on a TPU: all of the
forward pass may be computed again before the backward pass begins. With one `jax.checkpoint` a segment, each waits
for its cotangents.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from jkd.errors import UserError


def rematerialized(fn: Callable, names: Sequence[str]) -> Callable:
    """The function `fn(*args)` whose backward pass keeps the values that `checkpoint_name` calls one of `names`.

    The computation is cut behind each of them; what else crosses a cut (parameters, inputs, a long skip connection) is
    kept too, and all else is computed again. No names: only the inputs are kept.

    Raises:
      UserError: when traced, if no value has one of the names. Names inside of jitted functions and loops are not seen.
    """
    if not names:
        return jax.checkpoint(fn)

    def segmented(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        segments = list(_segments(closed.jaxpr, names))
        if len(segments) == 1:
            raise UserError(
                f"remat: no value is named {' or '.join(map(repr, names))}. Name what is to be kept by "
                "jax.ad_checkpoint.checkpoint_name, as the models of jkd.nn do, or give saved=()."
            )
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values |= zip(closed.jaxpr.invars, jax.tree.leaves(args), strict=True)
        for segment in segments:
            run = jax.checkpoint(core.jaxpr_as_fun(core.ClosedJaxpr(segment, [])))
            values |= zip(segment.outvars, run(*(values[var] for var in segment.invars)), strict=True)
        outs = [x.val if isinstance(x, core.Literal) else values[x] for x in closed.jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return segmented


def _segments(jaxpr: Any, names: Sequence[str]) -> Iterator[Any]:
    """The parts of a jaxpr, each of which takes what it reads of earlier ones and returns what later ones read."""
    parts: list[list] = [[]]
    for equation in jaxpr.eqns:
        parts[-1].append(equation)
        if equation.primitive.name == "name" and equation.params["name"] in names:
            parts.append([])
    last = {var: number for number, part in enumerate(parts) for one in part for var in _variables(one.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(parts))
    for number, part in enumerate(parts):
        made = dict.fromkeys(var for one in part for var in one.outvars)
        read = dict.fromkeys(var for one in part for var in _variables(one.invars))
        yield jaxpr.replace(
            constvars=[],
            invars=[var for var in read if var not in made],
            outvars=[var for var in made if last.get(var, -1) > number],
            eqns=part,
        )


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]
