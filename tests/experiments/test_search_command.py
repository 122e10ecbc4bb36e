"""The command that searches: what it finds is what the codes say, kept codes are checked, and how it refuses."""

import io

import jax
import numpy as np
import pytest
from helpers_experiments import QUIET
from PIL import Image

from experiments import cli, cmimh, search
from experiments import train as command
from experiments.searchers import Shown
from jkd import data, hashing, metrics, train
from jkd.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def searched_on_one_device(one_device):
    make_mesh = train.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda **sizes: make_mesh(devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def workdir(one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "run"
    command.main(["--config", "configs/cmimh.py:smoke", "--workdir", str(folder), "--config.only=full,cca", *QUIET])
    return folder


@pytest.fixture
def config(workdir):
    return cli.load_run(str(workdir), {})


def test_finds_what_the_codes_say(workdir, config, capsys):
    search.main(["--workdir", str(workdir), "--query", "data:3", "--stage", "cca", "--seed", "1", "--top", "4"])
    assert "Searched 1697 items of second by cca" in " ".join(capsys.readouterr().err.split())
    (picture,) = (workdir / "search").glob("*.png")
    with Image.open(picture) as image:
        assert image.width > 100
    hits = search.search(config, str(workdir), "data:3", 4, "cca", 1)
    # The same by hand: linear functions of the stored rows.
    outcome = train.load_outcome(workdir, "cca")
    functions, consts = (jax.tree.map(lambda x: np.asarray(x[1]), x) for x in (outcome.published, outcome.consts))
    pool = cmimh.Setup.of(config).task.pool
    codes = {}
    for side, part in (("first", "query"), ("second", "database")):
        x = pool.read(consts["rows"][part])[side]
        numbers = consts["statistics"][side]
        seen = ((x - numbers["mean"]) / numbers["scale"]).astype(np.float32)
        codes[side] = hashing.to_bits(hashing.project(hashing.Projection(**functions[side]), seen))
    distances = np.asarray(metrics.hamming_distance(codes["first"][3:4], codes["second"]))[0]
    order = np.argsort(distances, kind="stable")[:4]
    np.testing.assert_array_equal(hits.rows, order)
    np.testing.assert_array_equal(hits.distances, distances[order])
    assert hits.shown[0].text == f"label {pool.labels[consts['rows']['database'][order[0]]]}"
    assert hits.asked.picture.shape == (8, 8, 1)  # both halves


def test_a_file_of_an_image_is_its_row(workdir, config, tmp_path):
    outcome = train.load_outcome(workdir, "full")
    row = int(outcome.consts["rows"]["query"][0][5])
    pixels = data.load("digits8x8", "all").read(np.array([row]))["image"][0]
    whole, half, features = (str(tmp_path / name) for name in ("whole.png", "half.png", "half.npy"))
    Image.fromarray(pixels[..., 0]).save(whole)
    Image.fromarray(pixels[4:, :, 0]).save(half)
    np.save(features, pixels[4:].astype(np.float32).reshape(-1) / 255)
    sides = {"asks": "second", "into": "second"}
    expected = search.search(config, str(workdir), "data:5", 5, "full", **sides)
    for file in (whole, half, features):
        found = search.search(config, str(workdir), file, 5, "full", **sides)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.distances, expected.distances)


def test_kept_codes_are_read_and_never_replaced(workdir, config, monkeypatch):
    first = search.search(config, str(workdir), "data:0", 5, "full")
    file = workdir / "search" / "full-0-second.npz"
    stored = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "sweep", None)  # nothing is encoded again
        again = search.search(config, str(workdir), "data:0", 5, "full")
    np.testing.assert_array_equal(first.rows, again.rows)
    search.search(config, str(workdir), "data:0", 5, "full", into="first")
    try:
        file.write_bytes((workdir / "search" / "full-0-first.npz").read_bytes())
        with pytest.raises(UserError, match="is of other weights or rows"):
            search.search(config, str(workdir), "data:0", 5, "full")
        file.write_bytes(stored[:-100])
        with pytest.raises(UserError, match="is damaged"):
            search.search(config, str(workdir), "data:0", 5, "full")
    finally:
        file.write_bytes(stored)


def test_draws_words_and_pictures():
    shown = [Shown(np.full((4, 6, 3), 9, np.uint8), "label 1"), Shown(None, "warm coat")]
    hits = search.Hits("q", "full", "first", "second", "bits", Shown(None, "q"), np.arange(2), np.arange(2), shown, 9)
    assert Image.open(io.BytesIO(search.draw(hits))).height > 100
    assert search.table(hits).row_count == 2


def test_vectors_are_compared_by_cosine():
    items = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 1]], np.float32)
    cosine, rows = search._nearest(np.array([[0, 1]], np.float32), items, 3, binary=False)
    np.testing.assert_array_equal(rows, [1, 3, 2])
    np.testing.assert_allclose(cosine, [1, 1, 0.8])


def test_errors(workdir, config, tmp_path):
    for query, named, message in (
        ("data:60", {}, r"needs N in 0..59, got '60'"),
        ("warm coat", {}, r"neither a file nor words .* \(first: image, second: image\)"),
        ("none.png", {}, "must be an .npy file of numbers"),
        ("data:0", {"top": 1698}, r"--top must lie in \[1, 1697\]"),
        ("data:0", {"asks": "third"}, "Unknown side 'third'"),
        ("data:0", {"seed": 2}, r"--seed must lie in 0..1, got 2"),
        ("data:0", {"stage": "free"}, "no finished stage 'free'"),
    ):
        with pytest.raises(UserError, match=message):
            search.search(config, str(workdir), query, **named)
    bad = tmp_path / "bad.npy"
    for array, message in ((np.zeros(31), "must be an .npy file"), (np.full(32, np.nan), "not finite")):
        np.save(bad, array)
        with pytest.raises(UserError, match=message):
            search.search(config, str(workdir), str(bad), 5, asks="first")
    with pytest.raises(UserError, match="exists already"):
        search.main(["--workdir", str(workdir), "--query", "data:0", "--output", str(bad)])
