"""Softmax and log-softmax beyond the contract: tails, masks, axes, the two cases, errors."""

from functools import partial

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, assert_relative, random_logits, slow, unchecked

import jaxsoftmax as js

ROWS = hnp.arrays(np.float32, (3, 4), elements=st.floats(-50, 50, width=32))


@pytest.mark.parametrize("confidence", [-80.0, slow(-20.0), slow(0.0), slow(20.0), 40.0, slow(80.0)])
def test_every_entry_is_right_at_every_confidence(confidence):
    logits = random_logits((3, 10), 1, jnp.float32).at[:, 4].set(confidence)
    exact = np.asarray(logits, np.float64)
    jacobian = jax.jit(js.softmax_jacobian)(logits)
    assert_relative(jacobian, oracle.softmax_jacobian(exact), eps_multiple=8)
    # A positive cotangent at one class of each row: nothing cancels in the truth either.
    cotangent = np.zeros((3, 10), np.float32)
    cotangent[[0, 1, 2], [4, 0, 9]] = 1.7
    for function, truth, vjp in (
        (js.softmax, oracle.softmax, oracle.softmax_vjp),
        (js.log_softmax, oracle.log_softmax, oracle.log_softmax_vjp),
    ):
        value, (gradient,) = value_and_vjp(function, logits, cotangent)
        assert_relative(value, truth(exact), eps_multiple=8)
        assert_relative(gradient, vjp(exact, cotangent.astype(np.float64)), eps_multiple=8)


@partial(jax.jit, static_argnums=0)
def value_and_vjp(function, logits, cotangent):
    value, pull_back = jax.vjp(function, logits)
    return value, pull_back(cotangent)


@pytest.mark.parametrize("function", [slow(js.softmax), js.log_softmax])
def test_where_and_axis_mean_what_they_mean_in_jax(function):
    reference = {js.softmax: jax.nn.softmax, js.log_softmax: jax.nn.log_softmax}[function]
    logits = random_logits((3, 4, 5), 2, jnp.float32)
    mask = jnp.array([True, True, False, True])[:, None]
    for axis in (0, -2):
        options = {"axis": axis, "where": mask if axis == -2 else None}
        kept = mask if axis == -2 else True

        def masked(z, options=options, kept=kept):
            return jnp.where(kept, reference(z, **options), 0)

        cotangent = jnp.where(kept, random_logits(logits.shape, 1, jnp.float32, 5), 0)
        value, gradient = value_and_vjp(partial(function, **options), logits, cotangent)
        assert_close(value, reference(logits, **options), ulps=8)
        assert_close(gradient, value_and_vjp(masked, logits, cotangent)[1], ulps=8)


def test_a_row_with_no_class_left_is_zero():
    logits = random_logits((2, 3), 1, jnp.float32)
    where = jnp.array([[True, True, True], [False, False, False]])
    assert_close(js.softmax(logits, where=where)[1], np.zeros(3), ulps=0)
    assert_close(js.log_softmax(logits, where=where)[1], np.full(3, -np.inf), ulps=0)
    gradient = jax.grad(lambda z: js.softmax(z, where=where)[:, 0].sum())(logits)
    assert_close(gradient[1], np.zeros(3), ulps=0)


def test_ties_and_near_ties_share():
    logits = jnp.array([[5.0, 5.0, 5.0], [1e-8, 0.0, -200.0]])
    assert_close(js.softmax(logits), [[1 / 3] * 3, [0.5, 0.5, 0.0]], ulps=1)
    assert_close(js.softmax_jacobian(logits), oracle.softmax_jacobian(np.asarray(logits, float)), ulps=1)


def test_backward_keeps_one_array_of_the_logits_size():
    for function in (js.softmax, js.log_softmax):
        _, pull_back = jax.vjp(function, random_logits((8, 100), 1, jnp.float32))
        kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= 800]
        assert len(kept) == 1


def test_the_gradient_stores_nothing_of_the_logits_size():
    logits = jax.ShapeDtypeStruct((1024, 1000), jnp.float32)
    gradient = jax.jit(lambda z, c: jax.vjp(js.softmax, z)[1](c))
    stored = gradient.lower(logits, logits).compile().memory_analysis().temp_size_in_bytes
    assert stored < 0.01 * 1024 * 1000 * 4


