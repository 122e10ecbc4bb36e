"""Meshes, rules, the jitted step, and one run on three meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from jax.sharding import PartitionSpec as P

from jkd import train
from jkd.errors import UserError

SPLIT_ALL = ((".*", train.fsdp(min_size=1)),)


@functools.cache
def mesh(count: int, ways: int = 1):
    return train.make_mesh(fsdp=ways, devices=jax.devices()[:count])


# --- meshes ---


def test_make_mesh_fills_the_data_axis():
    assert dict(train.make_mesh().shape) == {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert dict(train.make_mesh(fsdp=2, tensor=2).shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert set(train.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 3}, {"data": 0}, {"fsdp": 16}, {"data": 4, "fsdp": 4}])
def test_make_mesh_names_sizes_that_do_not_fit(sizes):
    asked = " ".join(f".*{name}={size}" for name, size in sizes.items() if size)
    with pytest.raises(UserError, match=asked + ".* there are 8"):
        train.make_mesh(**sizes)


# --- rules ---


def specs(tree, rules, count=8, ways=4):
    return jax.tree.map(lambda s: s.spec, train.tree_shardings(tree, mesh(count, ways), rules))


def test_the_first_matching_rule_decides_and_the_rest_is_replicated():
    tree = {"head": {"kernel": jnp.zeros((8, 12))}, "body": {"kernel": jnp.zeros((8, 12)), "bias": jnp.zeros(12)}}
    rules = (("head/kernel", train.shard(-1, "fsdp")), ("kernel", train.fsdp(min_size=1)))
    assert specs(tree, rules) == {
        "head": {"kernel": P(None, "fsdp")},
        "body": {"kernel": P(None, "fsdp"), "bias": P()},
    }
    rules = (("kernel", train.shard(0, "fsdp")), ("head/kernel", train.replicate))
    assert specs(tree, rules)["head"]["kernel"] == P("fsdp")


def test_fsdp_splits_the_largest_dimension_that_divides():
    tree = {"a": jnp.zeros((4, 8)), "b": jnp.zeros((4, 9)), "c": jnp.zeros((3, 9)), "d": jnp.zeros((2, 4))}
    found = specs(tree, ((".*", train.fsdp(min_size=9)),))
    assert found == {"a": P(None, "fsdp"), "b": P("fsdp"), "c": P(), "d": P()}
    assert specs(tree, ((".*", train.fsdp(min_size=9)),), ways=1)["a"] == P()


def test_shard_refuses_what_does_not_fit():
    for dimension in (0, 2, -3):
        with pytest.raises(UserError, match=rf"shard\({dimension}, 'fsdp'\).*\(6, 8\)"):
            specs({"a": jnp.zeros((6, 8))}, ((".*", train.shard(dimension, "fsdp")),))


def test_optimizer_state_follows_the_parameters():
    variables = {"params": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(3)}}
    state = train.create_state(variables, optax.adam(0.1))
    rules = (("kernel", train.shard(0, "fsdp")),)
    found = {
        jax.tree_util.keystr(p): s.spec
        for p, s in jax.tree.leaves_with_path(train.tree_shardings(state, mesh(8, 4), rules))
    }
    assert sum(spec == P("fsdp") for spec in found.values()) == 3, "the kernel and its two moments"
    assert all(("kernel" in name) == (spec == P("fsdp")) for name, spec in found.items())


@pytest.mark.parametrize("leaf", [np.arange(16.0), jnp.arange(16.0), jax.random.key(3), 2.5])
def test_place_keeps_values(leaf):
    placed = train.place({"x": leaf}, mesh(8, 8), SPLIT_ALL)["x"]
    assert len(placed.sharding.device_set) == 8
    assert placed.sharding.spec == (P("fsdp") if np.ndim(leaf) else P())
    assert train.place(placed, mesh(8, 8), SPLIT_ALL) is placed
    if jnp.issubdtype(placed.dtype, jax.dtypes.prng_key):
        leaf, placed = jax.random.key_data(leaf), jax.random.key_data(placed)
    np.testing.assert_array_equal(placed, leaf)


# --- the jitted step ---


def batch(size: int = 16) -> dict:
    return toys.data.MemorySource(toys.DIGITS, size).batch(0)


def new_state(on=None):
    state = toys.init(jax.random.key(0), {}, {})
    return state if on is None else train.place(state, on, SPLIT_ALL)


def simple_step(state, batch, key):
    return toys.step(key, state, {}, batch, 0)


@functools.cache
def single_step():
    return jax.jit(simple_step)(new_state(), batch(), jax.random.key(1))


@pytest.mark.parametrize(("count", "ways"), [(1, 1), (8, 1), (8, 4)])
def test_one_step_agrees_on_any_mesh(count, ways):
    step = train.jit_step(simple_step, mesh(count, ways), rules=SPLIT_ALL)
    state, metrics = step(new_state(mesh(count, ways)), batch(), jax.random.key(1))
    wanted = single_step()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), (state, metrics), wanted)
    kernel = state.params["hidden"]["kernel"].sharding
    assert kernel.spec == (P(None, "fsdp") if ways > 1 else P())
    assert metrics["loss"].sharding.is_fully_replicated


@pytest.mark.parametrize("donate", [True, False])
def test_state_is_donated(donate):
    step = train.jit_step(simple_step, mesh(1), donate=donate)
    state = new_state(mesh(1))
    step(state, batch(), jax.random.key(1))
    assert [x.is_deleted() for x in jax.tree.leaves(state.params)] == [donate] * 4


def test_a_state_from_elsewhere_is_copied_and_compiled_for_once():
    traces = []

    def step(state, batch, key):
        traces.append(1)
        return simple_step(state, batch, key)

    jitted, state = train.jit_step(step, mesh(1)), new_state()
    after, _ = jitted(state, batch(), jax.random.key(1))
    jitted(after, batch(), jax.random.key(1))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    assert all(x.is_deleted() for x in jax.tree.leaves(after.params))
    assert len(traces) == 1


def test_lower_takes_shapes_only():
    step = train.jit_step(simple_step, mesh(8, 4), rules=SPLIT_ALL)
    shapes = jax.eval_shape(lambda: (new_state(), batch(), jax.random.key(1)))
    compiled = step.lower(*shapes).compile()
    assert compiled.input_shardings[0][0].params["hidden"]["kernel"].spec == P(None, "fsdp")
    assert compiled.input_shardings[0][1]["image"].spec == P(("slice", "data", "fsdp"))
    assert "all-reduce" in compiled.as_text()


def test_batch_axis_behind_the_members():
    def step(state, batch):
        return state + batch["x"].sum((1, 2)), {"mean": batch["x"].mean()}

    jitted = train.jit_step(step, mesh(8), batch_axis=1)
    x = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    state, _ = jitted(jnp.zeros(2), {"x": x})
    np.testing.assert_allclose(state, x.sum((1, 2)))
    with pytest.raises(UserError, match="batch_size 12 is not divisible by the 8 devices"):
        jitted(jnp.zeros(2), {"x": x[:, :12]})


def test_a_batch_that_does_not_divide_is_refused():
    step = train.jit_step(simple_step, mesh(8, 4))
    with pytest.raises(UserError, match="batch_size 12 is not divisible by the 8 devices.*multiple of 8"):
        step(new_state(), batch(12), jax.random.key(1))


def test_state_bytes_on_a_device_fall_with_the_fsdp_axis():
    def local_bytes(ways: int) -> int:
        on = mesh(4, ways)
        step = train.jit_step(simple_step, on, rules=SPLIT_ALL)
        state, _ = step(new_state(on), batch(), jax.random.key(1))
        shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == jax.devices()[0]]
        return sum(s.data.nbytes for s in shards)

    # 16x32, 32, 32x4 and 4 parameters, and as many of momentum: all divide by 4.
    whole = 4 * 2 * (16 * 32 + 32 + 32 * 4 + 4)
    assert [local_bytes(ways) for ways in (1, 2, 4)] == [whole, whole // 2, whole // 4]


# --- whole runs ---


def test_float64_runs_agree_on_any_mesh(tmp_path):
    with toys.x64():
        found = [final_of_run(tmp_path / f"{i}", on) for i, on in enumerate((mesh(1), mesh(8), mesh(8, 4)))]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            assert value.dtype == np.float64
            np.testing.assert_allclose(other[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def final_of_run(workdir, on) -> dict[str, np.ndarray]:
    options = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=False)
    train.run([toys.alone(300)], workdir=workdir, log_every=50, mesh=on, rules=SPLIT_ALL, options=options)
    return toys.final(workdir, "teacher")


def test_float32_runs_start_out_together(tmp_path):
    losses = []
    for i, on in enumerate((mesh(1), mesh(4, 2))):
        options = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=False)
        train.run([toys.alone(50)], workdir=tmp_path / f"{i}", log_every=1, mesh=on, rules=SPLIT_ALL, options=options)
        losses.append(toys.logged(tmp_path / f"{i}", "loss"))
    assert len(losses[0]) == 50
    np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=1e-5)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert math.isfinite(losses[0][-1])
