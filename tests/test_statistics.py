"""Statistics and labels of the head that are formed block by block, against plain float64 autodiff."""

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
    every,
    mostly_slow,
    random_labels,
    random_targets,
    slow,
    unchecked,
)

import jaxsoftmax as js
from jaxsoftmax import SparseLabels, TeacherLabels

TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 3e-2}
FLOATS = "log_normalizer", "entropy", "label_log_likelihood"


def normal(shape, dtype, seed=0, scale=0.5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def bent(z, softcap=None, logit_scale=None, where=None, num_classes=None):
    """The logits that the softmax sees, −inf for classes that do not exist."""
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    z = z if logit_scale is None else logit_scale * z
    exists = jnp.ones(z.shape, bool) if where is None else jnp.broadcast_to(where, z.shape)
    if num_classes is not None:
        exists &= jnp.arange(z.shape[-1]) < num_classes
    return jnp.where(exists, z, -jnp.inf)


def dense_labels(labels, shape, dtype, **exists):
    """Any labels as probabilities of all classes."""
    if isinstance(labels, TeacherLabels):
        features, weights, bias, scale, softcap = (
            None if part is None else jnp.asarray(part, dtype) for part in labels
        )
        return jax.nn.softmax(bent(features @ weights + bias, softcap, scale, **exists))
    if isinstance(labels, SparseLabels):
        one_hot = jax.nn.one_hot(jnp.asarray(labels.classes), shape[-1], dtype=dtype)
        return jnp.einsum("...jk,...j->...k", one_hot, jnp.asarray(labels.probabilities, dtype))
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, shape[-1], dtype=dtype)
    return labels.astype(dtype)


def plain_statistics(x, w, b, labels, softcap=None, logit_scale=None, **exists):
    """The statistics from all logits, to be differentiated by JAX."""
    z = bent(x @ w + b, softcap, logit_scale, **exists)
    normalizer = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    surprise = jnp.where(z == -jnp.inf, 0, normalizer - jnp.where(z == -jnp.inf, 0, z))
    a = jnp.exp(z - normalizer)
    y = dense_labels(labels, z.shape, z.dtype, **exists)
    return normalizer[..., 0], jnp.sum(a * surprise, axis=-1), -jnp.sum(y * surprise, axis=-1)


def plain_cost(
    x, w, b, labels, softcap=None, logit_scale=None, class_weight=None, label_smoothing=0.0, z_loss=0.0,
    sample_weight=None, reduction="mean", **exists,
):  # fmt: skip
    """The cost from all logits, to be differentiated by JAX."""
    z = bent(x @ w + b, softcap, logit_scale, **exists)
    y = dense_labels(labels, z.shape, z.dtype, **exists)
    normalizer = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    is_class = z > -jnp.inf
    surprise = jnp.where(is_class, normalizer - jnp.where(is_class, z, 0), 0)
    even = is_class / jnp.sum(is_class, axis=-1, keepdims=True)
    u = jnp.ones(z.shape[-1], z.dtype) if class_weight is None else class_weight
    weight = jnp.ones(z.shape[:-1]) if class_weight is None else jnp.sum(u * y, axis=-1)
    q = (1 - label_smoothing) * y + label_smoothing * even
    cost = jnp.sum(u * q * surprise, axis=-1) + z_loss * normalizer[..., 0] ** 2 * weight
    v = jnp.ones(z.shape[:-1]) if sample_weight is None else sample_weight
    cost, weight = cost * v, weight * v
    totals = {"none": cost, "sum": jnp.sum(cost), "mean": jnp.sum(cost) / jnp.sum(weight)}
    return totals[reduction]


FIRST = 4  # classes exist everywhere, and labels are among them


