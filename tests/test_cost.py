"""The costs beyond the contract: exactness, labels, weights, reductions, edges, errors."""

import itertools
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    assert_relative,
    every,
    mostly_slow,
    random_labels,
    random_logits,
    random_targets,
    slow,
    unchecked,
)

import jaxsoftmax as js

COSTS = [js.log_likelihood_cost, js.quadratic_cost]


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_worked_example(one_hot):
    probabilities = jnp.array([[0.1, 0.2, 0.25, 0.4, 0.05]] * 2)
    labels = jnp.array([2, 0])
    gradient = jax.grad(js.log_likelihood_cost)(
        jnp.log(probabilities), jax.nn.one_hot(labels, 5) if one_hot else labels
    )
    assert_close(gradient[0], np.array([0.1, 0.2, -0.75, 0.4, 0.05]) / 2, ulps=1)


@jax.jit
def cost_and_gradient(z, labels):
    """Of each example."""
    cost, pull_back = jax.vjp(lambda z: js.log_likelihood_cost(z, labels, reduction="none"), z)
    return cost, pull_back(jnp.ones_like(cost))[0]


@pytest.mark.parametrize(
    ("classes", "one_hot", "dtype"),
    [
        (2, False, jnp.float32),
        (2, True, jnp.float64),
        (10, False, jnp.float32),
        (10, True, jnp.float32),
        (1000, False, jnp.float64),
        (1000, True, jnp.float32),
    ],
)
def test_cost_and_gradient_are_exact_at_every_confidence(classes, one_hot, dtype):
    confidences = np.array([-80, -40, -20, -3, -1e-3, 0, 1e-3, 3, 20, 40, 80])
    logits = np.zeros((len(confidences), classes))
    logits[:, 1:] -= np.linspace(0, 2, classes - 1)
    logits[np.arange(len(confidences)), 0] = confidences
    with jax.enable_x64(dtype == jnp.float64):
        for offset in (0.0, 1000.0):
            z = jnp.asarray(logits + offset, dtype)
            exact, targets = np.asarray(z, np.float64), np.eye(classes)[np.zeros(len(z), int)]
            labels = jnp.asarray(targets, dtype) if one_hot else jnp.zeros(len(z), jnp.int32)
            cost, gradient = cost_and_gradient(z, labels)
            assert_relative(cost, oracle.log_likelihood(exact, targets), eps_multiple=8)
            truth = oracle.log_likelihood_vjp(exact, targets, np.ones(1))
            assert_relative(gradient, truth, eps_multiple=8)


MANY = list(itertools.product([4099, 70_000, 131_072], [False, True], [jnp.float32, jnp.float64]))


@pytest.mark.parametrize(
    ("classes", "one_hot", "dtype"), [*every(5, MANY), (131_072, False, jnp.float32)]
)
def test_many_classes_are_as_exact(classes, one_hot, dtype):
    label = classes - 2
    logits = np.random.default_rng(5).normal(size=(6, classes)) / 3
    logits[:, label] = [-80, -5, 0, 5, 40, 80]
    with jax.enable_x64(dtype == jnp.float64):
        labels = jnp.full(6, label, jnp.int32)
        if one_hot:
            labels = jax.nn.one_hot(labels, classes, dtype=dtype)
        for offset in (0.0, 1000.0):
            z = jnp.asarray(logits + offset, dtype)
            cost, gradient = cost_and_gradient(z, labels)
            exact_cost, exact_gradient = oracle.many_classes(np.asarray(z), label)
            assert_relative(cost, exact_cost, eps_multiple=8)
            assert_relative(gradient, exact_gradient, eps_multiple=8)


@pytest.mark.slow
def test_classes_that_are_nothing_alone_add_up():
    # Log-odds of the label against all others together: each e_k is below what float32 can hold.
    classes, label = 70_000, 12_345
    logits = np.random.default_rng(6).normal(size=(2, classes)) * 3
    logits[:, label] = -np.inf
    logits[:, label] = np.logaddexp.reduce(logits, axis=1) + np.array([-80, 80])
    z, labels = jnp.asarray(logits, jnp.float32), jnp.full(2, label)
    cost, gradient = oracle.many_classes(np.asarray(z), label)
    for y in (labels, jax.nn.one_hot(labels, classes)):
        found, slope = cost_and_gradient(z, y)
        assert_relative(found, cost, eps_multiple=8)
        assert_relative(slope, gradient, eps_multiple=8)
    assert_relative(-js.log_softmax(z)[:, label], cost, eps_multiple=8)


