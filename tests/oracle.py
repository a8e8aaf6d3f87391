"""The truth, in mpmath with 80 digits or NumPy float64; it shares no code with the library."""

import mpmath
import numpy as np

mpmath.mp.dps = 80


def _rows(array):
    """The rows of an array as lists of mpmath numbers."""
    return [[mpmath.mpf(float(v)) for v in row] for row in array.reshape(-1, array.shape[-1])]


def _probabilities(z):
    if any(mpmath.isnan(v) or v == mpmath.inf for v in z):
        return [mpmath.nan] * len(z)
    weights = [mpmath.exp(v) for v in z]
    total = mpmath.fsum(weights)
    return [w / total for w in weights]


def _dot(a, b):
    return mpmath.fsum(x * y for x, y in zip(a, b, strict=True))


def _minus_log(a):
    return mpmath.inf if a == 0 else -mpmath.log(a)


def by_rows(function):
    """Lifts `function(z, ...)` on rows of mpmath numbers to float64 arrays of any batch shape."""

    def on_arrays(logits, *others):
        batch = logits.shape[:-1]
        others = [np.broadcast_to(o, (*batch, np.shape(o)[-1])) for o in others]
        results = [function(*rows) for rows in zip(*map(_rows, (logits, *others)), strict=True)]
        width = np.shape(results[0]) if results else None
        if width is None:  # No rows: only the shape of a row of results is left to know.
            width = np.shape(function(*([mpmath.mpf(0)] * np.shape(o)[-1] for o in (logits, *others))))
        return np.array(results, dtype=object).astype(np.float64).reshape((*batch, *width))

    return on_arrays


@by_rows
def softmax(z):
    return _probabilities(z)


@by_rows
def softmax_vjp(z, c):
    a = _probabilities(z)
    mean = _dot(a, c)
    return [p * (v - mean) for p, v in zip(a, c, strict=True)]


@by_rows
def log_softmax(z):
    return [-_minus_log(p) for p in _probabilities(z)]


@by_rows
def log_softmax_vjp(z, c):
    total = mpmath.fsum(c)
    return [v - p * total for p, v in zip(_probabilities(z), c, strict=True)]


@by_rows
def softmax_jacobian(z):
    a = _probabilities(z)
    return [[p * ((i == j) - q) for j, q in enumerate(a)] for i, p in enumerate(a)]


@by_rows
def log_likelihood(z, t):
    return mpmath.fsum(v * _minus_log(p) for p, v in zip(_probabilities(z), t, strict=True) if v != 0)


@by_rows
def log_likelihood_vjp(z, t, c):
    total = mpmath.fsum(t)
    return [c[0] * (p * total - v) for p, v in zip(_probabilities(z), t, strict=True)]


@by_rows
def log_likelihood_target_vjp(z, t, c):
    a = _probabilities(z)
    return [c[0] * (0 if v == p == 0 else _minus_log(p)) for p, v in zip(a, t, strict=True)]


@by_rows
def entropy(z):
    return mpmath.fsum(p * _minus_log(p) for p in _probabilities(z) if p != 0)


@by_rows
def entropy_vjp(z, c):
    a = _probabilities(z)
    mean = mpmath.fsum(p * _minus_log(p) for p in a)
    return [c[0] * p * (_minus_log(p) - mean) for p in a]


@by_rows
def quadratic(z, t):
    return mpmath.fsum((p - v) ** 2 for p, v in zip(_probabilities(z), t, strict=True)) / 2


@by_rows
def quadratic_vjp(z, t, c):
    a = _probabilities(z)
    difference = [p - v for p, v in zip(a, t, strict=True)]
    mean = _dot(a, difference)
    return [c[0] * p * (d - mean) for p, d in zip(a, difference, strict=True)]


def network_gradient(parameters, x, labels, penalty=0.0):
    """Cost and gradient of FC → FC → softmax in NumPy float64, integer labels."""
    w1, b1, w2, b2 = (np.asarray(p, np.float64) for p in parameters)
    x = np.asarray(x, np.float64)
    inputs = x @ w1 + b1
    hidden = np.maximum(inputs, 0)
    z = hidden @ w2 + b2
    a = np.exp(z - z.max(axis=1, keepdims=True))
    a /= a.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    cost = -np.mean(np.log(a[rows, labels])) + penalty / 2 * ((w1**2).sum() + (w2**2).sum())
    d_z = a.copy()
    d_z[rows, labels] -= 1
    d_z /= len(x)
    d_inputs = (d_z @ w2.T) * (inputs > 0)
    gradient = (
        x.T @ d_inputs + penalty * w1,
        d_inputs.sum(0),
        hidden.T @ d_z + penalty * w2,
        d_z.sum(0),
    )
    return cost, gradient


def complete_cost(
    z, y, v=None, w=None, alpha=0.0, zeta=0.0, exists=None, reduction="mean", normalizer=None
):
    """The log-likelihood cost with every option, for probability rows y, in NumPy alone.

    It takes complex numbers, so that `complex_step` can differentiate it.
    """
    exists = np.ones(np.shape(z), bool) if exists is None else np.broadcast_to(exists, np.shape(z))
    w_or_1 = np.ones(np.shape(z)[-1]) if w is None else w
    shifted = np.where(exists, z, 0)
    normalizers = np.log(np.sum(np.where(exists, np.exp(shifted), 0), axis=-1))
    share = exists / exists.sum(axis=-1, keepdims=True)
    q = (1 - alpha) * y + alpha * share
    weights = 1 if w is None else np.sum(w_or_1 * y, axis=-1)
    each = np.sum(np.where(exists, w_or_1 * q * (normalizers[..., None] - shifted), 0), axis=-1)
    each = each + zeta * weights * normalizers**2
    v_or_1 = np.ones(np.shape(z)[:-1]) if v is None else v
    each, weights = v_or_1 * each, v_or_1 * weights * np.ones(np.shape(z)[:-1])
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / (weights.sum() if normalizer is None else normalizer)


def complex_step(function, arguments, name, cotangent):
    """Σ cotangent · ∂function/∂arguments[name], an entry at a time, by steps along the imaginary axis."""
    value = np.asarray(arguments[name], np.complex128)
    gradient = np.zeros(value.shape)
    for index in np.ndindex(value.shape):
        moved = value.copy()
        moved[index] += 1e-30j
        result = function(**{**arguments, name: moved})
        gradient[index] = np.sum(cotangent * np.imag(result)) / 1e-30
    return gradient


def many_classes(z, label):
    """Cost and gradient of rows z (n, classes) with one label for all, in 80-bit floating point.

    Measured from the label's own logit, nothing cancels: C = log1p(s), s = Σ_{k≠y} exp(z_k − z_y).
    """
    exponentials = np.exp(z.astype(np.longdouble) - z[:, label, None].astype(np.longdouble))
    exponentials[:, label] = 0
    others = exponentials.sum(axis=1, keepdims=True)
    gradient = exponentials / (1 + others)
    gradient[:, label] = -(others / (1 + others))[:, 0]
    return np.log1p(others)[:, 0], gradient
