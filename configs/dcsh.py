"""Spectral hashing of two modalities (Hoang et al., IEEE TIP 2020): codes of both graphs, and networks that learn them.

    python -m experiments.train --config configs/dcsh.py --workdir runs/dcsh

Variants:
  default      the upper and the lower halves of scikit-learn's digits, 16 bits: all arms.
  smoke        the same code in seconds.
  clusters     Gaussian clusters in two views, drawn anew for each seed; codes only, no networks.
  fashion      Fashion-MNIST, images against words of their class's name, through convolutions over both.
  mirflickr, nuswide
               features of yours: an .npz with first, second, label and split (`data.data_dir`).
  iaprtc12     likewise, of a set prepared by TensorFlow Datasets (`data.tfds`, `data.columns`, `data.data_dir`).

Sizes of networks, anchors and lengths are ours: no code of the authors is known to us.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import hashing, pairs, settings

VARIANTS = ("default", "smoke", "clusters", "fashion", "mirflickr", "nuswide", "iaprtc12")


def arm(codes: str = "joint", **changes: Any) -> ConfigDict:
    """Which codes networks learn, and at which rate."""
    config = ConfigDict()
    config.codes = codes  # joint, first, second; lsh, lsh_first, lsh_second; cca, pca: linear functions
    config.lr = 3e-3
    config.weighted = True  # directions count by their eigenvalues; False: the objective never falls
    config.alpha, config.rho = 1.0, 0.1  # the pull between codes and graphs; of balance and independence of bits
    config.iters = 10  # rounds; 0: the initial codes
    config.update(changes)
    return config


def arms(**changes: Any) -> ConfigDict:
    """The method, what is left of it without each part, and what it has to beat."""
    made = {
        "joint": arm(**changes),
        "unweighted": arm(weighted=False, **changes),
        "init": arm(iters=0, **changes),
        "uncoupled": arm(alpha=0.0, **changes),
        "first": arm("first", iters=0, **changes),
        "second": arm("second", iters=0, **changes),
        "lsh": arm("lsh", **changes),
        "cca": arm("cca", **changes),
        "pca": arm("pca", **changes),
    }
    return ConfigDict(made)


def network() -> ConfigDict:
    """The hashing networks and how they are trained; their rate is the arm's."""
    config = ConfigDict({"hidden": 256})  # units before the code
    config.model, config.width = "cnn", 16  # of images
    config.widths, config.filters, config.dropout = (1, 2, 3, 4, 5), 128, 0.5  # of texts
    config.loss, config.agreement = "bce", 0.0  # or tanh; weight of what ties both sides
    config.epochs, config.optimizer, config.weight_decay, config.momentum = 50.0, "adam", 0.0, 0.9
    config.schedule, config.milestones, config.warmup_epochs = "cosine", (0,), 0.0
    return config


def base() -> ConfigDict:
    config = settings.base("dcsh")
    config.seeds, config.eval_batch_size, config.eval_epochs = 5, 200, 0.0
    config.bits = 16
    config.data, config.retrieval = pairs.section(), hashing.section()
    config.graph = ConfigDict({"anchors": 150, "nearest": 5, "kmeans_iters": 20})
    config.graph.normalize = "l2"  # of the features that graphs compare: or standardize, none
    config.graph.dense_anchors = 400  # graphs with more are kept as their entries alone
    config.codes = ConfigDict({"inner": 5, "itq_iters": 50, "judged": 1000, "redraw": False})
    config.network = network()
    config.arms = arms()
    return config


def features(config: ConfigDict, name: str, classes: int, first: int, second: int, examples: int, train: int) -> None:
    """Users' features at the paper's scale."""
    config.seeds, config.batch_size, config.eval_batch_size, config.log_every = 1, 128, 512, 100
    config.data = pairs.section(name, query_examples=2000, validation_examples=1000, train_examples=train)
    config.data.update({"num_examples": examples, "num_classes": classes, "several": True})
    config.data.update({"first_shape": (first,), "second_shape": (second,)})
    config.bits, config.graph.anchors, config.graph.normalize = 64, 500, "l2"
    config.network.hidden, config.network.epochs = 4096, 50.0
    config.arms = arms(lr=1e-4)


def get_config(variant: str = "default") -> ConfigDict:
    config = base()
    if variant == "smoke":
        config.seeds, config.batch_size, config.eval_batch_size, config.log_every = 2, 16, 48, 2
        config.data.query_examples, config.data.validation_examples, config.data.train_examples = 96, 48, 96
        config.bits, config.graph.anchors, config.graph.nearest, config.network.hidden = 8, 24, 3, 16
        config.network.epochs, config.loop.checkpoint_every = 1.0, 0
        for one in config.arms.values():
            one.iters = min(one.iters, 2)
    elif variant == "clusters":
        config.seeds = 10
        config.data = pairs.section("clusters", noise=1.0, examples=480, query_examples=40, validation_examples=40)
        config.graph.update({"anchors": 60, "normalize": "none"})
        config.codes.redraw, config.network.epochs = True, 0.0
        config.arms = ConfigDict({name: one for name, one in config.arms.items() if name not in ("cca", "pca")})
        config.arms.update({f"lsh_{side}": arm(f"lsh_{side}") for side in ("first", "second")})
    elif variant == "fashion":
        config.ensemble = "loop"
        config.data = pairs.section("fashion_text", examples=6000, query_examples=1000, validation_examples=500)
        config.eval_batch_size, config.graph.anchors = 500, 300
        config.network.width, config.network.filters, config.network.epochs = 8, 64, 5.0
    elif variant == "mirflickr":
        features(config, variant, 24, 4096, 1386, 20015, 5000)
    elif variant == "nuswide":
        features(config, variant, 10, 4096, 1000, 186577, 10496)  # rows that 256 devices share evenly
    elif variant == "iaprtc12":
        features(config, variant, 255, 4096, 2912, 20000, 5000)
        config.data.name, config.data.tfds, config.data.columns = "tfds", "iaprtc12", ("image", "text", "label")
    return config
