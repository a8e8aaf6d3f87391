"""How tests compare, and the numbers they feed in."""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def slow(*case):
    """A case that only runs with the slow tests."""
    return pytest.param(*case, marks=pytest.mark.slow)


def mostly_slow(step: int, cases: Sequence[Any]) -> Sequence[Any]:
    """Cases of which all but every so many are slow."""
    return [
        case if i % step == 0 else slow(*case) if isinstance(case, tuple) else slow(case)
        for i, case in enumerate(cases)
    ]


def every(step: int, cases: Sequence[Any]) -> Sequence[Any]:
    """Every so many of a table's cases; nightly all of them.

    A step without a factor in common with the table's rows and columns meets each of these, in turn.
    """
    return cases if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else cases[::step]


def assert_close(actual, expected, *, ulps):
    """Every leaf within `ulps` units in the last place of the expected leaf's largest entry.

    The unit is that of the actual leaf's dtype, so the bound grows with neither size nor shape.
    NaN and infinity must stand in the same places.
    """
    actual_leaves = jax.tree.leaves(actual)
    expected_leaves = jax.tree.leaves(expected, is_leaf=lambda part: isinstance(part, list))
    assert len(actual_leaves) == len(expected_leaves)
    for a, b in zip(actual_leaves, expected_leaves, strict=True):
        _assert_leaf_close(a, np.asarray(b, np.float64), ulps)


def _assert_leaf_close(actual, expected, ulps):
    limits = jnp.finfo(actual.dtype)
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    largest = np.max(np.abs(expected), initial=float(limits.tiny), where=np.isfinite(expected))
    unit = float(limits.eps) * 2.0 ** np.floor(np.log2(largest))
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.nan_to_num(np.abs(actual - expected), nan=np.inf)) / unit
    if error.size:
        worst = np.unravel_index(np.argmax(error), error.shape)
        assert error[worst] <= ulps, (
            f"{error[worst]:.3g} ulp at {worst}: {actual[worst]!r}, expected {expected[worst]!r}"
        )


def assert_norms_close(actual, expected, tolerance):
    """Every leaf within `tolerance` times the expected leaf's norm of it."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        # A sum whose terms cancel, as with one class, is compared with 0.05: its terms are of order 1.
        assert np.linalg.norm(a - e) <= tolerance * max(np.linalg.norm(e), 0.05)


def assert_relative(actual, expected, *, eps_multiple):
    """Every entry within (eps_multiple + |ln |true||) · eps of itself; under 1e−37 aside."""
    eps = float(jnp.finfo(actual.dtype).eps)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    known = np.abs(expected) > 1e-37
    actual, expected = actual[known], expected[known]
    error = np.abs(actual - expected) / np.abs(expected)
    bound = (eps_multiple + np.abs(np.log(np.abs(expected)))) * eps
    worst = np.argmax(error / bound)
    assert error[worst] <= bound[worst], (
        f"relative error {error[worst]:.3g} over {bound[worst]:.3g}: {actual[worst]!r}, "
        f"expected {expected[worst]!r}"
    )


def random_logits(shape, scale, dtype, seed=0):
    """Normal logits times `scale`; for scale −inf, normal ones with a −inf in each row after class 0."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape) * (1 if scale == -np.inf else scale)
    if scale == -np.inf and shape[-1] > 1:
        values[..., 1] = -np.inf
    return jnp.asarray(values, dtype)


def random_targets(shape, dtype, seed=1):
    """Rows of probabilities, with an exact 0 for class 1."""
    values = np.random.default_rng(seed).gamma(1.0, size=shape)
    if shape[-1] > 1:
        values[..., 1] = 0
    return jnp.asarray(values / values.sum(axis=-1, keepdims=True), dtype)


def random_labels(shape, seed=2):
    """Classes for logits of `shape`, never class 1."""
    drawn = np.random.default_rng(seed).integers(0, shape[-1], shape[:-1])
    return jnp.asarray(np.where(drawn == 1, 0, drawn), jnp.int32)


def unchecked(function):
    """The public function without the runtime type checks of the tests, as users have it."""
    return inspect.unwrap(function)
