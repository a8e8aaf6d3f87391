"""The log-likelihood cost, the quadratic cost it is compared with, and the weight penalty."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._checks import (
    FloatArray,
    LabelArray,
    WeightArray,
    arithmetic_dtype,
    as_labels,
    as_logits,
    as_weights,
)
from ._softmax import RowSums, pull_back_softmax, row_sums

Reduction = Literal["mean", "sum", "none"]


def log_likelihood_cost(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int = -1,
    sample_weight: WeightArray | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, "..."]:
    """Log-likelihood cost of the softmax of `logits`: C = −Σ_k y_k ln a_k, also called cross-entropy.

    With m the row's maximum and r the sum of exp(z_k − m) over all classes but the winner,
    an example costs Σ_k y_k [(m − z_k) + log1p(r)], and its gradient is
    ∂C/∂z_j = a_j − y_j, computed as a_j (Σ_k y_k − y_j) − y_j (1 − a_j) with 1 − a_j taken from r.
    Neither loses digits, however confident the prediction. The mean's gradient carries 1/N.

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        labels: Integers (*batch), the class of each example; or floating-point probabilities of the
            logits' shape. The cost is differentiable in probabilities.
        axis: The class axis.
        sample_weight: One number for each example (*batch), or a bool mask. It multiplies the
            example's cost. An example with weight 0 counts for nothing, whatever it holds.
        reduction: "mean" divides by the sum of the weights (the number of examples without them),
            "sum" adds, "none" returns a cost for each example.

    Returns:
        Cost in nats, float32 (float64 for float64 logits): a scalar, or (*batch) for "none".
        The mean of no examples, or of total weight 0, is 0 with gradient 0.
        A class with logit −inf has probability and gradient 0 and costs nothing where its label is 0;
        as the label it costs +inf. NaN or +inf among an example's logits makes that example NaN.

    Raises:
        TypeError: If logits, labels or weights have the wrong kind of dtype (bool labels included).
        ValueError: If shapes do not fit, `reduction` is unknown, or an integer label known outside
            jit is not in [0, classes). Under jit such a label gives NaN, in the example's cost and
            in its gradient.

    Example:
        >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.25, 0.4, 0.05]))
        >>> [round(float(slope), 4) for slope in jax.grad(log_likelihood_cost)(logits, 2)]
        [0.1, 0.2, -0.75, 0.4, 0.05]

    References:
        Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs".
        Prieto et al. (2025), "Grokking at the edge of numerical stability", arXiv:2501.04697, on what
        training loses to costs rounded to 0.
    """
    return _cost_of(_log_likelihood, logits, labels, axis, sample_weight, reduction)


def quadratic_cost(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int = -1,
    sample_weight: WeightArray | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, "..."]:
    """Quadratic cost of the softmax of `logits`: C = ½ Σ_k (a_k − y_k)².

    Its gradient ∂C/∂z_j = a_j [(a_j − y_j) − Σ_k a_k (a_k − y_k)] carries the softmax's derivative,
    which vanishes for a saturated output, right or wrong: the learning slowdown that the
    log-likelihood cost does not have. Both factors are computed from the row's rest, so a gradient
    that is tiny is tiny to full precision.

    Args:
        logits: As for `log_likelihood_cost`.
        labels: As for `log_likelihood_cost`.
        axis: As for `log_likelihood_cost`.
        sample_weight: As for `log_likelihood_cost`.
        reduction: As for `log_likelihood_cost`.

    Returns:
        Cost, a pure number between 0 and 1 for each example, float32 (float64 for float64 logits): a
        scalar, or (*batch) for "none". The mean of total weight 0 is 0. A class with logit −inf has
        probability 0. NaN or +inf among an example's logits makes that example NaN.

    Raises:
        TypeError: As for `log_likelihood_cost`.
        ValueError: As for `log_likelihood_cost`.

    Example:
        >>> wrong_and_saturated = jnp.array([20.0, 0.0])
        >>> jax.grad(quadratic_cost)(wrong_and_saturated, 1)
        Array([ 4.12e-09, -4.12e-09], dtype=float32)

    References:
        Nielsen (2015), "Neural Networks and Deep Learning", chapter 3, on the learning slowdown.
    """
    return _cost_of(_quadratic, logits, labels, axis, sample_weight, reduction)


def weight_penalty(params: PyTree) -> Float[Array, ""]:
    """Weight penalty ½ Σ w², with gradient w: multiply by λ and add it to a cost.

    Args:
        params: Any pytree. Its weights are the real floating-point arrays with two or more axes;
            those with fewer are biases or scales and excluded, other leaves are passed over.

    Returns:
        A scalar, float32 or the widest dtype among the weights if that is wider. NaN or ±inf in a
        weight gives NaN or inf.

    Raises:
        ValueError: If there is no such array: a penalty of nothing would go unnoticed.

    Example:
        >>> print(weight_penalty({"weights": jnp.array([[1.0, 2.0]]), "bias": jnp.array([9.0])}))
        2.5

    References:
        Krogh and Hertz (1991), "A simple weight decay can improve generalization".
    """
    arrays = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    weights = [a for a in arrays if a.ndim >= 2 and jnp.issubdtype(a.dtype, jnp.floating)]
    if not weights:
        raise ValueError(
            "params must hold at least one floating-point array with two or more axes, found none: "
            "pass the network's parameters as a pytree"
        )
    dtype = jnp.float64 if any(w.dtype == jnp.float64 for w in weights) else jnp.float32
    squares = [jnp.sum(jnp.square(w.astype(arithmetic_dtype(w.dtype)))) for w in weights]
    return jnp.sum(jnp.stack([square.astype(dtype) for square in squares])) / 2


def _cost_of(kernel, logits, labels, axis, sample_weight, reduction):
    """Checks, `kernel` for each example, weights and reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    array, axis = as_logits(logits, axis)
    dtype = arithmetic_dtype(array.dtype)
    weight = None
    if sample_weight is not None:
        weight = as_weights(sample_weight, array.shape[:axis] + array.shape[axis + 1 :], dtype)
    targets = as_labels(labels, array, axis, sample_weight)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        targets = targets.astype(dtype)
    cost = kernel(jnp.moveaxis(array.astype(dtype), axis, -1), targets)
    total = cost.size
    if weight is not None:
        # Weight 0 leaves an example out whatever its cost; d cost/d weight stays the cost itself.
        cost = weight * jnp.where((weight == 0) & ~jnp.isfinite(cost), 0, cost)
        total = jnp.sum(weight)
    if reduction == "none":
        return cost
    if reduction == "sum":
        return jnp.sum(cost)
    return jnp.where(total == 0, 0, jnp.sum(cost) / jnp.where(total == 0, 1, total))