def every_kind_of_labels(shape, dtype):
    *batch, classes = shape
    generator = np.random.default_rng(4)
    few = jnp.asarray(generator.integers(0, FIRST, (*batch, 3)), jnp.int32)
    share = jnp.asarray(generator.dirichlet(np.ones(3), tuple(batch)), dtype)
    soft = random_targets((*batch, FIRST), dtype)
    teacher = normal((*batch, 6), dtype, 6), normal((6, classes), dtype, 7), normal((classes,), dtype, 8)
    return {
        "integer": random_labels((*batch, FIRST)),
        "probabilities": jnp.pad(soft, [(0, 0)] * len(batch) + [(0, classes - FIRST)]),
        "sparse": SparseLabels(few, share),
        "teacher": TeacherLabels(*teacher, logit_scale=1.5, softcap=4.0),
    }


def exists_somewhere(shape, by_row):
    mask = np.random.default_rng(9).random(shape if by_row else shape[-1:]) < 0.6
    mask[..., :FIRST] = True
    return jnp.asarray(mask)


def wide(tree):
    """The same numbers in float64."""

    def each(leaf):
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, jnp.float64) if is_float else leaf

    return jax.tree.map(each, tree)


def pulled_back(function, arguments, labels, options, by_class):
    """What a function gives, and random cotangents of it as those of all that has a gradient."""
    free = labels
    with_free = lambda free: free  # noqa: E731
    if isinstance(labels, SparseLabels):
        free, with_free = labels.probabilities, lambda p: labels._replace(probabilities=p)
    elif isinstance(labels, TeacherLabels) or jnp.issubdtype(labels.dtype, jnp.integer):
        free, with_free = (), lambda _: labels

    def of_free(arguments, free, options):
        return function(*arguments, with_free(free), **options, **by_class)

    @jax.jit
    def run(arguments, free, options):
        values, pull_back = jax.vjp(of_free, arguments, free, options)
        generator = np.random.default_rng(3)
        cotangents = jax.tree.map(lambda v: jnp.asarray(generator.normal(size=v.shape), v.dtype), values)
        return values, pull_back(cotangents)

    return run(arguments, free, options)


def assert_as_plain(head, plain, arguments, labels, options, by_class, dtype):
    """The head's values and gradients in `dtype` are those of float64."""
    freely = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), freely[0], freely[1]:
        exact = pulled_back(plain, *wide((arguments, labels, options)), by_class)
    with jax.enable_x64(dtype == "float64"):
        actual = pulled_back(head, arguments, labels, options, by_class)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True):
        assert_norms_close(a, np.asarray(e).astype(a.dtype), TOLERANCES[dtype])


def a_case(kind, dtype, options, by_row):
    """Arguments, labels, options and which classes exist."""
    shape = 2, 7, 11
    with jax.enable_x64(dtype == "float64"):
        arguments = normal((2, 7, 5), dtype), normal((5, 11), dtype, 1), normal((11,), dtype, 2)
        options = {name: jnp.asarray(value, arguments[0].dtype) for name, value in options.items()}
        by_class = {} if by_row is None else {"where": exists_somewhere(shape, by_row), "num_classes": 9}
        return arguments, every_kind_of_labels(shape, dtype)[kind], options, by_class


BENT = {"softcap": 3.0, "logit_scale": 1.7}
ALL = {
    **BENT,
    "class_weight": np.linspace(0.5, 2, 11),
    "sample_weight": np.linspace(0, 1, 14).reshape(2, 7),
    "label_smoothing": 0.1,
    "z_loss": 0.02,
}


@pytest.mark.parametrize(
    ("kind", "dtype", "options", "by_row", "block_size"),
    every(
        4,
        [
            ("integer", "float64", BENT, True, 4),
            ("integer", "float32", {}, None, 4),
            ("teacher", "float32", BENT, None, 4),
            ("integer", "bfloat16", {"logit_scale": 0.5}, False, None),
            ("probabilities", "float32", BENT, False, None),
            ("sparse", "float32", {"logit_scale": 0.5}, True, 4),
        ],
    ),
)
def test_statistics_and_their_gradients(kind, dtype, options, by_row, block_size):
    case = a_case(kind, dtype, options, by_row)

    def head(*arguments, **options):
        statistics = js.head_statistics(*arguments, block_size=block_size, **options)
        return tuple(getattr(statistics, name) for name in FLOATS)

    assert_as_plain(head, plain_statistics, *case, dtype)


