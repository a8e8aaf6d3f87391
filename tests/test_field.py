"""What people met with: public bug reports, other projects' tests, the settings that people have."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import assert_close, assert_norms_close, every, mostly_slow, slow, unchecked
from jax import export

import jaxsoftmax as js

LOGITS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * 3
LABELS = [0, 3, 1]


@pytest.mark.parametrize("kind", [list, tuple, lambda a: [np.int32(each) for each in a], np.array])
@pytest.mark.parametrize("cost", [js.log_likelihood_cost, js.quadratic_cost])
def test_labels_may_be_a_list_inside_jit(cost, kind):
    labels = kind(LABELS)
    assert_close(jax.jit(lambda z: cost(z, labels))(LOGITS), cost(LOGITS, jnp.array(LABELS)), ulps=2)
    # Of numbers that are not known yet, too.
    traced = jax.jit(lambda z, a: cost(z, [a, 3, a + 1]))(LOGITS, jnp.int32(0))
    assert_close(traced, cost(LOGITS, jnp.array(LABELS)), ulps=2)
    with pytest.raises(ValueError, match=r"got 0 to 4\. .* set its sample_weight to 0"):
        jax.jit(lambda z: cost(z, kind([0, 4, 1])))(LOGITS)


@pytest.mark.parametrize(
    "dtype", [jnp.float8_e4m3fn, *map(slow, [jnp.float8_e5m2, jnp.float8_e4m3b11fnuz])]
)
def test_logits_of_one_byte_may_be_masked(dtype):
    z, where = jnp.array([[1.0, 2, 3], [0, -1, 4]]).astype(dtype), jnp.array([True, True, False])
    exact, _ = oracle.many_classes(np.asarray(z.astype(jnp.float32), np.float64)[:, :2], 0)
    assert_close(js.log_likelihood_cost(z, jnp.array([0, 0]), where=where), exact.mean(), ulps=4)
    gradient = jax.grad(lambda z: js.log_likelihood_cost(z, jnp.array([0, 0]), where=where))(z)
    assert gradient.dtype == dtype
    assert not gradient[:, 2].astype(jnp.float32).any()
    assert gradient.astype(jnp.float32)[0, 0] < 0


def test_one_row_of_probabilities_for_all_examples():
    row = jnp.array([0.1, 0.2, 0.3, 0.4])
    for labels in (row, row[None]):
        expected = js.log_likelihood_cost(LOGITS, jnp.broadcast_to(row, (3, 4)))
        assert_close(js.log_likelihood_cost(LOGITS, labels), expected, ulps=2)
    gradient = jax.grad(js.log_likelihood_cost, argnums=1)(LOGITS, row)
    whole = jax.grad(js.log_likelihood_cost, argnums=1)(LOGITS, jnp.broadcast_to(row, (3, 4)))
    assert_close(gradient, whole.sum(0), ulps=4)
    along_first = js.log_likelihood_cost(LOGITS.T, row[:, None], axis=0)
    assert_close(along_first, js.log_likelihood_cost(LOGITS, row), ulps=2)
    # One number for all classes would be a label that names a class, in the wrong dtype.
    for labels in (jnp.float32(1), jnp.ones((3, 1)), jnp.ones(3)):
        with pytest.raises(ValueError, match="one row for all examples"):
            js.log_likelihood_cost(LOGITS, labels)


def test_negative_weights_want_a_normalizer():
    advantages = jnp.array([1.0, -1.0, -0.05])
    costs = js.log_likelihood_cost(LOGITS, jnp.array(LABELS), reduction="none")
    for cost in (js.log_likelihood_cost, js.quadratic_cost):
        with pytest.raises(ValueError, match=r"sum of the sample weights, which is -0\.05.*normalizer"):
            cost(LOGITS, jnp.array(LABELS), sample_weight=advantages)
    x, w = jnp.eye(3), jnp.asarray(LOGITS)
    with pytest.raises(ValueError, match="set normalizer"):
        js.linear_log_likelihood_cost(x, w, None, jnp.array(LABELS), sample_weight=advantages)
    with pytest.raises(
        ValueError, match=r"sum of class weights, and -0\.2 is one of them: set normalizer"
    ):
        js.log_likelihood_cost(LOGITS, jnp.array(LABELS), class_weight=jnp.linspace(-0.2, 1, w.shape[1]))
    for cost, arguments in (
        (js.log_likelihood_cost, (w,)),
        (js.linear_log_likelihood_cost, (x, w, None)),
    ):
        mean = cost(*arguments, jnp.array(LABELS), sample_weight=advantages, normalizer=3)
        assert_close(mean, np.sum(np.asarray(costs) * np.asarray(advantages)) / 3, ulps=8)
    # Weights that add up to more than 0 are what they were.
    js.log_likelihood_cost(LOGITS, jnp.array(LABELS), sample_weight=-advantages)


def test_a_weight_with_an_axis_too_many():
    with pytest.raises(ValueError, match=r"got \(3, 1\): drop axis 1"):
        js.log_likelihood_cost(LOGITS, jnp.array(LABELS), sample_weight=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"got \(2,\)$"):
        js.log_likelihood_cost(LOGITS, jnp.array(LABELS), sample_weight=jnp.ones(2))


SETTINGS = {
    "nothing tolerated": {
        "jax_debug_nans": True, "jax_debug_infs": True, "jax_enable_x64": True,
        "jax_numpy_rank_promotion": "raise",
    },
    "no jit": {"jax_disable_jit": True},
}  # fmt: skip


def values_and_gradients():
    """Of all that is differentiable, with every option in one call or another."""
    z, labels, bias = jnp.asarray(LOGITS), jnp.array(LABELS), jnp.ones(4, jnp.float32)
    rows, exists = jnp.full((3, 4), 0.25, jnp.float32), jnp.arange(4) < 4
    weights = {"sample_weight": bias[:3], "class_weight": bias}
    options = {**weights, "label_smoothing": 0.1, "z_loss": 0.1}
    network = js.init_network(jax.random.key(0), 4, 3, 4, jnp.float32)

    def cost(z, rows):
        of_labels = js.log_likelihood_cost(z, labels, where=exists, **options)
        return of_labels + js.log_likelihood_cost(z, rows, **options) + js.quadratic_cost(z, rows)

    def head(x, w, bias):
        more = {**options, "softcap": 5.0, "num_classes": 4, "block_size": 2}
        return js.linear_log_likelihood_cost(x, w, bias, labels, **more)

    w = jnp.eye(4, dtype=jnp.float32)
    statistics = js.head_statistics(z, w, bias, labels, block_size=2)
    return (
        jax.vjp(js.softmax, z)[1](z),
        jax.vjp(js.log_softmax, z)[1](z),
        jax.value_and_grad(cost, (0, 1))(z, rows),
        jax.value_and_grad(head, (0, 1, 2))(z, w, bias),
        statistics._replace(prediction=None, label_rank=None),
        jax.value_and_grad(js.network_cost)(network, z, labels),
        js.backpropagate(network, z, labels),
    )


@cache
def under_none():
    return jax.jit(values_and_gradients)()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.slow
def test_under_the_settings_that_people_have(settings):
    expected = under_none()
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        actual = values_and_gradients()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert_close(actual, expected, ulps=16)


def assert_exports(function, shapes, *several):
    """Exported with symbolic shapes it gives what it gives for each arguments' own."""
    specs = [jax.ShapeDtypeStruct(shape, a.dtype) for shape, a in zip(shapes, several[0], strict=True)]
    exported = export.export(jax.jit(function))(*specs)
    for arguments in several:
        assert_norms_close(exported.call(*arguments), jax.jit(function)(*arguments), 1e-5)


