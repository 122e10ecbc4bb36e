"""What fits of a stored tree starts a new one."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jkd import train
from jkd.errors import UserError
from jkd.train.warm import parse_rules, warm_start


def target():
    return {
        "params": {
            "body": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
            "head": {"kernel": jnp.full((3, 5), 7.0), "bias": jnp.full(5, 7.0)},
        },
        "batch_stats": {"mean": jnp.zeros(3)},
    }


def source():
    return {
        "params": {
            "trunk": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float16)},
            "head": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(5, np.float32)},
            "aux": {"scale": np.ones(2, np.float32)},
        },
        "batch_stats": {"mean": np.full(3, 2.0, np.float32)},
    }


RULES = [("/trunk/", "/body/"), ("head/bias", None)]


def test_what_is_taken_and_what_is_reported():
    tree, report = warm_start(target(), source(), RULES)
    np.testing.assert_array_equal(tree["params"]["body"]["kernel"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(tree["params"]["body"]["bias"], [1, 1, 1])
    np.testing.assert_array_equal(tree["params"]["head"]["kernel"], np.full((3, 5), 7))
    np.testing.assert_array_equal(tree["params"]["head"]["bias"], np.full(5, 7))
    np.testing.assert_array_equal(tree["batch_stats"]["mean"], [2, 2, 2])
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    assert report.taken == {
        "batch_stats/mean": "batch_stats/mean",
        "params/body/bias": "params/trunk/bias",
        "params/body/kernel": "params/trunk/kernel",
    }
    assert report.cast == {"params/body/bias": ("float16", "float32")}
    assert report.initialized == ["params/head/bias"]
    assert report.mismatched == {"params/head/kernel": ((3, 4), (3, 5))}
    assert report.unused == ["params/aux/scale", "params/head/bias"]
    assert report.summary() == (
        "3 of 5 leaves taken (1 cast), 1 left as initialized, 1 of another shape, 2 of the source unused"
    )


@pytest.mark.parametrize("every", [False, True])
def test_the_table(every):
    _, report = warm_start(target(), source(), RULES)
    text = io.StringIO()
    Console(file=text, width=120).print(report.table(every=every))
    lines = [line for line in text.getvalue().splitlines() if "params" in line or "stats" in line]
    rows = [" ".join(line.replace("│", " ").split()) for line in lines]
    assert rows == [
        *(["batch_stats/mean taken"] if every else []),
        "params/body/bias taken, cast from float16 to float32 params/trunk/bias",
        "params/body/kernel taken params/trunk/kernel",
        "params/head/kernel as initialized: [3, 5] is [3, 4]",
        "params/head/bias as initialized",
        "unused params/aux/scale",
        "unused params/head/bias",
    ]


def test_the_first_matching_rule_decides():
    tree = {"a": {"x": jnp.zeros(1)}, "b": {"x": jnp.zeros(1)}}
    rules = [("^a/", "c/"), ("^a", "b"), (r"^(\w)/(\w)$", r"\2/\1")]
    given_ = {"a": {"x": np.ones(1, np.float32)}, "b": {"x": np.full(1, 2, np.float32)}}
    wanted = {"c": {"x": jnp.zeros(1)}, "x": {"b": jnp.zeros(1)}}
    found, report = warm_start(wanted, given_, rules)
    assert report.taken == {"c/x": "a/x", "x/b": "b/x"}
    assert float(found["x"]["b"][0]) == 2
    assert warm_start(tree, given_)[1].taken == {"a/x": "a/x", "b/x": "b/x"}


def test_inside_jit_the_caller_lays_out_the_result_and_outside_the_target():
    mesh = train.make_mesh(data=2, fsdp=4)
    wide = {"kernel": jnp.zeros((64, 512)), "bias": jnp.zeros(64)}
    stored = {"kernel": np.random.RandomState(0).rand(64, 512).astype(np.float32)}
    shardings = train.tree_shardings(wide, mesh)
    inside = jax.jit(lambda a, b: warm_start(a, b)[0], out_shardings=shardings)(wide, stored)
    assert jax.tree.map(lambda x: x.sharding, inside) == shardings
    placed = train.place(wide, mesh)
    outside, _ = warm_start(placed, stored)
    assert jax.tree.map(lambda x: x.sharding, outside) == shardings
    assert outside["kernel"].addressable_shards[0].data.shape == (64, 128)
    for tree in (inside, outside):
        np.testing.assert_array_equal(tree["kernel"], stored["kernel"])
    again, _ = warm_start(placed, outside)
    jax.jit(lambda x: x + 1, donate_argnums=0)(again["kernel"])
    assert not outside["kernel"].is_deleted()
    # An ensemble: as it stands, and member by member.
    seeds = {"kernel": jnp.zeros((3, 2, 4)), "head": jnp.ones((3, 2))}
    kept = {"kernel": np.arange(24.0, dtype=np.float32).reshape(3, 2, 4)}
    whole, _ = warm_start(seeds, kept)
    each = jax.vmap(lambda a, b: warm_start(a, b)[0])(seeds, kept)
    jax.tree.map(np.testing.assert_array_equal, whole, each)


def test_shapes_give_the_report_of_arrays():
    shapes = [jax.eval_shape(lambda tree=tree: jax.tree.map(jnp.asarray, tree)) for tree in (target(), source())]
    tree, report = warm_start(*shapes, RULES)
    assert report == warm_start(target(), source(), RULES)[1]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, target())


@given(st.sets(st.sampled_from("abcdefgh"), min_size=1), st.sets(st.sampled_from("abcdefgh"), min_size=1))
def test_every_leaf_is_accounted_for_once(here, there):
    wanted = {name: np.zeros(2, np.float32) for name in here}
    stored = {name: np.ones(2 if name < "e" else 3, np.float32) for name in there}
    fits = {name for name in here & there if name < "e"}
    if not fits:
        with pytest.raises(UserError, match="has nothing that fits"):
            warm_start(wanted, stored)
        return
    tree, report = warm_start(wanted, stored)
    assert {*report.taken} == fits
    assert {*report.taken, *report.initialized, *report.mismatched} == here
    assert {*report.taken, *report.unused, *report.mismatched} == there
    assert {name for name in here if tree[name][0] == 1} == fits


@pytest.mark.parametrize(
    ("rules", "strict", "says"),
    [
        (
            RULES,
            True,
            "does not fit: params/head/kernel is \\[3, 4\\] in the source and \\[3, 5\\] here; params/head/bi",
        ),
        ([(".*kernel", "x")], False, "give params/head/kernel and params/trunk/kernel one path, x: drop one"),
        ([("(", "x")], False, "The rule's regex '\\(' cannot be read"),
        ([("head", "\\3")], False, "The rule's replacement .* cannot be used"),
        ([(".*", None)], False, "has nothing that fits: batch_stats/mean is not in the source"),
    ],
)
def test_refusals(rules, strict, says):
    with pytest.raises(UserError, match=says):
        warm_start(target(), source(), rules, strict=strict)


def test_strict_passes_where_all_is_used():
    stored = jax.tree.map(np.asarray, target()) | {"opt": np.zeros(2)}
    assert warm_start(target(), stored, [("^opt", None)], strict=True)[1].unused == ["opt"]


def test_rules_from_text():
    assert parse_rules(["trunk -> body", "head.* -> ", "aux->"]) == [("trunk", "body"), ("head.*", None), ("aux", None)]
    for line in ("head", "-> x"):
        with pytest.raises(UserError, match="must be 'regex -> replacement'"):
            parse_rules([line])