@pytest.mark.parametrize(
    ("kind", "dtype", "reduction", "options", "by_row"),
    mostly_slow(
        2,
        every(
            3,
            [
                ("sparse", "float64", "none", ALL, True),
                ("sparse", "float32", "mean", {}, None),
                ("teacher", "float32", "mean", ALL, True),
                ("sparse", "float32", "mean", ALL, False),
                ("integer", "float32", "mean", ALL, True),
                ("teacher", "float32", "mean", BENT, None),
                ("teacher", "bfloat16", "mean", BENT, None),
                ("teacher", "float64", "sum", ALL, False),
                ("probabilities", "float64", "mean", ALL, True),
            ],
        ),
    ),
)
def test_costs_of_every_kind_of_labels(kind, dtype, reduction, options, by_row):
    case = a_case(kind, dtype, options, by_row)
    fixed = {"reduction": reduction}
    head = partial(js.linear_log_likelihood_cost, block_size=4, **fixed)
    assert_as_plain(head, partial(plain_cost, **fixed), *case, dtype)


@pytest.mark.parametrize(
    ("lead", "block_size"), [slow(5.0, 2), slow(20.0, None), (40.0, 2), slow(80.0, None)]
)
def test_entropy_keeps_its_digits_however_confident(lead, block_size):
    z = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    z[:, 4] = z.max(1) + np.float32(lead)
    labels = np.array([4, 0, 4])
    # An identity for features makes the logits exactly these.
    x = jnp.eye(3)

    def statistics(w):
        found = js.head_statistics(x, w, None, jnp.asarray(labels), block_size=block_size)
        return found.entropy, found.label_log_likelihood

    @jax.jit
    def run(w):
        values, pull_back = jax.vjp(statistics, w)
        one, nothing = jnp.ones(3), jnp.zeros(3)
        return (*values, *pull_back((one, nothing)), *pull_back((nothing, -one)))

    one, y = np.ones((3, 1)), np.eye(12)[labels]
    expected = (
        oracle.entropy(z),
        -oracle.log_likelihood(z, y),
        oracle.entropy_vjp(z, one),
        oracle.log_likelihood_vjp(z, y, one),
    )
    for actual, exact in zip(run(jnp.asarray(z)), expected, strict=True):
        assert_relative(actual, exact, eps_multiple=8)

    @jax.jit
    def run_beside(w, labels):
        def cost(w):
            options = {"reduction": "sum", "block_size": block_size, "return_statistics": True}
            return js.linear_log_likelihood_cost(x, w, None, labels, **options)

        (cost, found), gradient = jax.value_and_grad(cost, has_aux=True)(w)
        return cost, gradient, found.entropy, found.label_log_likelihood

    entropy, likelihood, _, gradient = expected
    for given in (labels, y.astype(np.float32)):
        found = run_beside(jnp.asarray(z), jnp.asarray(given))
        for actual, exact in zip(found, (-likelihood.sum(), gradient, entropy, likelihood), strict=True):
            assert_relative(actual, exact, eps_multiple=8)
    # However small the others' exponentials are.
    z[:, 4] += 6
    *_, entropy, _ = run_beside(jnp.asarray(z), jnp.asarray(labels))
    assert_relative(entropy, oracle.entropy(z), eps_multiple=8)


