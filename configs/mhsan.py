"""MHSAN: several attention heads in visual-semantic embedding (Park et al., WACV 2020).

    python -m experiments.train --config configs/mhsan.py --workdir runs/mhsan

Variants:
  default      2 x 2 collages of scikit-learn's digits (real pixels), with made-up captions that name digits and corners
               among distractors: heads, negatives, pooling.
  smoke        the same code in seconds, with a small convolutional network in front of one arm's heads.
  scenes       no real data: feature maps of procedural scenes of three objects on a grid, and captions of them.
  single       the same with one object: the control, where one head is enough.
  coco         the paper's settings on MS-COCO (Karpathy's splits; recalls of all 5,000 test images and of 5 folds).
  flickr30k    the paper's settings on Flickr30K.

`coco` and `flickr30k` read features and captions that you bring, because nothing is downloaded: data.file is an .npz,
or a folder of .npy files whose images stay on disk; `jkd.data.read_captioned` says with which arrays. They also take
pixels: set network.backbone, and network.pretrained where its first layers are to stay as they are. Widths and lengths
of the paper's runs are those of its authors' code; its factors of the learning rate, a misprint, are not.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import settings

LARGE = {"coco": (113287, 160), "flickr30k": (29000, 160)}  # training images, and pairs in a batch
VARIANTS = ("default", "smoke", "scenes", "single", *LARGE)


def arm(heads: int = 4, **changes: Any) -> ConfigDict:
    """How the images and captions of one pair of encoders are pooled, and what they are trained by."""
    config = ConfigDict()
    config.heads, config.width = heads, 64  # numbers of a position, and so of a head
    config.pool = "attention"  # or mean
    config.diversity = 0.1  # weight of the heads' penalty, beside a sum over pairs
    config.negatives = "hard"  # or all, or how many of the hardest
    config.warmup = 0.1  # share of the steps in which all negatives count
    config.batch_size = 0  # 0: that of the config
    config.lr = 3e-3
    config.update(changes)
    return config


def data(name: str, **changes: Any) -> ConfigDict:
    """Which pictures and captions; fields of other sets are not used."""
    config = ConfigDict()
    config.name = name  # scenes or collages, which are made; coco, flickr30k or file
    config.file, config.data_dir = "", ""  # of coco, flickr30k and file: an .npz, or a folder of .npy files
    config.seed = 0  # of what is made
    config.train_examples, config.validation_examples, config.test_examples = 2000, 500, 500
    config.captions, config.distractors, config.distractor_words = 5, 3, 10
    config.fewest = 2  # things that a caption names at least
    config.grid, config.objects, config.types, config.features, config.noise = 4, 3, 12, 16, 0.1  # of scenes
    config.digits, config.places = "digits8x8", True  # of collages
    config.mean, config.std = (0.3,), (0.38,)  # of pixels
    config.cells, config.coordinates = 0, False  # pixels as a map of so many cells a side; two more channels
    # For plans without the data: what they look like.
    config.blank, config.shape, config.features_given = False, (16, 16, 1), False
    config.length, config.words, config.table_dim, config.num_examples = 11, 25, 0, 2000
    config.update(changes)
    return config


def network(**changes: Any) -> ConfigDict:
    """What the encoders of all arms share."""
    config = ConfigDict()
    config.dim, config.hidden, config.dropout = 64, 32, 0.0
    config.cell, config.layers, config.peephole, config.cell_dropout = "sru", 1, True, 0.0  # or gru
    config.word_dim = 32  # of learned words
    config.backbone, config.backbone_width, config.tap = "", 0, "block2"  # "": maps or pixels are embedded as they are
    config.pretrained = False  # whether the backbone's first layers and its statistics stay as they are
    config.update(changes)
    return config


def base() -> ConfigDict:
    config = settings.base("mhsan")
    for name in ("average", "microbatches", "eval_epochs"):
        del config[name]
    config.seeds, config.batch_size, config.eval_batch_size = 5, 64, 250
    config.steps, config.eval_every, config.log_every = 1000, 250, 50
    config.folds = 1  # parts of the test images that are searched separately, besides all of them
    config.gallery = 4  # test images whose attention is drawn
    config.data = data("collages", cells=2, coordinates=True)
    config.network = network()
    config.train = ConfigDict()
    config.train.margin, config.train.reduction = 0.2, "sum"
    config.train.chunk_size = 0  # rows of scores in memory at a time; 0: all
    config.train.text_from, config.train.image_from = 0.0, 0.0  # epochs, each of all captions
    config.train.clip = 0.0  # largest norm of the gradients; 0: any
    config.train.schedule = "cosine"  # or factors: the rate times each factor from its epoch on
    config.train.epochs, config.train.factors = (2.0, 5.0, 10.0, 40.0), (0.2, 0.5, 0.1, 0.1)
    return config


def heads(wide: int) -> dict[str, ConfigDict]:
    """One head, one of so wide positions that all is as many parameters as with four, and several."""
    return {"heads1": arm(1), "wide1": arm(1, width=wide), "heads4": arm(4), "heads8": arm(8)}


def others() -> dict[str, ConfigDict]:
    """What else the heads are compared with."""
    return {
        "mean": arm(1, pool="mean"),
        "undiverse": arm(4, diversity=0.0),
        "diverse": arm(4, diversity=10.0),
        "all_negatives": arm(4, negatives="all"),
        "without_warmup": arm(4, warmup=0.0),
        "batch16": arm(4, batch_size=16),
    }


def paper(config: ConfigDict, name: str) -> None:
    """The settings of the authors' code."""
    examples, config.batch_size = LARGE[name]
    config.seeds, config.ensemble, config.precision, config.remat = 1, "loop", "bfloat16", True
    config.data = data(name, captions=5, shape=(8, 8, 2048), features_given=True, num_examples=examples)
    config.data.length, config.data.words, config.data.table_dim = 60, 30000, 620
    config.network = network(dim=2400, hidden=350, dropout=0.5, layers=4, cell_dropout=0.25, word_dim=620)
    epoch = 5 * examples / config.batch_size
    config.steps, config.eval_every, config.log_every = round(100 * epoch), round(epoch), 100
    config.train.schedule = "factors"
    config.train.text_from, config.train.image_from = 5.0, 20.0
    if name == "coco":
        config.folds = 5
    else:
        config.train.text_from, config.train.image_from = 4.0, 41.0
        config.train.epochs, config.train.factors = (3.0, 7.0, 52.0), (0.2, 0.5, 0.1)
    config.loop.checkpoint_every = 5000
    rate = {"lr": 0.005, "width": 2400, "warmup": 0.0}
    arms = {f"heads{n}": arm(n, **rate) for n in (1, 5, 10)}
    config.arms = ConfigDict(arms | {"undiverse": arm(10, diversity=0.0, **rate)})


