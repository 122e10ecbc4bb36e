"""Energy KD (Kim et al., Knowledge-Based Systems 296, 2024), its baselines and its controls.

    python -m experiments.train --config configs/energy_kd.py --workdir runs/energy_kd

Variants:
  default      5,000 MNIST digits: of 2,000, each seed draws 1,000 to train and 1,000 to validate; 3,000 to test; MLP
               teacher and students, 8 paired seeds. All seeds of all arms: about a minute on 2 CPU cores.
  smoke        the same code in seconds.
  fashion_lt   Fashion-MNIST with a long tail (imbalance 50), convolutional nets with batch norm.
  cifar100     the authors' setting: ResNet-56 -> 20; needs cifar100 prepared as array_record (`data.data_dir`).
  cifar100_lt  the same with a long tail (imbalance 100).
  imagenet     ResNet-34 -> 18, needs imagenet2012 prepared as array_record.

Every arm has its own learning rate, epochs and loss: --config.arms.kd.lr=0.02; --config.only=ce,kd runs two arms.
"""

from ml_collections import ConfigDict

VARIANTS = ("default", "smoke", "fashion_lt", "cifar100", "cifar100_lt", "imagenet")


def arm(loss: str, *, mix: str = "none", **changes) -> ConfigDict:
    """One student; see `experiments/energy_kd.py` for what the fields do."""
    config = ConfigDict()
    config.loss = loss  # ce, kd, energy_kd, dkd, energy_dkd
    config.mix = mix  # none; high_energy: HE-DA; all: the whole batch
    config.mixer = "cutmix"  # or mixup
    config.lr = 0.01
    config.epochs = 40.0
    config.milestones = (0,)
    config.ce_weight, config.kd_weight = 0.1, 0.9
    config.temperature = 4.0
    config.t_low, config.t_mid, config.t_high = 2.0, 4.0, 6.0
    config.low_rate, config.high_rate = 0.3, 0.3
    config.alpha, config.beta, config.warmup_epochs = 1.0, 8.0, 20.0
    config.update(changes)
    return config


def all_arms(long: float = 1.5, **changes) -> ConfigDict:
    """The paper's arms, and two controls: the temperatures of the authors' code, which are the paper's reversed, and KD
    with the epochs of `long` training.
    """
    arms = ConfigDict()
    arms.ce = arm("ce", **changes)
    arms.kd = arm("kd", **changes)
    arms.energy_kd = arm("energy_kd", **changes)
    arms.energy_kd_reversed = arm("energy_kd", **{**changes, "t_low": 6.0, "t_high": 2.0})
    arms.dkd = arm("dkd", **changes)
    arms.energy_dkd = arm("energy_dkd", **{**changes, "low_rate": 0.1, "high_rate": 0.1})
    arms.kd_cutmix = arm("kd", mix="all", **changes)
    arms.kd_he_da = arm("kd", mix="high_energy", **{**changes, "low_rate": 0.0, "high_rate": 0.5})
    epochs = {"epochs": long * arms.kd.epochs}
    arms.kd_long = arm("kd", **{**changes, **epochs})
    arms.energy_kd_long = arm("energy_kd", **{**changes, **epochs})
    return arms


def network(model: str, lr: float, epochs: float) -> ConfigDict:
    """A model and how it is trained; the rate and epochs of students are their arm's."""
    config = ConfigDict()
    config.model, config.hidden, config.width = model, (256, 256), 16
    config.lr, config.epochs = lr, epochs
    config.schedule, config.milestones = "cosine", (0,)  # or "steps": tenfold drops after these epochs
    config.momentum, config.weight_decay = 0.9, 5e-4
    # A warm start: WORKDIR:STAGE, .safetensors or .pth file; rules "regex -> replacement", "regex ->" drops.
    config.init_from, config.init_rules = "", ()
    return config


def digits() -> ConfigDict:
    """The small default."""
    config = ConfigDict()
    config.method = "energy_kd"
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
    config.data.imbalance = 1.0
    config.data.shift, config.data.pad_crop, config.data.flip = 1, 0, False
    config.data.mean, config.data.std = (0.1307,), (0.3081,)
    # For plans without the data: what they look like.
    config.data.blank, config.data.shape, config.data.num_classes = False, (28, 28, 1), 10
    config.data.num_examples = 2000

    config.teacher = network("mlp", 0.05, 40.0)
    config.teacher.source, config.teacher.bank = "live", 8  # or cached: logits of so many views of each image
    config.teacher.workdir, config.teacher.stage = "", "teacher"  # a finished run, or a file, to take it from
    config.student = network("mlp", 0.01, 40.0)
    config.student.hidden = (24, 24)
    config.arms = all_arms()
    config.only = ()  # some of the arms; empty: all; ("teacher",): no student

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "slices": 1})
    config.loop = ConfigDict({"checkpoint_every": 500, "keep": 3, "progress": True, "tensorboard": True})
    config.loop.peer_timeout, config.loop.hang_timeout = 60.0, 1800.0  # seconds; 0: off; see docs/reliability.md
    config.loop.workers, config.loop.prefetch = 4, 4  # threads that read what does not fit in memory; batches ahead
    return config