def test_the_backward_pass_takes_no_sums_anew():
    x, w, labels = jnp.ones((64, 8)), jnp.ones((8, 5000)), jnp.zeros(64, int)

    def costs(x, w):
        return js.linear_log_likelihood_cost(x, w, None, labels, reduction="none", block_size=16)

    def statistics(x, w):
        found = js.head_statistics(x, w, None, labels, block_size=16)
        return [getattr(found, name) for name in FLOATS]

    for function in (costs, statistics):
        found, pull_back = jax.vjp(function, x, w)
        assert " reduce(" not in jax.jit(pull_back).lower(found).compile().as_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_statistics_of_narrow_probabilities(dtype):
    x, w, labels = normal((3, 2), "float32"), normal((2, 5), "float32", 1), jnp.full((3, 5), 0.25, dtype)

    @partial(jax.jit, static_argnums=1)
    def run(labels, block_size):
        statistics = partial(js.head_statistics, x, w, None, block_size=block_size)
        return jax.value_and_grad(lambda labels: statistics(labels).label_log_likelihood.sum())(labels)

    for block_size in (None, 2):
        value, gradient = run(labels, block_size)
        exact, exact_gradient = run(labels.astype("float32"), block_size)
        assert gradient.dtype == labels.dtype
        assert_close((value, gradient), (exact, exact_gradient.astype(dtype)), ulps=2)


def test_a_statistic_alone_takes_no_more_than_a_cost():
    x, w, labels = jnp.ones((64, 8)), jnp.ones((8, 5000)), jnp.zeros(64, int)

    def transcendentals(function):
        gradient = jax.jit(
            jax.grad(lambda x, w: jnp.sum(function(x, w, None, labels, block_size=16)), (0, 1))
        )
        return gradient.lower(x, w).compile().cost_analysis()["transcendentals"]

    def of_statistic(name):
        return transcendentals(
            lambda *args, **options: getattr(js.head_statistics(*args, **options), name)
        )

    cost = transcendentals(partial(js.linear_log_likelihood_cost, reduction="none"))
    found = {name: of_statistic(name) / cost for name in FLOATS}
    assert max(found["log_normalizer"], found["label_log_likelihood"]) < 1.1 < 1.25 < found["entropy"]


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("is_soft", [False, True])
def test_a_statistic_alone_has_the_gradient_that_it_has_among_others(is_soft, block_size):
    # Rows without a distribution, and one whose label names no class.
    x = jnp.array([[1.0, 0.5], [-1.0, 2.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [0.5, -2.0]])
    w, labels = normal((2, 7), "float32"), jnp.array([1, 0, 2, 3, 9])
    labels = jax.nn.softmax(normal((5, 7), "float32", 1)) if is_soft else labels

    def statistics(labels, x, w):
        found = unchecked(js.head_statistics)(x, w, None, labels, block_size=block_size)
        return [getattr(found, name) for name in FLOATS]

    @jax.jit
    def both_ways(of_row, labels):
        found = []
        _, pull_back = jax.vjp(partial(statistics, labels), x, w)
        zeros = [jnp.zeros(5)] * len(FLOATS)
        for i in range(len(FLOATS)):
            alone = jax.grad(lambda x, w, i=i: jnp.vdot(of_row, statistics(labels, x, w)[i]), (0, 1))
            found.append((alone(x, w), pull_back([*zeros[:i], of_row, *zeros[i + 1 :]])))
        return found

    for of_row in jnp.eye(5):
        for alone, among in both_ways(of_row, labels):
            jax.tree.map(np.testing.assert_array_equal, alone, among)


@pytest.mark.slow
def test_second_derivatives_of_statistics():
    x, w, b, t = (
        normal((3, 4), "float32"),
        normal((4, 6), "float32", 1, 2.0),
        normal((6,), "float32", 2),
        1.5,
    )
    labels, direction = jnp.array([0, 5, 2]), normal((4, 6), "float32", 3)

    def head(w, t, block_size):
        found = js.head_statistics(x, w, b, labels, softcap=4.0, logit_scale=t, block_size=block_size)
        return sum(jnp.sum(getattr(found, name) * jnp.arange(1.0, 4)) for name in FLOATS)

    def plain(x, w, b, t, weights):
        found = plain_statistics(x, w, b, labels, softcap=4.0, logit_scale=t)
        return sum(jnp.sum(each * weights) for each in found)

    def both_ways(cost, w, t, direction):
        gradient = jax.grad(cost)
        forward = jax.jvp(lambda w, t: gradient(w, t), (w, t), (direction, jnp.ones_like(t)))[1]
        return forward, jax.grad(lambda w: jnp.vdot(gradient(w, t), direction))(w)

    freely = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), freely[0], freely[1]:
        x_, w_, b_, direction_, t_ = wide((x, w, b, direction, t))
        weights = wide(jnp.arange(1.0, 4))
        plainly = jax.jit(partial(both_ways, lambda w, t: plain(x_, w, b_, t, weights)))
        exact = plainly(w_, t_, direction_)
    for block_size in (None, 2):
        cost = partial(head, block_size=block_size)
        run = jax.jit(partial(both_ways, cost))
        assert_close(run(w, jnp.float32(t), direction), jax.tree.map(np.asarray, exact), ulps=64)


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.slow
def test_a_class_of_logit_minus_infinity(block_size):
    x, w, b = jnp.ones((3, 1)), jnp.array([[1.0, 2, 3]]), jnp.array([0, 0, -jnp.inf])
    labels = jnp.array([0, 1, 0])

    def cost(x, w, b, c, s):
        bends = {"softcap": c, "logit_scale": s, "block_size": block_size}
        found = js.head_statistics(x, w, b, labels, **bends)
        of_all = 1e30 * (found.entropy + found.log_normalizer + found.label_log_likelihood).sum()
        return of_all + js.linear_log_likelihood_cost(x, w, b, labels, **bends)

    gradient = jax.jit(jax.grad(cost, (0, 1, 2, 3, 4)))
    found = gradient(x, w, b, 1e4, 2.0)
    assert jax.tree.all(jax.tree.map(lambda part: bool(jnp.all(jnp.isfinite(part))), found))
    # As if there were only the others.
    others = gradient(x, w[:, :2], b[:2], 1e4, 2.0)
    assert_close(found[0], others[0], ulps=8)
    assert_close(found[3:], others[3:], ulps=64)
    assert not np.any(found[1][:, 2])


