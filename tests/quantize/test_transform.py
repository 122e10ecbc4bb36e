import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd import nn, quantize, train
from jkd.errors import UserError
from jkd.interop.safetensors import load_safetensors, save_safetensors
from jkd.quantize import (
    choices,
    dequantize,
    direct,
    export_codes,
    flipped,
    frozen,
    init_levels,
    nearest_index,
    pack_bits,
    pack_params,
    packed_shapes,
    quantize_params,
    refresh_bases,
    unpack,
    unpack_bits,
    weight_basis,
)

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
MODEL = nn.build("cnn", 5, width=4)


PACK = {n: jax.jit(lambda index, n=n: pack_bits(index, n)) for n in range(1, 9)}
UNPACK = {n: jax.jit(lambda packed, n=n: unpack_bits(packed, n, (3, 7))) for n in range(1, 9)}


split_params = jax.jit(quantize_params, static_argnames=("bits", "rules", "form", "per_channel"))
join_params = jax.jit(direct())


KERNEL = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32) * np.float32([1, 2, 5, 0.1])


def small(form, **options):
    """One kernel of four output channels, of unlike size."""
    return split_params({"kernel": KERNEL, "bias": np.zeros(4, np.float32)}, bits=2, form=form, **options)


@pytest.fixture(scope="module")
def variables():
    return nn.init(MODEL, jax.random.key(0), (8, 8, 1))


@pytest.fixture(scope="module", params=["onehot", "binary", "latent", "lq"])
def split(request, variables):
    """The model's kernels in two bits, all of them."""
    return split_params(variables["params"], bits=2, rules=(), form=request.param)


# --- codes in bytes ---


