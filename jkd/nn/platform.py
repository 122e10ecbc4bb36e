"""Which platform a program is traced for: where two forms of one computation are fast on different ones.

`jax.lax.platform_dependent` decides when a program is lowered, at a price: XLA's CPU backend then leaves derivatives of
convolutions in a form that takes ten times as long.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("platform", default=None)


def target() -> str:
    """The platform that is traced for: "cpu", "gpu" or "tpu"; by default where programs run here."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is for this platform. Another one runs it too, perhaps more slowly."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
