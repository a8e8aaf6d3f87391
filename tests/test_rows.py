"""Each processor's way through rows and blocks, run on the CPU, is as right and as exact."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    assert_norms_close,
    assert_relative,
    random_labels,
    random_logits,
    random_targets,
    slow,
)
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js
from jaxsoftmax import _blocks, _rows
from jaxsoftmax._mesh import first_class

LANES = 1024


REDUCE = jax.lax.reduce


def in_lanes(terms, start, join, axes):
    """The terms of each row joined as a device with so many lanes would: a chain each, then theirs."""
    if not isinstance(terms, tuple):
        return REDUCE(terms, start, join, axes)
    spare = -terms[0].shape[-1] % LANES
    padded = [
        jnp.pad(term, [(0, 0)] * (term.ndim - 1) + [(0, spare)], constant_values=first)
        for term, first in zip(terms, start, strict=True)
    ]
    folded = tuple(term.reshape(*term.shape[:-1], -1, LANES) for term in padded)
    chains = REDUCE(folded, start, join, (folded[0].ndim - 2,))
    return tuple(REDUCE(tuple(chains), start, join, (chains[0].ndim - 1,)))


@pytest.fixture(params=["gpu", "tpu"])
def elsewhere(request, monkeypatch):
    """Runs what accelerators run."""

    def way(_, other, *arguments, tpu=None):
        return (tpu if tpu and request.param == "tpu" else other)(*arguments)

    for module in (_rows, _blocks):
        monkeypatch.setattr(module, "by_processor", way)
    if request.param == "tpu":
        monkeypatch.setattr(jax.lax, "reduce", in_lanes)
    else:
        # Rows of more than 256 numbers in float32 go in parts.
        monkeypatch.setattr(_rows, "MOST_BYTES", 1024)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


# The CPU goes through rows of more than 4,096 classes in parts, if their number has divisors.
@pytest.mark.parametrize("classes", [4099, 4100, slow(8192), slow(50_257)])
def test_long_rows_in_parts(classes):
    generator = np.random.default_rng(7)
    ends = [-200, -1, 0, 1, classes - 2, classes - 1, classes]
    index = np.array([*ends, 127, 128, 204, 205, classes // 2])
    z = np.float32(generator.normal(size=(len(index), classes)) * 9)
    is_own = np.arange(classes) == index[:, None]
    z[is_own & (index % 2 == 0)[:, None]] = 60
    e = np.exp(np.float64(z) - z.max(axis=1, keepdims=True))
    index = jnp.asarray(index[:, None], jnp.int32)
    found, _ = _rows.sums_and_kept((), None, jnp.asarray(z), index)
    assert_relative(found.others[:, 0], (e * ~is_own).sum(axis=1), eps_multiple=8)
    found = _rows.sum_of_all_but((), jnp.asarray(z), index)
    exact = np.where(is_own, 0, np.float64(z)).sum(axis=1)
    np.testing.assert_array_less(np.abs(found[:, 0] - exact), 1e-6 * np.abs(z).sum(axis=1))


@pytest.mark.parametrize("classes", [25, 128, 300, 4099, 4100, slow(8192), slow(50_257)])
def test_rank_in_rows_of_many_lengths(classes):
    ends = [-200, -1, 0, 1, classes - 2, classes - 1, classes]
    index = np.array([*ends, 127, 128, 204, 205, classes // 2])
    # Many are equal, some infinite, and all are in the last row.
    z = np.random.default_rng(9).normal(size=(len(index), classes)).round(1)
    z[:, ::7], z[:, 1::1000], z[-1] = -np.inf, 3e38, -3e38
    own = np.take_along_axis(z, index[:, None].clip(0, classes - 1), axis=1)
    is_before = np.arange(classes) < index[:, None]
    expected = ((z > own) | (z == own) & is_before).sum(axis=1)
    finite = np.isfinite(own[:, 0])  # Of others any number will do.
    for dtype in "float32", "float64":
        with jax.enable_x64(dtype == "float64"):
            found = _rows.rank((), jnp.asarray(z, dtype), jnp.asarray(index[:, None], jnp.int32))
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found[finite, 0], expected[finite])
    # Of two devices, one has only classes before the one at index, or behind it.
    mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Auto,))
    two = jax.shard_map(
        lambda z, index: _rows.rank(("c",), z, index - first_class(z, ("c",))),
        mesh=mesh,
        in_specs=(P(None, "c"), P()),
        out_specs=P(),
    )
    both = np.float32(np.concatenate([z, z], axis=1))
    for half in 0, 1:
        index = np.arange(1, len(z) + 1) % classes + half * classes
        own = np.take_along_axis(both, index[:, None], axis=1)
        expected = ((both > own) | (both == own) & (np.arange(2 * classes) < index[:, None])).sum(axis=1)
        found = jax.jit(two)(both, jnp.asarray(index[:, None], jnp.int32))
        finite = np.isfinite(own[:, 0])
        assert finite.sum() > 9
        np.testing.assert_array_equal(found[finite, 0], expected[finite])


@pytest.mark.parametrize("classes", [4099, 4100, slow(8192), slow(50_257)])
def test_the_winner_of_long_rows(classes):
    z = np.float32(np.random.default_rng(8).normal(size=(9, classes)))
    # The first of several that are equal: of one part, of two, of all; and one at each end.
    for row, winners in enumerate([(5, 9), (9, 4000, 4001), range(classes), [0], [classes - 1]]):
        z[row, winners] = 8
    z[5, :-1] = -np.inf
    z[6, 3] = np.nan
    z[7, 4000] = np.inf
    z[8] = -np.inf
    found = _rows.sums_without_winner((), jnp.asarray(z))
    number = np.asarray(found.number)[:6, 0]
    np.testing.assert_array_equal(number, z[:6].argmax(axis=1))
    e = np.exp(np.float64(z[:6]) - z[:6].max(axis=1, keepdims=True))
    e[np.arange(6), number] = 0
    assert_relative(found.others[:6, 0], e.sum(axis=1), eps_multiple=8)
    assert np.isnan(np.asarray(found.own + found.others)[6:8]).all()
    assert float(found.others[8, 0]) == 0
    mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Auto,))
    two = jax.shard_map(
        lambda z: _rows.winner(("c",), z), mesh=mesh, in_specs=P(None, "c"), out_specs=P()
    )
    for half in (z[:5], z[:5, ::-1], 0 * z[:5]):
        both = np.concatenate([half, z[:5]], axis=1)
        np.testing.assert_array_equal(jax.jit(two)(both)[:, 0], both.argmax(axis=1))


def test_a_pass_has_one_reduction():
    # XLA's library would store the logits' size, where memory_analysis() does not see it, between two.
    z = jax.ShapeDtypeStruct((1025, 32768), jnp.float32)
    labels = jnp.zeros(1025, jnp.int32)
    for function in (
        lambda z: js.log_likelihood_cost(z, labels),
        lambda z: _rows.rank((), z, labels[:, None]),
        js.softmax,
        js.log_softmax,
    ):
        for computation in re.split(r"\n}", jax.jit(function).lower(z).compile().as_text()):
            names = re.findall(r"(\S+) = \S+ reduce\(", computation)
            assert not any(f"reduce({name}" in computation for name in names), computation


@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.float64)], ids=str)
def test_exact_at_every_confidence(elsewhere, dtype):
    for classes in (4099, 131_072) if elsewhere == "tpu" else (2, 1000, 1009):
        leads = np.array([-87, -40, -3, 0, 3, 20, 40, 87])
        logits = np.random.default_rng(5).normal(size=(len(leads), classes)) / 3
        label = classes // 2
        logits[:, label] = leads
        with jax.enable_x64(dtype == jnp.float64):
            z = jnp.asarray(np.concatenate([logits, logits + 1000]), dtype)
            exact_cost, exact_gradient = oracle.many_classes(np.asarray(z), label)
            index = jnp.full(len(z), label)
            for labels in (index, jax.nn.one_hot(index, classes, dtype=dtype)):

                def total(z, labels):
                    each = js.log_likelihood_cost(z, labels, reduction="none")
                    return jnp.sum(each), each

                (_, cost), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(z, labels)
                assert_relative(cost, exact_cost, eps_multiple=8)
                assert_relative(gradient, exact_gradient, eps_multiple=8)


# Devices agree alike on all accelerators.
@pytest.mark.parametrize("elsewhere", ["gpu"], indirect=True)
def test_devices_agree_on_the_winner_of_a_row(elsewhere):
    del elsewhere
    generator = np.random.default_rng(6)
    x, w, c = (jnp.asarray(generator.normal(size=s), jnp.float32) for s in ((9, 4), (4, 16), (9, 16)))
    labels, classes = random_labels((9, 16)), P(None, "model")

    def every(x, w, c, class_axis=None):
        z = x @ w
        statistics = js.head_statistics(x, w, None, labels, softcap=2.0, class_axis=class_axis)
        gradient = jax.grad(lambda z: jnp.vdot(js.log_softmax(z, class_axis=class_axis), c))(z)
        return statistics, gradient

    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    on_mesh = jax.shard_map(
        partial(every, class_axis="model"),
        mesh=mesh,
        in_specs=(P(), classes, classes),
        out_specs=(P(), classes),
    )
    (found, gradient), (expected, whole) = jax.jit(on_mesh)(x, w, c), jax.jit(every)(x, w, c)
    assert len(set(np.asarray(expected.prediction) // 4)) == 4  # Each device has the winner of some row.
    for name in ("prediction", "label_rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert_close((found.entropy, gradient), (expected.entropy, whole), ulps=32)


@pytest.mark.parametrize("elsewhere", ["gpu", slow("tpu")], indirect=True)
def test_the_edges(elsewhere):
    del elsewhere
    logits = jnp.array(
        [
            [1.0, -jnp.inf, 0.0],
            [jnp.nan, 0, 0],
            [jnp.inf, 0, 0],
            [0, 0, jnp.inf],
            [-jnp.inf] * 3,
            [3e38, -3e38, 0],
        ]
    )
    labels = jnp.array([0, 1, 1, 2, 0, 0])
    for y in (labels, jax.nn.one_hot(labels, 3)):
        cost = jax.jit(partial(js.log_likelihood_cost, reduction="none"))(logits, y)
        assert_close(cost, [np.log1p(np.exp(-1.0)), np.nan, np.nan, np.nan, np.inf, 0], ulps=2)
    assert list(np.isnan(js.softmax(logits)).all(axis=1)) == [False, True, True, True, True, False]
    gradient = jax.grad(lambda z: js.log_likelihood_cost(z, labels, sample_weight=labels == 0))(logits)
    assert_close(gradient[1:4], np.zeros((3, 3)), ulps=0)
    bad = jax.jit(partial(js.log_likelihood_cost, reduction="none"))(logits[:2], jnp.array([5, -1]))
    assert np.isnan(bad).all()
    cost, gradient = jax.value_and_grad(js.log_likelihood_cost)(jnp.array([[7.0]]), jnp.array([0]))
    assert (float(cost), float(gradient[0, 0])) == (0, 0)


# Sums over devices are the same on all accelerators.
@pytest.mark.parametrize("elsewhere", ["gpu", slow("tpu")], indirect=True)
def test_classes_spread_over_devices(elsewhere):
    del elsewhere
    z = random_logits((5, 24), 30, jnp.float32)
    z = z.at[1, 3].set(-jnp.inf).at[2, 20].set(jnp.nan).at[3].set(-jnp.inf).at[4].set(7)
    # A device may have nothing but −inf.
    z = z.at[0, :6].set(-jnp.inf)
    y = jax.nn.one_hot(jnp.array([7, 0, 1, 2, 23]), 24)
    mesh = jax.make_mesh((4,), ("c",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.PartitionSpec(None, "c")

    def results(z, y, **axis):
        cost = js.log_likelihood_cost(z, y, reduction="none", **axis)
        return js.softmax(z, **axis), js.log_softmax(z, **axis), jnp.broadcast_to(cost[:, None], z.shape)

    spread = jax.shard_map(
        partial(results, class_axis="c"), mesh=mesh, in_specs=(place, place), out_specs=(place,) * 3
    )
    for found, expected in zip(jax.jit(spread)(z, y), (results(z, y)), strict=True):
        assert_close(found, expected, ulps=4)


@pytest.mark.slow
def test_softmax_and_second_derivatives(elsewhere):
    del elsewhere
    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)) * 4, jnp.float32)
    exact = np.asarray(z, np.float64)
    assert_relative(js.softmax(z), oracle.softmax(exact), eps_multiple=8)
    assert_relative(js.log_softmax(z), oracle.log_softmax(exact), eps_multiple=8)
    for label in (jnp.array(1), jax.nn.one_hot(1, 6)):
        hessian = jax.jit(jax.hessian(lambda z: js.log_likelihood_cost(z, label)))(z[0])  # noqa: B023
        assert_close(hessian, oracle.softmax_jacobian(exact[:1])[0], ulps=16)
    z = random_logits((3, 3000), 1, jnp.float32).at[1, 5].set(60).at[2].set(0)
    exact = np.asarray(z, np.float64)
    assert_relative(js.softmax(z), oracle.softmax(exact), eps_multiple=8)
    assert_relative(js.log_softmax(z), oracle.log_softmax(exact), eps_multiple=8)
    z = z[:, :6]
    plain = js.without_custom_rules(js.log_likelihood_cost)
    _, slope = jax.jvp(lambda z: plain(z, jnp.array([1, 2, 3])), (z,), (jnp.ones_like(z),))
    assert abs(slope) < 1e-6


@pytest.mark.parametrize(
    ("reduction", "is_soft", "shape", "dtype", "block_size"),
    [
        slow("mean", False, (23, 3, 9), jnp.float32, None),  # one block
        ("mean", True, (23, 3, 9), jnp.float32, 2),  # parts of 3 rows, in blocks
        slow("none", False, (24, 30, 9), jnp.float32, 5),  # one part
        # parts of several blocks, the last shorter
        slow("none", True, (300, 70, 40), jnp.bfloat16, 64),
        slow("none", False, (300, 70, 40), jnp.float16, 64),
    ],
)
# The order of products is the same on all accelerators.
@pytest.mark.parametrize("elsewhere", ["gpu"], indirect=True)
def test_the_head_in_parts(elsewhere, shape, dtype, block_size, reduction, is_soft):
    del elsewhere
    rows, features, classes = shape
    generator = np.random.default_rng(3)
    x, w, b = (
        jnp.asarray(generator.normal(size=size) / 2, dtype)
        for size in ((rows, features), (features, classes), (classes,))
    )
    options = {
        "sample_weight": jnp.asarray(generator.random(rows), jnp.float32).at[0].set(0),
        "class_weight": jnp.asarray(generator.random(classes), jnp.float32),
        "label_smoothing": jnp.float32(0.1),
        "z_loss": jnp.float32(0.01),
    }
    cotangent = jnp.asarray(generator.normal(size=() if reduction == "mean" else rows), jnp.float32)

    def results(cost, labels, *arguments):
        def of(x, w, b, options):
            return cost(x, w, b, labels, **options)

        value, pull_back = jax.vjp(of, *arguments)
        return value, pull_back(cotangent)

    def head(*arguments, **options):
        cost = js.linear_log_likelihood_cost
        return cost(*arguments, reduction=reduction, block_size=block_size, **options)

    def dense(x, w, b, labels, **options):
        z = jnp.matmul(x, w, preferred_element_type=jnp.float32) + b.astype(jnp.float32)[None]
        return js.log_likelihood_cost(z, labels, reduction=reduction, **options)

    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    shape = rows, classes
    labels = random_targets(shape, jnp.float32) if is_soft else random_labels(shape)
    run = (jax.jit(partial(results, cost, labels))(x, w, b, options) for cost in (head, dense))
    assert_norms_close(*run, tolerance)


@pytest.mark.parametrize("elsewhere", ["gpu"], indirect=True)
def test_float32_weights_beside_bfloat16_features(elsewhere):
    del elsewhere
    x = jnp.asarray(np.random.default_rng(3).normal(size=(30, 8)), jnp.bfloat16)
    w = jnp.asarray(np.random.default_rng(4).normal(size=(8, 12)), jnp.float32)
    labels = random_labels((30, 12))

    @jax.jit
    def both(w):
        head = lambda w: js.linear_log_likelihood_cost(x, w, None, labels, block_size=7)  # noqa: E731
        dense = lambda w: js.log_likelihood_cost(x.astype(jnp.float32) @ w, labels)  # noqa: E731
        return jax.grad(head)(w), jax.grad(dense)(w)

    gradient, exact = both(w)
    assert gradient.dtype == jnp.float32
    assert_norms_close(gradient, exact, 1e-2)
