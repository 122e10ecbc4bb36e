"""What evaluators draw and say, and the curves that they leave: files, events, warnings, resumed runs."""

import io
import os
import signal

import jax
import numpy as np
import pytest
import toys
from PIL import Image
from rich.console import Console

from jkd import train
from jkd.errors import UserError
from jkd.train import context, log, loop
from jkd.train.passes import examine

KEYS = jax.random.split(jax.random.key(3), 2)
EVENTS = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=True)


def shades(published, consts, batch, mask):
    return {"level": toys.logits(published["params"], batch["image"])[:, 0] * 40 + 128}


def draw(rows):
    """One pixel an image, and the same in color."""
    grey = np.clip(rows["level"][:48], 0, 255).astype(np.uint8).reshape(6, 8)
    return {"grey": grey, "color": np.stack((grey, 255 - grey, grey), -1)}


def finish(rows):
    return {"level": float(rows["level"].mean()), "size": float(len(rows["level"]))}


def warn(found):
    return f"{found['size']:g} images are few" if found["level"] > -np.inf else None


def drawing(**changes) -> train.Evaluator:
    source = toys.accuracy().source
    fields = {"kind": "gather", "every": 4, "draw": draw, "warn": warn}
    return train.Evaluator(source, shades, finish, **(fields | changes))


def stage(num_steps=6, **changes) -> train.Stage:
    return toys.classifier(num_steps=num_steps, evaluators={"look": drawing(), "train": toys.accuracy(4)}, **changes)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def published_of(workdir):
    """What a run on one device published, and its mesh."""
    mesh = train.make_mesh(devices=jax.devices()[:1])
    published = train.load_outcome(workdir, "teacher").published
    return jax.tree.map(np.asarray, published), mesh


def names(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "pictures").rglob("*") if path.is_file())


