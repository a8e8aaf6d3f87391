"""The log-likelihood cost, the quadratic cost it is compared with, and the weight penalty."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._checks import (
    Axes,
    FloatArray,
    LabelArray,
    MaskArray,
    MeshAxis,
    Number,
    WeightArray,
    arithmetic_dtype,
    as_class_weight,
    as_labels,
    as_logits,
    as_number,
    as_weights,
    as_where,
    spread_over,
    varying,
)
from ._softmax import (
    LIFT,
    RowSums,
    apart,
    class_count,
    custom_vjp_static_first,
    first_class,
    from_its_device,
    is_class,
    is_sharded,
    lifted_roots,
    over_classes,
    pick,
    pull_back_softmax,
    reduce_rows,
    row_maximum,
    row_sums,
    share,
    spread,
    sum_of_other_exponentials,
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
    class_axis: MeshAxis = None,
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
        class_axis: Inside `jax.shard_map`, the mesh axis or axes that the classes of `logits`,
            probability labels and `class_weight` are spread over; elsewhere none is needed, sharded or
            not. Sums over classes go over all devices then, and sums over examples over this one's.

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
    z, labels, v, axes = _as_examples(logits, labels, axis, sample_weight, class_axis)
    options = as_options(class_weight, label_smoothing, z_loss, z.shape[-1], arithmetic_dtype(z.dtype))
    exists = None
    if where is not None:
        exists = jnp.moveaxis(as_where(where, jnp.shape(logits)), axis, -1)
        z = jnp.where(exists, z, -jnp.inf)
    cost = example_costs(z, labels, v, options, exists, row_maximum(z, axes=axes), axes)
    weight = total_weight(labels, v, options.class_weight, axes)
    return reduced(cost, weight, reduction, normalizer)


def quadratic_cost(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int = -1,
    sample_weight: WeightArray | None = None,
    reduction: Reduction = "mean",
    class_axis: MeshAxis = None,
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
        class_axis: As for `log_likelihood_cost`.

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
    z, labels, weight, axes = _as_examples(logits, labels, axis, sample_weight, class_axis)
    z = z.astype(arithmetic_dtype(z.dtype))
    cost = _quadratic(axes, *_alike(z, _as_targets(labels, weight, z.dtype)))
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
    m: Float[Array, "*batch 1"],
    axes: Axes = (),
) -> Float[Array, "*batch"]:
    """What each example costs, its sample weight v included.

    `exists` tells, for (classes) or (*batch, classes), which classes do; z must be −inf for the others.
    m is the `row_maximum` of z, to within a rounding.
    """
    w, alpha, zeta = options
    z, labels = _alike(z, _as_targets(labels, v, m.dtype))
    if _is_probability(labels):
        q = labels if alpha is None else (1 - alpha) * labels + alpha * _even(exists, z, m.dtype, axes)
        cost, log_sum = _target_cost(axes, z.astype(m.dtype), q if w is None else w * q)
    else:
        cost, log_sum = _label_cost(axes, z, m, labels)
    if v is not None:
        ignored = (v == 0) & ~jnp.isfinite(cost + log_sum)
        cost, log_sum = (jnp.where(ignored, 0, each) for each in (cost, log_sum))
        z, m = (jnp.where(ignored[..., None], 0, each) for each in (z, m))
    class_weight = None if w is None else _class_weight(labels, w, axes)
    if not _is_probability(labels):
        cost = cost if w is None else _weighted(class_weight, cost)
        if alpha is not None:
            even = alpha * _even(exists, z, m.dtype, axes)
            shared = _shared_cost(z, m, log_sum, even if w is None else w * even, v, axes)
            cost = _weighted(1 - alpha, cost) + shared
    if zeta is not None:
        squared = jnp.square(m[..., 0] + log_sum)
        cost += zeta * (squared if w is None else _weighted(class_weight, squared))
    return cost if v is None else _weighted(v, cost)


def total_weight(
    labels: Array,
    v: Float[Array, "*batch"] | None,
    w: Float[Array, " classes"] | None = None,
    axes: Axes = (),
) -> Array | int:
    """What all examples together weigh in the mean: Σ_n v Σ_k w_k y_k."""
    if w is not None:
        weight = _class_weight(_as_targets(labels, v, w.dtype), w, axes)
        return jnp.sum(weight if v is None else _weighted(v, weight))
    if v is not None:
        return jnp.sum(v)
    return math.prod(labels.shape[:-1] if _is_probability(labels) else labels.shape)


def _as_examples(logits, labels, axis, sample_weight, class_axis):
    """All checked: logits and labels with the classes last, sample weights, axes of the classes."""
    array, axis = as_logits(logits, axis)
    axes = spread_over("logits", array, "class_axis", class_axis)
    v = None
    if sample_weight is not None:
        batch = array.shape[:axis] + array.shape[axis + 1 :]
        v = as_weights(sample_weight, batch, arithmetic_dtype(array.dtype))
    z = jnp.moveaxis(array, axis, -1)
    labels = as_labels(labels, array.shape, axis, sample_weight, class_count(z, axes))
    return z, labels, v, axes


def _as_targets(labels, v, dtype):
    """Integer labels, or probabilities in `dtype`; 0 for those that v = 0 leaves without meaning."""
    if not _is_probability(labels):
        return labels if v is None else jnp.where((v == 0) & (labels < 0), 0, labels)
    y = labels.astype(dtype)
    return y if v is None else jnp.where((v == 0)[..., None] & ~jnp.isfinite(y), 0, y)


def _alike(z, labels):
    """Logits and labels that vary along the same mesh axes, as a rule's gradients by them do."""
    z = spread(z, varying(labels))
    return z, spread(labels, varying(z)) if _is_probability(labels) else labels


