"""What all configs share: data sets, networks, how a run is executed."""

from typing import Any

from ml_collections import ConfigDict


def base(method: str) -> ConfigDict:
    """5,000 MNIST digits: the small default of most methods. It has no networks and no arms yet."""
    config = ConfigDict()
    config.method = method
    config.seed, config.seeds, config.ensemble = 0, 8, "vmap"  # paired seeds; vmap, unroll or loop
    config.batch_size, config.eval_batch_size = 64, 1000
    config.eval_epochs = 10.0  # between evaluations; the last one always happens
    config.log_every = 50

    config.precision = "float32"  # or bfloat16: what models compute in; parameters, losses and sums stay float32
    config.remat, config.microbatches = False, 1  # less memory for the same step
    config.average = ConfigDict({"kind": "none", "decay": 0.999, "start_epoch": 0.0})  # ema or mean of the parameters

    config.data = ConfigDict()
    config.data.name, config.data.data_dir, config.data.image_size = "mnist5k", "", 0
    # Every seed draws training and validation rows of its own from the first; all are tested on the second.
    config.data.train_split, config.data.test_split = "train+test[:1000]", "test[1000:]"
    config.data.train_examples, config.data.validation_examples = 0, 1000  # 0: all others
    config.data.test_per_class = 0  # test rows of each class; 0: all
    config.data.imbalance = 1.0
    config.data.weak = augmentation(shift=1)
    config.data.strong = augmentation(shift=3, cutout=8)
    config.data.resize = 0  # images of one size come to models resized to this side, in views of both kinds
    config.data.mean, config.data.std = (0.1307,), (0.3081,)
    # For plans without the data: what they look like.
    config.data.blank, config.data.shape, config.data.num_classes = False, (28, 28, 1), 10
    config.data.num_examples = 2000

    config.arms = ConfigDict()
    config.only = ()  # some of the arms and other stages that can be run alone; empty: all

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "slices": 1})
    config.loop = ConfigDict({"checkpoint_every": 500, "keep": 3, "progress": True, "tensorboard": True})
    config.loop.peer_timeout, config.loop.hang_timeout = 60.0, 1800.0  # seconds; 0: off; see docs/reliability.md
    config.loop.workers, config.loop.prefetch = 4, 4  # threads that read what does not fit in memory; batches ahead
    return config


def network(model: str, lr: float, epochs: float) -> ConfigDict:
    """A model and how it is trained; the rate and epochs of students are their arm's."""
    config = ConfigDict()
    config.model, config.hidden, config.width = model, (256, 256), 16  # hidden: of mlp; width: of cnn
    config.norm = False  # of mlp: batch normalization
    config.lr, config.epochs = lr, epochs
    config.schedule, config.milestones = "cosine", (0,)  # or cosine_epochs, or steps: tenfold drops after these epochs
    config.warmup_epochs = 0.0  # in which the rate rises linearly
    config.optimizer = "sgd"  # or adam: no momentum, and weight decay that is not scaled by its steps
    config.momentum, config.weight_decay = 0.9, 5e-4
    return config


def augmentation(**changes: Any) -> ConfigDict:
    """How images are augmented, in this order; zeros leave a step out.

    `crop`: the least share of the area that random resized crops keep; `rotation`: at most so many degrees; `jitter`:
    of color, as a share; the others in pixels.
    """
    steps: dict[str, Any] = {"crop": 0.0, "shift": 0, "pad_crop": 0, "flip": False, "rotation": 0.0}
    steps |= {"jitter": 0.0, "policy": "none", "cutout": 0}
    return ConfigDict(steps | changes)


def smoke(config: ConfigDict) -> None:
    """Seconds: two seeds, few images."""
    config.seeds, config.batch_size, config.eval_batch_size, config.log_every = 2, 16, 96, 1
    config.data.train_examples, config.data.validation_examples = 40, 48
    digits8x8(config)
    # Compiling random shifts would take longer than all else.
    config.data.weak, config.data.strong = augmentation(), augmentation(cutout=2)
    config.eval_epochs = 0.0
    config.loop.checkpoint_every = 0


def digits8x8(config: ConfigDict) -> None:
    """scikit-learn's digits."""
    config.data.name, config.data.shape, config.data.num_examples = "digits8x8", (8, 8, 1), 1297
    config.data.train_split, config.data.test_split = "train", "test"


def cifar100(config: ConfigDict) -> None:
    """CIFAR-100 with padded crops and flips."""
    config.seeds, config.ensemble, config.eval_epochs, config.log_every = 1, "loop", 1.0, 100
    config.data.name, config.data.train_split, config.data.test_split = "cifar100", "train", "test"
    config.data.train_examples, config.data.validation_examples = 0, 0
    config.data.shape, config.data.num_classes, config.data.num_examples = (32, 32, 3), 100, 50000
    config.data.weak = augmentation(pad_crop=4, flip=True)
    config.data.strong = augmentation(policy="randaugment", pad_crop=4, flip=True)
    config.data.mean, config.data.std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    config.loop.checkpoint_every = 5000


def imagenet(config: ConfigDict) -> None:
    """ImageNet, random crops of 224 pixels and flips."""
    config.seeds, config.ensemble, config.eval_epochs, config.log_every = 1, "loop", 1.0, 100
    config.batch_size, config.eval_batch_size = 512, 512
    config.data.name, config.data.image_size = "imagenet2012", 224
    config.data.train_split, config.data.test_split = "train", "validation"
    config.data.train_examples, config.data.validation_examples = 0, 0
    config.data.shape, config.data.num_classes, config.data.num_examples = (224, 224, 3), 1000, 1281167
    config.data.weak = augmentation(flip=True)
    config.data.strong = augmentation(policy="randaugment", flip=True)
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.loop.checkpoint_every = 2000


def cub200(config: ConfigDict) -> None:
    """Caltech's birds, read as ImageNet is."""
    imagenet(config)
    config.data.name, config.data.test_split = "caltech_birds2011", "test"
    config.data.num_classes, config.data.num_examples = 200, 5994
    config.loop.checkpoint_every = 500
