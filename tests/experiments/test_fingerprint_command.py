"""Instances of a fingerprinted generator are made, sampled and identified by the commands of one run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import QUIET
from PIL import Image

from experiments import cli, fingerprints, gan_fingerprinting, gan_measures, instances, train
from jkd import gan
from jkd import train as jkd_train
from jkd.interop.safetensors import load_safetensors, save_safetensors

pytest.importorskip("safetensors")

CONFIG = "configs/gan_fingerprinting.py:smoke"
DRAW = np.random.default_rng(0)
NOISE = DRAW.integers(0, 256, (12, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped smoke run of one arm, with fewer evaluations: they take most of its time."""
    workdir = tmp_path_factory.mktemp("fingerprints") / "run"
    fewer = ("--config.only=full", "--config.perturbations=()", "--config.eval_every=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_fingerprinting, "altered", lambda params: {})
        patch.setattr(gan_measures.Judge, "all", lambda judge, players: {"test": judge.frechet("test")})
        train.main(["--config", CONFIG, "--workdir", str(workdir), *QUIET, *fewer])
    return workdir


@pytest.fixture(scope="module")
def users(run):
    """The folder of four instances of the second seed."""
    folder = run.parent / "users"
    given = ["--workdir", str(run), "--stage", "full", "--seed", "1", "--count", "4", "--key", "3"]
    fingerprints.main(["make", *given, "--output", str(folder)])
    return folder


@pytest.fixture
def reads_pixels(monkeypatch):
    """Gives every seed a decoder that reads the bits of the first 16 pixels; smoke training makes none that reads."""
    original = jkd_train.load_outcome

    def load(*args, **options):
        outcome = original(*args, **options)
        decoder = jax.tree.map(np.zeros_like, outcome.published["generator"]["params"]["decoder"])
        decoder["hidden1"]["kernel"][:, :16] = np.eye(16)
        decoder["head"]["kernel"][:, :, -16:] = np.eye(16)
        params = outcome.published["generator"]["params"] | {"decoder": decoder}
        return dataclasses.replace(outcome, published={**outcome.published, "generator": {"params": params}})

    monkeypatch.setattr(fingerprints.train, "load_outcome", load)


def bits_of(users):
    """The registry's fingerprints, read by other means."""
    stored = json.loads((users / "registry.json").read_text())
    return np.array([[int(b) for b in f"{int(one['bits'], 16):016b}"] for one in stored["instances"]])


def identify(run, users, images, tmp_path, *more):
    given = ["--workdir", str(run), "--stage", "full", "--registry", str(users / "registry.json")]
    file = tmp_path / "found.json"
    fingerprints.main(["identify", *given, "--input", str(images), "--json", str(file), *more])
    return json.loads(file.read_text())


def test_an_instance_makes_the_images_of_its_fingerprint(run, users, tmp_path, capsys):
    folder = tmp_path / "images"
    fingerprints.main(
        [
            "sample",
            "--instance",
            str(users / "instance-002.safetensors"),
            "--count",
            "66",
            "--key",
            "5",
            "--output",
            f"{folder}/",
        ]
    )
    assert "Wrote 66 images" in capsys.readouterr().err
    found = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
    assert (found.shape, found.dtype) == ((66, 8, 8), np.uint8)
    assert np.asarray(Image.open(tmp_path / "images.png")).shape == (8 * 34, 9 * 34)
    loaded = fingerprints.load_run(cli.load_run(str(run), {}), str(run), "full", 1)
    latents = jax.random.normal(jax.random.key(5), (66, 8))
    own = jnp.broadcast_to(jnp.float32(bits_of(users)[2])[None], (66, 16))
    expected = gan.as_uint8(loaded.game.players.generate({"params": loaded.params}, latents, own)[0].images)
    # A rounding may fall on the other side.
    assert np.abs(found.astype(int) - np.asarray(expected)[..., 0]).max() <= 1
    other = load_safetensors(users / "instance-001.safetensors")[0]["params"]
    assert not np.array_equal(
        other["synthesis"]["head"]["kernel"],
        load_safetensors(users / "instance-002.safetensors")[0]["params"]["synthesis"]["head"]["kernel"],
    )


def test_what_is_written(users):
    stored = json.loads((users / "registry.json").read_text())
    assert [one["name"] for one in stored["instances"]] == [f"instance-{k:03d}" for k in range(4)]
    assert sorted(p.name for p in users.iterdir()) == [
        *(f"instance-{k:03d}.safetensors" for k in range(4)),
        "registry.json",
    ]
    assert (stored["bits"], stored["stage"], stored["seed"]) == (16, "full", 1)
    np.testing.assert_array_equal(instances.read_registry(users / "registry.json").bits, bits_of(users))
    # What is released tells the fingerprint to nobody: not the bits, nor the key, nor how another one would look.
    tree, about = load_safetensors(users / "instance-000.safetensors")
    assert set(about) == {"method", "stage", "generator", "latent_dim"}
    assert json.loads(about["generator"])["condition_dim"] == 0
    assert set(tree["params"]) == {"synthesis"}
    assert all(set(layer) == {"kernel", "bias"} for layer in tree["params"]["synthesis"].values())


def test_fingerprints_are_distinct_and_secret():
    found = instances.distinct_fingerprints(jax.random.key(0), 16, 4)
    assert sorted((found @ [8, 4, 2, 1]).tolist()) == list(range(16))
    secret = [instances.distinct_fingerprints(fingerprints.random_key(None), 2, 64) for _ in range(2)]
    assert (secret[0] != secret[1]).any()
    again = [instances.distinct_fingerprints(fingerprints.random_key(7), 2, 64) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_random_noise_is_nobodys(run, users, tmp_path, capsys):
    np.save(tmp_path / "noise.npy", NOISE)
    found = identify(run, users, tmp_path / "noise.npy", tmp_path, "--false-positive-rate", "1e-4")
    assert [row["user"] for row in found["sources"]] == [None] * 12
    assert [row["file"] for row in found["sources"]] == [f"row {k}" for k in range(12)]
    assert "0 of 12 carry a fingerprint of the 4" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("reads_pixels")
def test_fingerprints_are_identified(run, users, tmp_path, capsys):
    bits, images = bits_of(users), NOISE[:6].copy()
    images.reshape(6, 64)[:4, :16] = 255 * bits[[2, 0, 3, 1]]
    images.reshape(6, 64)[4, :16] = 255 * (1 - bits[0])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{k}.png")
    found = identify(run, users, folder, tmp_path, "--false-positive-rate", "1e-4")
    rows = found["sources"]
    assert [row["user"] for row in rows] == [*(f"instance-00{k}" for k in (2, 0, 3, 1)), None, None]
    assert [row["file"] for row in rows] == [f"{k}.png" for k in range(6)]
    assert [row["matched"] for row in rows[:4]] == [16] * 4
    # The best of four users: 4 / 2^16.
    assert rows[0]["log10_p"] == pytest.approx(np.log10(4 / 2**16), abs=1e-4)
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("instance-002", "nobody", "matching of 16 bits"))


@pytest.mark.usefixtures("reads_pixels")
def test_images_are_read_together(run, users, tmp_path):
    images, own = NOISE[:5].copy(), bits_of(users)[1]
    pixels = images.reshape(5, 64)
    pixels[:, :16] = 255 * own
    for k in range(5):
        pixels[k, 3 * k : 3 * k + 3] = 255 * (1 - own[3 * k : 3 * k + 3])  # three wrong bits in each, others every time
    np.save(tmp_path / "images.npy", images)
    alone = identify(run, users, tmp_path / "images.npy", tmp_path, "--false-positive-rate", "1e-3")
    assert [row["user"] for row in alone["sources"]] == [None] * 5
    (tmp_path / "found.json").unlink()
    given = ("--together", "--false-positive-rate", "1e-3")
    (row,) = identify(run, users, tmp_path / "images.npy", tmp_path, *given)["sources"]
    assert (row["user"], row["matched"], row["file"]) == ("instance-001", 16, "5 images")
    assert row["log10_p"] == pytest.approx(np.log10(4 / 2**16), abs=1e-4)


def test_many_images_without_a_fingerprint_accuse_nobody(run, users, tmp_path):
    # The decoder reads about the same in all of them: were it taken for so many coins, somebody would be sure to match.
    given = ("--together", "--false-positive-rate", "1e-3")
    (row,) = identify(run, users, "data:test", tmp_path, *given)["sources"]
    assert (row["user"], row["file"]) == (None, "500 images")
    assert row["log10_p"] > -3


def test_stylegan2_instances_come_back(tmp_path):
    fields = {
        "resolution": 8,
        "channels": 1,
        "latent_dim": 4,
        "style_dim": 8,
        "mapping_layers": 1,
        "fmap_base": 32,
        "fmap_max": 8,
    }
    generator = gan.StyleGAN2Generator(**fields, condition_dim=6, style_from="condition", attention=((8, "global"),))
    latents, bits = jnp.float32(DRAW.normal(size=(3, 4))), jnp.float32([1, 0, 0, 1, 1, 0])
    condition = jnp.broadcast_to(bits[None], (3, 6))
    params = jax.jit(generator.init)(jax.random.key(0), latents, condition)["params"]
    baked = jax.jit(lambda params: gan.bake_fingerprint(generator, params, bits))(params)
    file = tmp_path / "one.safetensors"
    save_safetensors(file, {"params": baked}, instances.describe(generator.baked(), 4))
    loaded = instances.load_instance(file)
    assert loaded.generator == generator.baked()
    expected = jax.jit(lambda params: gan.as_uint8(generator.apply({"params": params}, latents, condition).images))(
        params
    )
    found = np.asarray(jax.jit(loaded.images)(latents))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    assert found.std() > 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--stage", "plain"], "Unknown stage with fingerprints 'plain'. Known: bits32, full, "),
        (["--stage", "bits32"], "holds no finished stage 'bits32'"),
        (["--seed", "2"], "--seed must be one of 0..1, got 2."),
        (["--count", "0"], "--count must be 1 to 2^16, as many as 16 bits tell apart, got 0."),
        (["--count", "70000"], "got 70000."),
        (["--output", "THERE"], "exists already and is not overwritten"),
        (["--config.arms.full.lr=1"], "decided what this run computed and cannot be changed now"),
        (["--coun", "3"], "Unknown argument '--coun'."),
    ],
)
def test_make_refuses(argv, says, run, users, refused, tmp_path):
    given = ("make", "--workdir", run, "--stage", "full", "--count", 2, "--output", tmp_path / "new")
    assert says in refused(fingerprints.main, *given, *(str(users) if word == "THERE" else word for word in argv))
    assert not any(tmp_path.iterdir())


