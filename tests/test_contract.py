"""One contract, run over every differentiable function of logits."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, every, random_labels, random_logits, random_targets

import jaxsoftmax as js


class Case(NamedTuple):
    """A function of logits, its value and its VJP by the oracle, both in float64."""

    function: Callable
    value: Callable
    vjp: Callable


def with_labels(cost, value, vjp, make_labels):
    """A cost for each example as a function of logits alone."""

    def function(logits):
        return cost(logits, make_labels(logits.shape, jnp.float32), reduction="none")

    def targets(logits):
        labels = np.asarray(make_labels(logits.shape, jnp.float32))
        if labels.shape == logits.shape:
            return labels.astype(np.float64)
        return np.eye(logits.shape[-1])[labels]

    return Case(
        function,
        lambda z: value(z, targets(z)),
        lambda z, cotangent: vjp(z, targets(z), cotangent[..., None]),
    )


def integer(shape, _dtype):
    return random_labels(shape)


CASES = {
    "softmax": Case(js.softmax, oracle.softmax, oracle.softmax_vjp),
    "log_softmax": Case(js.log_softmax, oracle.log_softmax, oracle.log_softmax_vjp),
    "log_likelihood_cost, integers": with_labels(
        js.log_likelihood_cost, oracle.log_likelihood, oracle.log_likelihood_vjp, integer
    ),
    "log_likelihood_cost, probabilities": with_labels(
        js.log_likelihood_cost, oracle.log_likelihood, oracle.log_likelihood_vjp, random_targets
    ),
    "quadratic_cost, integers": with_labels(
        js.quadratic_cost, oracle.quadratic, oracle.quadratic_vjp, integer
    ),
    "quadratic_cost, probabilities": with_labels(
        js.quadratic_cost, oracle.quadratic, oracle.quadratic_vjp, random_targets
    ),
}
SHAPES = [(5,), (7, 5), (2, 3, 17), (0, 5), (3, 1), (3, 2)]
SCALES = [0, 1, 30, 1e4, -np.inf]
DTYPES = ["float64", "float32", "bfloat16", "float16"]

pytestmark = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cotangent_for(case, logits, seed=3):
    out = jax.eval_shape(case.function, logits)
    return jnp.asarray(np.random.default_rng(seed).normal(size=out.shape), out.dtype)


@partial(jax.jit, static_argnums=0)
def value_and_gradient(case, logits, cotangent):
    value, pull_back = jax.vjp(case.function, logits)
    return value, pull_back(cotangent)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_vjp_are_the_oracles(case, dtype):
    # Every shape meets every dtype in one case or another, and every case in one dtype or another.
    shapes = every(6, np.roll(np.arange(6), DTYPES.index(dtype) + list(CASES.values()).index(case)))
    for shape, scale in itertools.product([SHAPES[i] for i in shapes], SCALES):
        with jax.enable_x64(dtype == "float64"):
            logits = random_logits(shape, scale, dtype)
            exact_logits = np.asarray(logits, np.float64)
            cotangent = cotangent_for(case, logits)
            value, gradient = value_and_gradient(case, logits, cotangent)
        narrow = dtype in ("bfloat16", "float16")
        # A narrow result is the float32 one rounded once. The bound on log_softmax at 1e4 nats is
        # half an ulp of its own, so 8 leave room for the sums.
        ulps = 1 if narrow else 8
        is_cost = value.shape != logits.shape
        assert value.dtype == ("float32" if narrow and is_cost else dtype)
        assert gradient.dtype == dtype
        assert_close(value, case.value(exact_logits), ulps=8 if is_cost else ulps)
        assert_close(gradient, case.vjp(exact_logits, np.asarray(cotangent, np.float64)), ulps=ulps)


def test_gradient_is_linear_in_the_cotangent(case):
    logits = random_logits((7, 5), 3, jnp.float32)
    _, pull_back = jax.vjp(case.function, logits)
    first, second = cotangent_for(case, logits), cotangent_for(case, logits, seed=4)
    expected = jax.tree.map(lambda a, b: a - 2 * b, pull_back(first), pull_back(second))
    assert_close(pull_back(first - 2 * second), expected, ulps=8)


@pytest.mark.slow
def test_jit_and_checkpoint_change_nothing(case):
    logits = random_logits((7, 5), 3, jnp.float32)
    value, pull_back = jax.vjp(case.function, logits)
    cotangent = cotangent_for(case, logits)
    expected = value, pull_back(cotangent)
    for wrapped in (jax.jit(case.function), jax.checkpoint(case.function)):
        value, pull_back = jax.vjp(wrapped, logits)
        assert_close((value, pull_back(cotangent)), expected, ulps=4)


@pytest.mark.slow
def test_vmap_and_scan_are_loops(case):
    logits = random_logits((4, 6), 3, jnp.float32)
    cotangent = jnp.stack([cotangent_for(case, row) for row in logits])

    def value_and_gradient(row, cotangent):
        value, pull_back = jax.vjp(case.function, row)
        return value, pull_back(cotangent)[0]

    loop = [value_and_gradient(row, c) for row, c in zip(logits, cotangent, strict=True)]
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *loop)
    assert_close(jax.vmap(value_and_gradient)(logits, cotangent), expected, ulps=4)
    _, scanned = jax.lax.scan(
        lambda carry, row: (carry, value_and_gradient(*row)), None, (logits, cotangent)
    )
    assert_close(scanned, expected, ulps=4)


@pytest.mark.slow
def test_second_derivatives_are_those_of_plain_autodiff(case):
    with jax.enable_x64(True):
        logits = random_logits((2, 4), 2, jnp.float64)
        cotangent = cotangent_for(case, logits)

        def scalar(function, z):
            return jnp.sum(function(z) * cotangent.astype(function(z).dtype))

        plain = js.without_custom_rules(case.function)

        @jax.jit
        def hessians(z):
            return (
                jax.hessian(lambda z: scalar(plain, z))(z),
                jax.hessian(lambda z: scalar(case.function, z))(z),
                jax.jacrev(jax.jacrev(lambda z: scalar(case.function, z)))(z),
            )

        expected, *actual = hessians(logits)
        assert_close(tuple(actual), (expected, expected), ulps=64)


# Long rows, as XLA on the CPU passes over NaN in the maxima and minima of some of these.
LENGTHS = [(5, jnp.float32), (1000, jnp.bfloat16), (4096, jnp.float32)]


@pytest.mark.parametrize("first", every(3, [0, 1, 2]))
@pytest.mark.slow
def test_a_broken_row_stays_alone(case, first):
    classes, dtype = LENGTHS[(first + list(CASES.values()).index(case)) % 3]
    logits = random_logits((8, classes), 1, dtype)
    rows = jnp.array([0, 7])
    cotangent = cotangent_for(case, logits)
    sound = value_and_gradient(case, logits, cotangent)
    broken = logits.at[1, 0].set(jnp.nan).at[2, 3].set(jnp.inf).at[3, classes // 2].set(jnp.nan)
    broken = broken.at[4, -1].set(jnp.nan).at[5].set(jnp.nan).at[6, -1].set(jnp.inf)
    value, gradient = value_and_gradient(case, broken, cotangent)
    assert_close((value[rows], gradient[rows]), (sound[0][rows], sound[1][rows]), ulps=0)
    for each in (value, gradient, case.function(broken), jax.jit(case.function)(broken)):
        assert np.isnan(each[1:7]).all()
