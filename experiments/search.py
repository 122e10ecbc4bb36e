"""Searches what a trained run can find: prints the nearest items and draws them.

    python -m experiments.search --workdir runs/cmimh --query data:3 --top 10
    python -m experiments.search --workdir runs/cmimh --query digit.png --from first --into second
    python -m experiments.search --workdir runs/fashion --query "warm winter coat"

QUERY is an image file (.png, .jpg), features (.npy), words, or data:N, the N-th of the rows that were held out as
queries. It is encoded by the run's encoder of its side; what is searched are the codes (or vectors) of the other side
of the rows that the run calls its database, or with --into of any side. They are computed once and kept in
WORKDIR/search; a file there that is of other weights or rows is not overwritten. OUTPUT, a new file, shows the query
and the hits; by default the next free WORKDIR/search/hits-NNN.png.

--config.NAME=VALUE sets mesh.*, loop.*, eval_batch_size and data.data_dir only.
"""

import dataclasses
import functools
import io
import itertools
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.table import Table

from experiments import cli
from experiments.searchers import FILES, Searcher, Shown
from jkd import hashing, metrics, train
from jkd.errors import UserError, unknown
from jkd.train.ensemble import member
from jkd.train.fingerprints import inspect_tree
from jkd.train.log import console
from jkd.train.workdir import folder_of, write_bytes

