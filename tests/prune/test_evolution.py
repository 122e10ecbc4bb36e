"""Which weights are inherited, how generations start, and a few of them trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import nn
from jkd.channels import Channels
from jkd.errors import UserError
from jkd.prune import (
    build_masks,
    extract_slim,
    first_generation,
    first_init,
    hypothesis_magnitude,
    kels_mask,
    knowledge_evolution,
    next_generation,
    reset_init,
    slim_indices,
    wels_mask,
)

KEY = jax.random.key(0)
# A convolution from 2 to 4 channels with bias, a normalization, a hidden layer of 4 units and three classes.
CHANNELS = {
    "conv": Channels(np.array([0, 1]), np.array([0, 1])),
    "norm": Channels(None, np.array([0, 1])),
    "hidden": Channels(np.array([0, 1]), np.array([0, 1, 2])),
    "head": Channels(np.array([0, 1, 2]), np.array([0, 1, 2])),
}
next_jit = jax.jit(next_generation)


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "hidden": {"kernel": (4, 4), "bias": (4,)},
        "head": {"kernel": (4, 3), "bias": (3,)},
    }
    return jax.tree.map(
        lambda shape: draw.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.fixture(scope="module")
def masks(params):
    return build_masks(params, channels=CHANNELS)


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_kels_by_hand():
    mask = kels_mask((4, 5), 0.5)
    assert mask.dtype == bool
    assert [tuple(at) for at in np.argwhere(mask)] == [(i, o) for i in (0, 1) for o in (0, 1, 2)]
    assert kels_mask((3, 64), 0.5, keep_in=True).sum() == 3 * 32
    assert kels_mask((512, 100), 0.5, keep_out=True).sum() == 256 * 100
    window = kels_mask((3, 3, 10, 4), 0.5, in_blocks=(4, 6))
    assert window.sum() == 9 * 5 * 2
    assert set(np.argwhere(window)[:, 2].tolist()) == {0, 1, 4, 5, 6}


@pytest.mark.parametrize(
    ("blocks", "rate", "kept"),
    [
        ((5,), 0.5, [0, 1, 2]),
        ((4, 6), 0.5, [0, 1, 4, 5, 6]),
        ((3, 3, 2), 0.1, [0, 3, 6]),
        ((2, 3), 1.0, [0, 1, 2, 3, 4]),
        ((100,), 0.29, list(range(29))),
        ((100,), 0.07, list(range(7))),  # 0.07 * 100 is 7.000000000000001
    ],
)
def test_leading_channels_of_every_part(blocks, rate, kept):
    assert slim_indices(blocks, rate).tolist() == kept


def test_wels_draws_every_weight():
    draw = jax.jit(wels_mask, static_argnums=(1, 2))
    mask = np.asarray(draw(KEY, (100, 200), 0.3))
    assert mask.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 20_000))
    uniform = np.asarray(jax.random.uniform(KEY, (100, 200)))
    np.testing.assert_array_equal(mask, uniform >= np.float32(0.7))
    np.testing.assert_array_equal(mask, draw(KEY, (100, 200), 0.3))
    assert (mask != np.asarray(draw(jax.random.key(1), (100, 200), 0.3))).any()


def test_masks_of_a_network(params, masks):
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    np.testing.assert_array_equal(masks["conv"]["kernel"], kels_mask((3, 3, 2, 4), 0.5, keep_in=True))
    np.testing.assert_array_equal(masks["conv"]["bias"], [True, True, False, False])
    np.testing.assert_array_equal(masks["hidden"]["kernel"], np.outer([1, 1, 0, 0], [1, 1, 1, 0]) > 0)
    np.testing.assert_array_equal(masks["head"]["kernel"], kels_mask((4, 3), 0.75, keep_out=True))
    for leaf in (*masks["norm"].values(), masks["hidden"]["bias"], masks["head"]["bias"]):
        assert leaf.all()
    random = build_masks(params, 0.5, "wels", key=KEY)
    assert 0 < random["conv"]["kernel"].mean() < 1
    assert random["conv"]["bias"].all()
    assert (np.asarray(random["hidden"]["kernel"]).ravel()[:12] != np.asarray(random["head"]["kernel"]).ravel()).any()
    assert_equal(random, jax.jit(lambda key: build_masks(params, 0.5, "wels", key=key))(KEY))


def test_initial_values():
    shape = (3, 3, 50, 60)
    first, reset = (np.asarray(jax.jit(fn, static_argnums=1)(KEY, shape)) for fn in (first_init, reset_init))
    assert first.std() == pytest.approx(np.sqrt(2 / 450), rel=0.02)
    assert abs(first.mean()) < 1e-3
    assert 0.999 / np.sqrt(450) < np.abs(reset).max() <= 1 / np.sqrt(450)
    assert first.std() / reset.std() == pytest.approx(np.sqrt(6), rel=0.02)
    low = jax.eval_shape(lambda: (first_init(KEY, shape, jnp.bfloat16), reset_init(KEY, shape, jnp.bfloat16)))
    assert {leaf.dtype for leaf in low} == {jnp.dtype("bfloat16")}


def test_what_a_generation_inherits(params, masks):
    born = jax.tree.map(np.asarray, next_jit(KEY, params, masks))
    for name in ("conv", "hidden", "head"):
        mask = np.asarray(masks[name]["kernel"])
        before, after = params[name]["kernel"], born[name]["kernel"]
        np.testing.assert_array_equal(after[mask], before[mask])
        assert (after[~mask] != before[~mask]).all()
        assert np.abs(after[~mask]).max() <= np.prod(after.shape[:-1]) ** -0.5
    np.testing.assert_array_equal(born["conv"]["bias"], [*params["conv"]["bias"][:2], 0, 0])
    assert_equal(born["norm"], params["norm"])
    assert_equal(next_jit(KEY, born, masks), born)  # the same key draws the same
    assert (np.asarray(next_jit(jax.random.key(1), params, masks)["head"]["kernel"]) != born["head"]["kernel"]).any()


def test_all_and_nothing(params, masks):
    everything = jax.tree.map(np.ones_like, masks)
    assert_equal(next_jit(KEY, params, everything), params)
    nothing = jax.tree.map(np.zeros_like, masks)
    born = next_jit(KEY, params, nothing)
    fresh = jax.jit(functools.partial(first_generation, init_fn=reset_init))(KEY, params)
    for name in ("conv", "hidden", "head"):
        np.testing.assert_array_equal(born[name]["kernel"], fresh[name]["kernel"])
    # Normalizations and biases of dense layers are never drawn.
    assert_equal((born["norm"], born["head"]["bias"]), (params["norm"], params["head"]["bias"]))
    assert not born["conv"]["bias"].any()
    first = jax.jit(first_generation)(KEY, params)
    assert_equal(first["norm"], params["norm"])
    assert np.abs(np.asarray(first["conv"]["kernel"]) - params["conv"]["kernel"]).min() > 0


def test_the_same_draw_on_every_mesh(params, masks):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), "model" if leaf.shape[-1] % 4 == 0 else None))

    shardings = jax.tree.map(place, params)
    sharded = jax.tree.map(jax.device_put, (params, masks), (shardings, shardings))
    born = jax.jit(next_generation, out_shardings=shardings)(KEY, *sharded)
    assert born["conv"]["kernel"].sharding.spec == P(None, None, None, "model")
    assert_equal(jax.tree.map(np.asarray, born), jax.tree.map(np.asarray, next_jit(KEY, params, masks)))


def test_slim_network_by_hand(params):
    stats = {"norm": {"mean": np.arange(4.0, dtype=np.float32), "var": np.ones(4, np.float32)}}
    slim = extract_slim({"params": params, "batch_stats": stats}, CHANNELS)
    np.testing.assert_array_equal(slim["params"]["conv"]["kernel"], params["conv"]["kernel"][..., :2])
    np.testing.assert_array_equal(slim["params"]["hidden"]["kernel"], params["hidden"]["kernel"][:2, :3])
    np.testing.assert_array_equal(slim["params"]["hidden"]["bias"], params["hidden"]["bias"][:3])
    np.testing.assert_array_equal(slim["params"]["head"]["kernel"], params["head"]["kernel"][:3])
    np.testing.assert_array_equal(slim["params"]["norm"]["scale"], params["norm"]["scale"][:2])
    np.testing.assert_array_equal(slim["batch_stats"]["norm"]["mean"], [0, 1])


def test_magnitudes_by_hand(params, masks):
    found = jax.jit(hypothesis_magnitude)(params, masks)
    assert set(found) == {"conv/kernel", "hidden/kernel", "head/kernel"}
    mask, sizes = np.asarray(masks["hidden"]["kernel"]), np.abs(params["hidden"]["kernel"])
    assert found["hidden/kernel"] == pytest.approx((sizes[mask].mean(), sizes[~mask].mean()))
    whole = masks | {"head": {"kernel": np.ones((4, 3), bool), "bias": np.ones(3, bool)}}
    head = jax.jit(hypothesis_magnitude)(params, whole)["head/kernel"]
    assert np.isfinite(head.fit)
    assert np.isnan(head.reset)


@pytest.fixture(scope="module")
def training():
    """A small network, and a function that trains it for some steps and donates what it is given."""
    model = nn.CNN(3, 4)
    variables = nn.init(model, KEY, (4, 4, 2))
    labels = np.arange(6) % 3
    images = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype(np.float32)

    def loss(params, state):
        out, state = nn.apply_train(model.apply, params, state, images)
        return -jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], axis=1).mean(), state

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads, state = jax.grad(loss, has_aux=True)(params, state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    return model, variables, step


def test_generations(training):
    model, variables, step = training
    channels = nn.shared_channels(model, nn.narrow(model, 0.5), (4, 4, 2))
    masks, starts, keys = build_masks(variables["params"], channels=channels), [], []

    def train(params, state, key):
        starts.append(jax.tree.map(np.array, params))
        keys.append(jax.random.key_data(key).tolist())
        for _ in range(2):
            params, state = step(params, state)
        return params, state

    before = jax.tree.map(np.array, variables)
    history = knowledge_evolution(train, variables, masks, KEY, 3)
    assert_equal(variables, before)  # nothing of it was donated
    assert_equal(starts[0], before["params"])
    assert len(history) == 3
    assert len({str(key) for key in keys}) == 3
    for last, start in zip(history, starts[1:], strict=False):
        for name in ("stem", "block2"):
            mask, old = np.asarray(masks[name]["conv"]["kernel"]), np.asarray(last["params"][name]["conv"]["kernel"])
            np.testing.assert_array_equal(start[name]["conv"]["kernel"][mask], old[mask])
            assert (start[name]["conv"]["kernel"][~mask] != old[~mask]).all()
        assert_equal(start["head"]["bias"], np.asarray(last["params"]["head"]["bias"]))
    assert (starts[1]["stem"]["conv"]["kernel"] != starts[2]["stem"]["conv"]["kernel"]).any()
    # Fit and reset weights are trained alike: no gradient is masked.
    for start, end in zip(starts, history, strict=True):
        moved = start["head"]["kernel"] != np.asarray(end["params"]["head"]["kernel"])
        for kind in (np.asarray(masks["head"]["kernel"]), ~np.asarray(masks["head"]["kernel"])):
            assert moved[kind].mean() > 0.5
    slim = extract_slim(history[-1], channels)
    assert slim["batch_stats"]["block2"]["norm"]["mean"].shape == (8,)
    # The means of the running statistics went on from the generation before.
    again = knowledge_evolution(train, variables, masks, KEY, 2)
    assert_equal(again, history[:2])


def test_generations_stay_where_they_are(training):
    _, variables, _ = training
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = NamedSharding(mesh, P())
    masks = build_masks(variables["params"], 0.5, "wels", key=KEY)
    seen = []

    def train(params, state, key):
        seen.append({leaf.sharding for leaf in jax.tree.leaves((params, state))})
        return params, state

    placed = jax.device_put(variables, replicated)
    history = knowledge_evolution(train, placed, masks, KEY, 2)
    assert seen == [{replicated}] * 2
    assert_equal(jax.tree.map(np.asarray, history), knowledge_evolution(train, variables, masks, KEY, 2))


def test_mistakes(params, masks):
    for rate in (0.0, 1.0, -0.5, float("nan")):
        for function in (
            lambda rate: kels_mask((4, 4), rate),
            lambda rate: wels_mask(KEY, (4, 4), rate),
            lambda rate: build_masks(params, rate, channels=CHANNELS),
        ):
            with pytest.raises(UserError, match=r"split_rate must lie in \(0, 1\), both ends"):
                function(rate)
    with pytest.raises(UserError, match=r"in_blocks must sum to the 10 inputs of the kernel, got \(4, 5\)"):
        kels_mask((10, 4), 0.5, in_blocks=(4, 5))
    with pytest.raises(UserError, match=r"A kernel is \[\*window, inputs, outputs\], got the shape \(4,\)"):
        kels_mask((4,), 0.5)
    with pytest.raises(UserError, match="split_rate must lie in"):
        slim_indices((4,), 1.5)
    with pytest.raises(UserError, match=r"width_blocks must be positive numbers of channels, got \(4, 0\)"):
        slim_indices((4, 0), 0.5)
    with pytest.raises(UserError, match="Unknown mode 'kel'. Did you mean 'kels'"):
        build_masks(params, 0.5, "kel")
    with pytest.raises(UserError, match="needs channels for the mode 'kels'"):
        build_masks(params, 0.5)
    for options in ({"key": KEY}, {"split_rate": 0.5}):
        with pytest.raises(UserError, match="needs key and split_rate for the mode 'wels'"):
            build_masks(params, mode="wels", **options)
    with pytest.raises(UserError, match="know nothing of the layer 'conv'"):
        build_masks(params, channels={"head": CHANNELS["head"]})
    wrong = CHANNELS | {"hidden": Channels(np.array([4]), np.array([0]))}
    with pytest.raises(UserError, match=r"channels do not fit hidden/kernel, whose shape is \(4, 4\)"):
        build_masks(params, channels=wrong)
    with pytest.raises(UserError, match=r"Only whole channels \(KELS\) make a slim network"):
        extract_slim({"params": params}, None)
    with pytest.raises(UserError, match="channels do not fit hidden/kernel"):
        extract_slim({"params": params}, wrong)


def test_masks_that_do_not_fit(params, masks):
    smaller = {name: leaf for name, leaf in masks.items() if name != "norm"}
    with pytest.raises(UserError, match="masks must have the structure of params"):
        next_generation(KEY, params, smaller)
    turned = masks | {"head": {"kernel": masks["head"]["kernel"].T, "bias": masks["head"]["bias"]}}
    with pytest.raises(UserError, match=r"The mask of head/kernel is \(3, 4\), and the leaf \(4, 3\)"):
        hypothesis_magnitude(params, turned)
    with pytest.raises(UserError, match="num_generations must be at least 1, got 0"):
        knowledge_evolution(lambda *given: given[:2], {"params": params}, masks, KEY, 0)
