import numpy as np
import pytest

from jkd import data, train
from jkd.data.rows import BlankRows
from jkd.errors import UserError
from jkd.train.passes import evaluate, sweep

COLUMNS = {
    "first": np.arange(46, dtype=np.float64).reshape(23, 2),
    "second": np.arange(23 * 6, dtype=np.int64).reshape(23, 2, 3),
    "second_mask": np.arange(46).reshape(23, 2) % 2 == 0,
    "label": np.arange(23) % 3,
}


@pytest.fixture(scope="module")
def pairs():
    return data.from_columns(COLUMNS, name="pairs", num_classes=4)


def test_rows_hold_every_column(pairs):
    batch = pairs.subset([5, 2]).read(np.array([1]))
    assert {name: column.dtype for name, column in batch.items()} == {
        "first": np.float32,
        "second": np.int32,
        "second_mask": np.bool_,
        "label": np.int32,
    }
    assert batch["first"].tolist() == [[4, 5]]
    assert batch["second"].tolist() == [[[12, 13, 14], [15, 16, 17]]]
    assert len(pairs) == 23
    assert pairs.nbytes == 23 * (8 + 24 + 2 + 4)
    assert (pairs.num_classes, pairs.labels.tolist()) == (4, COLUMNS["label"].tolist())


def test_batches_hold_every_column_and_the_row(pairs):
    part = pairs.subset(np.arange(22, 3, -1))
    resident = data.source(part, 8, seed=3)
    streamed = data.source(part, 8, seed=3, resident="stream")
    assert isinstance(resident, data.MemorySource)
    for t in (0, 2, 5):
        batch, other = resident.batch(t), streamed.batch(t)
        assert set(batch) == set(other) == {*COLUMNS, "index"}
        for name, column in COLUMNS.items():
            np.testing.assert_array_equal(batch[name], column[np.asarray(batch["index"])])
            np.testing.assert_array_equal(batch[name], other[name])


def test_eight_devices_read_the_same_rows(pairs):
    for resident in ("device", "stream"):
        source = data.source(pairs, 8, resident=resident)
        rows = sweep(lambda args, batch, key: batch, (), source, mesh=train.make_mesh())
        assert train.make_mesh().size == 8
        for name, column in COLUMNS.items():
            np.testing.assert_array_equal(rows[name], column)
        np.testing.assert_array_equal(rows["index"], np.arange(23))


def test_an_evaluator_sees_every_column_and_a_mask(pairs):
    def collect(published, consts, batch, mask):
        return (batch["first"].sum(1) * mask).sum(), (batch["second_mask"].any(1) & mask).sum()

    evaluator = train.Evaluator(data.source(pairs, 8), collect, lambda sums: {"sum": sums[0], "rows": sums[1]})
    found = evaluate(evaluator, {}, {}, mesh=train.make_mesh())
    assert (float(found["sum"]), int(found["rows"])) == (45 * 46 / 2, 23)


def test_splits_with_one_class_and_with_several(pairs):
    first, second = pairs.split(9, seed=1)
    assert np.bincount(first.labels).tolist() == [3, 3, 3]
    assert sorted([*first.indices, *second.indices]) == list(range(23))
    several = data.from_columns({**COLUMNS, "label": np.eye(4, dtype=bool)[COLUMNS["label"]]}, name="tags")
    first, second = several.split(9, seed=1)
    assert several.num_classes == 4
    assert first.labels.shape == (9, 4)
    assert sorted([*first.indices, *second.indices]) == list(range(23))
    assert first.indices.tolist() != list(range(9))
    for draw in (lambda: several.per_class(1), lambda: several.long_tail(2)):
        with pytest.raises(UserError, match="'tags' have several classes each"):
            draw()


def test_stand_ins_have_the_shapes_of_what_they_stand_for():
    columns = {"first": ((5,), np.float32), "second_mask": ((2,), np.bool_)}
    small = data.blank_columns(12, columns, 5, several=True)
    assert isinstance(data.source(small, 4), data.MemorySource)
    assert small.labels.sum(0).tolist() == [3, 3, 2, 2, 2]
    large = data.blank_columns(10**6, {"first": ((1000,), np.float32)}, 5)
    assert isinstance(large.rows, BlankRows)
    assert large.nbytes == 10**6 * 4004
    streamed = data.source(large, 4).local(3)
    assert streamed["first"].shape == (4, 1000)
    assert streamed["label"].tolist() == [2, 3, 4, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "needs a column 'label'"),
        ({"index": np.arange(23)}, "none 'index'"),
        ({"first": np.zeros((22, 2))}, "equal length, got {'first': 22"),
        ({"first": np.float32(1)}, "equal length, got {'first': 0"),
        (
            {"first": np.where(np.arange(46).reshape(23, 2) == 7, np.nan, 0)},
            "'first' of 'bad' holds NaN or inf.* row 3",
        ),
        ({"first": np.array(["a"] * 23)}, "'first' of 'bad' must hold numbers or booleans"),
        ({"label": np.zeros((23, 4))}, r"must be int\[N\] or bool\[N, 4\], got float32\[23, 4\]"),
        ({"label": np.zeros((23, 3), bool)}, r"got bool\[23, 3\]"),
        ({"label": np.full(23, 4)}, r"in \[0, 4\), got 4 to 4"),
    ],
)
def test_what_is_no_table_is_refused(changes, message):
    columns = {name: column for name, column in {**COLUMNS, **changes}.items() if column is not None}
    with pytest.raises(UserError, match=message):
        data.from_columns(columns, name="bad", num_classes=4)