@pytest.mark.parametrize(
    "others", every(3, [[0, -8], [0, -8, -9, -10, -12], [0, *[-11] * 30], [0, *[-15] * 2000]])
)
def test_what_is_nothing_beside_a_small_sum_still_counts(others):
    z = np.array([[ahead, *others] for ahead in (72, 75, 80, 84)], np.float32)
    label = jnp.zeros(len(z), jnp.int32)
    cost, gradient = oracle.many_classes(z, 0)
    for y in (label, jax.nn.one_hot(label, z.shape[1])):
        found, slope = cost_and_gradient(jnp.asarray(z), y)
        alone = VALUE(z, y)
        assert_relative(found, cost, eps_multiple=8)
        assert_relative(alone, cost, eps_multiple=8)
        assert_relative(slope, gradient, eps_multiple=8)
    assert_relative(-js.log_softmax(z)[:, 0], cost, eps_multiple=8)


def test_labels_that_are_nearly_one_hot_keep_what_is_left():
    # At the winner, a (1 − t) and t (1 − a) are both small: neither may be a difference of large numbers.
    z, labels = np.array([[40.0, 0, 0, 1]] * 2, np.float32), np.eye(4, dtype=np.float32)[[0, 3]]
    labels[:, 1] = 3e-9
    _, gradient = cost_and_gradient(jnp.asarray(z), jnp.asarray(labels))
    truth = oracle.log_likelihood_vjp(z, labels, np.ones((2, 1)))
    assert_relative(gradient, truth, eps_multiple=8)
    (pulled,) = jax.jit(lambda z, c: jax.vjp(js.log_softmax, z)[1](c))(z, labels)
    truth = oracle.log_softmax_vjp(z, labels)
    assert_relative(pulled, truth, eps_multiple=8)


def test_the_learning_slowdown():
    wrong_and_saturated, label = jnp.array([20.0, 0.0]), jnp.array(1)
    quadratic = jax.grad(js.quadratic_cost)(wrong_and_saturated, label)
    truth = oracle.quadratic_vjp(np.array([20.0, 0.0]), np.array([0.0, 1.0]), np.ones(1))
    assert_relative(quadratic, truth, eps_multiple=8)
    assert np.abs(quadratic).max() < 1e-6
    assert np.abs(jax.grad(js.log_likelihood_cost)(wrong_and_saturated, label)).max() > 0.99


@pytest.mark.parametrize("cost", COSTS)
def test_gradient_in_probability_labels(cost):
    logits = random_logits((7, 5), 3, jnp.float32)
    targets = random_targets((7, 5), jnp.bfloat16)
    cotangent = random_logits((7,), 1, jnp.float32, 9)
    _, pull_back = jax.vjp(lambda t: cost(logits, t, reduction="none"), targets)
    (gradient,) = pull_back(cotangent)
    z, t, c = (np.asarray(a, np.float64) for a in (logits, targets, cotangent))
    if cost is js.log_likelihood_cost:
        truth = oracle.log_likelihood_target_vjp(z, t, c[:, None])
    else:
        truth = c[:, None] * (t - oracle.softmax(z))
    assert gradient.dtype == jnp.bfloat16
    assert_close(gradient, truth, ulps=1)


@pytest.mark.parametrize(("cost", "soft"), [(COSTS[0], False), slow(COSTS[1], True)])
def test_reductions_and_weights(cost, soft):
    logits = random_logits((3, 4, 5), 2, jnp.float32)
    labels = random_targets((3, 4, 5), jnp.float32) if soft else random_labels((3, 4, 5))
    weight = jnp.asarray(np.random.default_rng(4).gamma(1.0, size=(3, 4)), jnp.float32)
    each = np.asarray(cost(logits, labels, reduction="none"), np.float64)
    w = np.asarray(weight, np.float64)
    assert_close(cost(logits, labels), each.mean(), ulps=4)
    assert_close(cost(logits, labels, reduction="sum"), each.sum(), ulps=4)
    assert_close(cost(logits, labels, sample_weight=weight), (w * each).sum() / w.sum(), ulps=4)
    assert_close(cost(logits, labels, sample_weight=weight, reduction="none"), w * each, ulps=2)
    mask = weight > 0.5
    assert_close(
        cost(logits, labels, sample_weight=mask), cost(logits[mask], _rows(labels, mask)), ulps=4
    )
    # The mean's derivative in a weight is (cost − mean) / total, at weight 0 as elsewhere.
    weight = weight.at[0, 0].set(0)
    w = np.asarray(weight, np.float64)
    slope = jax.grad(lambda weight: cost(logits, labels, sample_weight=weight))(weight)
    assert_close(slope, (each - (w * each).sum() / w.sum()) / w.sum(), ulps=16)