@pytest.mark.parametrize("block_size", [slow(None), 2])
def test_rank_counts_larger_logits_and_equal_ones_before(block_size):
    z = jnp.array([[0.0, 3, 3, 1, 3], [0, 0, 0, 0, 0], [-9, 2, -1, 5, 2], [1, 9, 0, 0, 0]])
    z = jnp.concatenate([z, jnp.nextafter(z[:1], jnp.float32(9)).at[0, 1].set(3)])
    x = jnp.eye(5).at[3, 1].set(jnp.nan)

    @partial(jax.jit, static_argnames="softcap")
    def rank(labels, **options):
        return js.head_statistics(x, z, None, labels, block_size=block_size, **options).label_rank

    assert list(rank(jnp.array([2, 3, 4, 0, 1]))) == [1, 3, 2, 5, 2]
    # Of classes that exist; what bends logits changes no order, and may make them equal.
    some = jnp.array([True, True, False, True, True])
    assert list(rank(jnp.array([4, 3, 1, 0, 1]), where=some, softcap=1e-3)) == [1, 2, 1, 5, 1]
    # Of the smallest differences, too, each counts more than a place.
    smallest = jnp.float32(3e-38) * jnp.array([[1.0, 2, 2, 2, 2]])
    assert list(js.head_statistics(x[:1, :1], smallest, None, jnp.array([4])).label_rank) == [3]
    # A label without a likelihood is nobody's hit.
    assert list(rank(jnp.array([1, 2, 0, 0, 2]), where=some)) == [0, 5, 3, 5, 5]
    assert list(rank(jnp.array([-1, 5, 1, 0, 1]))) == [5, 5, 1, 5, 2]
    assert rank(None) is None
    assert rank(jnp.ones((5, 5))) is None


