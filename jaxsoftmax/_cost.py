"""The log-likelihood cost, the quadratic cost it is compared with, and the weight penalty."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._checks import (
    FloatArray,
    LabelArray,
    MaskArray,
    Number,
    WeightArray,
    arithmetic_dtype,
    as_class_weight,
    as_labels,
    as_logits,
    as_number,
    as_weights,
    as_where,
)
from ._softmax import (
    RowSums,
    below,
    is_class,
    is_sharded,
    pick,
    pull_back_softmax,
    row_sums,
    sum_of_others,
)

Reduction = Literal["mean", "sum", "none"]


def log_likelihood_cost(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int = -1,
    where: MaskArray | None = None,
    sample_weight: WeightArray | None = None,
    class_weight: WeightArray | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: Reduction = "mean",
    normalizer: Number | None = None,
) -> Float[Array, "..."]:
    """Log-likelihood cost of the softmax of `logits`: C = −Σ_k y_k ln a_k, also called cross-entropy.

    With m the row's maximum and r the sum of exp(z_k − m) over all classes but the winner,
    an example costs Σ_k y_k [(m − z_k) + log1p(r)], and its gradient is
    ∂C/∂z_j = a_j − y_j, computed as a_j (Σ_k y_k − y_j) − y_j (1 − a_j) with 1 − a_j taken from r.
    Neither loses digits, however confident the prediction. The mean's gradient carries 1/N.

    In full, with targets q_k = (1 − α) y_k + α/K, class weights w and sample weight v, an example costs
    v [Σ_k w_k q_k (−ln a_k) + ζ (ln Σ_k exp z_k)² Σ_k w_k y_k] and weighs v Σ_k w_k y_k in the mean.
    Without class weights Σ_k w_k y_k stands for 1.

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        labels: Integers (*batch), the class of each example; or floating-point probabilities of the
            logits' shape.
        axis: The class axis.
        where: The classes that exist, a bool mask broadcastable to `logits`; all if None. A class that
            does not counts as one with logit −inf, and takes no share of the smoothing.
        sample_weight: v, a number for each example (*batch), or a bool mask. An example of weight 0
            counts for nothing, whatever it holds: NaN, infinity, or a label that names no class.
        class_weight: w, a number for each class (classes,). Without it an example weighs v, also
            where its probabilities do not sum to 1.
        label_smoothing: α from 0 to 1, spread over the K classes that exist.
        z_loss: ζ, at least 0, the strength of a penalty on the log-normaliser.
        reduction: "mean" divides by the sum of the examples' weights (the number of examples where
            there are no weights), "sum" adds, "none" returns a cost for each example.
        normalizer: What "mean" divides by instead: a global number of tokens, or that of a whole batch
            accumulated in parts.

    Returns:
        Cost in nats, float32 (float64 for float64 logits): a scalar, or (*batch) for "none". It is
        differentiable in logits, probability labels, both weights, α, ζ and `normalizer`; a gradient
        has its argument's dtype. A mean over total weight 0, or over no examples, is 0 with gradient 0.
        A class with logit −inf has probability and gradient 0 and costs nothing where its target is 0;
        as the label it costs +inf. NaN or +inf among an example's logits makes that example NaN.

    Raises:
        TypeError: If logits, labels, mask or weights have the wrong kind of dtype (bool labels
            included).
        ValueError: If shapes do not fit, an option is out of its range, or an integer label known
            outside jit is not in [0, classes). Under jit such a label gives NaN, in the example's cost
            and in its gradient, which the float checks of `jax.experimental.checkify` report.

    Example:
        >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.25, 0.4, 0.05]))
        >>> [round(float(slope), 4) for slope in jax.grad(log_likelihood_cost)(logits, 2)]
        [0.1, 0.2, -0.75, 0.4, 0.05]

    References:
        Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs".
        Szegedy et al. (2016), "Rethinking the Inception architecture", section 7, on smoothing.
        Prieto et al. (2025), "Grokking at the edge of numerical stability", arXiv:2501.04697, on what
        training loses to costs rounded to 0.
    """
    z, labels, v = _as_examples(logits, labels, axis, sample_weight)
    options = as_options(class_weight, label_smoothing, z_loss, z.shape[-1], z.dtype)
    exists = None
    if where is not None:
        exists = jnp.moveaxis(as_where(where, jnp.shape(logits)), axis, -1)
        z = jnp.where(exists, z, -jnp.inf)
    cost = example_costs(z, labels, v, options, exists)
    return reduced(cost, total_weight(labels, v, w=options.class_weight), reduction, normalizer)


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
    z, labels, weight = _as_examples(logits, labels, axis, sample_weight)
    cost = _quadratic(z, _as_targets(labels, weight, z.dtype))
    if weight is not None:
        cost = _weighted(weight, cost)
    return reduced(cost, total_weight(labels, weight), reduction, None)


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
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    weights = [a for a in arrays if a.ndim >= 2 and jnp.issubdtype(a.dtype, jnp.floating)]
    if not weights:
        raise ValueError(
            "params must hold at least one floating-point array with two or more axes, found none: "
            "pass the network's parameters as a pytree"
        )
    dtype = jnp.float64 if any(w.dtype == jnp.float64 for w in weights) else jnp.float32
    squares = [jnp.sum(jnp.square(w.astype(arithmetic_dtype(w.dtype)))) for w in weights]
    return jnp.sum(jnp.stack([square.astype(dtype) for square in squares])) / 2


class Options(NamedTuple):
    """Class weights w, smoothing α and z-loss ζ; None for what is not asked for."""

    class_weight: Float[Array, " classes"] | None
    label_smoothing: Number | None
    z_loss: Number | None


def as_options(
    class_weight: Any, label_smoothing: Any, z_loss: Any, classes: int, dtype: jax.typing.DTypeLike
) -> Options:
    """The options of a cost over so many classes, checked, in the dtype to compute in."""
    return Options(
        None if class_weight is None else as_class_weight(class_weight, classes, dtype),
        _unless_zero(as_number("label_smoothing", label_smoothing, dtype, most=1)),
        _unless_zero(as_number("z_loss", z_loss, dtype)),
    )


def example_costs(
    z: Float[Array, "*batch classes"],
    labels: Array,
    v: Float[Array, "*batch"] | None,
    options: Options,
    exists: Array | None,
) -> Float[Array, "*batch"]:
    """What each example costs, its sample weight v included.

    `exists` tells, for (classes) or (*batch, classes), which classes do; z must be −inf for the others.
    """
    w, alpha, zeta = options
    labels = _as_targets(labels, v, z.dtype)
    class_weight = None if w is None else _class_weight(labels, v, w)
    if _is_probability(labels):
        q = labels if alpha is None else (1 - alpha) * labels + _smoothing(alpha, z, exists)
        cost, log_rest, z = _ignoring(v, z, *_log_likelihood(z, q if w is None else w * q))
    else:
        cost, log_rest, z = _ignoring(v, z, *_log_likelihood(z, labels))
        if w is not None:
            cost = _weighted(class_weight, cost)
        if alpha is not None:
            share = _smoothing(alpha, z, exists)
            share = share if w is None else w * share
            cost = _weighted(1 - alpha, cost) + _shared_cost(z, log_rest, share, v)
    if zeta is not None:
        squared = jnp.square(_maximum(z) + log_rest)
        cost += zeta * (squared if w is None else _weighted(class_weight, squared))
    return cost if v is None else _weighted(v, cost)


def total_weight(
    labels: Array, v: Float[Array, "*batch"] | None, w: Float[Array, " classes"] | None = None
) -> Array | int:
    """What all examples together weigh in the mean: Σ_n v Σ_k w_k y_k."""
    if w is not None:
        weight = _class_weight(_as_targets(labels, v, w.dtype), v, w)
        return jnp.sum(weight if v is None else _weighted(v, weight))
    if v is not None:
        return jnp.sum(v)
    return math.prod(labels.shape[:-1] if _is_probability(labels) else labels.shape)


def _as_examples(logits, labels, axis, sample_weight):
    """Checked logits and labels with the classes last, and sample weights, in the dtype to compute in."""
    array, axis = as_logits(logits, axis)
    dtype = arithmetic_dtype(array.dtype)
    v = None
    if sample_weight is not None:
        v = as_weights(sample_weight, array.shape[:axis] + array.shape[axis + 1 :], dtype)
    labels = as_labels(labels, array.shape, axis, sample_weight)
    return jnp.moveaxis(array, axis, -1).astype(dtype), labels, v


def _as_targets(labels, v, dtype):
    """Integer labels as they are; probabilities in `dtype`, with 0 for what v = 0 ignores."""
    if not _is_probability(labels):
        return labels
    y = labels.astype(dtype)
    return y if v is None else jnp.where((v == 0)[..., None] & ~jnp.isfinite(y), 0, y)


def _ignoring(v, z, cost, log_rest):
    """Cost, log1p(r) and logits, with numbers in place of what breaks an example of weight 0."""
    if v is None:
        return cost, log_rest, z
    ignored = (v == 0) & ~jnp.isfinite(cost + log_rest)
    # The logits matter for smoothing and z-loss alone; where neither is asked for, nothing reads them.
    z = jnp.where(ignored[..., None], 0, z)
    return jnp.where(ignored, 0, cost), jnp.where(ignored, 0, log_rest), z


def _class_weight(labels, v, w):
    """Σ_k w_k y_k for each example; NaN where an integer label names no class and v is not 0."""
    if _is_probability(labels):
        return jnp.sum(w * labels, axis=-1)
    if is_sharded(labels) or is_sharded(w):
        own = jnp.arange(w.shape[0], dtype=labels.dtype) == labels[..., None]
        weight = jnp.sum(jnp.where(own, w, 0), axis=-1)
    else:
        weight = jnp.take(w, labels, mode="clip")
    counts = True if v is None else v != 0
    return jnp.where((labels < 0) & counts, jnp.nan, weight)


def _weighted(weight, cost):
    """Weight times cost: 0 for weight 0 whatever the cost, while d/d weight stays the cost."""
    return weight * jnp.where(jnp.equal(weight, 0) & ~jnp.isfinite(cost), 0, cost)


def reduced(
    cost: Float[Array, "*batch"],
    weight: Array | int,
    reduction: str,
    normalizer: Any,
) -> Float[Array, "..."]:
    """The costs of all examples, which weigh `weight` together, as one number or as they are."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer goes with reduction 'mean', got {reduction!r}")
    if reduction == "none":
        return cost
    if reduction == "sum":
        return jnp.sum(cost)
    if normalizer is not None:
        weight = as_number("normalizer", normalizer, cost.dtype)
    return jnp.where(weight == 0, 0, jnp.sum(cost) / jnp.where(weight == 0, 1, weight))