def _rows(labels, mask):
    return labels[mask]


@pytest.mark.parametrize("cost", [COSTS[0], slow(COSTS[1])])
def test_gradient_carries_the_weights_and_the_mean(cost):
    logits, labels = random_logits((6, 4), 2, jnp.float32), random_labels((6, 4))
    weight = jnp.arange(6.0)
    rows = jax.jit(jax.vmap(jax.grad(cost)))(logits, labels)
    assert_close(jax.jit(jax.grad(cost))(logits, labels), rows / 6, ulps=2)
    gradient = jax.jit(jax.grad(lambda z: cost(z, labels, sample_weight=weight)))(logits)
    assert_close(gradient, rows * (weight / 15)[:, None], ulps=2)


@pytest.mark.parametrize(
    ("cost", "soft", "jit"),
    every(
        2,
        [
            (COSTS[0], False, True),
            (COSTS[0], True, False),
            (COSTS[1], True, False),
            (COSTS[1], False, True),
        ],
    ),
)
def test_an_example_of_weight_zero_counts_for_nothing(cost, soft, jit):
    logits, labels = random_logits((6, 4), 2, jnp.float32), random_labels((6, 4))
    broken = logits.at[1, 2].set(jnp.nan).at[2].set(jnp.inf).at[3].set(-jnp.inf)
    bad_labels = labels.at[4].set(-100).at[1].set(99)
    if soft:
        labels = jax.nn.one_hot(labels, 4)
        bad_labels = labels.at[4, 1].set(jnp.nan)
    kept = jnp.array([0, 5])
    weight = jnp.zeros(6).at[kept].set(jnp.array([0.5, 2.0]))

    def weighted(z, t):
        return cost(z, t, sample_weight=weight)

    differentiate = jax.value_and_grad(weighted, argnums=(0, 1) if soft else 0)
    if jit:
        differentiate = jax.jit(differentiate)
    value, gradient = differentiate(broken, bad_labels)
    expected, expected_gradient = jax.value_and_grad(
        lambda z, t: cost(z, t, sample_weight=weight[kept]), argnums=(0, 1) if soft else 0
    )(logits[kept], labels[kept])
    assert_close(value, expected, ulps=2)
    for leaf, expected_leaf in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        assert_close(leaf[kept], expected_leaf, ulps=2)
        assert_close(leaf[jnp.array([1, 2, 3, 4])], np.zeros((4, 4)), ulps=0)


LONG = list(
    itertools.product([False, True], [((3, 4096), jnp.float32), ((8, 1000), jnp.bfloat16)], COSTS)
)


@pytest.mark.parametrize(
    ("soft", "long", "cost"),
    mostly_slow(2, every(3, LONG)),
)
def test_long_rows_of_weight_zero_may_hold_nan_at_the_label(cost, soft, long):
    shape, dtype = long
    labels = jax.nn.one_hot(jnp.full(shape[0], 7), shape[1]) if soft else jnp.full(shape[0], 7)
    z = random_logits(shape, 1, dtype)
    weight = jnp.ones(shape[0]).at[1].set(0)
    options = {"z_loss": 0.1, "label_smoothing": 0.1} if cost is js.log_likelihood_cost else {}
    function = jax.value_and_grad(lambda z: cost(z, labels, sample_weight=weight, **options))
    function = function if soft else jax.jit(function)
    expected = function(z)
    for broken in (z.at[1, 7].set(jnp.nan), z.at[1].set(jnp.nan), z.at[1].set(-jnp.inf)):
        value, gradient = function(broken)
        assert_close(value, expected[0], ulps=4)
        assert_close(gradient, expected[1].at[1].set(0), ulps=1)


