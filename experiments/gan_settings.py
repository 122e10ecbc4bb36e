"""What the configs of generators share: networks, the game they play, data and how images are judged."""

from typing import Any

from ml_collections import ConfigDict

from experiments import settings


def generator(model: str, **changes: Any) -> ConfigDict:
    """How images are made; fields of other models are not used."""
    config = ConfigDict()
    config.model = model  # mlp, dcgan or stylegan2
    config.latent_dim = 32
    config.hidden = (128, 128)  # of mlp
    config.width = 32  # of dcgan: channels before the last layer
    config.fmap_base, config.fmap_max = 8192, 512  # of stylegan2: channels are min(2 base / resolution, max)
    config.style_dim, config.mapping_layers = 512, 8  # of stylegan2 (of mlp with a condition: style_dim)
    config.architecture = "skip"  # of stylegan2: or resnet
    config.attention = ()  # of stylegan2: blocks as "RESOLUTION:KIND", of global, patchwise, dynamic and tokens
    config.style_mixing = 0.0  # of stylegan2: share of images with styles from two latents
    config.update(changes)
    return config


def discriminator(model: str, **changes: Any) -> ConfigDict:
    """How images are told apart; fields of other models are not used."""
    config = ConfigDict()
    config.model = model  # mlp, dcgan or stylegan2
    config.hidden = (128, 128)  # of mlp
    config.width = 32  # of dcgan
    config.norm = "none"  # of dcgan: or batch, spectral
    config.fmap_base, config.fmap_max = 8192, 512  # of stylegan2
    config.architecture = "resnet"  # of stylegan2: or skip
    config.minibatch_group = 4  # of stylegan2: images whose deviation is looked at; 0: not at all
    config.attention = ()  # of stylegan2: as the generator's, or of reference
    config.update(changes)
    return config


def game(steps: int, **changes: Any) -> ConfigDict:
    """How the two are trained; the rate is the arm's."""
    config = ConfigDict()
    config.steps = steps
    config.beta1, config.beta2, config.eps = 0.0, 0.99, 1e-8  # of Adam
    config.penalty = "r1"  # on D: or zero_centered, one_centered (between real and generated images), none
    config.penalty_weight, config.penalty_every = 1.0, 1  # of the mean squared norm: half of what is called gamma
    config.path_weight, config.path_every, config.path_decay = 0.0, 4, 0.01  # path lengths of G; 0: none
    config.path_shrink = 2  # they are measured on 1 / so many of the batch
    config.drift = 1e-3  # weight of the mean squared real logit
    config.decay = 0.995  # of the generator's average, a step ...
    config.half_life = 0.0  # ... or 0.5^(batch size / so many images) where > 0
    config.update(changes)
    return config


def base(method: str) -> ConfigDict:
    """scikit-learn's digits, dense networks: the small default of the methods on generators."""
    config = settings.base(method)
    for name in ("average", "microbatches", "eval_epochs"):
        del config[name]
    config.seeds, config.ensemble, config.batch_size, config.eval_batch_size = 3, "loop", 64, 100
    config.eval_every = 1000  # steps; the last evaluation always happens
    config.log_every = 100
    settings.digits8x8(config)
    config.data.train_examples, config.data.validation_examples = 0, 297
    config.data.weak = config.data.strong = settings.augmentation()
    config.generator, config.discriminator = generator("mlp"), discriminator("mlp")
    config.game = game(4000)
    config.features = features()
    # What is judged: this many generated images for each real one; distances of neighbours take so many real ones.
    config.judge = ConfigDict({"per_image": 4, "neighbours": 500, "gallery": 64, "kid_subsets": False})
    # Another run whose stages before the arms are taken instead of trained: its features, and its generator.
    config.start = ConfigDict({"workdir": ""})
    return config


