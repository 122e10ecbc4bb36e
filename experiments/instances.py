"""Generators with one fingerprint each: how they are stored, and the registry of whose is which."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jkd import gan
from jkd.errors import UserError
from jkd.interop import safetensors

GENERATORS = {"MLPGenerator": gan.MLPGenerator, "StyleGAN2Generator": gan.StyleGAN2Generator}
DTYPES = ("dtype", "param_dtype")  # fields of generators


def distinct_fingerprints(key: jax.Array, count: int, bits: int) -> np.ndarray:
    """Fingerprints bool[count, bits] of fair coins, of which no two are equal.

    Raises:
      UserError: if `count` is not positive, or there are not so many.
    """
    if not 0 < count <= 2**bits:
        raise UserError(f"--count must be 1 to 2^{bits}, as many as {bits} bits tell apart, got {count}.")
    found = np.zeros((0, bits), bool)
    while len(found) < count:
        key, draw = jax.random.split(key)
        found = np.concatenate([found, np.asarray(gan.sample_fingerprints(draw, count, bits)) == 1])
        found = found[np.sort(np.unique(found, axis=0, return_index=True)[1])]
    return found[:count]


class Instance(NamedTuple):
    """A generator with one fingerprint."""

    generator: Any
    params: Any
    latent_dim: int

    def images(self, latents: jax.Array) -> jax.Array:
        """Images as released: uint8."""
        return gan.as_uint8(self.generator.apply({"params": self.params}, latents).images)


def describe(generator: Any, latent_dim: int) -> dict[str, str]:
    """What `load_instance` builds a generator from: its class and fields, as text."""
    names = [field.name for field in dataclasses.fields(generator) if field.name not in ("parent", "name")]
    fields = {name: getattr(generator, name) for name in names}
    fields |= {name: jnp.dtype(fields[name]).name for name in DTYPES}
    return {"generator": json.dumps({"class": type(generator).__name__, **fields}), "latent_dim": str(latent_dim)}


def load_instance(path: str | os.PathLike) -> Instance:
    """Reads a file of `make`.

    Raises:
      UserError: if it is none.
    """
    tree, about = safetensors.load_safetensors(path)
    try:
        fields = {name: _tuples(value) for name, value in json.loads(about["generator"]).items()}
        kind = GENERATORS[fields.pop("class")]
        fields |= {name: jnp.dtype(fields[name]) for name in DTYPES}
        return Instance(kind(**fields), jax.tree.map(jnp.asarray, tree["params"]), int(about["latent_dim"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no instance that `make` wrote.") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class Registry(NamedTuple):
    """Whose fingerprint is which: the stage and seed of the instances, their names and bits."""

    stage: str
    seed: int
    names: list[str]
    bits: np.ndarray


def read_registry(path: str) -> Registry:
    """Reads a registry.json of `make`.

    Raises:
      UserError: if it is none.
    """
    try:
        stored = json.loads(epath.Path(path).read_text())
        count, instances = int(stored["bits"]), stored["instances"]
        packed = np.array([list(bytes.fromhex(one["bits"])) for one in instances], np.uint8)
        names = [str(one["name"]) for one in instances]
        if packed.shape != (len(names), -(-count // 8)) or not names:
            raise ValueError(f"{count} bits in {packed.shape}")
        return Registry(str(stored["stage"]), int(stored["seed"]), names, np.unpackbits(packed, axis=1)[:, :count])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or no registry that `make` wrote.") from error