@pytest.mark.parametrize("confidence", [slow(-40.0), slow(0.0), 40.0])
def test_forward_mode_and_second_derivatives_are_exact(confidence):
    z = random_logits((10,), 1, jnp.float32).at[4].set(confidence)
    cotangent = random_logits((10,), 1, jnp.float32, 5)
    a = oracle.softmax(np.asarray(z, np.float64))
    # Only differences of a cotangent matter: from the winner's on, nothing cancels.
    c = np.asarray(cotangent - cotangent[np.argmax(a)], np.float64)
    d = c - np.sum(a * c)
    truth = np.diag(a * d) - np.outer(a, a) * (d[:, None] + d)
    for second in (jax.jacfwd, jax.jacrev):
        gradient = jax.grad(lambda z: jnp.vdot(c.astype(np.float32), js.softmax(z)))
        assert_relative(jax.jit(second(gradient))(z), truth, eps_multiple=64)
    forward = jax.jit(jax.jacfwd(js.without_custom_rules(js.softmax)))
    assert_relative(forward(z), oracle.softmax_jacobian(np.asarray(z, np.float64)), eps_multiple=16)


@pytest.mark.parametrize("classes", [slow(16), 100, slow(1000)])
def test_logits_that_one_program_forms_and_rounds_share_one(classes):
    x = random_logits((8, 16), 5, jnp.bfloat16)
    w = random_logits((16, classes), 5, jnp.bfloat16, 1)
    b = random_logits((classes,), 1, jnp.bfloat16, 2)
    a = jax.jit(lambda x, w, b: js.softmax(x @ w + b[None]))(x, w, b)
    assert np.abs(np.asarray(a, np.float64).sum(-1) - 1).max() < 2 * classes**0.5 * 2.0**-9


def test_a_cotangent_that_depends_on_the_logits():
    z = np.asarray(random_logits((10,), 1, jnp.float32), np.float64)

    def curvature(softmax):
        return jax.jit(jax.hessian(lambda z: jnp.sum(softmax(z) ** 2)))

    with jax.enable_x64(True):
        truth = np.asarray(curvature(jax.nn.softmax)(z))
    assert_close(curvature(js.softmax)(jnp.asarray(z, jnp.float32)), truth, ulps=16)


LAWFUL = jax.jit(js.softmax), jax.jit(js.softmax_jacobian)


@hypothesis.given(ROWS, st.floats(-100, 100, width=32))
def test_laws(rows, shift):
    logits = jnp.asarray(rows)
    softmax, jacobian = LAWFUL
    probabilities = softmax(logits)
    unit = float(jnp.finfo(probabilities.dtype).eps)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=8 * unit)
    assert bool(jnp.all(probabilities >= 0))
    np.testing.assert_allclose(softmax(logits + shift), probabilities, rtol=400 * unit, atol=1e-37)
    reversed_classes = softmax(logits[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(reversed_classes, probabilities, rtol=8 * unit)
    np.testing.assert_allclose(jacobian(logits).sum(axis=-1), 0, atol=8 * unit)


def test_errors_say_what_to_do():
    softmax = unchecked(js.softmax)
    with pytest.raises(TypeError, match=r"floating-point numbers, got int32: .*astype"):
        softmax(jnp.arange(3))
    with pytest.raises(TypeError, match="got complex64"):
        softmax(jnp.ones(3, jnp.complex64))
    with pytest.raises(ValueError, match="got a scalar: pass shape"):
        softmax(jnp.float32(1))
    with pytest.raises(
        ValueError, match=r"axis must be in \[-2, 2\) for logits of shape \(2, 3\), got 2"
    ):
        softmax(jnp.ones((2, 3)), axis=2)
    with pytest.raises(ValueError, match="at least one class"):
        softmax(jnp.ones((2, 0)))
    with pytest.raises(ValueError, match=r"where \(4,\) must broadcast to the logits' \(2, 3\)"):
        softmax(jnp.ones((2, 3)), where=jnp.ones(4, bool))
    with pytest.raises(TypeError, match=r"where must be a bool mask .* got float32"):
        softmax(jnp.ones((2, 3)), where=jnp.ones(3))