def smoke(config: ConfigDict) -> None:
    """Seconds: two seeds, few images, all arms."""
    config.seeds, config.batch_size, config.eval_batch_size, config.log_every = 2, 16, 96, 1
    config.data.train_examples, config.data.validation_examples = 40, 48
    config.data.name, config.data.shape, config.data.num_examples = "digits8x8", (8, 8, 1), 1297
    config.data.train_split, config.data.test_split = "train", "test"
    config.data.shift = 0  # compiling random shifts would take longer than all else
    config.eval_epochs = 0.0
    config.teacher.hidden, config.student.hidden = (16,), (8,)
    config.teacher.epochs = 0.8
    for one in config.arms.values():
        one.epochs = 0.8
    config.loop.checkpoint_every = 0


def fashion_lt(config: ConfigDict) -> None:
    """Real data where the tail is hard: 60,000 images cut to a long tail."""
    config.ensemble, config.batch_size, config.eval_epochs = "loop", 64, 0.0
    config.data.name, config.data.train_split, config.data.test_split = "fashion_mnist", "train", "test"
    config.data.train_examples, config.data.validation_examples = 10000, 2000
    config.data.imbalance = 50.0
    config.data.mean, config.data.std = (0.286,), (0.353,)
    config.data.shift, config.data.flip = 2, True
    config.data.num_examples = 60000
    config.teacher.update({"model": "cnn", "width": 24, "epochs": 40.0, "lr": 0.2})
    config.student.update({"model": "cnn", "width": 8})
    config.arms = all_arms(epochs=30.0, lr=0.15)
    config.seeds = 5


def cifar100(config: ConfigDict) -> None:
    """The paper's CIFAR-100 setting.

    The authors train KD, DKD and HE-DA for 240 epochs and what follows energies for 360: the arms `*_long`. Every arm
    has its partner of equal epochs; `energy_kd_reversed_long` is the authors' code as it stands.
    """
    config.seeds, config.ensemble, config.eval_epochs, config.log_every = 1, "loop", 1.0, 100
    config.data.name, config.data.train_split, config.data.test_split = "cifar100", "train", "test"
    config.data.train_examples, config.data.validation_examples = 0, 0
    config.data.shape, config.data.num_classes, config.data.num_examples = (32, 32, 3), 100, 50000
    config.data.shift, config.data.pad_crop, config.data.flip = 0, 4, True
    config.data.mean, config.data.std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    steps = {"schedule": "steps", "milestones": (150, 180, 210)}
    config.teacher.update({"model": "resnet56", "lr": 0.05, "epochs": 240.0, **steps})
    config.student.update({"model": "resnet20", **steps})
    config.arms = all_arms(lr=0.05, epochs=240.0, milestones=(150, 180, 210))
    # The authors' for ResNet-56 -> 20; theirs of DKD also serve Energy DKD, which they trained for other nets only.
    config.arms.kd_he_da.high_rate = 0.4
    config.arms.dkd.beta = config.arms.energy_dkd.beta = 2.0
    for name in ("kd", "energy_kd", "energy_kd_reversed", "dkd", "energy_dkd"):
        config.arms[f"{name}_long"] = config.arms[name].copy_and_resolve_references()
        config.arms[f"{name}_long"].update({"epochs": 360.0, "milestones": (150, 180, 210, 240, 270, 300)})
    config.loop.checkpoint_every = 5000


def cifar100_lt(config: ConfigDict) -> None:
    """CIFAR-100 with a long tail."""
    cifar100(config)
    config.data.imbalance = 100.0


def imagenet(config: ConfigDict) -> None:
    """The paper's ImageNet setting: 100 epochs, batch 512, KD weights 0.5/0.5 at T = 1."""
    config.seeds, config.ensemble, config.eval_epochs, config.log_every = 1, "loop", 1.0, 100
    config.batch_size, config.eval_batch_size = 512, 512
    config.data.name, config.data.image_size = "imagenet2012", 224
    config.data.train_split, config.data.test_split = "train", "validation"
    config.data.train_examples, config.data.validation_examples = 0, 0
    config.data.shape, config.data.num_classes, config.data.num_examples = (224, 224, 3), 1000, 1281167
    config.data.shift, config.data.flip = 0, True
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    steps = {"schedule": "steps", "milestones": (30, 60, 90), "weight_decay": 1e-4}
    config.teacher.update({"model": "resnet34", "lr": 0.2, "epochs": 100.0, **steps})
    config.student.update({"model": "resnet18", **steps})
    weights = {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": 1.0}
    config.arms = all_arms(lr=0.2, epochs=100.0, milestones=(30, 60, 90), low_rate=0.2, high_rate=0.2)
    for name in ("kd", "kd_long", "kd_cutmix", "kd_he_da"):
        config.arms[name].update(weights)
    for name in ("energy_kd", "energy_kd_reversed", "energy_kd_long"):  # no published setting: KD's weights
        config.arms[name].update({"ce_weight": 0.5, "kd_weight": 0.5})
    for name in ("dkd", "energy_dkd"):
        config.arms[name].update({"beta": 0.5, "warmup_epochs": 1.0, "temperature": 1.0})
    config.loop.checkpoint_every = 2000


def get_config(variant: str = "default") -> ConfigDict:
    config = digits()
    change = {"smoke": smoke, "fashion_lt": fashion_lt, "cifar100": cifar100, "cifar100_lt": cifar100_lt}
    if variant != "default":
        {**change, "imagenet": imagenet}[variant](config)
    return config