def _smoothing(alpha, z, exists):
    """α/K for each class that exists, 0 for the others."""
    if exists is None:
        return alpha / z.shape[-1]
    exists = exists.astype(z.dtype)
    return alpha * exists / jnp.maximum(jnp.sum(exists, axis=-1, keepdims=True), 1)


def _shared_cost(z, log_rest, share, v):
    """Σ_k share_k (−ln a_k). Its gradient a_j Σ_k share_k − share_j has nothing to lose."""
    surprise = log_rest[..., None] - below(z, _maximum(z)[..., None])
    if v is not None or not isinstance(share, float):
        nothing = jnp.equal(share, 0) if v is None else jnp.equal(share, 0) | (v == 0)[..., None]
        surprise = jnp.where(nothing & (z == -jnp.inf), 0, surprise)
    return jnp.sum(share * surprise, axis=-1)


def _maximum(z):
    """The row maximum m; what it is subtracted from does not change with it."""
    return jax.lax.stop_gradient(jnp.max(z, axis=-1))


def _unless_zero(number):
    """None for an option that is known to be 0, so that what it asks for can be left out."""
    return None if isinstance(number, int | float) and number == 0 else number


def _is_probability(labels):
    return jnp.issubdtype(labels.dtype, jnp.floating)


class _Residuals(NamedTuple):
    sums: RowSums
    own: RowSums | None  # The row sums of the label's class alone, for integer labels.
    cost: Float[Array, "*batch"]
    logits: Array | None  # Kept for the gradient of probability labels alone.
    labels: Array