@pytest.mark.parametrize("soft", [False, slow(True)])
def test_second_derivatives_are_exact(soft):
    label = jnp.array([0.0, 1.0, *[0.0] * 8]) if soft else jnp.array(1)
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        of_rows = jax.jit(hessian(lambda z: js.log_likelihood_cost(z, label)))
        for behind, leads in ((-30, 0), (0, 0), (17, 0), (60, 0), (0, 40), (-30, 60), (60, 5)):
            z = np.linspace(0, 1, 10).astype(np.float32)
            z[1] -= np.float32(behind)
            z[4] += np.float32(leads)
            truth = oracle.softmax_jacobian(z.astype(np.float64))
            assert_relative(of_rows(jnp.asarray(z)), truth, eps_multiple=16)


@pytest.mark.parametrize("classes", [slow(3), slow(12), 200])
def test_a_small_cotangent_reaches_every_class(classes):
    z = jnp.zeros(classes).at[1].set(2.0)
    exact = oracle.log_likelihood_vjp(np.asarray(z, np.float64), np.eye(classes)[1], np.ones(1))
    for cotangent in (1e-15, 1e-20, 1e-30, 1e15):
        gradient = jax.jit(jax.grad(lambda z, c: c * js.log_likelihood_cost(z, 1)))(z, cotangent)
        assert_relative(gradient / cotangent, exact, eps_multiple=8)


def test_derivatives_of_the_cost_without_any_rule():
    z = jnp.array([3.0, 1, 2, -4])
    for label in (jnp.array(1), jax.nn.one_hot(1, 4)):
        exact = oracle.log_likelihood_vjp(np.asarray(z, np.float64), np.eye(4)[1], np.ones(1))
        plain = js.without_custom_rules(lambda z: js.log_likelihood_cost(z, label), jvp=True)  # noqa: B023
        assert_close(jax.jit(jax.grad(plain))(z), exact, ulps=8)


@pytest.mark.slow
def test_logits_so_large_that_neighbours_are_far_apart():
    for z in ([1e7, 1e7 + 4], [-1e9, -1e9 + 64, -1e9 + 128], [3e38, 3e38, 1.0]):
        z = jnp.array(z, jnp.float32)
        exact = np.asarray(z, np.float64)
        assert_relative(js.softmax(z), oracle.softmax(exact), eps_multiple=8)
        assert_relative(js.log_softmax(z), oracle.log_softmax(exact), eps_multiple=8)
        first = np.eye(len(z))[0]
        for labels in (jnp.array(0), jnp.asarray(first, jnp.float32)):
            cost, gradient = jax.value_and_grad(js.log_likelihood_cost)(z, labels)
            assert_relative(cost, oracle.log_likelihood(exact, first), eps_multiple=8)
            assert_relative(gradient, oracle.log_likelihood_vjp(exact, first, np.ones(1)), eps_multiple=8)


@pytest.mark.parametrize("cost", COSTS)
def test_nothing_to_average_is_zero(cost):
    empty, no_labels = jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32)
    assert float(cost(empty, no_labels)) == 0
    assert jax.grad(cost)(empty, no_labels).shape == (0, 3)
    logits, labels = random_logits((2, 3), 1, jnp.float32), random_labels((2, 3))
    value, gradient = jax.value_and_grad(lambda z: cost(z, labels, sample_weight=jnp.zeros(2)))(logits)
    assert float(value) == 0
    assert_close(gradient, np.zeros((2, 3)), ulps=0)


@pytest.mark.parametrize(
    ("cost", "dtype"),
    [(COSTS[0], jnp.int8), (COSTS[1], jnp.uint8), slow(COSTS[0], jnp.uint32), slow(COSTS[1], jnp.int32)],
)
def test_a_label_that_names_no_class(cost, dtype):
    bad = 200 if jnp.issubdtype(dtype, jnp.unsignedinteger) else -100
    logits, labels = random_logits((3, 5), 1, jnp.float32), jnp.array([1, bad, 4], dtype)
    low, high = (1, 200) if bad > 0 else (-100, 4)
    with pytest.raises(ValueError, match=rf"\[0, 5\) for 5 classes, got {low} to {high}"):
        cost(logits, labels)
    each, gradient = jax.jit(jax.value_and_grad(lambda z, y: cost(z, y, reduction="sum")))(logits, labels)
    assert np.isnan(each)
    assert np.isnan(gradient[1]).all()
    sound = jax.vmap(jax.grad(cost))(logits, jnp.array([1, 0, 4]))
    rows = jnp.array([0, 2])
    assert_close(gradient[rows], sound[rows], ulps=2)


