"""The head is the dense cost of features @ weights + bias, in less memory and no more products."""

import itertools
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
from jaxsoftmax import _blocks, _rows

SHAPES = list(itertools.product([1, 7, 130], [1, 2, 10, 300, 1025], [3, 64]))
REDUCTIONS = ["mean", "sum", "none"]


def layer(rows, features, classes, dtype, scale=1.0, seed=0):
    generator = np.random.default_rng(seed)
    shapes = (rows, features), (features, classes), (classes,)
    return tuple(jnp.asarray(generator.normal(size=shape) * scale, dtype) for shape in shapes)


def every_option(rows, classes, dtype, seed=5):
    generator = np.random.default_rng(seed)
    return {
        "sample_weight": jnp.asarray(generator.random(rows), dtype).at[0].set(0),
        "class_weight": jnp.asarray(generator.random(classes), dtype),
        "label_smoothing": jnp.asarray(0.1, dtype),
        "z_loss": jnp.asarray(0.01, dtype),
        "softcap": jnp.asarray(5.0, dtype),
    }


def dense(x, w, b, labels, softcap=None, num_classes=None, **options):
    """The same cost from all the logits at once."""
    z = jnp.matmul(x, w, preferred_element_type=jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    z = z if b is None else z + b.astype(z.dtype)[None]
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    where = None if num_classes is None else jnp.arange(z.shape[-1]) < num_classes
    return js.log_likelihood_cost(z, labels, where=where, **options)


def value_and_gradients(cost, arguments, options, cotangent, **fixed):
    """The cost, and its gradients by every floating-point argument and option."""
    x, w, b, labels = arguments
    soft = jnp.issubdtype(labels.dtype, jnp.floating)

    def function(parts, options):
        return cost(*parts, **({} if soft else {"labels": labels}), **options, **fixed)

    @jax.jit
    def run(parts, options):
        value, pull_back = jax.vjp(function, parts, options)
        return value, pull_back(cotangent(value))

    return run((x, w, b, labels) if soft else (x, w, b), options)


TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 3e-2}
CASES = list(itertools.product(REDUCTIONS, TOLERANCES, SHAPES))


@pytest.mark.parametrize(
    ("number", "case"),
    mostly_slow(2, list(enumerate(every(79, CASES)))),
)
def test_equals_the_dense_cost_with_every_option(number, case):
    reduction, dtype, (rows, classes, features) = case
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    with jax.enable_x64(dtype == "float64"):
        x, w, b = layer(rows, features, classes, dtype, scale=0.5)
        shape = (rows, classes)
        labels = random_targets(shape, wide) if number % 2 else random_labels(shape)
        options = every_option(rows, classes, wide) if number % 3 else {}

        def cotangent(value):
            return jnp.asarray(np.random.default_rng(9).normal(size=value.shape), value.dtype)

        expected = value_and_gradients(dense, (x, w, b, labels), options, cotangent, reduction=reduction)
        actual = value_and_gradients(
            js.linear_log_likelihood_cost, (x, w, b, labels), options, cotangent,
            reduction=reduction, block_size=50,
        )  # fmt: skip
        assert_norms_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("block_size", "reduction"),
    [slow(None, "mean"), slow(1, "none"), (6, "mean"), (7, "none"), slow(8, "mean"), slow(1000, "none")],
)
def test_any_block_size_and_leading_axes(block_size, reduction):
    x, w, b = layer(14, 5, 11, jnp.float32)
    labels = random_labels((14, 11))
    dense_cost = jax.jit(partial(dense, labels=labels, reduction=reduction))
    expected = jax.jit(jax.grad(lambda *layer: dense_cost(*layer).sum(), (0, 1, 2)))(x, w, b)

    def cost(x, w, b):
        folded = x.reshape(2, 7, 5), w, b, labels.reshape(2, 7)
        costs = js.linear_log_likelihood_cost(*folded, reduction=reduction, block_size=block_size)
        assert costs.shape == (() if reduction == "mean" else (2, 7))
        return costs.sum()

    assert_close(jax.jit(jax.grad(cost, (0, 1, 2)))(x, w, b), expected, ulps=8)