def label_sums(logits: Float[Array, "*batch classes"], labels: Array) -> tuple[RowSums, RowSums | None]:
    """The row sums that are exact for these labels, and those of an integer label's own class.

    They are NaN in the row of a label that names no class.
    """
    if _is_probability(labels):
        return row_sums(logits), None
    index = labels[..., None]
    sums = row_sums(logits, index)
    sums = sums._replace(rest=jnp.where(index < 0, jnp.nan, sums.rest))
    return sums, sums._replace(exponentials=sums.own)


def log_likelihood_gradient(
    sums: RowSums, own: RowSums | None, labels: Array
) -> Float[Array, "*batch classes"]:
    """∂C/∂z for each row: a − y where the targets sum to 1, without its cancellation."""
    a = sums.probabilities
    if own is None:
        return a * sum_of_others(labels) - labels * sums.complements
    return jnp.where(is_class(a, labels[..., None]), -own.complements, a)


def _surprise(sums, logits, targets):
    """−ln a_k for each class; 0 where it is infinite and the target 0, since 0 · ln 0 = 0."""
    return jnp.where((targets == 0) & (logits == -jnp.inf), 0, sums.surprises(logits))


# What an example costs, and log1p(r), from which smoothing and z-loss are made.
@jax.custom_vjp
def _log_likelihood(logits, labels):
    return _log_likelihood_fwd(logits, labels)[0]


