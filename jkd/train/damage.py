"""How damage on disk is told from what passes, and said."""

import contextlib
import errno
import json
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from jkd.errors import UserError

PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EACCES}
PASSING_ERRORS |= {errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH}
# How tensorstore says so; it gives up with ABORTED after many tries.
PASSING_STATUSES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED")


class CorruptCheckpointError(ValueError):
    """A checkpoint that cannot be read back, or whose arrays are not those that were written."""


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` with a checksum of its own: the numbers beside the arrays decide where a run goes on."""
    return {**meta, "check": _check_of(meta)}


def _check_of(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({n: v for n, v in meta.items() if n != "check"}, sort_keys=True).encode())


def check_meta(meta: Any) -> dict[str, Any]:
    """Returns `meta`, or raises CorruptCheckpointError where it is not what was sealed."""
    if not isinstance(meta, dict) or meta.get("check", _check_of(meta)) != _check_of(meta):
        raise CorruptCheckpointError("meta was altered on disk (checksums differ)")
    return meta


@contextlib.contextmanager
def usable(directory: epath.Path) -> Iterator[None]:
    """Raises UserError in place of whatever reading a stored result raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if passing(error):
            raise UserError(f"{directory} cannot be read now: {first_line(error)}. Nothing was changed.") from error
        raise UserError(
            f"The stored result {directory} cannot be used: {first_line(error)}. "
            "Remove the stage's folder to train that stage again."
        ) from error


def passing(error: Exception) -> bool:
    """Whether an error says nothing about the files: no memory, or a file system that does not answer."""
    if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
        return True
    return isinstance(error, MemoryError) or any(word in str(error) for word in PASSING_STATUSES)


def first_line(error: Exception) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