def test_a_run_of_another_method_is_refused(run, users, refused, tmp_path):
    config = json.loads((run / "config.json").read_text())
    text = json.dumps(config).replace('"gan_fingerprinting"', '"energy_kd"')
    (tmp_path / "config.json").write_text(text)
    given = ("make", "--workdir", tmp_path, "--stage", "full", "--count", 2, "--output", tmp_path / "new")
    assert "is a run of energy_kd; fingerprints are those of a run of gan_fingerprinting" in refused(
        fingerprints.main, *given
    )


def test_sample_refuses(users, refused, tmp_path):
    one = users / "instance-000.safetensors"
    save_safetensors(tmp_path / "other.safetensors", {"x": np.ones(2)}, {"generator": '{"class": "Model"}'})
    (tmp_path / "new.png").write_text("mine")
    for more, says in (
        ((one, "--count", 0), "--count must be positive, got 0."),
        ((tmp_path / "other.safetensors", "--count", 1), "other.safetensors is no instance that `make` wrote."),
        ((users / "registry.json", "--count", 1), "registry.json is damaged or no safetensors file."),
        ((one, "--count", 1, "--output", tmp_path / "new"), "new.png exists already and is not overwritten"),
        ((one, "--count", 1, "--output", users), "exists already and is not overwritten"),
        ((one, "--count", 1, "--config.seeds=3"), "sample reads no run: leave --config.NAME=VALUE out."),
    ):
        assert says in refused(fingerprints.main, "sample", "--output", tmp_path / "o", "--instance", *more)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "--false-positive-rate 1e-06 is less than 16 bits can show among 4 users: give 6.5e-05 or more, or train"),
        ({"bits": 15}, "with 15 bits, --stage full has 16."),
        ({"bits": 32}, "is damaged or no registry that `make` wrote."),
        ({"stage": "immunized"}, "registry.json is of immunized with 16 bits, --stage full has 16."),
        ({"seed": 5}, "--seed must be one of 0..1, got 5."),
        ({"instances": []}, "is damaged or no registry that `make` wrote."),
        ({"instances": [{"name": "a"}]}, "is damaged or no registry that `make` wrote."),
        ({"instances": [{"name": "a", "bits": "zz"}]}, "is damaged or no registry that `make` wrote."),
    ],
)
def test_identify_refuses(change, says, run, users, refused, tmp_path):
    stored = json.loads((users / "registry.json").read_text())
    (tmp_path / "registry.json").write_text(json.dumps(stored | change))
    np.save(tmp_path / "noise.npy", NOISE)
    given = ("--workdir", run, "--stage", "full", "--registry", tmp_path / "registry.json", "--input")
    assert says in refused(fingerprints.main, "identify", *given, tmp_path / "noise.npy")


def test_identify_refuses_what_cannot_be_read(run, users, refused, tmp_path):
    np.save(tmp_path / "large.npy", np.zeros((2, 9, 9, 1), np.uint8))
    stored = json.loads((users / "registry.json").read_text())
    stored["instances"][3]["bits"] = stored["instances"][1]["bits"]
    (tmp_path / "twice.json").write_text(json.dumps(stored))
    given = ("identify", "--workdir", run, "--stage", "full", "--false-positive-rate", "1e-3")
    np.save(tmp_path / "noise.npy", NOISE)
    for registry, images, says in (
        (tmp_path / "none.json", "noise.npy", "none.json cannot be read: No such file or directory."),
        (tmp_path / "twice.json", "noise.npy", "users 1 and 3 share one."),
        (
            users / "registry.json",
            "large.npy",
            "must be an .npy file of uint8[N, 8, 8, 1], values 0 to 255, got uint8[2, 9, 9, 1]",
        ),
        (users / "registry.json", "none", "give an .npy file of uint8[N, 8, 8, 1]"),
    ):
        assert says in refused(fingerprints.main, *given, "--registry", registry, "--input", tmp_path / images)