def features() -> ConfigDict:
    """The network whose features images are compared by: trained on the labels of the training rows, or given."""
    config = settings.network("mlp", 1e-3, 30.0)
    config.hidden, config.norm, config.optimizer, config.weight_decay = (128, 64), False, "adam", 0.0
    config.smoothing, config.seed = 0.0, 0
    config.layer = "pool"  # maps are averaged over their positions
    config.init_from = ""  # WORKDIR:STAGE, or a file of weights; see docs/generators.md
    config.resize, config.rgb = 0, False  # of a given network: to this side; grey images as three channels
    config.mean, config.std = (0.3,), (0.37,)  # of the images as it sees them
    config.fid = False  # of a given inception_v3 with 1008 classes: the network and the images of the FID
    config.num_classes = 0  # of a given network; 0: those of the data
    return config


def fashion(config: ConfigDict) -> None:
    """Fashion-MNIST, judged by the features of a small convolutional network."""
    config.data.name, config.data.shape, config.data.num_examples = "fashion_mnist", (28, 28, 1), 58000
    config.data.train_split, config.data.test_split = "train", "test"
    config.data.validation_examples, config.eval_batch_size = 2000, 500
    config.features.update({"model": "cnn", "width": 8, "epochs": 1.0, "lr": 3e-3})
    config.judge.update({"per_image": 1, "neighbours": 2000})


def patches(config: ConfigDict) -> None:
    """32x32 pieces of two photos, and a StyleGAN2 of few weights."""
    config.data.name, config.data.shape, config.data.num_examples = "patches32", (32, 32, 3), 7000
    config.data.num_classes, config.data.validation_examples, config.eval_batch_size = 2, 1000, 250
    config.data.weak = settings.augmentation(flip=True)
    config.features.update({"model": "cnn", "width": 8, "epochs": 3.0, "lr": 3e-3})
    config.judge.update({"per_image": 1, "neighbours": 2000})
    small_stylegan2(config)


def photos(config: ConfigDict, name: str, side: int, examples: int) -> None:
    """Large sets of color photos, of one class; features of ImageNet's MobileNetV2, whose weights are to be given."""
    config.seeds, config.batch_size, config.eval_batch_size, config.log_every = 1, 32, 100, 100
    config.data.name, config.data.shape, config.data.num_examples = name, (side, side, 3), examples
    config.data.num_classes, config.data.train_split, config.data.test_split = 2, "train[5000:]", "train[:5000]"
    config.data.validation_examples = 2000
    config.data.weak = settings.augmentation(flip=True)
    config.features.update({"model": "mobilenet_v2", "num_classes": 1000, "resize": 224})
    config.features.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    config.features.init_from = "mobilenet_v2.safetensors"
    config.judge.update({"per_image": 1, "neighbours": 5000})
    config.eval_every, config.loop.checkpoint_every = 10000, 2000


def stylegan2(config: ConfigDict, steps: int) -> None:
    """The authors' StyleGAN2 of medium size (config-e) and its regularizers; the length is in steps."""
    config.generator = generator("stylegan2", latent_dim=512, style_mixing=0.9)
    config.discriminator = discriminator("stylegan2")
    config.game = game(steps, penalty_weight=5.0, penalty_every=16, path_weight=2.0, drift=0.0, half_life=10000.0)


def small_stylegan2(config: ConfigDict) -> None:
    """A StyleGAN2 of a few hundred thousand weights."""
    sizes = {"fmap_base": 128, "fmap_max": 32}
    config.generator = generator("stylegan2", latent_dim=32, style_dim=32, mapping_layers=2, **sizes)
    config.discriminator = discriminator("stylegan2", **sizes)


def smoke(config: ConfigDict) -> None:
    """Seconds: two seeds, small networks, a few steps."""
    config.seeds, config.batch_size, config.eval_batch_size = 2, 16, 32
    config.log_every, config.eval_every = 1, 2
    config.data.train_examples, config.data.validation_examples = 64, 32
    config.data.test_per_class = 4
    config.generator.update({"hidden": (16, 16), "latent_dim": 8})
    config.discriminator.hidden = (16, 16)
    config.features.update({"hidden": (16,), "epochs": 1.0})
    config.game.update({"steps": 4})
    config.judge.update({"per_image": 2, "neighbours": 20, "gallery": 16})
    config.loop.checkpoint_every = 0
