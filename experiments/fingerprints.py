r"""Makes generators with a fingerprint each, samples from one, and says whose fingerprint images carry.

    python -m experiments.fingerprints make --workdir runs/gan_fingerprinting --stage full --count 10 --output users
    python -m experiments.fingerprints sample --instance users/instance-003.safetensors --count 64 --output images
    python -m experiments.fingerprints identify --workdir runs/gan_fingerprinting --stage full \
        --registry users/registry.json --input images [--together] [--false-positive-rate 1e-6] [--json found.json]

make: instances of a stage's averaged generator, without training. OUTPUT, a new folder, holds instance-000.safetensors,
    instance-001.safetensors, ... and registry.json, whose fingerprint each is. An instance holds nothing else that
    tells its fingerprint, and all that `sample` needs; the registry stays with who releases them. No two instances
    share a fingerprint; without --key nobody can draw them again.
sample: images of one instance as released: uint8, in PNG files of the new folder OUTPUT; side by side in OUTPUT.png.
identify: the user whose fingerprint is nearest to what the decoder of the same stage and seed reads, for each image of
    an .npy file of uint8[N, height, width, channels], of a folder of .png and .jpg files, or of data:SPLIT of the run's
    data set (whose images carry none); or for all of them as one source (--together: each bit by majority). "nobody"
    where the best of all users matches so well by chance with a probability above --false-positive-rate. The chance is
    in the fingerprints, which are fair coins: it holds whatever a decoder reads in images that have none. Such images
    tend to be read alike, so rows are no independent evidence; n bits show no less than users / 2^n.

--config.NAME=VALUE sets mesh.*, loop.*, eval_batch_size, data.data_dir and data.blank only. Where the data set of the
run is not on this machine, --config.data.blank=True takes the images' shape from the run's config instead.
"""

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.table import Table

from experiments import cli, gan_fingerprinting, gan_measures, gans, predict, report
from experiments.fingerprint_game import SUB, FingerprintGame
from experiments.instances import Instance, describe, distinct_fingerprints, load_instance, read_registry
from jkd import data, gan, metrics, train
from jkd.errors import UserError, unknown
from jkd.interop import safetensors
from jkd.train.ensemble import member
from jkd.train.log import console, jsonable, png
from jkd.train.mesh import check_batch_size
from jkd.train.passes import Residents
from jkd.train.workdir import write_bytes, write_text

METHOD = "gan_fingerprinting"
CHECKED = 16  # images of each new instance that are read
AT_ONCE = 64  # images made at once


def main(argv: list[str] | None = None) -> None:
    args, overrides = cli.parse(_parser(), argv)
    cli.use_compilation_cache()
    if args.command == "sample":
        if overrides:
            raise UserError("sample reads no run: leave --config.NAME=VALUE out.")
        says = sample(args.instance, args.count, args.output, args.key)
    else:
        config = cli.load_run(args.workdir, overrides, ("eval_batch_size", "data.blank"))
        says = make(config, args) if args.command == "make" else _identify(config, args)
    console.print(says, soft_wrap=True)


def _identify(config: Any, args: argparse.Namespace) -> str:
    file = cli.new_file(args.json) if args.json else None
    found = identify(config, args)
    report.table_console().print(table(found))
    if file is not None:
        write_text(file, json.dumps(jsonable(found), indent=1) + "\n")
    known = sum(row["user"] is not None for row in found["sources"])
    return f"{known} of {len(found['sources'])} carry a fingerprint of the {found['users']} in {args.registry}."


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, config=False, processes=False)
    kinds = parser.add_subparsers(dest="command", required=True, metavar="make|sample|identify")
    make, sample, identify = (kinds.add_parser(name, allow_abbrev=False) for name in ("make", "sample", "identify"))
    for one in (make, identify):
        one.add_argument("--workdir", required=True, help=f"the folder of a run of {METHOD}; gs:// works")
        one.add_argument("--stage", required=True, metavar="NAME", help="a finished stage of it with fingerprints")
    for one, what in ((make, "instances"), (sample, "images")):
        one.add_argument("--count", required=True, type=int, metavar="N", help=f"how many {what}")
        one.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    make.add_argument("--seed", default=0, type=int, metavar="K", help="of an ensemble: 0, 1, ..")
    make.add_argument("--key", type=int, metavar="N", help="draws the same fingerprints again; by default secret")
    sample.add_argument("--instance", required=True, metavar="FILE", help="an instance-NNN.safetensors")
    sample.add_argument("--key", default=0, type=int, metavar="N", help="draws the latents")
    identify.add_argument("--registry", required=True, metavar="FILE", help="the registry.json of `make`")
    identify.add_argument("--input", required=True, metavar="INPUT", help="images.npy, a folder, or data:SPLIT")
    identify.add_argument(
        "--together", action="store_true", help="all images come from one source: each bit by majority"
    )
    identify.add_argument("--false-positive-rate", type=float, default=1e-6, metavar="P", help="by default 1e-6")
    identify.add_argument("--json", metavar="FILE", help="also write what was found, to a new file")
    return parser


