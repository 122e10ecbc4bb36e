"""Writes a trained model as a file for programs without jkd, reads it back and compares its outputs.

    python -m experiments.export --workdir runs/energy_kd --stage kd --format stablehlo --output kd.stablehlo
    python -m experiments.export --workdir runs/energy_kd --stage kd --format safetensors --output kd.safetensors

stablehlo: a program uint8[b, height, width, channels] -> {"logits", "probabilities", "pool"} for any b, of one seed,
    with normalization and parameters inside (low-bit weights as packed codes). It needs jax and flatbuffers: see
    jkd/interop/stablehlo.py.
safetensors: the variables by path (params/head/kernel) of one seed, or of all with a leading axis (--seed all).
    A later run starts from it by --config.student.init_from=kd.safetensors.
packed: the variables of one seed with low-bit weights as codes of so many bits, and a table of levels for each kernel:
    about bits x weights / 8 bytes. `jkd.quantize.unpack` makes weights of them inside a jitted function.
torch: the variables of one seed under PyTorch's names and layouts, as .safetensors: `load_state_dict(load_file(..))`.
    --style says whose names, such as torchvision or mdistiller: see jkd/interop/torch_names.py.

--config.NAME=VALUE sets mesh.*, loop.*, data.data_dir and data.blank only. Where the data set of the run is not on this
machine, --config.data.blank=True takes the images' shape from the run's config instead.
"""

from typing import Any

import jax
import numpy as np
from etils import epath

from experiments import cli
from experiments.compression import pack
from jkd import quantize, train
from jkd.errors import UserError
from jkd.interop import safetensors, stablehlo, torch
from jkd.train.ensemble import member
from jkd.train.log import console

FORMATS = ("stablehlo", "safetensors", "packed", "torch")
SUFFIXED = ("packed", "torch")
TOLERANCE = 1e-4  # of the largest output: another program may round otherwise
IMAGES = 4


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    parser.add_argument("--workdir", required=True, help="the folder of a run; gs:// works")
    parser.add_argument("--stage", required=True, metavar="NAME", help="a finished stage of it")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, metavar="FILE", help="a new file")
    parser.add_argument("--seed", default="0", metavar="K", help="of an ensemble: 0, 1, ..; or all (safetensors)")
    parser.add_argument("--platforms", help="of a program, by default cpu,cuda,tpu; rocm too", metavar="NAME,..")
    parser.add_argument("--style", metavar="NAME", help="of torch: torchvision, timm, mdistiller, ...")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_run(args.workdir, overrides, ("data.blank",))
    output = cli.new_file(args.output)
    if args.platforms and args.format != "stablehlo":
        raise UserError("--platforms is for programs: --format stablehlo.")
    if args.style and args.format != "torch":
        raise UserError("--style is for PyTorch's names: --format torch.")
    if args.format in SUFFIXED and output.suffix != ".safetensors":
        raise UserError(
            f"--format {args.format} writes a .safetensors file: --output must end so, got {args.output!r}."
        )
    platforms = tuple((args.platforms or ",".join(stablehlo.DEFAULT_PLATFORMS)).split(","))
    says = export(config, args.workdir, args.stage, args.format, output, args.seed, platforms, args.style)
    size = f"{output.stat().length:,} bytes"
    console.print(f"Wrote {args.stage} of {args.workdir} to {output}, {size}; {says}.", soft_wrap=True)


