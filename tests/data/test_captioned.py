import numpy as np
import pytest

from jkd import data
from jkd.data.seeding import random_state
from jkd.data.vocabulary import PADDING, Vocabulary, write_captions
from jkd.errors import UserError

SCENES = data.make_scenes(40, 0, noise=0.0)


@pytest.fixture(scope="module")
def digits():
    images = (np.arange(30)[:, None, None, None] * np.ones((1, 4, 4, 1))).astype(np.uint8)
    return data.from_arrays(images, np.arange(30) % 10, num_classes=10, name="tiny")


def spoken(made, row, caption):
    columns = made.examples.arrays
    return made.vocabulary.text(columns["words"][row, caption]).split()


def test_scenes_show_what_they_hold():
    columns = SCENES.examples.arrays
    assert columns["image"].shape == (40, 4, 4, 16)
    assert columns["words"].shape == columns["mask"].shape == (40, 5, 9)
    np.testing.assert_array_equal(columns["mask"], columns["words"] != PADDING)
    for row in range(40):
        things, places = columns["things"][row], columns["places"][row]
        assert len(set(things)) == len(set(places)) == 3
        cells = columns["image"][row].reshape(16, 16)
        hot = np.zeros((16, 12))
        hot[places, things] = 1
        np.testing.assert_array_equal(cells[:, :12], hot)
    where = columns["image"][0, :, :, 12:]
    np.testing.assert_array_equal(columns["image"][1, :, :, 12:], where)
    assert len(np.unique(np.round(where.reshape(16, 4), 4), axis=0)) == 16
    np.testing.assert_array_equal(SCENES.examples.labels, columns["things"][:, 0])


def test_captions_say_what_scenes_hold():
    columns = SCENES.examples.arrays
    orders, numbers = set(), set()
    for row in range(40):
        held = {(f"object{t}", f"cell{p}") for t, p in zip(columns["things"][row], columns["places"][row], strict=True)}
        for k in range(5):
            words = spoken(SCENES, row, k)
            said = [(words[i], words[i + 1]) for i in range(len(words) - 1) if words[i].startswith("object")]
            assert set(said) <= held
            assert len(said) == len(set(said)) == sum(word.startswith("cell") for word in words) >= 2
            assert sum(word.startswith("word") for word in words) <= 3
            orders.add(tuple(words.index(a) > words.index(b) for (a, _), (b, _) in [(said[0], said[-1])]))
            numbers.add(len(said))
    assert numbers == {2, 3}


def test_the_seed_decides_everything():
    again, other = data.make_scenes(40, 0, noise=0.0), data.make_scenes(40, 1, noise=0.0)
    for name, column in SCENES.examples.arrays.items():
        np.testing.assert_array_equal(again.examples.arrays[name], column)
    assert (other.examples.arrays["things"] != SCENES.examples.arrays["things"]).any()
    # What every machine and version of numpy draws.
    assert spoken(SCENES, 0, 0) == ["object9", "cell1", "object8", "cell6", "object7", "cell3"]


def test_collages_are_of_the_digits_that_they_name(digits):
    made = data.make_collages(digits, 20, 0, fewest=4, distractors=0)
    columns = made.examples.arrays
    assert columns["image"].shape == (20, 8, 8, 1)
    assert columns["image"].dtype == np.uint8
    tiles = columns["image"].reshape(20, 2, 4, 2, 4).swapaxes(2, 3).reshape(20, 4, 16)
    assert (tiles == tiles[:, :, :1]).all()
    np.testing.assert_array_equal(tiles[:, :, 0] % 10, columns["things"])
    words = spoken(made, 0, 0)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    corners = ("topleft", "topright", "bottomleft", "bottomright")
    said = dict(zip(words[1::2], words[::2], strict=True))
    assert said == {corners[i]: names[columns["things"][0, i]] for i in range(4)}
    plain = data.make_collages(digits, 20, 0, places=False, fewest=4, distractors=0)
    assert plain.examples.arrays["words"].shape == (20, 5, 4)
    assert sorted(spoken(plain, 0, 0)) == sorted(said.values())