def _log_likelihood_fwd(logits, labels):
    sums, own = label_sums(logits, labels)
    if own is None:
        total = jnp.sum(labels, axis=-1)
        cost = jnp.sum(labels * _surprise(sums, logits, labels), axis=-1)
    else:
        total = labels + 1
        cost = sums.surprises(pick(logits, labels[..., None]))[..., 0]
    # Where every class has logit −inf there is no distribution, and the label is impossible.
    cost = jnp.where((total > 0) & (sums.maximum[..., 0] == -jnp.inf), jnp.inf, cost)
    kept = logits if own is None else None
    return (cost, jnp.log1p(sums.rest)[..., 0]), _Residuals(sums, own, cost, kept, labels)


# C = −Σ_k t_k ln a_k with ∂ ln a_k/∂z_j = δ_jk − a_j, so
#     ∂C/∂z_j = a_j T − t_j,                     T = Σ_k t_k
#             = a_j (T − t_j)  −  t_j (1 − a_j)  where nothing cancels: at the label of a one-hot
#                                                target the first term is 0, elsewhere the second
#     ∂C/∂t_k = −ln a_k
# log1p(r) = ln Σ_k exp(z_k − m), and m is held fixed, so
#     ∂log1p(r)/∂z_j = a_j
def _log_likelihood_bwd(residuals, cotangents):
    sums, own, cost, logits, labels = residuals
    d_cost, d_log_rest = (cotangent[..., None] for cotangent in cotangents)
    # A row that nobody counts has cotangents 0, whatever it holds: select, since 0 · NaN is NaN.
    ignored = (d_cost == 0) & (d_log_rest == 0) & ~jnp.isfinite(cost[..., None] + sums.rest)
    gradient = d_cost * log_likelihood_gradient(sums, own, labels) + d_log_rest * sums.probabilities
    d_logits = jnp.where(ignored, 0, gradient)
    if logits is None:
        return d_logits, None
    return d_logits, jnp.where(ignored, 0, d_cost * _surprise(sums, logits, labels))


_log_likelihood.defvjp(_log_likelihood_fwd, _log_likelihood_bwd)


@jax.custom_vjp
def _quadratic(logits, labels):
    return _quadratic_fwd(logits, labels)[0]


def _quadratic_fwd(logits, labels):
    sums, own = label_sums(logits, labels)
    difference = _difference(sums, own, labels)
    cost = jnp.sum(jnp.square(difference), axis=-1) / 2
    return cost, _Residuals(sums, own, cost, None, labels)


# C = ½ Σ_k d_k² with d = a − t, so ∂C/∂a = d, pulled back through the softmax, and ∂C/∂t = −d.
def _quadratic_bwd(residuals, cotangent):
    sums, own, cost, _, labels = residuals
    cotangent = cotangent[..., None]
    ignored = (cotangent == 0) & ~jnp.isfinite(cost)[..., None]
    difference = _difference(sums, own, labels)
    d_logits = jnp.where(ignored, 0, cotangent * pull_back_softmax(sums, difference))
    if own is not None:
        return d_logits, None
    return d_logits, jnp.where(ignored, 0, -cotangent * difference)


def _difference(sums, own, labels):
    """The difference a − t as a (1 − t) − t (1 − a), exact where a rounds to 1."""
    if own is None:
        return sums.probabilities * (1 - labels) - labels * sums.complements
    return log_likelihood_gradient(sums, own, labels)


_quadratic.defvjp(_quadratic_fwd, _quadratic_bwd)