HELD_OUT = "data:"
COLUMNS = 5  # pictures side by side


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    parser.add_argument("--workdir", required=True, help="the folder of a run; gs:// works")
    parser.add_argument("--query", required=True, metavar="IMAGE_OR_TEXT", help="a file, words, or data:N")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="hits (10)")
    parser.add_argument("--stage", metavar="NAME", help="a finished stage (the first that is)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of an ensemble: 0, 1, .. (0)")
    parser.add_argument("--from", dest="asks", metavar="SIDE", help="what the query is (by its kind)")
    parser.add_argument("--into", metavar="SIDE", help="what is searched (the other side)")
    parser.add_argument("--output", metavar="FILE.png", help="a new file (in WORKDIR/search)")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_run(args.workdir, overrides)
    output = cli.new_file(args.output) if args.output else None
    cli.use_compilation_cache()
    hits = search(config, args.workdir, args.query, args.top, args.stage, args.seed, args.asks, args.into)
    console.print(table(hits))
    output = output or _free(folder_of(args.workdir) / "search")
    write_bytes(output, draw(hits))
    console.print(f"Searched {hits.searched} items of {hits.into} by {hits.stage}: {output}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Hits:
    """What was asked and found.

    Attributes:
      query: as it was given.
      stage: that encoded.
      asks: the side of the query.
      into: the side of what was searched.
      measure: what `distances` are: "bits" or "cosine" (of which more is nearer).
      asked: the query as a person sees it.
      rows: of the hits, the nearest first; in the order of the run's database.
      distances: of the hits.
      shown: the hits as a person sees them.
      searched: how many items there were.
    """

    query: str
    stage: str
    asks: str
    into: str
    measure: str
    asked: Shown
    rows: np.ndarray
    distances: np.ndarray
    shown: Sequence[Shown]
    searched: int


def search(
    config: Any,
    workdir: str,
    query: str,
    top: int = 10,
    stage: str | None = None,
    seed: int = 0,
    asks: str | None = None,
    into: str | None = None,
) -> Hits:
    """Encodes a query and finds the `top` nearest items of a side; see the module.

    Raises:
      UserError: for a run without encoders, a stage, seed or side that is not there, a query that cannot be encoded, a
        `top` that is not in [1, items], or stored codes of something else.
    """
    stage = stage or _first_stage(config, workdir)
    searcher = _searcher(config, workdir, stage)
    asks, into = _sides(searcher, query, asks, into)
    mesh = train.make_mesh(**config.mesh)
    outcome = train.load_outcome(workdir, stage, mesh=mesh)
    if not 0 <= seed < max(outcome.members, 1):
        raise UserError(f"--seed must lie in 0..{max(outcome.members, 1) - 1}, got {seed}.")
    published, consts = (member(x, seed) if outcome.members else x for x in (outcome.published, outcome.consts))
    batch, asked = _asked(searcher, consts, asks, query)
    vector = _encoded(searcher, asks, published, consts, batch)
    database = _database(
        searcher, into, published, consts, mesh, folder_of(workdir) / "search" / f"{stage}-{seed}-{into}.npz"
    )
    items = len(database.items)
    if not 1 <= top <= items:
        raise UserError(f"--top must lie in [1, {items}], the number of items, got {top}.")
    distances, rows = _nearest(vector, database.items, top, searcher.binary)
    shown = [
        searcher.show(into, consts, "database", row // database.of_row, row % database.of_row) for row in rows.tolist()
    ]
    measure = "bits" if searcher.binary else "cosine"
    return Hits(query, stage, asks, into, measure, asked, rows, distances, shown, items)


def _first_stage(config: Any, workdir: str) -> str:
    finished = [name for name in train.finished_stages(workdir) if name in config.get("arms", {})]
    if not finished:
        raise UserError(f"{workdir} holds no finished stage of an arm; finish its training first.")
    return finished[0]


def _searcher(config: Any, workdir: str, stage: str) -> Searcher:
    module = cli.experiment(config)
    if not hasattr(module, "searcher"):
        raise UserError(f"{workdir} is a run of {config.method}, which makes no codes to search.")
    return module.searcher(config, stage)


def _sides(searcher: Searcher, query: str, asks: str | None, into: str | None) -> tuple[str, str]:
    """The sides of the query and of what is searched."""
    known = tuple(searcher.sides)
    for side in (asks, into):
        if side is not None and side not in known:
            raise unknown("side", side, known)
    if asks is None:
        is_file = pathlib.Path(query).suffix.lower() in FILES
        texts = [side for side in known if searcher.sides[side] == "text"]
        others = [side for side in known if side not in texts]
        fitting = known if query.startswith(HELD_OUT) else others if is_file else texts
        if not fitting:
            kinds = ", ".join(f"{side}: {kind}" for side, kind in searcher.sides.items())
            raise UserError(f"The query {query!r} is neither a file nor words that this run could encode ({kinds}).")
        asks = next((side for side in fitting if side != into), fitting[0])
    return asks, into or next(side for side in known if side != asks)


def _asked(searcher: Searcher, consts: Any, side: str, query: str) -> tuple[Mapping[str, np.ndarray], Shown]:
    """The query as a batch of one row, and as a person sees it."""
    if not query.startswith(HELD_OUT):
        batch = searcher.read(side, query)
        return batch, Shown(None, query)
    source, number = searcher.source(consts, "query"), query.removeprefix(HELD_OUT)
    if not number.isdigit() or int(number) >= source.num_examples:
        raise UserError(f"--query data:N needs N in 0..{source.num_examples - 1}, got {number!r}.")
    row = int(number)
    batch = source.dataset.read(np.array([row]))
    return {**batch, "index": source.dataset.indices[[row]]}, searcher.show(side, consts, "query", row, 0)


def _encoded(searcher: Searcher, side: str, published: Any, consts: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    encode = jax.jit(functools.partial(searcher.encode, side))
    found = np.asarray(encode(published, consts, dict(batch)))
    vector = found.reshape(-1, found.shape[-1])[:1]
    if not np.isfinite(vector).all():
        raise UserError("The encoding of the query is NaN or infinite.")
    return _stored(vector, searcher.binary)


@dataclasses.dataclass(frozen=True)
class _Database:
    """What is searched: packed codes or vectors of unit length, `of_row` for each row."""

    items: np.ndarray
    of_row: int


def _database(searcher: Searcher, side: str, published: Any, consts: Any, mesh: Any, file: epath.Path) -> _Database:
    """Reads what is searched from its file, or computes and keeps it.

    Raises:
      UserError: if the file is of other weights or rows, or an encoding is not finite.
    """
    source = searcher.source(consts, "database")
    of = {"weights": published, "rows": jnp.asarray(source.dataset.indices)}
    about = {"side": side, "binary": searcher.binary, **inspect_tree(of)}
    if file.exists():
        return _read(file, about)

    def encode(args: Any, batch: Any, key: Any) -> jax.Array:
        return searcher.encode(side, args[0], args[1], batch)

    found = train.sweep(encode, (published, consts), source, mesh=mesh)
    if not np.isfinite(found).all():
        raise UserError(f"Encodings of {side} are NaN or infinite: nothing can be searched.")
    of_row = found.shape[1] if found.ndim == 3 else 1
    made = _Database(_stored(found.reshape(-1, found.shape[-1]), searcher.binary), of_row)
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, items=made.items, of_row=of_row, about=json.dumps(about, sort_keys=True))
    write_bytes(file, buffer.getvalue())
    return made


def _stored(vectors: np.ndarray, binary: bool) -> np.ndarray:
    if binary:
        return np.asarray(metrics.pack_bits(vectors >= 0))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _read(file: epath.Path, about: Mapping[str, Any]) -> _Database:
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            same = str(stored["about"]) == json.dumps(about, sort_keys=True)
            found = _Database(stored["items"], int(stored["of_row"]))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged; remove it, and it will be made again.") from error
    if not same:
        raise UserError(f"{file} is of other weights or rows than this run's; remove it, and it will be made again.")
    return found


def _nearest(query: np.ndarray, items: np.ndarray, top: int, binary: bool) -> tuple[np.ndarray, np.ndarray]:
    """Distances and numbers of the nearest items; of equally near ones the lower number first."""
    if binary:
        found = hashing.hamming_search(jnp.asarray(query), jnp.asarray(items), top)
        return np.asarray(found.distances[0]), np.asarray(found.indices[0])
    cosine = items @ query[0]
    order = np.argsort(-cosine, kind="stable")[:top]
    return cosine[order], order


def table(hits: Hits) -> Table:
    """The hits as rows."""
    made = Table(title=f"{hits.query} ({hits.asked.text})" if hits.asked.text != hits.query else hits.query)
    for name in ("rank", "item", hits.measure, "what"):
        made.add_column(name, justify="left" if name == "what" else "right")
    for rank, (row, distance, shown) in enumerate(zip(hits.rows, hits.distances, hits.shown, strict=True), 1):
        made.add_row(str(rank), str(row), f"{distance:.3f}" if hits.measure == "cosine" else str(distance), shown.text)
    return made


def draw(hits: Hits) -> bytes:
    """A PNG file: the query, then the hits in rows of five."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = 1 + -(-len(hits.shown) // COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(2.2 * COLUMNS, 2.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.ravel():
        axis.axis("off")
    _cell(axes[0, 0], hits.asked, f"query: {hits.asks}")
    for rank, (axis, shown) in enumerate(zip(axes[1:].ravel(), hits.shown, strict=False), 1):
        _cell(axis, shown, f"{rank}: {hits.distances[rank - 1]:.3g} {hits.measure}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    plt.close(figure)
    return buffer.getvalue()


def _cell(axis: Any, shown: Shown, title: str) -> None:
    axis.set_title(title if shown.picture is None else f"{title}\n{shown.text}", fontsize=8)
    if shown.picture is None:
        axis.text(0.5, 0.5, shown.text, ha="center", va="center", wrap=True, fontsize=8)
        return
    gray = shown.picture.shape[-1] == 1
    axis.imshow(shown.picture[..., 0] if gray else shown.picture, cmap="gray" if gray else None, vmin=0, vmax=255)


def _free(folder: epath.Path) -> epath.Path:
    """The next picture of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return next(file for n in itertools.count() if not (file := folder / f"hits-{n:03d}.png").exists())


if __name__ == "__main__":
    cli.command(main)