def export(
    config: Any,
    workdir: str,
    stage: str,
    kind: str,
    output: epath.Path,
    seed: str = "0",
    platforms: tuple[str, ...] = stablehlo.DEFAULT_PLATFORMS,
    style: str | None = None,
) -> str:
    """Writes and checks one file; what the check found, in words.

    Raises:
      UserError: for a stage or seed that is not there, or if the file does not give the model's outputs: it is removed.
    """
    outcome = train.load_outcome(workdir, stage)
    chosen, metadata = select(outcome, seed, kind)
    predictor = cli.experiment(config).predictor(config, stage)
    first = member(chosen, 0) if metadata else chosen
    predictor.check(first)
    images = np.random.RandomState(0).randint(0, 256, (IMAGES, *predictor.shape), np.uint8)
    classify = jax.jit(predictor.fn)
    if kind == "safetensors":
        about = {"method": str(config.method), "stage": stage, **metadata}
        safetensors.save_safetensors(output, chosen, about)
        stored = safetensors.load_safetensors(output)[0]
        found = classify(member(stored, 0) if metadata else stored, images)
    elif kind == "packed":
        return _export_packed(output, predictor, chosen, images, {"method": str(config.method), "stage": stage})
    elif kind == "torch":
        about = {"method": str(config.method), "stage": stage}
        torch.save_torch(output, predictor.model, predictor.plain(chosen), style=style, metadata=about)
        weights = torch.read_state_dict(output)
        found = classify(torch.from_torch(predictor.model, weights, image_shape=predictor.shape, style=style), images)
    else:
        inside = _packed(predictor, chosen) if quantize.is_quantized(chosen) else (predictor, chosen)
        program = stablehlo.export_predictor(*inside, predictor.shape, platforms=platforms)
        stablehlo.save_stablehlo(output, program)
        here = jax.default_backend()
        if here not in {"gpu" if name in ("cuda", "rocm") else name for name in platforms}:
            return f"not checked: it is for {', '.join(platforms)} and this machine has {here}"
        found = stablehlo.load_stablehlo(output).call(images)
    return check(output, classify(first, images), found)


def _export_packed(output: epath.Path, predictor: Any, variables: Any, images: Any, about: dict[str, str]) -> str:
    if not quantize.is_quantized(variables):
        raise UserError(
            f"Stage {about['stage']} has no low-bit weights to pack: --format safetensors takes any weights."
        )
    packed = pack(variables)
    size = quantize.packed_size(packed["params"])
    safetensors.save_safetensors(output, packed, about)
    stored = safetensors.load_safetensors(output)[0]
    found = jax.jit(_unpacking(predictor, stored))(stored, images)
    says = check(output, jax.jit(predictor.fn)(variables, images), found, tolerance=0.0)
    return f"{says}; {size.weights:,} weights in {size.bytes:,} bytes, {size.bytes / size.least:.3f} of their bits"


def _packed(predictor: Any, variables: Any) -> tuple[Any, Any]:
    """The predictor of packed variables, and these."""
    packed = pack(variables)
    return _unpacking(predictor, packed), packed


def _unpacking(predictor: Any, packed: Any) -> Any:
    """`predictor.fn` of variables like `packed`, which are unpacked inside: weights lie in memory as codes."""
    unpack = quantize.unpack(quantize.packed_shapes(packed))
    return lambda packed, images: predictor.fn(unpack(packed), images)


def select(outcome: train.Outcome, seed: str, kind: str) -> tuple[Any, dict[str, str]]:
    """The variables of one seed, or of all, on the host; of all, {"members": their number}.

    Raises:
      UserError: for a seed that is not there, or all seeds as one program.
    """
    published = jax.device_get(outcome.published)
    if seed == "all":
        if kind != "safetensors":
            raise UserError("--seed all is for --format safetensors; other files are of one seed: --seed 0.")
        return published, {"members": str(outcome.members)} if outcome.members else {}
    count = max(outcome.members, 1)
    if seed not in map(str, range(count)):
        raise UserError(f"--seed must be one of 0..{count - 1}{', or all' * (kind == 'safetensors')}, got {seed!r}.")
    return (member(published, int(seed)) if outcome.members else published), {}


def check(output: epath.Path, expected: Any, found: Any, tolerance: float = TOLERANCE) -> str:
    """Compares the outputs of the model with those of its file; the largest difference in words.

    Raises:
      UserError: if they differ by more than `tolerance` of the largest; the file is removed.
    """
    largest = 0.0
    for name, rows in expected.items():
        rows = np.asarray(rows, np.float64)
        difference = float(np.abs(np.asarray(found[name], np.float64) - rows).max())
        largest = max(largest, difference)
        if not difference <= tolerance * max(1.0, float(np.abs(rows).max())):
            output.unlink()
            raise UserError(f"{output} gave other {name} than the model (by {difference:.2g}) and was removed.")
    return f"read back, it gives the model's outputs on {IMAGES} images (largest difference {largest:.2g})"


if __name__ == "__main__":
    cli.command(main)