@pytest.mark.slow
def test_exports_with_symbolic_shapes():
    n, k = export.symbolic_shape("n, k")
    few, many = (jax.random.normal(jax.random.key(0), (5, classes)) for classes in (4, 200))
    labels = jnp.arange(5) % 4
    assert_exports(js.softmax, [(n, k)], (few,), (many,))
    for cost in (js.log_likelihood_cost, jax.value_and_grad(js.log_likelihood_cost)):
        assert_exports(cost, [(n, k), (n,)], (few, labels), (many, labels))
    soft = [(z, jnp.full_like(z, 1 / z.shape[1])) for z in (few, many)]
    assert_exports(lambda z, y: js.log_likelihood_cost(z, y, label_smoothing=0.1), [(n, k)] * 2, *soft)


@pytest.mark.slow
def test_the_head_exports_with_symbolic_rows():
    (n,) = export.symbolic_shape("n")
    x, w = jax.random.normal(jax.random.key(1), (5, 3)), jax.random.normal(jax.random.key(2), (3, 7))
    for block_size in (None, 2):

        def head(x, w, labels, block_size=block_size):
            return js.linear_log_likelihood_cost(x, w, None, labels, block_size=block_size)

        value_and_gradient = jax.value_and_grad(head, (0, 1))
        assert_exports(value_and_gradient, [(n, 3), (3, 7), (n,)], (x, w, jnp.arange(5)))
    assert_exports(lambda x, w: js.head_statistics(x, w, None).entropy, [(n, 3), (3, 7)], (x, w))