def smoke(config: ConfigDict) -> None:
    config.seeds, config.batch_size, config.eval_batch_size, config.log_every = 2, 16, 16, 1
    config.steps, config.eval_every, config.folds = 4, 2, 2
    config.data = data("collages", train_examples=32, validation_examples=16, test_examples=24, captions=2)
    config.network = network(dim=16, hidden=8, dropout=0.1, word_dim=8, backbone="cnn", backbone_width=4)
    config.train.text_from, config.train.image_from = 0.5, 0.75
    arms = {name: one for name, one in (heads(128) | others()).items() if name in ("heads1", "heads4", "mean")}
    config.arms = ConfigDict(arms)
    for one in config.arms.values():
        one.width = 12
    config.loop.checkpoint_every = 0


def get_config(variant: str = "default") -> ConfigDict:
    config = base()
    config.arms = ConfigDict(heads(128) | others())  # 51,040 parameters, and 50,784 of heads4
    if variant == "smoke":
        smoke(config)
    elif variant in ("scenes", "single"):
        config.data = data("scenes")
        if variant == "single":
            config.data.objects, config.data.fewest = 1, 1
        config.arms = ConfigDict(heads(137) | {"mean": others()["mean"]})  # 48,157, and 48,032 of heads4
    elif variant in LARGE:
        paper(config, variant)
    return config