def test_many_classes_and_narrow_labels():
    logits = random_logits((2, 300), 1, jnp.float32)
    wide = js.log_likelihood_cost(logits, jnp.array([5, 250]))
    assert_close(js.log_likelihood_cost(logits, jnp.array([5, 250], jnp.uint8)), wide, ulps=0)
    with jax.enable_x64(True):
        beyond = jnp.array([2**32 + 5, 250], jnp.int64)
        assert np.isnan(jax.jit(js.log_likelihood_cost)(logits, beyond))


def test_minus_infinity():
    logits = jnp.array([[1.0, -jnp.inf, 0.0], [1.0, -jnp.inf, 0.0]])
    each = js.log_likelihood_cost(logits, jnp.array([0, 1]), reduction="none")
    assert_close(each, [np.log1p(np.exp(-1.0)), np.inf], ulps=1)
    soft = js.log_likelihood_cost(logits, jnp.array([[1.0, 0, 0], [0.5, 0.5, 0]]), reduction="none")
    assert_close(soft, each, ulps=1)
    without = jax.grad(js.log_likelihood_cost)(jnp.array([1.0, 0.0]), jnp.array(0))
    gradient = jax.grad(js.log_likelihood_cost)(logits[0], jnp.array([1.0, 0, 0]))
    assert_close(gradient, [without[0], 0, without[1]], ulps=1)


@pytest.mark.parametrize("cost", [COSTS[0], slow(COSTS[1])])
def test_axis(cost):
    logits, labels = random_logits((3, 4, 5), 2, jnp.float32), random_labels((3, 5, 4))
    moved = jnp.moveaxis(logits, 1, -1)
    assert_close(cost(logits, labels, axis=1), cost(moved, labels), ulps=2)
    targets = random_targets((3, 5, 4), jnp.float32)
    assert_close(cost(logits, jnp.moveaxis(targets, -1, 1), axis=-2), cost(moved, targets), ulps=2)
    gradient = jax.jit(jax.grad(lambda z: cost(z, labels, axis=1)))(logits)
    assert_close(gradient, jnp.moveaxis(jax.jit(jax.grad(cost))(moved, labels), -1, 1), ulps=2)


def test_backward_keeps_one_array_of_the_logits_size():
    logits, labels = random_logits((8, 100), 1, jnp.float32), random_labels((8, 100))
    _, pull_back = jax.vjp(lambda z: js.log_likelihood_cost(z, labels), logits)
    assert len([leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= 800]) == 1


@pytest.mark.parametrize(
    ("classes", "soft", "explicit"),
    [(16, False, True), slow(16, True, False), slow(8192, False, False), slow(8192, True, True)],
)
def test_rows_and_classes_may_be_sharded(explicit, soft, classes):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    logits, labels = random_logits((8, classes), 2, jnp.float32), random_labels((8, classes))
    if soft:
        labels = random_targets((8, classes), jnp.float32)
    expected = jax.jit(jax.value_and_grad(js.log_likelihood_cost))(logits, labels)
    spec = jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        rows, both = (jax.NamedSharding(mesh, spec(*axes)) for axes in (["data"], ["data", "model"]))
        placed = jax.device_put((logits, labels), (both, both if soft else rows))
        compiled = jax.jit(jax.value_and_grad(js.log_likelihood_cost)).lower(*placed).compile()
        assert_close(jax.device_get(compiled(*placed)), expected, ulps=8)
    # What moves between devices is a number for each of a device's 4 rows, or one for all of them.
    moved = re.findall(r" (\S+) (all-|reduce-scatter|collective-)([\w-]*)\(", compiled.as_text())
    assert moved
    for shape, *operation in moved:
        assert "".join(operation) == "all-reduce"
        assert shape.partition("{")[0] in ("f32[4]", "f32[4,1]", "f32[]")


VALUE_AND_GRADIENT = jax.jit(jax.value_and_grad(js.log_likelihood_cost))
VALUE = jax.jit(lambda z, y: js.log_likelihood_cost(z, y, reduction="none"))


