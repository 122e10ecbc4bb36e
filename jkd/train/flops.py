"""The model FLOPs of a traced program: its matrix products and convolutions, loops counted as often as they run.

The compiler's own count is no use for a rate: it counts the body of a loop once, is per device, and includes what
is not the model's work. A jaxpr is the program as it was written, for the global batch.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jkd.train.chips import chip_of


def count_flops(jaxpr: Any) -> float:
    """FLOPs (a multiplication and an addition are two) of the products and convolutions of a jaxpr.

    A scan's body counts `length` times, a branch as its dearest case, a while loop (whose trips nobody knows) once.
    What rematerialization computes again counts again, and so does what the compiler may find unused. Elementwise
    work, reductions, sorts, decompositions and custom kernels do not count.

    Args:
      jaxpr: of `jax.make_jaxpr(fn)(*args)` or `jax.jit(fn).trace(*args)`.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return sum((_count(eqn) for eqn in inner.eqns), 0.0)


def flops_and_peak(call: Any, args: Any, times: int, mesh: Mesh) -> tuple[float, float]:
    """The FLOPs of a jitted function called `times` times, and the most that a mesh does in a second (in bfloat16).

    Both are 0 where the devices are not known. The first call that follows finds the trace made here in its cache.
    """
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None:
        return 0.0, 0.0
    return times * count_flops(call.trace(*args).jaxpr), chip.peak_flops * mesh.devices.size


def _count(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _product(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    inside = [count_flops(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inside, 0.0)
    if name == "shard_map":  # its body is what one device does
        return params["mesh"].size * sum(inside, 0.0)
    return max(inside, default=0.0) if name == "cond" else sum(inside, 0.0)


def _product(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    # The zeros between the pixels of a dilated input (the gradient of a stride) are no work; padding counts.
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    products = math.prod(kernel) / kernel[spec[0]] / math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * products


def _jaxprs(params: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(getattr(leaf, "jaxpr", leaf), "eqns"):
            yield leaf
