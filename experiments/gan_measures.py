"""How good generated images are: evaluators of what `gans.stage` publishes, and pictures of them.

A sampler is `sample(published, consts, index[N]) -> images [N, height, width, channels]` in [-1, 1]: image i is a
function of the stage's published variables and of i alone, so that every arm and seed is judged on the same latents.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.gans import Setup
from jkd import gan, metrics, train
from jkd.gan.players import Players, as_uint8, from_uint8
from jkd.train.log import png
from jkd.train.workdir import write_bytes

LATENT_SEED = 7  # of all images that are judged
Sampler = Callable[[Any, Any, jax.Array], jax.Array]


def latents_of(index: jax.Array, dim: int) -> jax.Array:
    """Latent i of those that every generator is judged by, for each i."""
    key = jax.random.key(LATENT_SEED)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (dim,)))(index)


def averaged(players: Players) -> Sampler:
    """Images of the averaged generator."""

    def sample(published: Any, consts: Any, index: jax.Array) -> jax.Array:
        return players.generate(published["average"], latents_of(index, players.latent_dim))[0].images

    return sample


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """The evaluators of one generator.

    Attributes:
      setup: of the config.
      sample: its images.
      target: `target(images) -> images`: what stored uint8 images become before they are compared with; for a
        generator of another domain.
    """

    setup: Setup
    sample: Sampler
    target: Callable[[jax.Array], jax.Array] = lambda images: images

    def real(self, images: jax.Array) -> jax.Array:
        """Stored images as they are compared with, uint8."""
        return self.target(self.setup.plain(images))

    def features(self, published: Any, consts: Any, batch: Any, copies: int) -> tuple[jax.Array, jax.Array]:
        """Features of a batch of stored images [B, dim], and of `copies` generated ones for each [B, copies, dim]."""
        index, look = batch["index"], self.setup.features
        real = look(consts["features"], self.real(batch["image"]))
        made = [
            look(consts["features"], as_uint8(self.sample(published, consts, index * copies + k)))
            for k in range(copies)
        ]
        return real, jnp.stack(made, 1)

    def frechet(self, part: str, every: int = 0) -> train.Evaluator:
        """The Frechet distance to the rows of a part, from sums over batches."""
        copies = self.setup.config.judge.per_image

        def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
            real, fake = self.features(published, consts, batch, copies)
            flat = fake.reshape(-1, fake.shape[-1])
            sums = metrics.moment_sums(real, mask), metrics.moment_sums(flat, jnp.repeat(mask, copies))
            return dict(zip(("real", "fake"), (x._asdict() for x in sums), strict=True))

        def finish(sums: Any) -> dict[str, float]:
            return {"frechet": float(_frechet(sums["real"], sums["fake"]))}

        return train.Evaluator(self.setup.part(part), collect, finish, every=every)

    def manifold(self, part: str = "test", every: int = 0) -> train.Evaluator:
        """Kernel distance, precision, recall, density and coverage, over the first rows of a part."""

        def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
            real, fake = self.features(published, consts, batch, 1)
            return {"real": real, "fake": fake[:, 0]}

        def finish(rows: Any) -> dict[str, float]:
            return {name: float(value) for name, value in _neighbours(rows["real"], rows["fake"]).items()}

        limit = self.setup.config.judge.neighbours
        return train.Evaluator(self.setup.part(part, limit), collect, finish, kind="gather", every=every)

    def gallery(self, players: Players | None, part: str = "test", every: int = 0) -> train.Evaluator:
        """A picture of generated images; whether they are varied, and whether the discriminator has already won.

        Without players no discriminator is asked.
        """

        def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
            made, real = self.sample(published, consts, batch["index"]), self.real(batch["image"])
            found = {"fake": as_uint8(made), "real": real}
            if players is not None:
                critic = published["discriminator"]
                found |= {
                    "fake_logits": players.judge(critic, made, from_uint8(real))[0].logits,
                    "real_logits": players.judge(critic, from_uint8(real), jnp.roll(from_uint8(real), 1, 0))[0].logits,
                }
            return found

        limit = self.setup.config.judge.gallery
        source = self.setup.part(part, limit)
        named: dict[str, Any] = {"kind": "gather", "every": every, "draw": draw, "warn": warn}
        return train.Evaluator(source, collect, health, **named)

    def all(self, players: Players) -> dict[str, train.Evaluator]:
        """Every evaluator of a generator of the data's own domain."""
        every = self.setup.config.eval_every
        return {
            "validation": self.frechet("validation"),
            "test": self.frechet("test", every),
            "manifold": self.manifold(),
            "gallery": self.gallery(players, every=every),
        }


@functools.lru_cache(maxsize=64)
def of_players(setup: Setup, players: Players) -> dict[str, train.Evaluator]:
    """The evaluators of generators of the data's own domain; arms with equal networks share them, and programs."""
    return Judge(setup, averaged(players)).all(players)


@jax.jit
def _frechet(real: Mapping[str, Any], fake: Mapping[str, Any]) -> jax.Array:
    moments = [metrics.moments(metrics.MomentSums(**sums)) for sums in (real, fake)]
    return metrics.frechet_distance(*moments[0], *moments[1])


@jax.jit
def _neighbours(real: jax.Array, fake: jax.Array) -> dict[str, jax.Array]:
    found = {"kid": metrics.kid(real, fake)}
    if len(real) > 5:
        found |= metrics.manifold_precision_recall(real, fake)._asdict()
        found |= metrics.density_coverage(real, fake)._asdict()
    return found


@jax.jit
def _health(rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    found = {
        "diversity": gan.diversity_ratio(from_uint8(rows["fake"]), from_uint8(rows["real"])),
        "duplicates": gan.duplicates(from_uint8(rows["fake"])),
    }
    if "real_logits" in rows:
        found["separation"] = gan.logit_separation(rows["real_logits"], rows["fake_logits"])
    return found


def health(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Diversity next to that of real images, near copies, and how far the discriminator is ahead."""
    return {name: float(value) for name, value in _health(rows).items()}


def warn(values: Mapping[str, float]) -> str | None:
    """What is wrong with a game, in words."""
    return gan.verdict(**{name: float(value) for name, value in values.items()})


def draw(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The generated images side by side."""
    return {"generated": tile(rows["fake"])}


def write_pngs(folder: epath.Path, images: np.ndarray) -> None:
    """uint8[N, height, width, channels] as 00000.png, 00001.png, .. of a folder that exists."""
    for i, image in enumerate(images):
        write_bytes(folder / f"{i:05d}.png", png(image[..., 0] if image.shape[-1] == 1 else image))


def tile(images: np.ndarray, *, least: int = 28) -> np.ndarray:
    """uint8[N, height, width, channels] as one picture, about square; small images are enlarged to `least` pixels."""
    scale = -(-least // images.shape[1])
    images = images.repeat(scale, 1).repeat(scale, 2)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    columns = int(np.ceil(np.sqrt(len(images))))
    empty = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    images = np.concatenate([images, empty])
    rows = len(images) // columns
    _, height, width, channels = images.shape
    picture = images.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    return picture[..., 0] if channels == 1 else picture
