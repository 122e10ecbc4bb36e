"""Small TFDS sets written as array_record without TensorFlow."""

import io

import numpy as np
import pytest
from PIL import Image

NUM = 40
CLASSES = 4


def encode(pixels, image_format):
    """An encoded image as a file object, which TFDS stores as it is."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    file.seek(0)
    return file


@pytest.fixture(scope="session")
def tiny_images():
    """uint8[NUM, 8, 8, 3] and labels 0..CLASSES-1 in turn."""
    images = np.random.RandomState(0).randint(0, 256, (NUM, 8, 8, 3)).astype(np.uint8)
    return images, np.arange(NUM, dtype=np.int32) % CLASSES


def write_set(data_dir, set_name, version, features, examples):
    """Writes `examples` as split "train" of the TFDS set `set_name`, without registering it."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        code_path = None
        VERSION = tfds.core.Version(version)

        def _info(self):
            structure = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=structure, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    from jkd.data.records import quiet

    with quiet():
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory, tiny_images):
    """A TFDS data folder: cifar100 (PNG, ids), photos (JPEG of variable size), unlabeled."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    images, labels = tiny_images
    label = tfds.features.ClassLabel(num_classes=CLASSES)
    write_set(
        root,
        "cifar100",
        "3.0.2",
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": label,
        },
        [
            {"id": f"n{i}", "image": encode(image, "PNG"), "label": int(k)}
            for i, (image, k) in enumerate(zip(images, labels, strict=True))
        ],
    )
    photos = [np.full((20 + i, 30, 3), 5 * i, np.uint8) for i in range(12)]
    for photo in photos:
        photo[:, 15:] = 250  # the right half is bright: crops differ
    write_set(
        root,
        "photos",
        "1.0.0",
        {"image": tfds.features.Image(), "label": label},
        [{"image": encode(photo, "JPEG"), "label": i % CLASSES} for i, photo in enumerate(photos)],
    )
    write_set(root, "unlabeled", "1.0.0", {"score": tfds.features.Scalar(np.float32)}, [{"score": 1.0}])
    return root