def test_batches_hold_all_columns(digits):
    batch = data.source(SCENES.examples, 8, seed=3).batch(0)
    assert set(batch) == {"image", "words", "mask", "things", "places", "label", "index"}
    np.testing.assert_array_equal(batch["words"], SCENES.examples.arrays["words"][np.asarray(batch["index"])])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objects": 13}, "objects <= grid"),
        ({"features": 15}, "features >= types"),
        ({"noise": -1.0}, "noise must be finite and at least 0"),
        ({"grid": 0}, "grid must be finite and at least 1"),
        ({"captions": 0}, "captions >= 1"),
        ({"fewest": 4}, r"fewest in \[1, 3\]"),
        ({"distractor_words": 0}, "a vocabulary that has some"),
    ],
)
def test_mistakes_in_scenes(changes, says):
    with pytest.raises(UserError, match=says):
        data.make_scenes(4, 0, **changes)


def test_only_digits_make_collages():
    other = data.from_arrays(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4))
    with pytest.raises(UserError, match="ten digits; 'arrays' has 4 classes"):
        data.make_collages(other, 2, 0)


def test_captions_without_distractors_or_places():
    words = Vocabulary(("a", "b"), (), ())
    things = np.array([[0, 1]])
    found = write_captions(random_state("t", 0), words, things, None, captions=3, fewest=2, distractors=0)
    assert {words.text(one) for one in found[0]} <= {"a b", "b a"}


# --- users' files ---


def arrays(**changes):
    draw = np.random.default_rng(0)
    words = draw.integers(1, 9, (6, 2, 4))
    words[:, :, 3] = 0
    split = np.array(["train", "restval", "val", "test", "train", "test"])
    image = draw.normal(size=(6, 2, 2, 3)).astype(np.float32)
    made = {"image": image, "words": words, "split": split, **changes}
    return {name: array for name, array in made.items() if array is not None}


def test_an_npz_of_features_and_captions(tmp_path):
    given = arrays(table=np.ones((10, 5), np.float32))
    np.savez(tmp_path / "coco.npz", **given)
    found = data.read_captioned(tmp_path / "coco.npz")
    assert {name: index.tolist() for name, index in found.rows.items()} == {
        "train": [0, 1, 4],
        "validation": [2],
        "test": [3, 5],
    }
    assert found.words == 10
    assert found.table.shape == (10, 5)
    np.testing.assert_array_equal(found.examples.arrays["mask"], given["words"] > 0)
    assert data.source(found.examples, 3).batch(0)["image"].shape == (3, 2, 2, 3)


def test_a_folder_stays_on_disk(tmp_path):
    for name, array in arrays().items():
        np.save(tmp_path / f"{name}.npy", array)
    found = data.read_captioned(tmp_path)
    assert found.examples.arrays is None
    assert (found.words, found.table) == (9, None)
    source = data.source(found.examples.subset([4, 1]), 2)
    assert isinstance(source, data.StreamSource)
    np.testing.assert_array_equal(source.batch(0)["image"], arrays()["image"][[4, 1]])
    np.testing.assert_array_equal(source.batch(0)["index"], [4, 1])


def test_vectors_of_words_need_a_mask(tmp_path):
    vectors = np.ones((6, 2, 4, 3), np.float32)
    mask = np.ones((6, 2, 4), bool)
    np.savez(tmp_path / "a.npz", **arrays(words=vectors, mask=mask))
    assert data.read_captioned(tmp_path / "a.npz").words == 0
    np.savez(tmp_path / "b.npz", **arrays(words=vectors))
    with pytest.raises(UserError, match="'mask' must be bool"):
        data.read_captioned(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split": None}, "missing: split"),
        ({"captions": np.zeros(6)}, "unknown: captions"),
        ({"split": np.array(["train"] * 6)}, "no row of validation"),
        ({"split": np.array(["training"] * 6)}, "got 'training'"),
        ({"split": np.array(["train"] * 5)}, "5 splits"),
        ({"words": np.zeros((6, 2, 4), int)}, "caption 0 of row 0 is empty"),
        ({"words": np.full((6, 2, 4), -1)}, "numbers >= 0"),
        ({"words": np.ones((6, 4), int)}, "'words' must be"),
        ({"image": np.zeros((6, 4), np.float32)}, "'image' must be"),
        ({"image": np.full((6, 2, 2, 3), np.nan, np.float32)}, "NaN or inf"),
        ({"table": np.ones((4, 5), np.float32)}, "'table' has 4 rows"),
        ({"split": np.array([{}] * 6, dtype=object)}, "cannot be read"),
    ],
)
def test_mistakes_in_files(changes, says, tmp_path):
    np.savez(tmp_path / "given.npz", **arrays(**changes))
    with pytest.raises(UserError, match=says):
        data.read_captioned(tmp_path / "given.npz")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        data.read_captioned(tmp_path / "none.npz")
