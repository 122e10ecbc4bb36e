"""Names of the leaves of trees."""

from typing import Any

import jax


def path_name(path: Any) -> str:
    """The name `a/b/0` of a leaf's path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