def _class_weight(labels, w, axes):
    """Σ_k w_k y_k for each example; NaN where an integer label names no class."""
    if _is_probability(labels):
        return over_classes(jnp.sum, w * labels, axes)[..., 0]
    if is_sharded(labels) or is_sharded(w):
        own = jnp.arange(w.shape[0], dtype=labels.dtype) == labels[..., None]
        weight = jnp.sum(jnp.where(own, w, 0), axis=-1)
    else:
        number = labels - first_class(w, axes)
        weight = from_its_device(jnp.take(w, number, mode="clip"), number, w, axes)
    return jnp.where(labels < 0, jnp.nan, weight)


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


def _even(exists, z, dtype, axes):
    """The even distribution over the classes of z: 1/K for each that exists, 0 for the others."""
    if exists is None:
        return jnp.full(z.shape[-1], 1 / class_count(z, axes), dtype)
    exists = exists.astype(dtype)
    return exists / jnp.maximum(over_classes(jnp.sum, exists, axes), 1)


def _shared_cost(z, m, log_sum, even, v, axes):
    """Σ_k c_k (−ln a_k) for the even part c of the target. Its gradient has nothing to lose."""
    nothing = even == 0 if v is None else (even == 0) | (v == 0)[..., None]
    surprise = log_sum[..., None] + (m - z.astype(m.dtype))
    return over_classes(jnp.sum, even * jnp.where(nothing & (z == -jnp.inf), 0, surprise), axes)[..., 0]


def _unless_zero(number):
    """None for an option that is known to be 0, so that what it asks for can be left out."""
    return None if isinstance(number, int | float) and number == 0 else number


def _is_probability(labels):
    return jnp.issubdtype(labels.dtype, jnp.floating)


def label_sums(logits: Float[Array, "*batch classes"], labels: Array, axes: Axes = ()) -> RowSums:
    """The row sums of logits, NaN in the row of an integer label that names no class."""
    sums = row_sums(logits, axes)
    if _is_probability(labels):
        return sums
    return sums._replace(rest=jnp.where(labels[..., None] < 0, jnp.nan, sums.rest))


def log_likelihood_gradient(
    sums: RowSums, labels: Array, axes: Axes = ()
) -> Float[Array, "*batch classes"]:
    """∂C/∂z for each row: a − y where the targets sum to 1, without its cancellation."""
    a = sums.probabilities
    if _is_probability(labels):
        return a * sum_of_others(labels, axes) - labels * sums.complements
    return jnp.where(is_class(a, _number(labels, a, axes)), -sums.complements, a)