@pytest.mark.parametrize(
    ("kind", "dtype", "reduction", "block_size", "options"),
    [
        ("integer", "float32", "none", 4, {"label_smoothing": 0.1, "softcap": 3.0}),
        ("integer", "float32", "mean", 4, {}),
        slow("integer", "bfloat16", "mean", 4, {"softcap": 3.0}),
        slow("probabilities", "float32", "mean", 4, {}),
        slow("teacher", "float32", "mean", None, {"label_smoothing": 0.1}),
        slow("integer", "float32", "sum", None, {"label_smoothing": 0.1}),
    ],
)
def test_statistics_beside_the_cost(kind, dtype, reduction, block_size, options):
    arguments, labels, *_ = a_case(kind, dtype, {}, None)
    options = {**options, "block_size": block_size}
    bend = {"softcap": options.get("softcap"), "block_size": block_size}

    def cost(x, w, b, **returned):
        cost = js.linear_log_likelihood_cost(x, w, b, labels, reduction=reduction, **options, **returned)
        return (cost[0].sum(), cost[1]) if returned else cost.sum()

    both = partial(cost, return_statistics=True)

    @jax.jit
    def run(*arguments):
        # No gradient goes through statistics.
        d_x = jax.grad(lambda x: both(x, *arguments[1:])[1].entropy.sum())(arguments[0])
        return d_x, jax.value_and_grad(both, (0, 1, 2), has_aux=True)(*arguments)

    d_x, ((value, statistics), gradients) = run(*arguments)
    assert not np.any(d_x)
    expected = jax.jit(jax.value_and_grad(cost, (0, 1, 2)))(*arguments)
    alone = jax.jit(partial(js.head_statistics, **bend))(*arguments, labels)
    assert_close((value, gradients), expected, ulps=2)
    np.testing.assert_array_equal(statistics.prediction, alone.prediction)
    np.testing.assert_array_equal(statistics.label_rank, alone.label_rank)
    for name in FLOATS:
        assert_close(getattr(statistics, name), getattr(alone, name), ulps=4)


def test_statistics_change_no_gradient_of_unknown_labels():
    x, w = jnp.array([[1.0, 0], [0, 1], [2, 1]]), jnp.array([[1.0, 2, -1], [0, 1, 3]])
    cost = unchecked(js.linear_log_likelihood_cost)

    @jax.jit
    def gradients(labels, weight):
        def total(x, **returned):
            options = {"reduction": "none", "z_loss": 0.1, "sample_weight": weight, **returned}
            found = cost(x, w, None, labels, **options)
            return (found[0] if returned else found).sum()

        return jax.grad(total)(x), jax.grad(partial(total, return_statistics=True))(x)

    alone, beside = gradients(jnp.array([1, -1, 7]), jnp.array([1.0, 1.0, 0.0]))
    assert list(np.isnan(beside).any(axis=-1)) == [False, True, False]
    assert not np.any(beside[2])
    assert_close(beside[0], alone[0], ulps=2)


def test_a_class_that_sparse_labels_do_not_know():
    x, w = jnp.ones((3, 2)), jnp.zeros((2, 4))
    share = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    cost = unchecked(js.linear_log_likelihood_cost)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\) for 4 classes, got 0 to 7"):
        cost(x, w, None, SparseLabels(jnp.array([[0, 1], [2, -9], [7, 0]]), share))
    known = SparseLabels(jnp.array([[0, 1], [2, -9], [3, 3]]), share)
    assert_close(cost(x, w, None, known), np.log(4.0), ulps=2)

    def costs(numbers):
        return cost(x, w, None, SparseLabels(numbers, share), reduction="none")

    numbers = jnp.array([[0, 1], [2, -9], [7, 0]])
    assert list(np.isnan(jax.jit(costs)(numbers))) == [False, False, True]
    with pytest.raises(ValueError, match=r"shape \(3,\) and an axis more, got \(3, 2\) and \(3, 1\)"):
        cost(x, w, None, SparseLabels(numbers, share[:, :1]))
    with pytest.raises(TypeError, match=r"labels.classes must be integers, got float32"):
        cost(x, w, None, SparseLabels(share, share))
    with pytest.raises(
        ValueError, match=r"labels.weights must give logits of shape \(3, 4\), got \(3, 5\)"
    ):
        cost(x, w, None, TeacherLabels(x, jnp.ones((2, 5))))
    with pytest.raises(ValueError, match=r"labels.features .* must fit, .* got \(3, 2\) and \(3, 4\)"):
        cost(x, w, None, TeacherLabels(x, jnp.ones((3, 4))))
    with pytest.raises(ValueError, match="logit_scale must be a number above 0, got 0"):
        cost(x, w, None, known, logit_scale=0)
    with pytest.raises(ValueError, match=r"where \(3,\) must broadcast to the logits' \(4,\)"):
        cost(x, w, None, known, where=jnp.ones(3, bool))
    assert np.isnan(jax.jit(lambda t: cost(x, w, None, known, logit_scale=t))(-1.0))