def test_a_product_wider_than_its_chunks(monkeypatch):
    monkeypatch.setattr(_blocks, "CHUNK", 5 * 3)
    x, w, b = layer(9, 5, 11, jnp.float32)
    labels = random_labels((9, 11))
    jax.clear_caches()
    actual = jax.jit(jax.grad(lambda w: js.linear_log_likelihood_cost(x, w, b, labels, block_size=4)))(w)
    jax.clear_caches()
    assert_close(actual, jax.jit(jax.grad(lambda w: dense(x, w, b, labels)))(w), ulps=8)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1e-3), slow("none", 0.0)])
def test_padding_classes_do_not_exist(reduction, scale):
    x, w, b = layer(6, 4, 10, jnp.float32, scale=scale)
    labels = random_labels((6, 7))
    padded = w.at[:, 7:].set(3e38), b.at[7:].set(9.0)

    def cost(w, b, num_classes, smoothing):
        return js.linear_log_likelihood_cost(
            x, w, b, labels, num_classes=num_classes, label_smoothing=smoothing, reduction=reduction,
            block_size=4,
        ).sum()  # fmt: skip

    run = jax.jit(jax.value_and_grad(cost, (0, 1)), static_argnums=2)
    for smoothing in (0.0, 0.1):
        value, (d_w, d_b) = run(*padded, 7, smoothing)
        expected, (e_w, e_b) = run(w[:, :7], b[:7], None, smoothing)
        assert_close((value, d_w[:, :7], d_b[:7]), (expected, e_w, e_b), ulps=8)
        assert_close((d_w[:, 7:], d_b[7:]), (np.zeros((4, 3)), np.zeros(3)), ulps=0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\) for 7 classes, got 8 to 8"):
        js.linear_log_likelihood_cost(x, w, b, jnp.full(6, 8), num_classes=7)
    bad = jax.jit(lambda y: js.linear_log_likelihood_cost(x, w, b, y, num_classes=7, reduction="none"))
    assert list(np.isnan(bad(jnp.array([0, 7, 9, 10, -1, 6])))) == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("soft", "reduction"), [(False, "sum"), slow(False, "none"), slow(True, "sum"), (True, "none")]
)
def test_exact_however_confident(reduction, soft):
    lead = np.array([0.0, 10, 20, 30, 40, -40])
    z = np.zeros((6, 10))
    z[:, 2] = lead
    # An identity for features makes the logits exactly these.
    x, w = jnp.eye(6), jnp.asarray(z, jnp.float32)
    labels = jax.nn.one_hot(jnp.full(6, 2), 10) if soft else jnp.full(6, 2)
    cost, slopes = oracle.many_classes(z, 2)

    def function(x, w, b):
        return js.linear_log_likelihood_cost(x, w, b, labels, reduction=reduction, block_size=4)

    value, pull_back = jax.vjp(function, x, w, jnp.zeros(10))
    _, d_w, d_b = pull_back(jnp.ones_like(value))
    assert_relative(value, cost if reduction == "none" else cost.sum(), eps_multiple=8)
    assert_relative(d_w, slopes, eps_multiple=8)
    alone = jax.jit(jax.grad(lambda b, x, y: js.linear_log_likelihood_cost(x, w, b, y)))
    for row in range(6):
        assert_relative(alone(jnp.zeros(10), x[row], labels[row]), slopes[row], eps_multiple=32)
    assert_close(d_b, slopes.astype(np.float64).sum(0), ulps=4)