@pytest.mark.parametrize("axis", [(2, 0), slow((1,)), slow(None)])
def test_several_axes_of_classes_are_one(axis):
    z = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    axes = tuple(range(3)) if axis is None else axis
    exists = np.arange(24).reshape(2, 3, 4) % 5 != 1
    probabilities, c = np.exp(z), np.cos(z)

    def flat(array):
        moved = jnp.moveaxis(array, axes, range(-len(axes), 0))
        return moved.reshape(*moved.shape[: 3 - len(axes)], -1)

    labels = np.full(flat(z).shape[:-1], flat(z).shape[-1] - 1)
    weights = np.linspace(0, 2, flat(z).shape[-1], dtype=np.float32)

    def results(axis, z, exists, probabilities, c):
        def cost(z, y):
            options = {"class_weight": weights, "label_smoothing": 0.1}
            likelihood = js.log_likelihood_cost(z, y, axis=axis, **options)
            return likelihood + 3 * js.quadratic_cost(z, y, axis=axis)

        costs, gradients = zip(
            *(jax.value_and_grad(cost)(z, y) for y in (probabilities, labels)), strict=True
        )
        masked, pulled = [], []
        for function in (js.softmax, js.log_softmax):
            masked.append(jnp.where(exists, function(z, axis, exists), 0))
            pulled += jax.vjp(partial(function, axis=axis), z)[1](c)
        return costs, [*masked, *pulled, *gradients]

    given = z, exists, probabilities, c
    costs, arrays = jax.jit(partial(results, axis))(*given)
    of_one = jax.jit(partial(results, -1))(*map(flat, given))
    assert_close((costs, list(map(flat, arrays))), (of_one[0], tuple(of_one[1])), ulps=4)
    for function, whole in zip((jax.nn.softmax, jax.nn.log_softmax), arrays[:2], strict=True):
        assert_close(whole, np.where(exists, function(z, axis, where=exists), 0), ulps=8)


def test_axes_that_name_no_classes():
    for axis in ((), (0, 0), (1, -1)):
        with pytest.raises(ValueError, match="one axis of the logits, or several different ones"):
            js.softmax(LOGITS, axis)
    with pytest.raises(TypeError, match=r"axis must be an integer, a tuple of them.*got \[0, 1\]"):
        unchecked(js.softmax)(LOGITS, [0, 1])
    with pytest.raises(ValueError, match=r"in \[-2, 2\).*got \(0, 2\)"):
        js.log_likelihood_cost(LOGITS, jnp.array(LABELS), axis=(0, 2))
    with pytest.raises(ValueError, match=r"shape \(\), one for each row .* along axis 0, 1"):
        js.log_likelihood_cost(LOGITS, jnp.array(LABELS), axis=None)
    assert js.log_likelihood_cost(jnp.zeros((0, 2, 3)), jnp.zeros(0, int), axis=(1, 2)) == 0


WORDS = {
    "dtype": r"\.astype",
    "initial": "where alone",
    "ignore_index": "sample_weight=labels != ignore_index",
    "weight": "class_weight",
    "targets": "its docstring",
}


@pytest.mark.parametrize("word", WORDS)
def test_words_of_other_libraries(word):
    network = js.init_network(jax.random.key(0), 4, 2, 4)
    functions = js.softmax, js.log_softmax, js.log_likelihood_cost, js.quadratic_cost
    for function in (*functions, js.linear_log_likelihood_cost, js.head_statistics, js.network_cost):
        given = (network, LOGITS, np.array(LABELS)) if function is js.network_cost else (LOGITS,)
        with pytest.raises(
            TypeError, match=f"no argument '{word}'.*{WORDS[word]}.*Coming from elsewhere"
        ):
            function(*given, **{word: jnp.float32})


def test_parameters_that_are_no_arrays():
    of_function = {"a": [1.0, jnp.tanh]}, r"params\['a'\]\[1\]"
    for tree, name in (of_function, ((jnp.ones(2), "adam"), r"params\[1\]")):
        with pytest.raises(TypeError, match=rf"{name} must be an array, got .*eqx\.partition"):
            js.init_state(tree, optax.sgd(0.1))
    js.init_state({"a": np.ones(2), "b": 1.0, "c": None}, optax.adam(0.1))


