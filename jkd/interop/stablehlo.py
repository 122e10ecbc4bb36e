"""Predictors as StableHLO programs that run without the code of their model.

A consumer needs jax and flatbuffers alone, and a jax that is at most six months younger than the writer's (`jax.export`
promises no more):

    import pathlib, jax.export, numpy as np
    program = jax.export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
    rows = program.call(np.zeros((5, 28, 28, 1), np.uint8))  # any batch size; on a platform of `program.platforms`
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from etils import epath

from jkd.errors import UserError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")
MISSING = "Programs are written and read with the flatbuffers package: pip install 'jkd[export]'."


def export_predictor(
    predict: Callable[[Any, jax.Array], Any],
    variables: Any,
    shape: Sequence[int],
    *,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    baked: bool = True,
) -> jax.export.Exported:
    """Makes the program `images -> predict(variables, images)` for images uint8[b, H, W, C] of any batch size b.

    Args:
      predict: pure, traced; what it returns is a tree of arrays.
      variables: of one model.
      shape: (H, W, C) of one image.
      platforms: what the program can run on, of cpu, cuda, rocm and tpu; none of them needs to be here.
      baked: whether the variables are constants of the program; otherwise they are its first argument.

    Raises:
      UserError: for another platform, or a shape that is not one of images.
    """
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"Unknown platform {name!r}; a program is for some of {', '.join(PLATFORMS)}.")
    if not platforms or len(shape) != 3:
        raise UserError(f"An export needs a platform and images (H, W, C), got {list(platforms)} and {list(shape)}.")
    whole = jax.device_get(variables)
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *shape), jnp.uint8)
    if baked:
        return jax.export.export(jax.jit(lambda images: predict(whole, images)), platforms=platforms)(images)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
    return jax.export.export(jax.jit(predict), platforms=platforms)(shapes, images)


def save_stablehlo(path: str | os.PathLike, exported: jax.export.Exported) -> None:
    """Writes a program as one new file.

    Raises:
      UserError: if the file exists, or the package that writes it is missing.
    """
    file = epath.Path(path)
    if file.exists():
        raise UserError(f"{path} exists already and is not overwritten.")
    try:
        data = bytes(exported.serialize())
    except ImportError as error:
        raise UserError(MISSING) from error
    temporary = file.parent / f".{file.name}.tmp"
    temporary.write_bytes(data)
    temporary.replace(file)


def load_stablehlo(path: str | os.PathLike) -> jax.export.Exported:
    """Reads a program; `load_stablehlo(path).call(images)` runs it.

    Raises:
      UserError: if there is no such file, or it holds no program that this jax can read.
    """
    try:
        return jax.export.deserialize(bytearray(epath.Path(path).read_bytes()))
    except ImportError as error:
        raise UserError(MISSING) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # what flatbuffers raises is of many kinds
        raise UserError(f"{path} holds no exported program that jax {jax.__version__} can read.") from error