def equations(jaxpr):
    """Every equation of a jaxpr, those of the jaxprs within it included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize(
    ("reduction", "labels"), [("mean", jnp.int32), slow("none", jnp.int32), slow("mean", jnp.bfloat16)]
)
def test_never_holds_the_logits(reduction, labels):
    rows, features, classes, block = 2048, 32, 4096, 64
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in [(rows, features), (features, classes), (classes,)]
    ]
    # Nor the probabilities once more in float32.
    shape = (rows,) if labels == jnp.int32 else (rows, classes)
    labels = jax.ShapeDtypeStruct(shape, labels)

    def cost(x, w, b, labels):
        head = js.linear_log_likelihood_cost
        return head(x, w, b, labels, reduction=reduction, block_size=block, label_smoothing=0.1).sum()

    for function in (cost, jax.value_and_grad(cost, (0, 1, 2))):
        jaxpr = jax.make_jaxpr(function)(*arguments, labels)
        sizes = [out.aval.size for equation in equations(jaxpr.jaxpr) for out in equation.outvars]
        assert len(shape) > 1 or max(sizes) < rows * classes / 4
        compiled = jax.jit(function).lower(*arguments, labels).compile()
        limit = (4 if len(shape) == 1 else 7) * block * classes * 4 + 2 * features * (rows + classes) * 4
        assert compiled.memory_analysis().temp_size_in_bytes < limit < rows * classes * 4 / 3


@pytest.mark.parametrize(
    ("options", "has_gradient", "most"),
    [
        ({}, True, 1.3),
        slow({}, False, 1.1),
        slow({"logit_scale": 2.0}, True, 1.3),
        slow({"label_smoothing": 0.1}, False, 1.1),
        ({"label_smoothing": 0.1, "logit_scale": 2.0}, True, 2.5),
        slow({"z_loss": 1e-4, "num_classes": 8000}, True, 1.3),
        ({"return_statistics": True}, True, 1.3),
        slow({"return_statistics": True, "class_weight": jnp.ones(8192)}, True, 1.3),
    ],
    ids=str,
)
def test_a_block_takes_about_one_array(options, has_gradient, most):
    rows, features, classes, block = 1024, 16, 8192, 128
    shapes = (rows, features), (features, classes), (classes,)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def cost(x, w, b, labels):
        return js.linear_log_likelihood_cost(x, w, b, labels, block_size=block, **options)

    has_aux = "return_statistics" in options
    function = jax.value_and_grad(cost, (0, 1, 2), has_aux=has_aux) if has_gradient else cost
    analysis = jax.jit(function).lower(*arguments, labels).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < most * block * classes * 4


@pytest.mark.parametrize("classes", [5, 8192])
def test_an_empty_batch(classes):
    x, w, labels = jnp.zeros((0, 2)), jnp.zeros((2, classes)), jnp.zeros(0, int)

    @jax.jit
    def run(x, w):
        cost = partial(js.linear_log_likelihood_cost, bias=None, labels=labels, return_statistics=True)
        entropies = jax.grad(lambda x, w: js.head_statistics(x, w, None, labels).entropy.sum(), (0, 1))
        beside = jax.value_and_grad(cost, (0, 1), has_aux=True)
        return beside(x, w), entropies(x, w), cost(x, w), js.log_softmax(x @ w)

    ((value, statistics), gradients), of_entropy, alone, logs = run(x, w)
    assert value == alone[0] == 0
    assert logs.shape == (0, classes)
    assert {each.shape for each in jax.tree.leaves((statistics, alone[1]))} == {(0,)}
    for d_x, d_w in gradients, of_entropy:
        assert d_x.shape == x.shape
        assert not np.any(d_w)


@pytest.mark.parametrize(("rows", "classes"), [(60_000, 3), slow(30_000, 100)])
def test_the_bias_gradient_of_many_rows(rows, classes):
    labels = np.random.default_rng(3).integers(0, classes, rows)
    labels[: rows // 4] = 0
    x, w, b = jnp.zeros((rows, 2)), jnp.zeros((2, classes)), jnp.zeros(classes)
    gradient = jax.grad(js.linear_log_likelihood_cost, 2)(x, w, b, labels)
    exact = 1 / classes - np.bincount(labels) / rows
    assert np.abs(gradient - exact).max() <= 2 * np.finfo(np.float32).eps * np.abs(exact).max()


@pytest.mark.parametrize(("classes", "logits"), [(1000, 2**20), slow(8192, 5 * 2**20)])
def test_default_blocks_of_many_rows_stay_small(classes, logits):
    rows, features = 65_536, 8
    shapes = (rows, features), (features, classes)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    cost = lambda x, w, labels: js.linear_log_likelihood_cost(x, w, None, labels)  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(cost, (0, 1))).lower(x, w, labels).compile()
    few = (rows + classes) * (features + 2)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (1.1 * logits + few)


def products(function, *arguments):
    """Floating-point operations of the compiled function, in products of features and weights."""
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    (rows, features), (_, classes) = arguments[0].shape, arguments[1].shape
    return analysis["flops"] / (2 * rows * features * classes)


@pytest.mark.slow
def test_no_product_that_nobody_asked_for():
    x, w, b = layer(64, 256, 512, jnp.float32)
    labels = random_labels((64, 512))

    def cost(reduction):
        return lambda x, w: js.linear_log_likelihood_cost(x, w, b, labels, reduction=reduction).sum()

    for reduction in ("mean", "none"):
        function = cost(reduction)
        assert products(function, x, w) == pytest.approx(1, abs=0.1)
        assert products(jax.value_and_grad(function), x, w) == pytest.approx(2, abs=0.1)
        assert products(jax.value_and_grad(function, 1), x, w) == pytest.approx(2, abs=0.1)
        # "none" would take four, but in one block the compiler sees that it has the logits already.
        assert products(jax.value_and_grad(function, (0, 1)), x, w) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    ("rows", "block_size", "dtype", "reduction"),
    [
        ((), None, jnp.float32, "mean"),
        slow((12,), 4, jnp.float32, "mean"),
        ((12,), 4, jnp.float32, "none"),
        ((4,), None, jnp.bfloat16, "none"),
        slow((9,), 4, jnp.float16, "mean"),
    ],
)
def test_examples_under_vmap_share_the_gradient_of_their_weights(rows, block_size, dtype, reduction):
    batch, features, classes = 64, 512, 4096
    shapes = [(features, classes), (classes,), (batch, *rows, features)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    labels = jax.ShapeDtypeStruct((batch, *rows), jnp.int32)

    def cost(w, b, x, labels):
        def one(x, label):
            return js.linear_log_likelihood_cost(
                x, w, b, label, reduction=reduction, block_size=block_size
            ).sum()

        return jax.vmap(one)(x, labels).mean()

    compiled = jax.jit(jax.grad(cost, (0, 1, 2))).lower(*arguments, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * features * classes * 4 / 8


@pytest.mark.parametrize(("dtype", "reduction"), [(jnp.float32, "mean"), (jnp.bfloat16, "none")])
@pytest.mark.slow
def test_examples_of_several_blocks_under_vmap(reduction, dtype):
    x, w, b = layer(15, 4, 9, dtype)
    x, labels = x.reshape(3, 5, 4), random_labels((15, 9)).reshape(3, 5)
    several = jnp.stack([w, -w])

    def gradients(cost):
        def total(w, b, x):
            return jax.vmap(lambda x, label: cost(x, w, b, label).sum())(x, labels).sum()

        return (
            jax.grad(total, (0, 1, 2))(w, b, x),
            jax.vmap(jax.grad(lambda w, x, label: cost(x, w, b, label).sum()), (None, 0, 0))(
                w, x, labels
            ),
            jax.grad(lambda several: jax.vmap(total, (0, None, None))(several, b, x).sum())(several),
        )

    head = partial(js.linear_log_likelihood_cost, reduction=reduction, block_size=2)
    costs = head, partial(dense, reduction=reduction)
    assert_close(*(jax.jit(partial(gradients, cost))() for cost in costs), ulps=32)


def test_few_classes_and_many_rows():
    x, w, b = layer(90, 7, 3, jnp.float32)
    labels = random_labels((90, 3))
    direction = layer(7, 3, 1, jnp.float32, seed=3)[0]

    def results(cost):
        gradient = jax.grad(lambda w: cost(x, w, b, labels))
        return gradient(w), jax.jvp(gradient, (w,), (direction,))[1]

    costs = js.linear_log_likelihood_cost, dense
    assert_close(*(jax.jit(partial(results, cost))() for cost in costs), ulps=16)


@pytest.mark.parametrize(
    ("loss_scale", "scale", "reduction"),
    [slow(2.0**-6, 0.3, "none"), slow(2.0**18, 2.0**-8, "sum"), (2.0**18, 2.0**-8, "none")],
)
def test_float16_keeps_its_digits_however_the_loss_is_scaled(loss_scale, scale, reduction):
    # The logits' gradient would be subnormal in float16, or infinite.
    x, w, _ = (part.astype(jnp.float16) for part in layer(12, 8, 20_000, jnp.float32, scale=scale))
    labels = random_labels((12, 20_000))

    def gradients(cost, *arguments):
        def scaled(x, w):
            return loss_scale * cost(x, w, None, labels, reduction=reduction).sum()

        return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(scaled, (0, 1))(*arguments))

    exact = gradients(dense, *(part.astype(jnp.float32) for part in (x, w)))
    assert_norms_close(gradients(js.linear_log_likelihood_cost, x, w), exact, 5e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)], ids=str)
def test_narrow_operands_and_wide_sums(dtype, monkeypatch):
    x, w, b = layer(64, 8, 30, dtype, scale=0.5)
    labels = random_labels((64, 30))

    def cost(x, w, b):
        return js.linear_log_likelihood_cost(x, w, b, labels, reduction="sum", block_size=4)

    # A CPU's program alone: accelerators round a whole gradient inside its product.
    with monkeypatch.context() as patch:
        for module in (_rows, _blocks):
            patch.setattr(module, "by_processor", lambda cpu, _, *arguments, **__: cpu(*arguments))
        jax.clear_caches()
        jaxpr = jax.make_jaxpr(jax.grad(cost, (0, 1)))(x, w, b)
    jax.clear_caches()
    dots = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    # But for products with ones, which add the bias and sum rows.
    found = [e for e in dots if all(v.aval.ndim == 2 and 1 not in v.aval.shape for v in e.invars)]
    assert len(found) >= 3
    for equation in found:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(dtype)}
        assert equation.outvars[0].aval.dtype == jnp.float32
    with jax.enable_x64(True):
        exact = [jnp.asarray(part, jnp.float64) for part in (x, w, b)]
        expected = jax.jit(jax.grad(lambda *a: dense(*a, labels, reduction="sum"), (0, 1, 2)))(*exact)
    actual = jax.jit(jax.grad(cost, (0, 1, 2)))(x, w, b)
    assert [part.dtype for part in actual] == [dtype] * 3
    rows = jax.nn.one_hot(labels, 30, dtype=dtype)
    by_rows = jax.jit(jax.grad(lambda y: js.linear_log_likelihood_cost(x, w, b, y, block_size=4)))(rows)
    assert by_rows.dtype == dtype
    # The logits' gradient is rounded before its products; sixteen blocks add no error of their own.
    assert_norms_close([a.astype(jnp.float32) for a in actual], [np.float32(e) for e in expected], 4e-3)


def test_an_example_of_weight_zero_breaks_nothing():
    x, w, b = layer(5, 3, 7, jnp.float32)
    labels = random_labels((5, 7))
    weight = jnp.array([1.0, 0, 2, 0, 0])
    for junk in (jnp.nan, jnp.inf, -jnp.inf):
        dirty = x.at[1].set(junk).at[3, 0].set(junk)
        for reduction in REDUCTIONS:

            def cost(x, w, b, labels, reduction=reduction):
                return js.linear_log_likelihood_cost(
                    x, w, b, labels, sample_weight=weight, reduction=reduction, block_size=2
                ).sum()

            expected = jax.value_and_grad(cost, (0, 1, 2))(x, w, b, labels)
            assert_close(jax.value_and_grad(cost, (0, 1, 2))(dirty, w, b, labels), expected, ulps=0)
            bad = labels.at[1].set(-100).at[4].set(7)
            assert_close(jax.value_and_grad(cost, (0, 1, 2))(dirty, w, b, bad), expected, ulps=0)


def test_a_cost_that_is_not_counted_has_no_gradient():
    x, w, b = layer(3, 4, 5, jnp.float32)

    @jax.jit
    def guarded(x, w, labels):
        cost = js.linear_log_likelihood_cost(x, w, b, labels, block_size=2)
        return jnp.where(jnp.isnan(cost), 0, cost)

    gradients = jax.grad(guarded, (0, 1))(x, w, jnp.array([0, 9, 2]))
    assert_close(gradients, (np.zeros((3, 4)), np.zeros((4, 5))), ulps=0)


@pytest.mark.parametrize("reduction", ["none", slow("mean")])
def test_second_derivatives_are_exact(reduction):
    x, w, labels = jnp.zeros((2, 1)), jnp.zeros((1, 10)), jnp.ones(2, int)

    def cost(b):
        return js.linear_log_likelihood_cost(x, w, b, labels, reduction=reduction, block_size=1).mean()

    hessian = jax.jit(jax.hessian(cost))
    for behind, leads in ((-30, 0), (0, 0), (17, 0), (60, 0), (0, 40), (60, 5)):
        b = np.linspace(0, 1, 10).astype(np.float32)
        b[1] -= np.float32(behind)
        b[4] += np.float32(leads)
        assert_relative(hessian(b), oracle.softmax_jacobian(b.astype(np.float64)), eps_multiple=16)


@pytest.mark.parametrize("block_size", [None, slow(2)])
def test_slopes_far_over_a_softcap_keep_their_digits(block_size):
    # Each example picks its own row of the weights, so that their gradient is the logits'.
    softcap, labels = 30.0, np.array([0, 1, 2, 3])
    w = np.linspace(-420, 420, 28).reshape(4, 7).astype(np.float32)

    def cost(w):
        x = jnp.eye(4)
        return js.linear_log_likelihood_cost(
            x, w, None, jnp.asarray(labels), reduction="sum", softcap=softcap, block_size=block_size
        )

    z = w.astype(np.float64) / softcap
    expected = oracle.log_likelihood_vjp(softcap * np.tanh(z), np.eye(7)[labels], np.ones((4, 1)))
    expected /= np.cosh(z) ** 2
    # A logit of 30 is rounded by 2⁻²⁰, and its exponential by as much.
    assert_relative(jax.jit(jax.grad(cost))(jnp.asarray(w)), expected, eps_multiple=64)


@pytest.mark.parametrize(
    ("softcap", "block_size"),
    mostly_slow(6, list(itertools.product([90.0, 50.0], [2, 1, 5]))),
)
def test_exact_on_capped_logits_in_any_block(softcap, block_size):
    w = jnp.array([[0.0, 1, -2, 40 / 0.3]])
    x = jnp.linspace(0.3, 0.42, 5)[:, None]

    def cost(b):
        return js.linear_log_likelihood_cost(
            x, w, b, jnp.full(5, 3), reduction="sum", softcap=softcap, block_size=block_size
        )

    z = np.asarray(jax.jit(lambda x: softcap * jnp.tanh(x @ w / softcap))(x), np.longdouble)
    _, slopes = oracle.many_classes(z, 3)
    slopes *= 1 - (z / softcap) ** 2
    # The softcap's own derivative 1 − tanh² rounds as its argument does.
    assert_relative(jax.jit(jax.grad(cost))(jnp.zeros(4))[3], slopes.sum(0)[3], eps_multiple=200)


@pytest.mark.slow
def test_transformations():
    x, w, b = layer(12, 4, 9, jnp.float32)
    labels = random_labels((12, 9))

    def head(w, x, labels, reduction="mean"):
        return js.linear_log_likelihood_cost(x, w, b, labels, reduction=reduction, block_size=5).sum()

    def plain(w, x, labels, reduction="mean"):
        return dense(x, w, b, labels, reduction=reduction).sum()

    stacked = x.reshape(3, 4, 4), labels.reshape(3, 4)
    direction = layer(4, 9, 1, jnp.float32, seed=8)[0]

    def scanned(w, of):
        return jax.lax.scan(lambda total, batch: (total + of(w, *batch), None), 0.0, stacked)[0]

    ways = [
        lambda of: jax.grad(jax.checkpoint(of))(w, x, labels),
        lambda of: jax.grad(lambda w: jax.vmap(of, (None, 0, 0))(w, *stacked).sum())(w),
        lambda of: jax.vmap(jax.grad(of), (None, 0, 0))(w, *stacked),
        lambda of: jax.grad(scanned)(w, of),
        lambda of: jax.jvp(jax.grad(lambda w: of(w, x, labels)), (w,), (direction,))[1],
        lambda of: jax.grad(lambda w: jnp.vdot(jax.grad(of)(w, x, labels), direction))(w),
    ]
    for reduction, some in (("mean", every(3, ways)), ("none", every(3, ways[::-1]))):

        def gradients(cost, reduction=reduction, some=some):
            return [way(partial(cost, reduction=reduction)) for way in some]

        assert_close(
            jax.jit(partial(gradients, head))(), tuple(jax.jit(partial(gradients, plain))()), ulps=32
        )


@pytest.mark.parametrize("num_classes", [None, 3])
def test_statistics_of_one_feature(num_classes):
    x, w, _ = layer(64, 1, 5, jnp.float32)
    statistics = js.head_statistics(x, w, None, num_classes=num_classes)
    z = (x * w)[:, :num_classes]
    np.testing.assert_array_equal(statistics.prediction, jnp.argmax(z, axis=-1))
    a = js.softmax(z)
    np.testing.assert_allclose(statistics.entropy, -jnp.sum(a * jnp.log(a), axis=-1), rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_statistics(soft):
    x, w, b = layer(13, 4, 9, jnp.float32, scale=2)
    labels = random_targets((13, 9), jnp.float32) if soft else random_labels((13, 9))
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
    z = 3 * np.tanh(z / 3)[:, :8]
    log_normalizer = np.log(np.exp(z).sum(1))
    log_a = z - log_normalizer[:, None]
    y = np.asarray(labels, np.float64)[:, :8] if soft else np.eye(8)[np.asarray(labels) % 8]
    labels = labels.at[:, 8].set(0) if soft else labels % 8
    statistics = js.head_statistics(x, w, b, labels, softcap=3.0, num_classes=8, block_size=5)
    assert_close(statistics.log_normalizer, log_normalizer, ulps=8)
    assert list(statistics.prediction) == list(z.argmax(1))
    assert_close(statistics.entropy, -(np.exp(log_a) * log_a).sum(1), ulps=16)
    assert_close(statistics.label_log_likelihood, (y * log_a).sum(1), ulps=16)
    without = js.head_statistics(x.reshape(13, 1, 4), w, None)
    assert without.label_log_likelihood is None
    assert without.entropy.shape == (13, 1)


def test_predicts_the_first_of_the_largest_to_the_last_digit():
    above = np.nextafter(np.float32(1), np.float32(2))
    w = jnp.array([[1, above, above, 1], [above, 1, 1, above], [1, 1, 1, 1]])
    assert list(js.head_statistics(jnp.eye(3), w, jnp.zeros(4)).prediction) == [1, 0, 0]
    biased = js.head_statistics(jnp.eye(3), w, jnp.array([0.0, 0, 0, 1]), num_classes=3)
    assert list(biased.prediction) == [1, 0, 0]
    smallest = jnp.float32(3e-38) * w.at[0, 1].set(2)
    assert list(js.head_statistics(jnp.eye(3), smallest, None).prediction) == [1, 0, 0]


@pytest.mark.parametrize("softcap", [None, slow(300.0)])
def test_a_bias_may_decide_by_hundreds_of_nats(softcap):
    x, w, _ = layer(6, 4, 5000, jnp.float32)
    b = jnp.zeros(5000).at[7].set(250)
    labels = jnp.array([7, 7, 7, 1, 2, 3])

    def value_and_gradients(cost):
        return jax.jit(jax.value_and_grad(partial(cost, softcap=softcap), (0, 1, 2)))(x, w, b, labels)

    actual = value_and_gradients(partial(js.linear_log_likelihood_cost, block_size=2))
    assert_close(actual, value_and_gradients(dense), ulps=32)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_exports(platform):
    x, w, b = layer(64, 8, 50, jnp.float32)
    labels = random_labels((64, 50))

    def head(x, w, b):
        return js.linear_log_likelihood_cost(x, w, b, labels, block_size=10)

    def logits(z, *_):
        return js.log_likelihood_cost(z, labels)

    for function, arguments in ((head, (x, w, b)), (logits, (x @ w,))):
        exported = jax.export.export(jax.jit(jax.value_and_grad(function)), platforms=[platform])
        assert exported(*arguments).platforms == (platform,)


def test_errors_say_what_to_do():
    cost = unchecked(js.linear_log_likelihood_cost)
    x, w, b = layer(4, 3, 5, jnp.float32)
    labels = jnp.array([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"must fit, .* got \(4, 3\) and \(5, 3\)"):
        cost(x, w.T, b, labels)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\), one for each class, got \(3,\)"):
        cost(x, w, b[:3], labels)
    with pytest.raises(TypeError, match="TeacherLabels, got None: head_statistics works without labels"):
        cost(x, w, b, None)
    with pytest.raises(TypeError, match="features must be real floating-point numbers, got int32"):
        cost(jnp.ones((4, 3), int), w, b, labels)
    with pytest.raises(ValueError, match=r"integer labels must have shape \(4,\), .* got \(2,\)"):
        cost(x, w, b, labels[:2])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) for 5 classes, got 0 to 5"):
        cost(x, w, b, jnp.array([0, 1, 2, 5]))
    with pytest.raises(ValueError, match="num_classes must be at most the 5 columns of weights, got 6"):
        cost(x, w, b, labels, num_classes=6)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        cost(x, w, b, labels, block_size=0)
    with pytest.raises(ValueError, match="softcap must be a number above 0, got 0"):
        cost(x, w, b, labels, softcap=0)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'average'"):
        cost(x, w, b, labels, reduction="average")
    with pytest.raises(ValueError, match="softcap must be a number above 0, got inf"):
        cost(x, w, b, labels, softcap=jnp.inf)
    for bad in (jnp.float32(0), -1.0):
        with pytest.raises(ValueError, match="softcap must be a number above 0, got "):
            cost(x, w, b, labels, softcap=bad)
    d_b = jax.grad(cost, 2)(x[:, :0], w[:0], b, labels)  # No features: the bias alone.
    assert_close(d_b, jax.grad(lambda b: dense(x[:, :0], w[:0], b, labels))(b), ulps=4)
    assert cost(x[:0], w, b, labels[:0]) == 0
    assert cost(x[0], w, None, 2).shape == ()