def _number(labels, values, axes):
    """The number of each label's class among this device's, along the last axis of `values`."""
    return labels[..., None] - first_class(values, axes)


# The cost of integer labels, −ln a_y, and ln Σ_k e_k, from which smoothing and z-loss are made.
# With o = Σ_{k≠y} e_k, summed without the label,
#     −ln a_y = ln (1 + o / e_y)          which loses nothing where the label leads, and
#             = (m − z_y) + ln (o + e_y)  where it does not, and e_y may be too small to divide by.
# Neither needs m to be the maximum to the last digit: the compiler may round the logits otherwise there.
@custom_vjp_static_first
def _label_cost(axes, logits, maximum, labels):
    index = _number(labels, logits, axes)
    others = sum_of_other_exponentials(logits, maximum, index, axes)
    return _from_label(axes, logits, maximum, labels, others)[:2]


class _LabelResiduals(NamedTuple):
    logits: Array | None  # Where they are narrow, the exponentials are made of them again.
    roots: Array | None  # Otherwise the lifted roots of e_k, but 0 for the label.
    maximum: Array  # m
    own: Array  # e_y
    others: Array  # o
    label: Array  # Its number among the classes of this device.


def _label_cost_fwd(axes, logits, maximum, labels):
    index = _number(labels, logits, axes)
    if logits.dtype == maximum.dtype:
        # The same maximum, but taken after the label's logit: then the roots can take the logits' place.
        maximum = jnp.maximum(maximum, jax.lax.stop_gradient(pick(logits, index, axes)))
        roots = jnp.where(is_class(logits, index), 0, lifted_roots(logits, maximum))
        # A barrier, or the compiler may take the exponentials twice: for the sum and for the gradient.
        roots = jax.lax.optimization_barrier(roots)
        others = reduce_rows(jnp.sum, lambda roots, _: jnp.square(roots), roots, axes=axes) / LIFT**2
        kept = None, roots
    else:
        others = sum_of_other_exponentials(logits, maximum, index, axes)
        kept = logits, None
    cost, log_sum, own, others = _from_label(axes, logits, maximum, labels, others)
    return (cost, log_sum), _LabelResiduals(*kept, maximum, own, others, index)


# ∂C/∂z_j = a_j − δ_jy, which is e_j / (o + e_y) for j ≠ y and −o / (o + e_y) for the label;
# m is held fixed, so ∂ ln Σ_k e_k/∂z_j = a_j.
def _label_cost_bwd(_, residuals, cotangents):
    logits, roots, maximum, own, others, index = residuals
    d_cost, d_log_sum = (cotangent[..., None] for cotangent in cotangents)
    at_label = d_log_sum * share(own, others) - d_cost * share(others, own)
    at_others = (d_cost + d_log_sum) / (others + own)
    if roots is None:
        narrow, maximum, _ = apart(logits, maximum, others)
        exponentials = jnp.exp(narrow.astype(maximum.dtype) - maximum)
    else:
        exponentials = jnp.square(roots / LIFT)
    gradient = jnp.where(is_class(exponentials, index), at_label, at_others * exponentials)
    # A row that nobody counts has cotangents 0, whatever it holds: select, since 0 · NaN is NaN.
    ignored = (d_cost == 0) & (d_log_sum == 0) & ~_is_positive(others + own)
    gradient = jnp.where(ignored, 0, gradient)
    return gradient if logits is None else gradient.astype(logits.dtype), None, None


_label_cost.defvjp(_label_cost_fwd, _label_cost_bwd)


def _from_label(axes, logits, maximum, labels, others):
    """−ln a_y, ln Σ_k e_k, e_y and o, which is NaN for a label that names no class."""
    ahead = pick(logits, _number(labels, logits, axes), axes).astype(maximum.dtype) - maximum
    own = jnp.exp(ahead)
    others = jnp.where(labels[..., None] < 0, jnp.nan, others)
    leads = ahead > -1
    leading = jnp.log1p(others / jnp.where(leads, own, 1))
    log_sum = jnp.log(others + own)
    cost = jnp.where(leads, leading, log_sum - ahead)
    # Where every class has logit −inf there is no distribution, and the label is impossible.
    cost = jnp.where(others + own == 0, jnp.inf, cost)
    return cost[..., 0], jnp.where(leads, leading + ahead, log_sum)[..., 0], own, others


