"""Files of packages that need not be installed: where they are, and the tensors in them, read in place."""

import importlib.util
import json
import pathlib

import numpy as np

from jkd.errors import UserError

# What safetensors files call the types that are read here.
DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8}


def package_folder(module: str, what: str, install: str) -> pathlib.Path:
    """The folder of an installed package, which is not imported.

    Raises:
      UserError: if it is not installed; says `what` comes with it and how to `install` it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{what} come with a package that is not installed: {install}.")
    return pathlib.Path(spec.submodule_search_locations[0])


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by name: a length, a header of JSON, and bytes; nothing in it is run.

    Raises:
      UserError: if the file cannot be read or is damaged.
    """
    try:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        found = {name: _tensor(data, start, of) for name, of in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from error
    return found


def _tensor(data: bytes, start: int, of: dict) -> np.ndarray:
    first, last = of["data_offsets"]
    return np.frombuffer(data[start + first : start + last], DTYPES[of["dtype"]]).reshape(of["shape"])


def read_json(path: pathlib.Path) -> dict:
    """A JSON file of a package.

    Raises:
      UserError: if it cannot be read or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it holds no JSON.") from error