@hypothesis.given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-50, 50, width=32)),
    hnp.arrays(np.int32, (3,), elements=st.integers(0, 3)),
)
def test_laws(rows, classes):
    logits, labels = jnp.asarray(rows), jnp.asarray(classes)
    cost, gradient = VALUE_AND_GRADIENT(logits, labels)
    assert cost >= 0
    np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-7)
    order = np.array([2, 0, 3, 1])
    permuted, permuted_gradient = VALUE_AND_GRADIENT(
        logits[:, order], jnp.argsort(jnp.asarray(order))[labels]
    )
    np.testing.assert_allclose(permuted, cost, rtol=1e-6)
    np.testing.assert_allclose(permuted_gradient, gradient[:, order], rtol=1e-5, atol=1e-37)


def test_weight_penalty():
    params = {
        "layer": js.Dense(jnp.array([[1.0, 2.0]], jnp.bfloat16), jnp.array([5.0])),
        "count": jnp.ones((2, 2), jnp.int32),
        "activation": jax.nn.relu,
    }
    assert_close(js.weight_penalty(params), 2.5, ulps=0)
    network = js.init_network(jax.random.key(0), 3, 4, 2)
    gradient = jax.grad(js.weight_penalty)(network)
    expected = jax.tree.map(lambda p: p if p.ndim == 2 else jnp.zeros_like(p), network)
    assert_close(gradient, expected, ulps=0)
    with pytest.raises(ValueError, match="two or more axes, found none"):
        js.weight_penalty({"bias": jnp.ones(3)})