def _is_positive(total):
    """Whether a sum of exponentials makes a distribution."""
    return (total > 0) & jnp.isfinite(total)


# The same for targets t, one for each class.
@custom_vjp_static_first
def _target_cost(axes, logits, targets):
    return _target_cost_fwd(axes, logits, targets)[0]


class _TargetResiduals(NamedTuple):
    sums: RowSums
    cost: Array
    logits: Array
    targets: Array


def _target_cost_fwd(axes, logits, targets):
    sums = row_sums(logits, axes)
    cost = over_classes(jnp.sum, targets * _surprise(sums, logits, targets), axes)[..., 0]
    total = over_classes(jnp.sum, targets, axes)
    impossible = ((total > 0) & (sums.rest + sums.own == 0))[..., 0]
    cost = jnp.where(impossible, jnp.inf, cost)
    return (cost, sums.log_sum[..., 0]), _TargetResiduals(sums, cost, logits, targets)


# C = −Σ_k t_k ln a_k with ∂ ln a_k/∂z_j = δ_jk − a_j, so
#     ∂C/∂z_j = a_j T − t_j,                     T = Σ_k t_k
#             = a_j (T − t_j)  −  t_j (1 − a_j)  where nothing cancels: at the label of a one-hot
#                                                target the first term is 0, elsewhere the second
#     ∂C/∂t_k = −ln a_k
# and as above ∂ ln Σ_k e_k/∂z_j = a_j
def _target_cost_bwd(axes, residuals, cotangents):
    sums, cost, logits, targets = residuals
    d_cost, d_log_sum = (cotangent[..., None] for cotangent in cotangents)
    sound = jnp.isfinite(cost)[..., None] & _is_positive(sums.rest + sums.own)
    ignored = (d_cost == 0) & (d_log_sum == 0) & ~sound
    gradient = d_cost * log_likelihood_gradient(sums, targets, axes) + d_log_sum * sums.probabilities
    d_targets = d_cost * _surprise(sums, logits, targets)
    return jnp.where(ignored, 0, gradient), jnp.where(ignored, 0, d_targets)


_target_cost.defvjp(_target_cost_fwd, _target_cost_bwd)


def _surprise(sums, logits, targets):
    """−ln a_k for each class; 0 where it is infinite and the target 0, since 0 · ln 0 = 0."""
    return jnp.where((targets == 0) & (logits == -jnp.inf), 0, sums.surprises(logits))


@custom_vjp_static_first
def _quadratic(axes, logits, labels):
    return _quadratic_fwd(axes, logits, labels)[0]


class _QuadraticResiduals(NamedTuple):
    sums: RowSums
    cost: Array
    labels: Array


def _quadratic_fwd(axes, logits, labels):
    sums = label_sums(logits, labels, axes)
    cost = over_classes(jnp.sum, jnp.square(_difference(sums, labels, axes)), axes)[..., 0] / 2
    return cost, _QuadraticResiduals(sums, cost, labels)


# C = ½ Σ_k d_k² with d = a − t, so ∂C/∂a = d, pulled back through the softmax, and ∂C/∂t = −d.
def _quadratic_bwd(axes, residuals, cotangent):
    sums, cost, labels = residuals
    cotangent = cotangent[..., None]
    ignored = (cotangent == 0) & ~jnp.isfinite(cost)[..., None]
    difference = _difference(sums, labels, axes)
    d_logits = jnp.where(ignored, 0, cotangent * pull_back_softmax(sums, difference, axes))
    if not _is_probability(labels):
        return d_logits, None
    return d_logits, jnp.where(ignored, 0, -cotangent * difference)


def _difference(sums, labels, axes):
    """The difference a − t as a (1 − t) − t (1 − a), exact where a rounds to 1."""
    if _is_probability(labels):
        return sums.probabilities * (1 - labels) - labels * sums.complements
    return log_likelihood_gradient(sums, labels, axes)


_quadratic.defvjp(_quadratic_fwd, _quadratic_bwd)