def images_of(workdir) -> dict[tuple[str, int], bytes]:
    """The image events of a run by tag and step."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in (workdir / "tensorboard").rglob("events*"):
        raw = file.read_bytes()
        while raw:
            length = int.from_bytes(raw[:8], "little")
            event = Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            found |= {
                (v.tag, event.step): v.image.encoded_image_string for v in event.summary.value if v.HasField("image")
            }
    return found


@pytest.fixture
def said(monkeypatch):
    """What runs say, without line breaks."""
    text = io.StringIO()
    made = Console(file=text, width=500)
    for module in (log, context):
        monkeypatch.setattr(module, "console", made, raising=False)
    return text


# --- a single run ---


def test_pictures_are_files_and_events(tmp_path, said):
    toys.go([stage()], tmp_path, options=EVENTS)
    assert names(tmp_path) == [f"look-{kind}-{t:08d}.png" for kind in ("color", "grey") for t in (4, 6)]
    (folder,) = (tmp_path / "pictures").iterdir()
    assert "teacher" in folder.name
    published, mesh = published_of(tmp_path)
    wanted = examine(drawing(), published, {}, mesh=mesh).pictures
    for kind in ("grey", "color"):
        np.testing.assert_array_equal(pixels(folder / f"look-{kind}-00000006.png"), wanted[kind])
    assert np.abs(pixels(folder / "look-grey-00000004.png").astype(int) - wanted["grey"]).max() > 0
    events = images_of(tmp_path)
    assert set(events) == {(f"look-{kind}", t) for kind in ("color", "grey") for t in (4, 6)}
    shown = pixels(io.BytesIO(events["look-color", 6]))
    np.testing.assert_array_equal(shown, wanted["color"])


def test_warnings_are_said_at_their_step(tmp_path, said):
    evaluators = {"look": drawing(), "quiet": drawing(draw=None, warn=lambda found: None)}
    toys.go([toys.classifier(num_steps=6, evaluators=evaluators)], tmp_path)
    lines = [line for line in said.getvalue().splitlines() if "few" in line]
    assert lines == [f"Stage teacher, step {t}: 256 images are few" for t in (4, 6)]
    assert [name for name in names(tmp_path) if name.startswith("quiet")] == []


def test_warnings_may_hold_brackets(tmp_path, said):
    evaluators = {"look": drawing(draw=None, warn=lambda found: "outside of [0, 1] and of [/bold]")}
    toys.go([toys.classifier(num_steps=1, evaluators=evaluators)], tmp_path)
    assert "Stage teacher, step 1: outside of [0, 1] and of [/bold]" in said.getvalue()


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (np.zeros((2, 2), np.float32), r"uint8\[H, W\] or uint8\[H, W, 3\], got float32\[2, 2\]"),
        (np.zeros((2, 2, 1), np.uint8), r"got uint8\[2, 2, 1\]"),
        (np.zeros(4, np.uint8), r"got uint8\[4\]"),
    ],
)
def test_other_arrays_are_no_pictures(picture, says, tmp_path):
    evaluators = {"look": drawing(draw=lambda rows: {"wrong": picture}, warn=None)}
    with pytest.raises(UserError, match=says):
        toys.go([toys.classifier(num_steps=1, evaluators=evaluators)], tmp_path)


# --- ensembles ---


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_pictures_and_warnings_of_seeds(mode, tmp_path, said):
    toys.go([train.ensemble(stage(num_steps=4), KEYS, mode)], tmp_path, options=EVENTS)
    wanted = sorted(f"look-{kind}-seed{k}-00000004.png" for kind in ("color", "grey") for k in (0, 1))
    assert names(tmp_path) == wanted
    published, mesh = published_of(tmp_path)
    (folder,) = (tmp_path / "pictures").iterdir()
    for k in (0, 1):
        one = jax.tree.map(lambda x, k=k: x[k], published)
        alone = examine(drawing(), one, {}, mesh=mesh).pictures["grey"].astype(int)
        found = pixels(folder / f"look-grey-seed{k}-00000004.png")
        np.testing.assert_allclose(found, alone, atol=1)  # vectorized sums are rounded otherwise
    first, second = (pixels(folder / f"look-grey-seed{k}-00000004.png").astype(int) for k in (0, 1))
    assert np.abs(first - second).max() > 1
    assert {tag for tag, _ in images_of(tmp_path)} == {
        f"look-{kind}-seed{k}" for kind in ("color", "grey") for k in (0, 1)
    }
    text = said.getvalue()
    assert all(text.count(f"seed {k}: 256 images are few") == 1 for k in (0, 1))


# --- curves ---


@pytest.mark.parametrize("members", [0, 2])
def test_curves_are_what_was_logged_and_survive_a_resume(members, tmp_path, monkeypatch, said):
    made = stage(num_steps=14)
    stages = [train.ensemble(made, KEYS, "vmap") if members else made]
    whole = toys.go(stages, tmp_path / "whole")
    boundary = loop._StageRun._boundary

    def ask(self):
        if self.t == 10:  # two evaluations are behind, two to come
            monkeypatch.setattr(loop._StageRun, "_boundary", boundary)
            os.kill(os.getpid(), signal.SIGTERM)
        boundary(self)

    monkeypatch.setattr(loop._StageRun, "_boundary", ask)
    with pytest.raises(train.Preempted, match="at step 10"):
        toys.go(stages, tmp_path / "run")
    resumed = toys.go(stages, tmp_path / "run")
    assert resumed == whole
    logged = [record for record in toys.lines(tmp_path / "run") if "evaluation" in record]
    history = resumed["teacher"]["history"]
    assert set(history) == {"look/level", "look/size", "train/accuracy"}
    for name, curve in history.items():
        assert curve["steps"] == [record["step"] for record in logged] == [4, 8, 12, 14]
        assert curve["values"] == [record["evaluation"][name] for record in logged]
        values = np.asarray(curve["values"])
        assert values.shape == ((4, members) if members else (4,))
        assert np.asarray(curve["last"]).tolist() == values[-1].tolist()
        assert np.asarray(curve["max"]).tolist() == values.max(0).tolist()
        assert np.asarray(curve["min"]).tolist() == values.min(0).tolist()
    assert names(tmp_path / "run") == names(tmp_path / "whole")