# --- a run ---


class Run(NamedTuple):
    """A finished stage whose images carry fingerprints, of one seed."""

    setup: gans.Setup
    game: FingerprintGame
    published: Any

    @property
    def params(self) -> Any:
        """Of the averaged generator."""
        return self.published["average"]["params"][SUB]

    def read(self, images: jax.Array) -> jax.Array:
        """The decoder's logits of bits in uint8 images."""
        assert self.game.decoder is not None
        return self.game.decoder.read(self.published["generator"]["params"]["decoder"], gan.from_uint8(images))[1]


def load_run(config: Any, workdir: str, stage: str, seed: int, mesh: Any = None) -> Run:
    """One seed of a stage.

    Raises:
      UserError: for a run of another method, or a stage or seed that is not there or carries no fingerprints.
    """
    if config.method != METHOD:
        raise UserError(f"{workdir} is a run of {config.method}; fingerprints are those of a run of {METHOD}.")
    known = [name for name in config.arms if config.arms[name].kind == "fingerprint"]
    if stage not in known:
        raise unknown("stage with fingerprints", stage, known)
    outcome = train.load_outcome(workdir, stage, mesh=mesh)
    count = max(outcome.members, 1)
    if not 0 <= seed < count:
        raise UserError(f"--seed must be one of 0..{count - 1}, got {seed}.")
    setup = gans.Setup.of(config)
    published = member(outcome.published, seed) if outcome.members else outcome.published
    return Run(setup, gan_fingerprinting.fingerprint_game(setup, stage), published)


# --- make ---


def make(config: Any, args: argparse.Namespace) -> str:
    """Writes instances and their registry; what was written, in words.

    Raises:
      UserError: for what `load_run` refuses, a folder that exists, or more instances than fingerprints.
    """
    output = cli.new_file(args.output)
    run = load_run(config, args.workdir, args.stage, args.seed)
    bits = distinct_fingerprints(random_key(args.key), args.count, run.game.bits)
    output.mkdir(parents=True)
    right = _write_instances(output, run, {"method": METHOD, "stage": args.stage}, bits)
    instances = [{"name": _name(k), "bits": np.packbits(own).tobytes().hex()} for k, own in enumerate(bits)]
    registry = {"bits": run.game.bits, "stage": args.stage, "seed": args.seed, "instances": instances}
    write_text(output / "registry.json", json.dumps(registry, indent=1) + "\n")
    return (
        f"Made {len(bits)} instances of {args.stage} with {run.game.bits} bits each: {output}. "
        f"The decoder reads {right:.1%} of the bits of {CHECKED} images each."
    )


def _name(k: int) -> str:
    return f"instance-{k:03d}"


def _write_instances(output: epath.Path, run: Run, about: Mapping[str, str], bits: np.ndarray) -> float:
    """Writes one file after the other, so that a population need not fit into memory; the share of bits read right."""
    generator, latent_dim = run.game.players.generator, run.game.players.latent_dim
    plain = generator.baked()
    latents = run.game.players.latents(jax.random.key(0), CHECKED)

    @jax.jit
    def bake(params: Any, own: jax.Array) -> tuple[Any, jax.Array]:
        made = gan.bake_fingerprint(generator, params, own)
        logits = run.read(Instance(plain, made, latent_dim).images(latents))
        return made, metrics.bit_accuracy(logits, jnp.broadcast_to(own[None], logits.shape)).mean()

    about, right = {**about, **describe(plain, latent_dim)}, []
    for k, own in enumerate(bits):
        made, share = bake(run.params, own)
        safetensors.save_safetensors(output / f"{_name(k)}.safetensors", {"params": made}, about)
        right.append(float(share))
    return float(np.mean(right))


