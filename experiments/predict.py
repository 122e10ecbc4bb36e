"""Classifies images by a trained stage: probabilities, classes, logits and features, as an .npz file.

    python -m experiments.predict --workdir runs/energy_kd --stage kd --input images.npy --output predictions.npz

INPUT is an .npy file of uint8[N, height, width, channels], a folder of .png and .jpg files, or data:SPLIT, a split
of the run's data set (data:test, data:train[:10%]). OUTPUT holds, for N images and M seeds:

    probabilities  [N, classes], the mean over seeds     logits  [M, N, classes]
    predicted      [N], the most probable class          pool    [M, N, features], what the last layer reads
    file or label  [N], of a folder or of data:SPLIT

--config.NAME=VALUE sets mesh.*, loop.*, eval_batch_size, data.data_dir and data.blank only. Where the data set of the
run is not on this machine, --config.data.blank=True takes the images' shape from the run's config instead.
"""

import io
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from experiments import cli
from jkd import data, train
from jkd.data import images, rows
from jkd.errors import UserError
from jkd.train.ensemble import member
from jkd.train.log import console
from jkd.train.mesh import check_batch_size
from jkd.train.passes import Residents
from jkd.train.workdir import write_bytes

SUFFIXES = (".png", ".jpg", ".jpeg")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False)
    parser.add_argument("--workdir", required=True, help="the folder of a run; gs:// works")
    parser.add_argument("--stage", required=True, metavar="NAME", help="a finished stage of it")
    parser.add_argument("--input", required=True, metavar="INPUT", help="images.npy, a folder, or data:SPLIT")
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="a new file")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_run(args.workdir, overrides, ("eval_batch_size", "data.blank"))
    output = cli.new_file(args.output)
    cli.initialize(args)
    cli.use_compilation_cache()
    found = predict(config, args.workdir, args.stage, args.input)
    if jax.process_index() == 0:
        _save(output, found)
        seeds, count = found["logits"].shape[:2]
        console.print(f"Classified {count} images by {seeds} seed(s) of {args.stage}: {output}", soft_wrap=True)


def predict(config: Any, workdir: str, stage: str, spec: str) -> dict[str, np.ndarray]:
    """Runs every member of a stage over the images that `spec` names; see the module for what returns.

    Raises:
      UserError: for a stage that is not there, or images that the model does not take.
    """
    mesh = train.make_mesh(**config.mesh)
    check_batch_size(config.eval_batch_size, mesh, "eval_batch_size")
    outcome = train.load_outcome(workdir, stage, mesh=mesh)
    predictor = cli.experiment(config).predictor(config, stage)
    models = [member(outcome.published, k) for k in range(outcome.members)] or [outcome.published]
    predictor.check(models[0])
    dataset, more = read_input(spec, config.data, predictor.shape)
    source, residents = data.source(dataset, config.eval_batch_size), Residents(mesh)

    def one(published: Any, batch: Any, key: Any) -> Any:
        return predictor(published, batch["image"])

    each = [train.sweep(one, published, source, mesh=mesh, residents=residents) for published in models]
    found = {name: np.stack([rows[name] for rows in each]) for name in each[0]}
    found["probabilities"] = found["probabilities"].mean(axis=0)
    return {**found, "predicted": found["probabilities"].argmax(-1).astype(np.int32), **more}


def read_input(spec: str, config: Any, shape: tuple[int, ...]) -> tuple[data.Dataset, dict[str, np.ndarray]]:
    """The images that `spec` names (an .npy file, a folder or data:SPLIT) and what their rows are called.

    Args:
      spec: see the module.
      config: the `data` section of a run's config.
      shape: of an image as the model takes it; a split of the data set has the set's own.

    Returns:
      The images, and {"file": names} of a folder or {"label": numbers} of a split.

    Raises:
      UserError: if there are none, or they are not of that shape.
    """
    if spec.startswith("data:"):
        options = {"data_dir": config.data_dir or None, "image_size": config.image_size or None}
        dataset = data.load(config.name, spec.removeprefix("data:"), **options)
        return dataset, {"label": dataset.labels}
    path = pathlib.Path(spec)
    if path.is_dir():
        found = Files(path, shape, resize=config.image_size > 0)
        dataset = data.Dataset(path.name, 2, found, np.arange(len(found), dtype=np.int32), shape=found.shape)
        return dataset, {"file": np.array([file.name for file in found.files])}
    array = _load_array(path, shape)
    return data.from_arrays(array, np.zeros(len(array), np.int32), name=path.name), {}


def _load_array(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    wanted = f"an .npy file of uint8[N, {', '.join(map(str, shape))}], values 0 to 255"
    if not path.is_file():
        raise UserError(f"No input {path}: give {wanted}, a folder of PNG and JPEG files, or data:SPLIT.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a numpy array; the input must be {wanted}.") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[1:] != shape or not len(array):
        got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"The input {path} must be {wanted}, got {got}.")
    return np.asarray(array)


class Files(rows.Rows):
    """The PNG and JPEG files of a folder by name, of one size, or cropped and resized as for evaluation."""

    def __init__(self, folder: pathlib.Path, shape: tuple[int, ...], *, resize: bool):
        """Looks at the header of every file."""
        self.shape, self._resize = (shape[0], shape[1], shape[2]), resize
        self.files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise UserError(f"The input {folder} holds no .png or .jpg file.")
        for file in self.files:
            self._check(file)

    def _check(self, file: pathlib.Path) -> None:
        try:
            with Image.open(file) as image:
                (width, height), mode = image.size, image.mode
        except OSError as error:
            raise UserError(f"{file} cannot be read as an image.") from error
        if mode.startswith(("I", "F")):
            raise UserError(f"{file} must have 8 bits a channel, got Pillow's mode {mode}.")
        if not self._resize and (height, width) != self.shape[:2]:
            raise UserError(f"{file} is {height}x{width}; the model takes {self.shape[0]}x{self.shape[1]} images.")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> np.ndarray:
        """Unknown: zeros."""
        return np.zeros(len(self), np.int32)

    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> rows.Batch:
        """Decodes files to the model's channels."""
        del seed, positions  # always the central crop
        return {"image": np.stack([self._pixels(self.files[row]) for row in rows]), "label": self.labels[rows]}

    def _pixels(self, file: pathlib.Path) -> np.ndarray:
        try:
            image = images.decode(file.read_bytes(), self.shape[-1])
        except OSError as error:
            raise UserError(f"{file} cannot be decoded: {error}.") from error
        if not self._resize:
            return images.to_array(image)
        return images.crop(image, images.central_box(*image.size), self.shape[0])


def _save(output: epath.Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(output, buffer.getvalue())


if __name__ == "__main__":
    cli.command(main)