def test_bits_by_hand():
    # 3 + 1 * 4 + 2 * 16 + 0 * 64 = 39, then 1.
    np.testing.assert_array_equal(pack_bits(np.array([3, 1, 2, 0, 1]), 2), [39, 1])
    # 5 + 6 * 8 + 7 * 64 = 501: over two bytes.
    np.testing.assert_array_equal(pack_bits(np.array([5, 6, 7]), 3), [501 % 256, 501 // 256])
    np.testing.assert_array_equal(unpack_bits(np.uint8([39, 1]), 2, (5,)), [3, 1, 2, 0, 1])


@given(index=arrays(np.uint8, (3, 7), elements=st.integers(0, 255)), bits=st.integers(1, 8))
def test_what_is_packed_comes_back(index, bits):
    index = (index.astype(np.int32) % 2**bits).astype(np.uint8)
    packed = PACK[bits](index)
    assert packed.size == math.ceil(21 * bits / 8)
    np.testing.assert_array_equal(UNPACK[bits](packed), index)


def test_codes_are_those_of_sorted_levels():
    scores = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)
    levels = np.float32([0.3, -1, 1, -0.3])
    codes = export_codes(scores, levels)
    np.testing.assert_array_equal(codes.levels, np.sort(levels))
    np.testing.assert_array_equal(dequantize(*codes), quantize.direct_quantize(scores, levels))


# --- whole models ---


def test_a_model_is_quantized_but_for_its_ends(variables):
    params = variables["params"]
    joined = join_params(split_params(params))
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    for name in ("stem", "head"):
        assert jax.tree.all(jax.tree.map(np.array_equal, joined[name], params[name]))
    for block in ("block1", "block2"):
        kernel, before = joined[block]["conv"]["kernel"], params[block]["conv"]["kernel"]
        assert len(np.unique(kernel)) == 4
        assert np.corrcoef(np.ravel(kernel), np.ravel(before))[0, 1] > 0.9
        assert jax.tree.all(jax.tree.map(np.array_equal, joined[block]["norm"], params[block]["norm"]))
    assert np.isfinite(jax.jit(MODEL.apply)({**variables, "params": joined}, IMAGES).logits).all()


def test_rules_choose_bits_by_path(variables):
    rules = ((r"block1/conv", 1), (r"^stem/", 3), (r"^head/kernel", 4))
    joined = join_params(split_params(variables["params"], rules=rules))
    counts = {path: len(np.unique(joined[path]["conv"]["kernel"])) for path in ("stem", "block1", "block2")}
    assert counts == {"stem": 8, "block1": 2, "block2": 4}
    assert len(np.unique(joined["head"]["kernel"])) == 16


def test_it_composes_and_trains(variables):
    keep = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(2).random(x.shape) < 0.5), variables["params"])
    kernels = {"block1", "block2"}

    def prune(params):
        cut = {
            k: {**v, "conv": {"kernel": v["conv"]["kernel"] * keep[k]["conv"]["kernel"]}}
            for k, v in params.items()
            if k in kernels
        }
        return {**params, **cut}

    materialize = train.chain(direct(), prune)
    start = split_params(variables["params"])
    labels = np.arange(4)

    def loss_fn(params, batch, key):
        full = {**variables, "params": materialize(params)}
        return optax.losses.softmax_cross_entropy_with_integer_labels(MODEL.apply(full, batch).logits, labels).mean()

    rates = {"choices": optax.adam(0.1), "levels": optax.adam(1e-3), "weights": optax.adam(1e-3)}
    optimizer = optax.partition(rates, quantize.labels)
    step = jax.jit(train.make_train_step(loss_fn, optimizer))
    state = train.create_state({"params": start}, optimizer)
    losses = []
    for t in range(20):
        state, logged = step(state, IMAGES, jax.random.key(t))
        losses.append(float(logged["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < float(flipped(choices(start), choices(state.params))) < 1
    assert float(flipped(choices(start), choices(start))) == 0
    kernel = materialize(state.params)["block2"]["conv"]["kernel"]
    assert np.all(np.asarray(kernel)[~np.asarray(keep["block2"]["conv"]["kernel"])] == 0)
    assert len(np.unique(kernel)) <= 5


def test_a_packed_model_is_small_and_exact(split, variables, tmp_path):
    packed = pack_params(split)
    save_safetensors(tmp_path / "small.safetensors", packed)
    loaded = load_safetensors(tmp_path / "small.safetensors")[0]
    shapes = packed_shapes(loaded)
    found = jax.jit(unpack(shapes))(loaded)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(join_params(split)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [len(np.unique(found[name]["conv"]["kernel"])) for name in ("stem", "block1")] == [4, 4]
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(loaded) if "packed" in str(path)]
    weights = sum(math.prod(shape) for shape in shapes.values())
    assert sum(leaf.size for leaf in kernels) <= 1.05 * 2 * weights / 8
    images = jax.jit(lambda v, x: MODEL.apply({**variables, "params": unpack(shapes)(v)}, x).logits)(loaded, IMAGES)
    assert images.shape == (4, 5)


# --- forms ---


@pytest.mark.parametrize("form", ["onehot", "binary", "latent", "lq"])
def test_levels_of_their_own_for_each_channel(form):
    split = small(form, per_channel=True)
    kernel = join_params(split)["kernel"]
    assert max(len(np.unique(column)) for column in kernel.T) == 4
    if form in ("onehot", "latent"):
        for c in range(4):
            np.testing.assert_allclose(split["kernel"]["levels"][c], init_levels(KERNEL[:, c], 2), rtol=1e-6)
    packed = pack_params(split)
    assert packed["kernel"]["packed"].size == 9
    assert packed["kernel"]["levels"].shape == (4, 4)
    assert np.all(np.diff(packed["kernel"]["levels"]) >= 0)
    found = jax.jit(unpack(packed_shapes(packed)))(packed)
    np.testing.assert_array_equal(found["kernel"], kernel)
    np.testing.assert_array_equal(found["bias"], 0)
    assert float(flipped(choices(split), choices(split))) == 0


def test_many_levels_of_each_channel():
    split = split_params({"kernel": KERNEL}, bits=5, per_channel=True)
    packed = pack_params(split)
    found = jax.jit(unpack(packed_shapes(packed)))(packed)["kernel"]
    np.testing.assert_array_equal(found, join_params(split)["kernel"])
    np.testing.assert_allclose(found, KERNEL, atol=0.3)
    latent = direct()({"latent": KERNEL, "levels": split["kernel"]["levels"]})
    np.testing.assert_allclose(latent, found, rtol=1e-6)


def test_the_baseline_passes_the_gradient_to_latent_weights():
    split = small("latent")
    g = np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32)
    of_levels = {}
    for learned in (True, False):
        _, back = jax.vjp(direct(learn_levels=learned), split)
        (grad,) = back({"kernel": g, "bias": np.zeros(4, np.float32)})
        np.testing.assert_array_equal(grad["kernel"]["latent"], g)
        of_levels[learned] = grad["kernel"]["levels"]
    index = np.asarray(nearest_index(KERNEL, split["kernel"]["levels"]))
    np.testing.assert_allclose(of_levels[True], [g[index == k].sum() for k in range(4)], rtol=1e-4)
    np.testing.assert_array_equal(of_levels[False], 0)


@pytest.mark.parametrize("each", [True, False])
def test_bases_start_by_shape_and_follow_the_latent_weights(each):
    split = small("lq", per_channel=each)
    start = np.asarray(split["kernel"]["basis"])
    np.testing.assert_allclose(start, np.tile(weight_basis((9, 4), 2), (4, 1)) if each else weight_basis((9, 4), 2))
    columns = KERNEL.T if each else KERNEL.reshape(1, -1)
    wanted = []
    for column, basis in zip(columns, start.reshape(-1, 2), strict=True):
        codes = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]], np.float32)
        nearest = codes[np.abs(column[:, None] - codes @ basis).argmin(1)]
        ridge = 1e-4 * np.eye(2)
        wanted.append(np.linalg.solve(nearest.T @ nearest + ridge, nearest.T @ column + 1e-4 * basis))
    moved = jax.jit(refresh_bases)(split)
    np.testing.assert_allclose(
        moved["kernel"]["basis"].reshape(-1, 2), 0.9 * start.reshape(-1, 2) + 0.1 * np.stack(wanted), atol=1e-4
    )
    np.testing.assert_array_equal(moved["kernel"]["latent"], KERNEL)
    g = np.ones((9, 4), np.float32)
    joined, back = jax.vjp(lambda params: direct()(params)["kernel"], moved)
    (grad,) = back(g)
    np.testing.assert_array_equal(grad["kernel"]["latent"], g)
    np.testing.assert_array_equal(grad["kernel"]["basis"], 0)
    distance = np.abs(columns[..., None] - (moved["kernel"]["basis"].reshape(-1, 2) @ codes.T)[:, None]).min(-1)
    np.testing.assert_allclose(np.abs(columns - (joined.T if each else joined.reshape(1, -1))), distance, atol=1e-6)