def test_no_gradient_flows_to_a_teacher():
    (x, w, b), teacher, *_ = a_case("teacher", "float32", {}, None)

    def cost(teacher, block_size):
        return js.linear_log_likelihood_cost(x, w, b, teacher, block_size=block_size)

    for block_size in (None, 4):
        gradients = jax.jit(jax.grad(partial(cost, block_size=block_size)))(teacher)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("taught", "rows", "share"), [slow(False, 2048, 0.2), (True, 1024, 0.2)])
def test_holds_the_logits_of_neither(taught, rows, share):
    sizes = (rows, 64), (64, 32_000), (rows, 512), (512, 32_000)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sizes]
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def policy(x, w, labels):
        found = js.head_statistics(x, w, None, labels)
        return jnp.mean(found.label_log_likelihood + found.entropy * found.log_normalizer)

    def distillation(x, w, *teacher):
        return js.linear_log_likelihood_cost(x, w, None, TeacherLabels(*teacher))

    run = jax.jit(jax.value_and_grad(distillation if taught else policy, (0, 1)))
    compiled = run.lower(*arguments[:2], *(arguments[2:] if taught else [labels])).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < share * rows * 32_000 * 4


@pytest.mark.slow
def test_classes_that_float32_cannot_number():
    classes = 17_000_000
    last = classes - 1
    x = jnp.array([[1.0, 0], [0, 1]])
    w = jnp.zeros((2, classes)).at[0, last].set(30).at[1, 2**24 + 1].set(9).at[1, 2**24].set(8)
    labels = jnp.array([last, 2**24])
    statistics = jax.jit(js.head_statistics)(x, w, None, labels)
    assert list(statistics.prediction) == [last, 2**24 + 1]
    assert list(statistics.label_rank) == [0, 1]

    compiled = jax.jit(jax.value_and_grad(lambda w: js.linear_log_likelihood_cost(x, w, None, labels)))
    compiled = compiled.lower(w).compile()
    block = 4 * x.shape[0] * classes
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * block
    cost, slopes = compiled(w)
    rest = np.array([last, last - 1 + np.exp(9)]), np.exp([30.0, 8.0])
    assert_relative(cost, np.log1p(rest[0] / rest[1]).mean(), eps_multiple=8)
    shares = rest[0] / (rest[0] + rest[1])
    assert_relative(slopes[[0, 1], labels], -shares / 2, eps_multiple=8)
    others = np.array([[1.0, 1], [1, np.exp(9)]]) / (rest[0] + rest[1])[:, None] / 2
    assert_relative(slopes[:, [0, 2**24 + 1]], others, eps_multiple=8)


def test_a_label_that_nobody_counts_has_no_statistics():
    x, w, labels = jnp.ones((2, 2)), jnp.eye(2, 3), jnp.array([-100, 1])
    options = {"sample_weight": labels >= 0, "return_statistics": True}
    for block_size in (None, 1):
        cost, beside = js.linear_log_likelihood_cost(x, w, None, labels, block_size=block_size, **options)
        alone = jax.jit(js.head_statistics)(x, w, None, labels)
        assert np.isfinite(cost)
        assert list(np.isnan(beside.label_log_likelihood)) == [True, False]
        assert list(beside.label_rank) == list(alone.label_rank) == [3, 1]
