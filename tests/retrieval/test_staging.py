import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jkd import retrieval
from jkd.errors import UserError
from jkd.retrieval.staging import PARTS

PARAMS = {
    "image": {
        "backbone": {"stem": {"w": 1.0}, "block2_1": {"w": 1.0}, "block3_1": {"w": 1.0}},
        "positions": {"w": 1.0},
        "head": {"pool": {"w1": 1.0}, "projection": {"kernel": 1.0}},
    },
    "text": {"sru": {"w": 1.0}, "head": {"projection": {"kernel": 1.0}}},
}
PARAMS = jax.tree.map(jnp.float32, PARAMS)


def test_gates_by_epoch():
    for epoch, wanted in ((0, 0), (4.99, 0), (5, 1), (19, 1), (20, 2)):
        found = retrieval.epoch_gates(epoch)
        assert found == (wanted >= 1, wanted >= 2, wanted >= 1, wanted >= 2)
    flickr = jax.jit(lambda epoch: retrieval.epoch_gates(epoch, text_from=4, image_from=41))
    assert (bool(flickr(40.0).text), bool(flickr(40.0).image), bool(flickr(41.0).image)) == (True, False, True)
    with pytest.raises(UserError, match="epoch must be >= 0"):
        retrieval.epoch_gates(-1)


def test_parts_move_from_their_first_steps_on_by_one_program():
    optimizer = retrieval.staged(optax.adam(0.1), {"text": 2, "image": 4})
    state, params = optimizer.init(PARAMS), PARAMS
    update = jax.jit(optimizer.update)
    moved = []
    for t in range(6):
        grads = jax.tree.map(lambda x, t=t: jnp.full_like(x, 1.0 + t), params)
        updates, state = update(grads, state, params)
        moved.append(updates)
    assert update._cache_size() == 1
    for t, updates in enumerate(moved):
        image, text = updates["image"], updates["text"]
        # The frozen layers of the backbone never move, the projection always does.
        assert (image["backbone"]["stem"]["w"], image["backbone"]["block2_1"]["w"]) == (0, 0)
        assert image["head"]["projection"]["kernel"] == pytest.approx(-0.1, abs=0.01)
        for one in (text["sru"]["w"], text["head"]["projection"]["kernel"]):
            assert (float(one) == 0) == (t < 2)
        for one in (image["backbone"]["block3_1"]["w"], image["positions"]["w"], image["head"]["pool"]["w1"]):
            assert (float(one) == 0) == (t < 4)
    # A part's moments begin with it: Adam's first step is the rate, whatever came before.
    assert float(moved[2]["text"]["sru"]["w"]) == pytest.approx(-0.1, rel=1e-5)
    assert float(moved[4]["image"]["positions"]["w"]) == pytest.approx(-0.1, rel=1e-5)


def test_only_what_trains_is_clipped():
    optimizer = retrieval.staged(optax.identity(), {"text": 1, "image": 1}, clip=1.0)
    state = optimizer.init(PARAMS)
    grads = jax.tree.map(lambda x: 3 * x, PARAMS)
    updates, state = optimizer.update(grads, state, PARAMS)
    assert float(updates["image"]["head"]["projection"]["kernel"]) == pytest.approx(1.0)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)
    updates, state = optimizer.update(grads, state, PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)
    assert float(updates["text"]["sru"]["w"]) == pytest.approx(1 / np.sqrt(6))


def test_parts_of_a_network_from_scratch():
    assert retrieval.part_of("image/backbone/stem/conv/kernel") == "frozen"
    assert retrieval.part_of("image/backbone/stem/conv/kernel", PARTS[1:]) == "image"
    assert retrieval.part_of("image/backbone/block3_2/layer1/conv/kernel") == "image"
    assert retrieval.part_of("text/words/embedding") == "text"
    with pytest.raises(UserError, match="'head/kernel' belongs to no part"):
        retrieval.part_of("head/kernel")


def test_rates_by_epoch():
    coco = retrieval.rate_factors(10)
    found = [float(coco(t)) for t in (0, 19, 20, 50, 100, 399, 400)]
    np.testing.assert_allclose(found, [1, 1, 0.2, 0.1, 0.01, 0.01, 0.001], rtol=1e-5)
    flickr = retrieval.rate_factors(10, (3, 7, 52), (0.2, 0.5, 0.1))
    assert float(flickr(1000)) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: retrieval.rate_factors(10, (1, 2), (0.1,)), "equally many"),
        (lambda: retrieval.rate_factors(10, (1,), (0.0,)), "numbers > 0"),
        (lambda: retrieval.staged(optax.identity(), {"text": -1}), "must be >= 0"),
        (lambda: retrieval.staged(optax.identity(), {}, clip=-1.0), "must be >= 0"),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(UserError, match=says):
        call()
