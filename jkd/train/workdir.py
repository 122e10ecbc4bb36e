"""The folder of a run: whose it is, and what is in it."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from etils import epath

from jkd.errors import UserError
from jkd.train.processes import on_chief

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM)
# These fields say how a run is executed, not what it computes: they may change between restarts.
EXECUTION_FIELDS = ("mesh", "loop", "data.data_dir")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on an object store (`gs://...`): no folders, no appending, but every object whole or absent."""
    return "://" in os.fspath(path)


def folder_of(path: str | os.PathLike) -> epath.Path:
    """The absolute form of a path: checkpoints need one. Remote paths (`gs://...`) are as they are."""
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    # gcsfs remembers listings for ever by default: it would not see what other processes, or tensorstore, write.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        folder = epath.Path(text)
        folder.exists()
    except ImportError as error:
        raise UserError(f"{text} needs a package that is not here ({error}): pip install 'jkd[gcs]'.") from error
    except KeyError as error:
        raise UserError(
            f"{text} is on no file system that is known; gs://BUCKET/FOLDER is, or a local folder."
        ) from error
    except Exception as error:  # of credentials, of the network, of the store: each library has its own
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{text} cannot be reached: {type(error).__name__}: {reason}") from error
    return folder


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, by dotted name, that decide what a run computes."""
    return {name: value for name, value in flatten(config).items() if not is_execution(name)}


def is_execution(name: str) -> bool:
    """Whether a field, by dotted name, says how a run is executed."""
    return any(f"{name}.".startswith(f"{field}.") for field in EXECUTION_FIELDS)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat = {}
    for name, value in config.items():
        inner = flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
        flat.update(inner)
    return flat


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically: a reader sees the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees the old bytes or the new ones."""
    if is_remote(path):
        path.write_bytes(content)  # an object is replaced when all of it has arrived
        return
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def move_folder(folder: epath.Path, to: epath.Path) -> None:
    """Renames a folder; on an object store every file is copied, and then the old ones are removed."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        folder.rename(to)
        return
    _copy_files(folder, to)
    folder.rmtree()


def _copy_files(folder: epath.Path, to: epath.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _copy_files(path, to / path.name)
        else:
            path.copy(to / path.name)


def check_writable(folder: epath.Path) -> None:
    """Raises OSError where nothing can be written to a folder; several processes may ask at once."""
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink(missing_ok=True)


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """What `config.json` of a run's folder holds.

    Raises:
      UserError: if it is damaged.
    """
    try:
        found = json.loads((workdir / "config.json").read_text())
        if isinstance(found, dict):
            return found
    except ValueError:  # no JSON, or no text
        pass
    raise UserError(
        f"{workdir / 'config.json'} is damaged: it holds no JSON object. Restore it, or give a new workdir."
    )


def claim(workdir: epath.Path, config: Mapping[str, Any]) -> bool:
    """Makes `workdir` this config's, or checks that it is already; nothing is written otherwise.

    Returns:
      On the first process, whether it was nobody's before.

    Raises:
      UserError: if the folder cannot be written, holds other files, or belongs to another config.
    """
    return bool(on_chief(lambda: _claim(workdir, config)))


def check_claim(workdir: epath.Path, config: Mapping[str, Any]) -> bool:
    """Whether `workdir` is nobody's, without writing anything; otherwise it is this config's.

    Raises:
      UserError: if it holds other files, or belongs to another config.
    """
    fresh = not (workdir / "config.json").exists()
    if not fresh:
        _check_same(workdir, read_config(workdir), json.loads(json.dumps(config, default=str)))
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"The workdir {workdir} is a file; give a folder.")
    elif workdir.exists() and any(p for p in workdir.iterdir() if not p.name.startswith(".")):
        raise UserError(
            f"The workdir {workdir} is not empty and holds no config.json of a run; give a new or empty folder."
        )
    return fresh


def _claim(workdir: epath.Path, config: Mapping[str, Any]) -> bool:
    fresh = check_claim(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / "config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    except OSError as error:
        reason = f"there may be no such bucket: {error}" if is_remote(workdir) else error.strerror or error
        raise UserError(f"The workdir {workdir} cannot be written: {reason}.") from error
    return fresh


def disclaim(workdir: epath.Path) -> None:
    """Takes back a fresh claim of a run that ended before its first step: a corrected config may have the folder."""
    if (workdir / "stages").exists():
        (workdir / "stages").rmtree()
    (workdir / "config.json").unlink()


def _check_same(workdir: epath.Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    old, new = identity(there), identity(here)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        shown = ", ".join(f"{n} was {old.get(n, 'absent')} and is {new.get(n, 'absent')}" for n in changed[:3])
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"The workdir {workdir} belongs to another config: {shown}{more}. "
            "Give the config it was made with to resume it, or a new workdir."
        )


@contextlib.contextmanager
def storage_errors(workdir: epath.Path) -> Iterator[None]:
    """Turns what a full or read-only disk makes of any library's call into one line that says what to do.

    Raises:
      UserError: in place of an error that, or whose cause, is one of storage; others pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = _storage_error(error, workdir)
        if found is None:
            raise
        raise UserError(
            f"{found[0]} cannot be written: {found[1]}{_free_space(workdir)}. Nothing that was complete is lost: make "
            "room (or let it be written) and run the same command again to go on from the last checkpoint."
        ) from error


def _storage_error(error: BaseException | None, workdir: epath.Path) -> tuple[str, str] | None:
    """What could not be written, and why; None for errors that are not of storage."""
    while error is not None:
        file = str(getattr(error, "filename", None) or workdir)
        place = f"The workdir {workdir}" if file.startswith(str(workdir)) else file
        code = getattr(error, "errno", None)
        if code in FULL_DISK or (code in FORBIDDEN and file != str(workdir) and place != file):
            return place, os.strerror(code)
        for reason in map(os.strerror, FULL_DISK):  # of libraries in C++, as text
            if reason in str(error):
                return place, reason
        error = error.__cause__ or error.__context__
    return None


def _free_space(folder: epath.Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except (OSError, ValueError):  # remote
        return ""
    return f" ({usage.free / 1e6:,.1f} MB of {usage.total / 1e6:,.1f} MB are free)"


def stage_folder(workdir: epath.Path, index: int, name: str) -> epath.Path:
    """Where a stage's outcome is kept."""
    return workdir / "stages" / f"{index:02d}-{name}"
