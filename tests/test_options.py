"""Every option of the log-likelihood cost, alone and together, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, mostly_slow, random_logits, slow, unchecked

import jaxsoftmax as js
from jaxsoftmax._cost import row_statistics
from jaxsoftmax._rows import rank

SHAPE = (4, 5)
GENERATOR = np.random.default_rng(7)
Z = GENERATOR.normal(size=SHAPE) * 3
LABELS = np.array([0, 3, 4, 0])
PROBABILITIES = GENERATOR.gamma(1.0, size=SHAPE)
PROBABILITIES[:, 2] = 0
PROBABILITIES /= PROBABILITIES.sum(axis=-1, keepdims=True)
V = np.array([0.5, 0.0, 2.0, 1.0])
W = np.array([1.0, 0.3, 2.0, 0.0, 0.7])
EXISTS = np.array([True, True, False, True, True])
# The oracle's names for the options, and the library's.
NAMES = {
    "y": "labels", "v": "sample_weight", "w": "class_weight", "alpha": "label_smoothing",
    "zeta": "z_loss", "exists": "where",
}  # fmt: skip
COMBINATIONS = [
    {},
    {"v": V},
    {"w": W},
    {"alpha": 0.1},
    {"zeta": 0.01},
    {"exists": EXISTS},
    {"v": V, "w": W},
    {"w": W, "alpha": 0.2},
    {"alpha": 0.2, "exists": EXISTS},
    {"v": V, "w": W, "alpha": 0.3, "zeta": 0.02, "exists": EXISTS},
    {"v": V, "w": W, "alpha": 1.0, "zeta": 0.5, "exists": EXISTS, "normalizer": 7.0},
]


def ours(logits, labels, options):
    return js.log_likelihood_cost(
        logits, labels, **{NAMES.get(name, name): value for name, value in options.items()}
    )


# Each combination with both kinds of labels, and by turns the mean, the sum and every example's own cost.
REDUCED = [
    (options, soft, "mean" if "normalizer" in options else ("mean", "sum", "none")[(number + soft) % 3])
    for number, options in enumerate(COMBINATIONS)
    for soft in (False, True)
]


@pytest.mark.parametrize(
    ("options", "soft", "reduction"),
    mostly_slow(3, REDUCED),
    ids=lambda x: "+".join(x) if isinstance(x, dict) else str(x),
)
def test_value_and_every_gradient_are_the_oracles(options, soft, reduction):
    y = PROBABILITIES if soft else np.eye(5)[LABELS]
    arguments = {"z": Z, "y": y, "reduction": reduction, **options}
    expected = oracle.complete_cost(**arguments)
    cotangent = np.random.default_rng(1).normal(size=np.shape(expected))
    floats = [name for name in ("z", "y", "v", "w", "alpha", "zeta", "normalizer") if name in arguments]
    if not soft:
        floats.remove("y")
    truth = {
        name: oracle.complex_step(oracle.complete_cost, arguments, name, cotangent) for name in floats
    }

    def function(values):
        given = {**arguments, **values, "reduction": reduction}
        z, labels = given.pop("z"), given.pop("y")
        return ours(z, labels if soft else LABELS, given)

    @jax.jit
    def value_and_gradient(values, cotangent):
        value, pull_back = jax.vjp(function, values)
        return value, pull_back(cotangent)[0]

    with jax.enable_x64(True):
        values = {name: jnp.asarray(arguments[name], jnp.float64) for name in floats}
        value, gradient = value_and_gradient(values, jnp.asarray(cotangent, jnp.float64))
        assert_close(value, expected, ulps=32)
        assert_close([gradient[name] for name in floats], tuple(truth[name] for name in floats), ulps=64)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.slow
def test_second_derivatives_with_every_option(soft):
    options = COMBINATIONS[-2]
    labels = PROBABILITIES if soft else LABELS
    with jax.enable_x64(True):
        z = jnp.asarray(Z, jnp.float64)

        def custom(z):
            return ours(z, labels, options)

        expected = jax.jit(jax.hessian(js.without_custom_rules(custom)))(z)
        assert_close(jax.jit(jax.hessian(custom))(z), expected, ulps=64)
        assert_close(jax.jit(jax.jacrev(jax.jacrev(custom)))(z), expected, ulps=64)


def test_a_masked_label_is_impossible():
    for labels in (jnp.array([2]), jax.nn.one_hot(jnp.array([2]), 5)):
        assert ours(jnp.asarray(Z[:1], jnp.float32), labels, {"exists": EXISTS}) == np.inf
        nowhere = ours(jnp.asarray(Z[:1], jnp.float32), labels, {"exists": np.zeros(5, bool)})
        assert nowhere == np.inf


def test_masked_classes_may_hold_anything():
    z = jnp.asarray(Z, jnp.float32)
    options = {"exists": EXISTS, "alpha": 0.1, "w": W}
    cost, gradient = jax.value_and_grad(lambda z: ours(z, LABELS, options))(z)
    for junk in (jnp.nan, jnp.inf, -jnp.inf, 1e38):
        dirty = jax.value_and_grad(lambda z: ours(z, LABELS, options))(z.at[:, 2].set(junk))
        assert_close(dirty, (cost, gradient), ulps=0)
    assert_close(gradient[:, 2], np.zeros(4), ulps=0)
    kept = jnp.array([0, 1, 3, 4])
    without = jax.grad(lambda z: ours(z, np.array([0, 2, 3, 0]), {"alpha": 0.1, "w": W[np.array(kept)]}))(
        z[:, kept]
    )
    assert_close(gradient[:, kept], without, ulps=4)


def test_scaling_class_weights_changes_no_mean():
    z = jnp.asarray(Z, jnp.float32)
    doubled = ours(z, LABELS, {"w": 2 * W, "alpha": 0.1, "zeta": 0.1})
    assert_close(doubled, ours(z, LABELS, {"w": W, "alpha": 0.1, "zeta": 0.1}), ulps=4)


def test_a_normalizer_makes_parts_of_a_batch_add_up():
    z, weight = jnp.asarray(Z, jnp.float32), jnp.asarray(V, jnp.float32)
    whole = ours(z, LABELS, {"v": weight})
    parts = [
        ours(z[part], LABELS[part], {"v": weight[part], "normalizer": V.sum()})
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert_close(parts[0] + parts[1], whole, ulps=4)
    assert float(ours(z, LABELS, {"normalizer": 0})) == 0


def test_checkify_reports_a_label_that_names_no_class():
    from jax.experimental import checkify

    checked = checkify.checkify(jax.jit(js.log_likelihood_cost), errors=checkify.float_checks)
    z = jnp.asarray(Z, jnp.float32)
    assert checked(z, jnp.asarray(LABELS))[0].get() is None
    assert "nan generated" in checked(z, jnp.array([0, 9, 1, 2]))[0].get()


def test_long_rows_are_summed_in_blocks():
    for classes in (5000, 4099):
        z = random_logits((2, classes), 3, jnp.float32)
        labels = jnp.array([0, classes - 1])
        exact = np.asarray(z, np.float64)
        value, gradient = jax.jit(jax.value_and_grad(js.log_likelihood_cost))(z, labels)
        assert_close(value, oracle.complete_cost(exact, np.eye(classes)[np.asarray(labels)]), ulps=4)
        a = np.exp(exact - exact.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        assert_close(gradient, (a - np.eye(classes)[np.asarray(labels)]) / 2, ulps=4)


def test_the_even_part_weighs_as_much_as_told():
    # As a sum of so many equal numbers it would lose 20 ulp where the compiler knows them.
    classes = 4096
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(0).normal(size=(3, classes)))
        exists = np.arange(classes) % 10 < 7

        def cost(z):
            return js.log_likelihood_cost(
                z, jnp.zeros(3, int), where=jnp.asarray(exists), label_smoothing=1.0
            )

        value = jax.jit(cost)(z)
        kept = np.asarray(z)[:, exists]
        log_sum = np.log(np.sum(np.exp(kept), -1, keepdims=True))
        assert_close(value, np.mean(log_sum - kept), ulps=4)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1000, jnp.float32), slow(4096, jnp.bfloat16), slow(32768, jnp.float32), slow(32768, jnp.bfloat16)],
)
def test_no_array_of_the_logits_size_beside_the_gradient(classes, dtype):
    logits = jax.ShapeDtypeStruct((1024, classes), dtype)
    labels, mask = (jax.ShapeDtypeStruct((1024,), kind) for kind in (jnp.int32, jnp.bool))

    def cost(logits, labels, mask=None):
        return js.log_likelihood_cost(logits, labels, sample_weight=mask)

    def smoothed(logits, labels):
        return js.log_likelihood_cost(logits, labels, label_smoothing=0.1)

    both = jax.value_and_grad(cost)
    # Narrow logits are widened for smoothing, once for both of its uses.
    of_smoothed = [(jax.value_and_grad(smoothed),)] if dtype == jnp.float32 else []
    for function, *more in ((cost,), (both,), (both, mask), *of_smoothed):
        analysis = jax.jit(function).lower(logits, labels, *more).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < 0.02 * 1024 * classes * dtype.dtype.itemsize


@pytest.mark.parametrize(
    "function",
    [
        js.softmax,
        lambda z: row_statistics((), z, jnp.zeros(z.shape[0], int)),
        lambda z: rank((), z, jnp.zeros((z.shape[0], 1), int)),
        jax.value_and_grad(lambda z: js.log_likelihood_cost(z, jax.lax.stop_gradient(z))),
    ],
    ids=["softmax", "statistics", "rank", "probability labels"],
)
@pytest.mark.parametrize("classes", [1000, slow(32768)])
def test_nothing_of_the_logits_size_is_stored_for_two_of_a_kind(function, classes):
    logits = jax.ShapeDtypeStruct((1024, classes), jnp.float32)
    two = jax.jit(lambda a, b: (function(a), function(b)))
    analysis = two.lower(logits, logits).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 0.04 * 1024 * classes * 4


@pytest.mark.parametrize("classes", [5, 5000])
@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.float64)], ids=str)
def test_probabilities_of_impossible_classes(classes, dtype):
    generator = np.random.default_rng(3)
    z = np.array(generator.normal(size=(5, classes)) * 3, np.float32)
    y = np.array(generator.gamma(1.0, size=z.shape), np.float32)
    z[:, [0, -2]] = -np.inf
    y[:, [0, -2]] = 0
    y[1, -2] = 1e-30
    z[2] = -np.inf
    y[3, z[3].argmax()] = 0
    y[4] *= -1
    with np.errstate(divide="ignore", invalid="ignore"):
        log_a = z - np.log(np.exp(z.astype(float)).sum(axis=-1, keepdims=True))
        expected = -np.where(y == 0, 0, y * log_a).sum(axis=-1)
    expected[1:3] = np.inf
    with jax.enable_x64(dtype == jnp.float64):
        cost = jax.jit(partial(js.log_likelihood_cost, reduction="none"))
        assert_close(cost(jnp.asarray(z, dtype), jnp.asarray(y, dtype)), expected, ulps=8)


@pytest.mark.slow
def test_narrow_logits_keep_every_option_wide(key):
    z = 3 * jax.random.normal(key, (4, 1000), jnp.bfloat16)
    options = {"exists": jnp.arange(1000) < 997, "alpha": 0.1, "zeta": 0.01, "v": V, "w": jnp.ones(1000)}
    for labels in (jnp.arange(4), jax.nn.one_hot(jnp.arange(4), 1000, dtype=jnp.bfloat16)):
        narrow, wide = (
            jax.jit(jax.value_and_grad(lambda z: ours(z, labels, options)))(given)  # noqa: B023
            for given in (z, z.astype(jnp.float32))
        )
        assert_close(narrow[0], wide[0], ulps=4)
        assert_close(narrow[1], wide[1].astype(jnp.bfloat16), ulps=1)


@pytest.mark.parametrize(("explicit", "soft"), [(False, True), slow(True, False)])
def test_options_on_a_mesh(explicit, soft):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    spec = jax.sharding.PartitionSpec
    z = random_logits((8, 16), 3, jnp.float32)
    labels = jax.nn.softmax(z) if soft else jnp.arange(8)
    options = {
        "v": jnp.arange(8.0), "w": jnp.linspace(0.0, 2.0, 16), "alpha": 0.1, "zeta": 0.01,
        "exists": jnp.arange(16) != 3,
    }  # fmt: skip

    def function(z, labels):
        return ours(z, labels, options)

    expected = jax.jit(jax.value_and_grad(function))(z, labels)
    with jax.set_mesh(mesh):
        z = jax.device_put(z, jax.NamedSharding(mesh, spec("data", "model")))
        layout = spec("data", "model") if soft else spec("data")
        labels = jax.device_put(labels, jax.NamedSharding(mesh, layout))
        actual = jax.device_get(jax.jit(jax.value_and_grad(function))(z, labels))
    assert_close(actual, expected, ulps=8)


def test_errors_say_what_to_do():
    cost = unchecked(js.log_likelihood_cost)
    z = jnp.asarray(Z, jnp.float32)
    with pytest.raises(ValueError, match=r"label_smoothing must be from 0 to 1, got 1\.5"):
        cost(z, LABELS, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"z_loss must be at least 0, got -1"):
        cost(z, LABELS, z_loss=-1)
    with pytest.raises(TypeError, match=r"z_loss must be a real scalar, got float32 of shape \(2,\)"):
        cost(z, LABELS, z_loss=jnp.ones(2))
    with pytest.raises(ValueError, match=r"class_weight must have shape \(5,\), .* got \(4,\)"):
        cost(z, LABELS, class_weight=jnp.ones(4))
    with pytest.raises(ValueError, match="normalizer goes with reduction 'mean', got 'sum'"):
        cost(z, LABELS, reduction="sum", normalizer=3)
    with pytest.raises(ValueError, match=r"where \(4,\) must broadcast to the logits' \(4, 5\)"):
        cost(z, LABELS, where=jnp.ones(4, bool))


@pytest.mark.parametrize(("soft", "jit"), [(False, True), slow(True, False)])
def test_an_example_of_weight_zero_breaks_no_option(soft, jit):
    z = jnp.asarray(Z, jnp.float32)
    labels = jnp.asarray(PROBABILITIES, jnp.float32) if soft else jnp.asarray(LABELS)
    weight = jnp.array([1.0, 0.0, 2.0, 0.0])
    kept = jnp.array([0, 2])
    dropped = jnp.array([1, 3])
    w = jnp.asarray(W, jnp.float32)

    def gradients(z, labels, weight):
        def cost(z, w, alpha, zeta):
            options = {"v": weight, "w": w, "alpha": alpha, "zeta": zeta}
            return ours(z, labels, options)

        return jax.value_and_grad(cost, argnums=(0, 1, 2, 3))(z, w, jnp.float32(0.1), jnp.float32(0.2))

    expected = jax.jit(gradients)(z[kept], labels[kept], weight[kept])
    bad_labels = labels.at[dropped].set(jnp.nan if soft else -100)
    function = jax.jit(gradients) if jit else gradients
    for junk in (0.0, jnp.nan, jnp.inf, -jnp.inf):
        for given in (labels, bad_labels):
            dirty = z.at[1].set(junk).at[3, 2].set(junk)
            value, (d_z, *d_options) = function(dirty, given, weight)
            assert_close(
                (value, d_z[kept], d_options), (expected[0], expected[1][0], expected[1][1:]), ulps=8
            )
            assert_close(d_z[dropped], np.zeros((2, 5)), ulps=0)


def test_corners_of_smoothing_and_class_weights():
    z = jnp.array([[1.0, 2.0, -jnp.inf]])
    for zero in (0.0, jnp.float32(0)):
        assert_close(
            js.log_likelihood_cost(z, jnp.array([0]), label_smoothing=zero), np.log1p(np.e), ulps=2
        )
    here = jnp.array([True, True, False])
    masked = js.log_likelihood_cost(
        jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2]), where=here, label_smoothing=1.0
    )
    assert_close(masked, np.log1p(np.e) - 0.5, ulps=2)
    bad = jax.jit(lambda y: js.log_likelihood_cost(z, y, class_weight=jnp.array([0.0, 1.0, 1.0])))
    assert np.isnan(bad(jnp.array([7])))
    strength = jnp.asarray(0.1)
    captured = jax.jit(lambda z: js.log_likelihood_cost(z, jnp.array([0]), z_loss=strength))
    assert np.isfinite(captured(z))