@pytest.mark.parametrize("cost", [unchecked(cost) for cost in COSTS])
def test_errors_say_what_to_do(cost):
    logits, labels = jnp.ones((2, 3)), jnp.array([0, 1])
    with pytest.raises(TypeError, match=r"labels must be integers .* got bool: convert"):
        cost(logits, labels > 0)
    with pytest.raises(ValueError, match=r"shape \(2,\), one for each row .* got \(3,\)"):
        cost(logits, jnp.array([0, 1, 2]))
    with pytest.raises(ValueError, match="for one-hot labels use a floating-point dtype"):
        cost(logits, jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"logits' shape \(2, 3\), .* got \(2,\): pass integer labels"):
        cost(logits, jnp.array([0.0, 1.0]))
    square, row = jnp.ones((3, 3)), jnp.array([0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=r"may be classes, .* or a row .*: pass classes as integers"):
        jax.jit(cost)(square, row)
    assert_close(cost(square, row[None]), cost(square, jnp.stack([row] * 3)), ulps=0)
    with pytest.raises(
        TypeError, match="got a SparseLabels: only the costs of features take SparseLabels"
    ):
        unchecked(cost)(logits, js.SparseLabels(labels[:, None], jnp.ones((2, 1))))
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'average'"):
        cost(logits, labels, reduction="average")
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(2,\), .* got \(3,\)"):
        cost(logits, labels, sample_weight=jnp.ones(3))
    with pytest.raises(TypeError, match=r"sample_weight must be real .* got complex64"):
        cost(logits, labels, sample_weight=jnp.ones(2, jnp.complex64))
    with pytest.raises(TypeError, match="logits must be real floating-point numbers, got int32"):
        cost(jnp.ones((2, 3), jnp.int32), labels)


@pytest.mark.parametrize("classes", [12, slow(300), 5000])
@pytest.mark.parametrize("labels", [np.full(4, 7), np.arange(4)], ids=["the same", "arange"])
def test_labels_that_are_constants_of_a_program(classes, labels):
    # XLA then computes what it can of them when it compiles.
    z = np.random.default_rng(2).normal(size=(4, classes)).astype(np.float32)
    z[np.arange(4), labels] += 30
    x, w = jnp.asarray(z), jnp.eye(classes)

    def everything(z, labels):
        by_label = jax.value_and_grad(lambda z: js.log_likelihood_cost(z, labels))
        by_row = jax.value_and_grad(lambda z: js.log_likelihood_cost(z, jax.nn.one_hot(labels, classes)))
        return by_label(z), by_row(z), js.head_statistics(z, w, None, labels)

    found = jax.jit(lambda z: everything(z, labels))(x)
    expected = jax.jit(everything)(x, jnp.asarray(labels))
    assert float(found[0][0]) < 1e-6
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


PRODUCERS = {
    "scaled": lambda h: h * h.dtype.type(0.3),
    "divided": lambda h: h / h.dtype.type(3),
    "capped": lambda h: 50 * jnp.tanh(h / h.dtype.type(50) * h.dtype.type(0.37)),
    "rooted": lambda h: jnp.sqrt(jnp.abs(h)) * h.dtype.type(4),
    "normalized": lambda h: (
        (h - h.mean(-1, keepdims=True)) * np.linspace(0.3, 0.5, h.shape[-1], dtype=h.dtype)[None] + 1
    ),
}


@pytest.mark.parametrize(
    ("producer", "classes", "dtype"),
    every(5, list(itertools.product(PRODUCERS, [4, 300], [jnp.float32, jnp.float64]))),
)
@pytest.mark.slow
def test_exact_on_logits_computed_in_the_same_program(producer, dtype, classes):
    # The compiler may compute such logits twice and round them differently: nothing may rest on their
    # being the same to the last bit.
    make = PRODUCERS[producer]
    generator = np.random.default_rng(0)
    label = classes // 2
    h = np.abs(generator.normal(size=(33, classes))) * 5
    h[:, label] += 90 if dtype == jnp.float32 else 140
    labels = jnp.full(33, label)
    with jax.enable_x64(dtype == jnp.float64):
        one_hot = jax.nn.one_hot(labels, classes, dtype=dtype)
        h = jnp.asarray(h, dtype)
        cost, slopes = oracle.many_classes(np.asarray(jax.jit(make)(h)), label)

        @jax.jit
        def by_every_way(h):
            z = make(h)
            _, pull_back = jax.vjp(lambda z: js.log_likelihood_cost(z, labels, reduction="sum"), z)
            _, pull_back_rows = jax.vjp(lambda z: js.log_likelihood_cost(z, one_hot, reduction="sum"), z)
            one = jnp.ones((), dtype)
            return (
                js.log_likelihood_cost(make(h), labels, reduction="none"),
                js.log_likelihood_cost(make(h), one_hot, reduction="none"),
                -js.log_softmax(make(h))[:, label],
                -pull_back(one)[0][:, label],
                -pull_back_rows(one)[0][:, label],
            )

        *costs, slope, slope_by_rows = by_every_way(h)
    # The oracle's logits come from another program: they may differ by an ulp, here up to 64 eps.
    for actual in costs:
        assert_relative(actual, cost, eps_multiple=72)
    for actual in (slope, slope_by_rows):
        assert_relative(actual, -slopes[:, label], eps_multiple=72)


def test_exact_on_scaled_logits_in_a_scan():
    w = jnp.array([[0.0, 1, -2, 40 / 0.3]])
    x = jnp.linspace(0.3, 0.42, 4).reshape(2, 2, 1)

    def cost(bias):
        def step(total, x):
            z = 0.9 * (x @ w + bias[None])
            return total + js.log_likelihood_cost(z, jnp.full(2, 3), reduction="sum"), None

        return jax.lax.scan(step, jnp.float32(0), x)[0]

    z = np.asarray(jax.jit(lambda x: 0.9 * (x @ w))(x).reshape(4, 4))
    _, slopes = oracle.many_classes(z, 3)
    expected = 0.9 * slopes.astype(np.float64).sum(0)
    assert_relative(jax.jit(jax.grad(cost))(jnp.zeros(4)), expected, eps_multiple=32)


@pytest.mark.slow
def test_products_so_large_that_a_rounding_is_many_nats():
    # The compiler may merge such a product with what is subtracted from it, unrounded.
    h = 5 * np.random.default_rng(0).normal(size=(256, 10)).astype(np.float32)
    labels = np.arange(256) % 10
    for factor in (1e7, 1e10):
        z = np.float64(h * np.float32(factor))
        leads = z.max(axis=1, keepdims=True)
        one_hot = np.float32(z == leads)

        @jax.jit
        def every(h, factor=factor, one_hot=one_hot):
            z = h * factor
            return (
                js.softmax(z),
                js.log_softmax(z),
                js.log_likelihood_cost(z, one_hot),
                js.log_likelihood_cost(z, labels, reduction="none"),
                jax.grad(lambda z: js.log_likelihood_cost(z, labels, reduction="sum"))(z),
            )

        of_labels = (leads - z)[np.arange(256), labels]
        expected = one_hot, z - leads, 0, of_labels, one_hot - np.eye(10)[labels]
        assert_close(every(h), expected, ulps=1)
