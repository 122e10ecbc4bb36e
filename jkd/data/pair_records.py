"""Pairs from sets that TFDS has prepared: three of their features as columns."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jkd.data.examples import Examples, from_columns
from jkd.data.records import ARRAY_RECORD, find_builder
from jkd.errors import UserError, unknown


def load_record_pairs(name: str, columns: tuple[str, ...], data_dir: str | None = None, split: str = "all") -> Examples:
    """Reads all rows of a set into memory: features of numbers as "first" and "second", classes as "label".

    Args:
      name: a TFDS set prepared as array_record; "name/config:version" works.
      columns: the features that are "first", "second" and "label"; the last is a class, or a sequence of classes.
      data_dir: where it is prepared; None: TFDS's own folder.
      split: what TFDS accepts; "all": every split.

    Raises:
      UserError: if the set is not there, has no such features, or they are no numbers of one shape.
    """
    if not name or len(columns) != 3:
        raise UserError(f"TFDS pairs need a set and its features for first, second and label, got {name!r}, {columns}.")
    builder = find_builder(name, data_dir, ())
    features: Any = builder.info.features
    for column in columns:
        if column not in features:
            raise unknown(f"feature of {name!r}", column, features)
    names = split if split != "all" else "+".join(builder.info.splits)
    partial = dict.fromkeys(columns, True)
    rows = builder.as_data_source(names, decoders=tfds.decode.PartialDecoding(partial), file_format=ARRAY_RECORD)
    records = [rows[i] for i in range(len(rows))]
    sides = {}
    for side, column in zip(("first", "second"), columns[:2], strict=True):
        try:
            sides[side] = np.stack([np.asarray(record[column]) for record in records])
        except ValueError as error:
            raise UserError(f"Feature {column!r} of {name!r} varies in shape: {features[column]}.") from error
    label = features[columns[2]]
    if isinstance(label, tfds.features.ClassLabel):
        classes = np.array([record[columns[2]] for record in records])
        return from_columns({**sides, "label": classes}, num_classes=label.num_classes, name=name)
    inner = getattr(label, "feature", None)
    if not isinstance(inner, tfds.features.ClassLabel):
        raise UserError(f"Feature {columns[2]!r} of {name!r} must be a class or a sequence of classes, got {label}.")
    tags = np.zeros((len(records), inner.num_classes), bool)
    for row, record in enumerate(records):
        tags[row, np.asarray(record[columns[2]], int)] = True
    return from_columns({**sides, "label": tags}, num_classes=inner.num_classes, name=name)
