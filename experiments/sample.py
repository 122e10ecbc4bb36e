"""Makes images by a trained generator: PNG files, an .npy file of all, and a picture of them side by side.

    python -m experiments.sample --workdir runs/dual_contrastive_gan --stage dual --count 64 --output samples

OUTPUT is a new folder: 00000.png, 00001.png, ..; images.npy, uint8[count, height, width, channels]; latents.npy,
float32[count, latent]; grid.png. The averaged generator is used. --latents FILE.npy gives latents instead of drawing.

--config.NAME=VALUE sets mesh.*, loop.*, eval_batch_size, data.data_dir and data.blank only. Where the data set of the
run is not on this machine, --config.data.blank=True takes the images' shape from the run's config instead.
"""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import cli
from experiments.gan_measures import tile, write_pngs
from jkd import gan, train
from jkd.errors import UserError
from jkd.train.ensemble import member
from jkd.train.log import console, png
from jkd.train.workdir import write_bytes


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    parser.add_argument("--workdir", required=True, help="the folder of a run; gs:// works")
    parser.add_argument("--stage", required=True, metavar="NAME", help="a finished stage of it")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--count", type=int, default=64, help="images (64)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of an ensemble: 0, 1, .. (0)")
    parser.add_argument("--key", type=int, default=0, metavar="N", help="of the random latents (0)")
    parser.add_argument("--latents", metavar="FILE.npy", help="float[count, latent] in place of drawn ones")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_run(args.workdir, overrides, ("eval_batch_size", "data.blank"))
    output = cli.new_file(args.output)
    cli.use_compilation_cache()
    latents, images = sample(config, args.workdir, args.stage, args.count, args.seed, args.key, args.latents)
    write(output, latents, images)
    console.print(f"Wrote {len(images)} images of {args.stage} to {output}", soft_wrap=True)


def sample(
    config: Any, workdir: str, stage: str, count: int, seed: int = 0, key: int = 0, file: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Latents, and the images that one seed of a stage makes of them, uint8[count, height, width, channels].

    Raises:
      UserError: for a stage or a seed that is not there or makes no images, or latents of another width.
    """
    module = cli.experiment(config)
    if not hasattr(module, "generator"):
        raise UserError(f"{workdir} is a run of {config.method}, which trains no generator.")
    made = module.generator(config, stage)
    outcome = train.load_outcome(workdir, stage)
    if not 0 <= seed < max(outcome.members, 1):
        raise UserError(f"--seed must lie in 0..{max(outcome.members, 1) - 1}, got {seed}.")
    published = member(outcome.published, seed) if outcome.members else outcome.published
    latents = read_latents(file, made.latent_dim) if file else draw_latents(key, count, made.latent_dim)
    size, found = min(config.eval_batch_size, len(latents)), []

    @jax.jit
    def images(published: Any, latents: jax.Array, key: jax.Array) -> jax.Array:
        return gan.as_uint8(made.sample(published, latents, key))

    padded = np.concatenate([latents, latents[: -len(latents) % size]])  # one shape, one program
    for k, start in enumerate(range(0, len(padded), size)):
        batch_key = jax.random.fold_in(jax.random.key(key), k)
        found.append(np.asarray(images(published, jnp.asarray(padded[start : start + size]), batch_key)))
    return latents, np.concatenate(found)[: len(latents)]


def draw_latents(key: int, count: int, dim: int) -> np.ndarray:
    """Standard normal latents.

    Raises:
      UserError: if there are none.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}.")
    return np.asarray(jax.random.normal(jax.random.key(key), (count, dim)))


def read_latents(file: str, dim: int) -> np.ndarray:
    """The latents of a file.

    Raises:
      UserError: if it holds something else.
    """
    wanted = f"an .npy file of float[count, {dim}]"
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--latents {file} cannot be read: it must be {wanted}.") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.shape[1:] != (dim,) or not len(found):
        raise UserError(f"--latents {file} must be {wanted}.")
    return found.astype(np.float32)


def write(output: epath.Path, latents: np.ndarray, images: np.ndarray) -> None:
    """The files of a folder of images."""
    output.mkdir(parents=True)
    for name, array in (("images", images), ("latents", latents)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_bytes(output / f"{name}.npy", buffer.getvalue())
    write_pngs(output, images)
    write_bytes(output / "grid.png", png(tile(images)))


if __name__ == "__main__":
    cli.command(main)