class _Residuals(NamedTuple):
    sums: RowSums
    cost: Float[Array, "*batch"]
    labels: Array
    logits: Array | None  # Kept for the gradient of probability labels alone.


def _is_probability(labels):
    return jnp.issubdtype(labels.dtype, jnp.floating)


def targets_of(labels: Array, exponentials: Float[Array, "*batch classes"]) -> Array:
    """The targets t (*batch, classes): NaN in the row of an integer label that names no class."""
    if _is_probability(labels):
        return labels
    classes = exponentials.shape[-1]
    # Compared before any narrowing cast: a label beyond int32 must not wrap round to a class.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    exists = (labels >= 0) & (labels < classes)
    label = jnp.where(exists, labels, 0).astype(jnp.int32)[..., None]
    one_hot = jax.lax.broadcasted_iota(jnp.int32, exponentials.shape, exponentials.ndim - 1) == label
    return jnp.where(exists[..., None], one_hot.astype(exponentials.dtype), jnp.nan)


def _surprise(logits, sums, targets):
    """−ln a_k for each class; 0 where it is infinite and the target 0, since 0 · ln 0 = 0."""
    surprise = (sums.maximum - logits) + jnp.log1p(sums.rest)
    return jnp.where((targets == 0) & (logits == -jnp.inf), 0, surprise)


def _scaled(cotangent, cost, gradient):
    """The gradient of each row times the row's cotangent."""
    # A row that nobody counts has cotangent 0, whatever it holds: select, since 0 · NaN is NaN.
    ignored = (cotangent == 0) & ~jnp.isfinite(cost)
    return jnp.where(ignored[..., None], 0, cotangent[..., None] * gradient)


def log_likelihood_gradient(
    sums: RowSums, targets: Float[Array, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """∂C/∂z for each row: a − y where the targets sum to 1, without its cancellation."""
    others = jnp.sum(targets, axis=-1, keepdims=True) - targets
    return sums.probabilities * others - targets * sums.complements


@jax.custom_vjp
def _log_likelihood(logits, labels):
    return _log_likelihood_fwd(logits, labels)[0]


def _log_likelihood_fwd(logits, labels):
    sums = row_sums(logits)
    targets = targets_of(labels, sums.exponentials)
    cost = jnp.sum(targets * _surprise(logits, sums, targets), axis=-1)
    return cost, _Residuals(sums, cost, labels, logits if _is_probability(labels) else None)


# C = −Σ_k t_k ln a_k with ∂ ln a_k/∂z_j = δ_jk − a_j, so
#     ∂C/∂z_j = a_j T − t_j,                     T = Σ_k t_k
#             = a_j (T − t_j)  −  t_j (1 − a_j)  where nothing cancels: at the label of a one-hot
#                                                target the first term is 0, elsewhere the second
#     ∂C/∂t_k = −ln a_k
def _log_likelihood_bwd(residuals, cotangent):
    sums, cost, labels, logits = residuals
    targets = targets_of(labels, sums.exponentials)
    d_logits = _scaled(cotangent, cost, log_likelihood_gradient(sums, targets))
    if logits is None:
        return d_logits, None
    return d_logits, _scaled(cotangent, cost, _surprise(logits, sums, targets))


_log_likelihood.defvjp(_log_likelihood_fwd, _log_likelihood_bwd)


@jax.custom_vjp
def _quadratic(logits, labels):
    return _quadratic_fwd(logits, labels)[0]


def _quadratic_fwd(logits, labels):
    sums = row_sums(logits)
    difference = _difference(sums, targets_of(labels, sums.exponentials))
    cost = jnp.sum(jnp.square(difference), axis=-1) / 2
    return cost, _Residuals(sums, cost, labels, None)


# C = ½ Σ_k d_k² with d = a − t, so ∂C/∂a = d, pulled back through the softmax, and ∂C/∂t = −d.
def _quadratic_bwd(residuals, cotangent):
    sums, cost, labels, _ = residuals
    difference = _difference(sums, targets_of(labels, sums.exponentials))
    d_logits = _scaled(cotangent, cost, pull_back_softmax(sums, difference))
    if not _is_probability(labels):
        return d_logits, None
    return d_logits, _scaled(cotangent, cost, -difference)


def _difference(sums, targets):
    """A − t as a (1 − t) − t (1 − a), exact where a rounds to 1."""
    return sums.probabilities * (1 - targets) - targets * sums.complements


_quadratic.defvjp(_quadratic_fwd, _quadratic_bwd)