def test_bases_settle_at_small_errors(variables):
    def settled(params):
        return jax.lax.fori_loop(0, 60, lambda _, params: refresh_bases(params), params)

    split = split_params(variables["params"], bits=2, form="lq", rules=((r"^head/kernel", 3),))
    before, after = (join_params(params) for params in (split, jax.jit(settled)(split)))
    for name, *rest in (("block1", "conv"), ("head",)):
        kernel, old, new = (
            jax.tree.leaves(tree[name][rest[0]] if rest else tree[name])[-1]
            for tree in (variables["params"], before, after)
        )
        assert np.square(new - kernel).sum() < np.square(old - kernel).sum()


def test_what_an_optimizer_leaves_alone():
    fixed = {"kernel": {"latent": False, "basis": True}, "bias": False}
    assert frozen(small("lq")) == fixed
    assert not any(jax.tree.leaves([frozen(small(form)) for form in ("onehot", "binary", "latent")]))
    assert frozen(small("latent"), learn_levels=False) == {"kernel": {"latent": False, "levels": True}, "bias": False}
    params = small("lq")
    optimizer = optax.chain(optax.adamw(0.1, weight_decay=0.5), optax.masked(optax.set_to_zero(), frozen(params)))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["kernel"]["basis"], 0)
    assert np.abs(updates["kernel"]["latent"]).min() > 0
    assert quantize.is_level("a/kernel/basis")


def test_choices_are_split_like_their_weights(variables):
    mesh = train.make_mesh(fsdp=4)
    split = split_params(variables["params"])
    placed = train.place(split, mesh)
    for one, other in zip(jax.tree.leaves(join_params(placed)), jax.tree.leaves(join_params(split)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: quantize_params(p, 0), "bits must be an integer in 1..8, got 0"),
        (lambda p: quantize_params(p, 2, rules=((".*", 9),)), "bits must be an integer in 1..8, got 9"),
        (lambda p: quantize_params(p, 2, rules=((".*", 0),)), "Nothing is quantized: rules leave all of"),
        (lambda p: quantize_params(p, 2, form="ternary"), "Unknown form 'ternary'. Did you mean 'binary'"),
        (lambda p: quantize_params(jax.tree.map(lambda x: x * np.nan, p)), "is not finite: levels cannot be found"),
        (lambda p: pack_params(p), "params hold no levels and choices to pack"),
        (choices, "hold no choices"),
        (lambda p: quantize_params(p, rules=(("(", 2),)), "rules: .* is no regular expression"),
        (lambda p: quantize_params(p, rules=(("bias", 2),), per_channel=True), "has no output channels"),
        (lambda p: refresh_bases(p), "hold no basis to refresh"),
        (lambda p: refresh_bases(p, momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (
            lambda p: pack_params(jax.tree.map(lambda x: x * np.nan, small("lq"))),
            "kernel/basis is not finite: a model that",
        ),
        (
            lambda p: direct()({"latent": KERNEL, "basis": np.zeros((3, 2))}),
            r"basis must have the shape .* \[4, bits\]",
        ),
        (
            lambda p: direct()({"latent": KERNEL, "levels": np.zeros((3, 2))}),
            r"levels must be \[levels\] or \[4, levels\]",
        ),
        (lambda p: direct()({"codes": np.zeros((9, 4, 2)), "basis": np.zeros((3, 2))}), "basis must have the shape"),
        (lambda p: pack_bits(np.array([4]), 2), "index must lie in 0..3 for 2 bits, got 4..4"),
        (lambda p: unpack_bits(np.zeros(3, np.uint8), 2, (5,)), "packed must hold 2 bytes for 5 numbers"),
        (lambda p: export_codes(np.full((2, 2), np.nan, np.float32), np.float32([0, 1])), "assignment is not finite"),
    ],
)
def test_mistakes(call, says, variables):
    with pytest.raises(UserError, match=says):
        call(variables["params"])