FLOAT8 = jnp.float8_e4m3fn, jnp.float8_e5m2
MIXED = [
    (jnp.float32, FLOAT8[0]), (jnp.bfloat16, FLOAT8[1]), (FLOAT8[0], jnp.float32), FLOAT8,
    (FLOAT8[1], jnp.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("of_features", "of_weights"), mostly_slow(3, every(2, MIXED)))
def test_the_head_takes_any_mix_of_dtypes(of_features, of_weights):
    generator = np.random.default_rng(2)
    x = jnp.asarray(generator.integers(-3, 4, (5, 4)) / 2, jnp.float32).astype(of_features)
    w = jnp.asarray(generator.integers(-3, 4, (4, 6)) / 2, jnp.float32).astype(of_weights)
    labels = jnp.array([0, 5, 2, 3, 3])
    wide = [a.astype(jnp.float32) for a in (x, w)]
    dense = jax.jit(jax.value_and_grad(lambda x, w: js.log_likelihood_cost(x @ w, labels), (0, 1)))
    expected = dense(*wide)
    for block_size in (None, 2):
        head = lambda x, w, b=block_size: js.linear_log_likelihood_cost(x, w, None, labels, block_size=b)  # noqa: E731
        value, gradients = jax.jit(jax.value_and_grad(head, (0, 1)))(x, w)
        assert_close(value, expected[0], ulps=8)
        for gradient, exact, primal in zip(gradients, expected[1], (x, w), strict=True):
            assert gradient.dtype == primal.dtype
            coarsest = max(float(jnp.finfo(d).eps) for d in (of_features, of_weights))
            error = jnp.abs(gradient.astype(jnp.float32) - exact)
            # Numbers of one byte have no more than about 2⁻¹⁰ or 2⁻¹⁷ below their smallest.
            smallest = float(jnp.finfo(primal.dtype).smallest_subnormal)
            assert jnp.all(error <= 2 * coarsest * jnp.max(jnp.abs(exact)) + smallest)


@pytest.mark.slow
def test_features_of_64_bits_beside_a_narrow_bias():
    with jax.enable_x64(True):
        x, w, b = jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.zeros(3, jnp.float32)
        for reduction in ("mean", "none"):
            head = lambda b, r=reduction: js.linear_log_likelihood_cost(  # noqa: E731
                x, w, b, jnp.zeros(4, int), block_size=2, reduction=r
            ).mean()
            gradient = jax.grad(head)(b)
            assert gradient.dtype == jnp.float32
            assert_close(gradient, np.array([-2 / 3, 1 / 3, 1 / 3]), ulps=2)


def test_an_argument_of_the_wrong_kind_is_named():
    x, w, labels = jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.array(LABELS)
    softmax, cost, head = map(
        unchecked, (js.softmax, js.log_likelihood_cost, js.linear_log_likelihood_cost)
    )
    init_state, make_step, make_epoch = map(unchecked, (js.init_state, js.make_step, js.make_epoch))
    logits, compare = unchecked(js.logits), unchecked(js.compare_gradients)
    sgd, network = optax.sgd(0.1), js.init_network(jax.random.key(0), 2, 3, 4)
    wrong = {
        "logits": lambda bad: softmax(bad),
        "where": lambda bad: softmax(LOGITS, where=bad),
        "axis": lambda bad: softmax(LOGITS, axis=bad),
        "class_axis": lambda bad: softmax(LOGITS, class_axis=bad),
        "labels": lambda bad: cost(LOGITS, bad),
        "sample_weight": lambda bad: cost(LOGITS, labels, sample_weight=bad),
        "class_weight": lambda bad: cost(LOGITS, labels, class_weight=bad),
        "label_smoothing": lambda bad: cost(LOGITS, labels, label_smoothing=bad),
        "reduction": lambda bad: cost(LOGITS, labels, reduction=bad),
        "normalizer": lambda bad: cost(LOGITS, labels, normalizer=bad),
        "features": lambda bad: head(bad, w, None, labels),
        "weights": lambda bad: head(x, bad, None, labels),
        "bias": lambda bad: head(x, w, bad, labels),
        "softcap": lambda bad: head(x, w, None, labels, softcap=bad),
        "batch_axis": lambda bad: head(x, w, None, labels, batch_axis=bad),
        "block_size": lambda bad: head(x, w, None, labels, block_size=bad),
        "x": lambda bad: logits(network, bad),
        "network": lambda bad: logits(bad, x),
        "params": lambda bad: init_state(bad, sgd),
        "optimizer": lambda bad: init_state(x, bad),
        "cost": lambda bad: make_step(bad, sgd),
        "batch_size": lambda bad: make_epoch(lambda params, _: params.sum(), sgd, bad),
        "function": lambda bad: compare(bad, x),
        "argnums": lambda bad: compare(jnp.sin, x, argnums=bad),
    }
    needed = {
        "logits", "labels", "label_smoothing", "reduction", "features", "weights", "x", "network",
        "optimizer", "cost", "batch_size", "function",
    }  # fmt: skip
    for name, call in wrong.items():
        for bad in (*[None] * (name in needed), object(), {1.5}, 1j, "text"):
            with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* must "):
                call(bad)
    with pytest.raises(TypeError, match=r"^axis must be an integer"):
        softmax(LOGITS, axis=True)
    with pytest.raises(TypeError, match=r"^state must be a TrainState"):
        make_step(lambda params, _: params.sum(), sgd)(x, None)
    with pytest.raises(TypeError, match=r"^optimizer must be one of optax, .* got <function sgd"):
        make_step(lambda params, _: params.sum(), optax.sgd)