def random_key(seed: int | None) -> jax.Array:
    """The key of a number; of None one that the operating system draws."""
    if seed is not None:
        return jax.random.key(seed)
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(os.urandom(8), np.uint32)), impl="threefry2x32")


# --- sample ---


def sample(path: str, count: int, output: str, key: int = 0) -> str:
    """Writes images of one instance; what was written, in words.

    Raises:
      UserError: for a file that is no instance, a count that is not positive, or a folder or picture that exists.
    """
    if count < 1:
        raise UserError(f"--count must be positive, got {count}.")
    folder, picture = cli.new_file(output), cli.new_file(f"{output.rstrip('/')}.png")
    instance = load_instance(path)
    look = jax.jit(lambda params, latents: instance._replace(params=params).images(latents))
    latents = jax.random.normal(jax.random.key(key), (count, instance.latent_dim))
    parts = [look(instance.params, latents[start : start + AT_ONCE]) for start in range(0, count, AT_ONCE)]
    images = np.concatenate([np.asarray(part) for part in parts])
    folder.mkdir(parents=True)
    gan_measures.write_pngs(folder, images)
    write_bytes(picture, png(gan_measures.tile(images)))
    return f"Wrote {count} images of {path} to {folder}, and {picture}."


# --- identify ---


def identify(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Whose fingerprint each image carries, or all of them together: what --json writes.

    Raises:
      UserError: for what `load_run` and `gan.attribute` refuse, a registry of another stage or number of bits, or
        images that the decoder does not take.
    """
    mesh = train.make_mesh(**config.mesh)
    check_batch_size(config.eval_batch_size, mesh, "eval_batch_size")
    registry, rate = read_registry(args.registry), args.false_positive_rate
    run = load_run(config, args.workdir, args.stage, registry.seed, mesh)
    users, bits = registry.bits.shape
    if (registry.stage, bits) != (args.stage, run.game.bits):
        raise UserError(
            f"{args.registry} is of {registry.stage} with {bits} bits, --stage {args.stage} has {run.game.bits}."
        )
    names, logits = read_bits(run, config, args.input, mesh)
    _check_rate(rate, bits, users)
    if args.together:
        # Counts of several images must not be added up: where a decoder reads the same in all, that is seen once.
        names, logits = [f"{len(logits)} images"], np.sign(logits).mean(axis=0, keepdims=True)
    found = gan.attribute(logits, registry.bits, false_positive_rate=rate)
    user, matched, log_p = (np.asarray(each).tolist() for each in found)
    rows = zip(names, user, matched, log_p, strict=True)
    sources = [
        {"file": name, "user": registry.names[u] if u >= 0 else None, "matched": m, "log10_p": p / np.log(10)}
        for name, u, m, p in rows
    ]
    return {"users": users, "bits": bits, "false_positive_rate": rate, "sources": sources}


def read_bits(run: Run, config: Any, spec: str, mesh: Any) -> tuple[list[str], np.ndarray]:
    """What images are called, and the logits of the bits that the decoder reads in them."""
    dataset, more = predict.read_input(spec, config.data, run.setup.shape)

    def read(published: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        return {"logits": run._replace(published=published).read(run.setup.plain(batch["image"]))}

    source = data.source(dataset, config.eval_batch_size)
    rows = train.sweep(read, run.published, source, mesh=mesh, residents=Residents(mesh))
    names = more["file"].tolist() if "file" in more else [f"row {k}" for k in range(len(dataset))]
    return names, rows["logits"]


def _check_rate(rate: float, bits: int, users: int) -> None:
    if not 0 < rate <= 1:
        raise UserError(f"--false-positive-rate must lie in (0, 1], got {rate}.")
    least = float(np.exp(metrics.match_log_pvalue(bits, bits, users=users)))
    if rate < least:
        raise UserError(
            f"--false-positive-rate {rate:g} is less than {bits} bits can show among {users} users: give "
            f"{min(1.06 * least, 1):.2g} or more, or train a stage with more bits."
        )


def table(found: Mapping[str, Any]) -> Table:
    """What was found, a row a source."""
    made = Table(title=f"fingerprints at a false positive rate of {found['false_positive_rate']:g}")
    made.add_column("file")
    made.add_column("user")
    for column in (f"matching of {found['bits']} bits", "log10 p"):
        made.add_column(column, justify="right")
    for row in found["sources"]:
        made.add_row(row["file"], row["user"] or "nobody", str(row["matched"]), f"{row['log10_p']:.2f}")
    return made


if __name__ == "__main__":
    cli.command(main)
