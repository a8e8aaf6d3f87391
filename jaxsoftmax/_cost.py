"""The log-likelihood cost, the quadratic cost it is compared with, and the weight penalty."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PyTree

from ._checks import (
    FloatArray,
    LabelArray,
    MaskArray,
    Number,
    WeightArray,
    arithmetic_dtype,
    as_class_weight,
    as_labels,
    as_normalizer,
    as_number,
    as_weights,
    as_where,
    batch_of,
    class_size,
    classes_last,
    with_hints,
)
from ._mesh import (
    Axes,
    MeshAxis,
    across,
    class_count,
    device_count,
    first_class,
    from_its_device,
    is_sharded,
    largest,
    spread,
    varying,
    whole,
)
from ._rows import (
    RowSums,
    behind_in_all,
    behind_in_kept,
    is_class,
    kept_of,
    pick,
    rounded,
    scaled_exponentials,
    sum_over_classes,
    sums_and_kept,
    targets_behind,
    winner,
)
from ._softmax import (
    Row,
    Split,
    as_spread_logits,
    custom_vjp_static_first,
    pull_back_log_softmax,
    pull_back_softmax,
    pulled_back_at_winner,
    row_of,
    share,
    split_at_winner,
    values_of,
    wanted,
    without,
)

Reduction = Literal["mean", "sum", "none"]


@with_hints
def log_likelihood_cost(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int | tuple[int, ...] | None = -1,
    where: MaskArray | None = None,
    sample_weight: WeightArray | None = None,
    class_weight: WeightArray | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: Reduction = "mean",
    normalizer: Number | None = None,
    class_axis: MeshAxis = None,
) -> Float[Array, "..."]:
    """Log-likelihood cost of the softmax of `logits`, also called cross-entropy.

        C = −Σ_k y_k ln a_k
        ∂C/∂z_j = a_j − y_j

    The mean's gradient carries 1/N. Neither cost nor gradient loses digits, however confident the
    prediction: what is nearly 1 is never subtracted from 1. With integer labels y, the label's own
    exponential is left out of the sum:

        C = log1p(Σ_{k≠y} exp(z_k − z_y))

    In full, with targets q, class weights w and sample weight v, an example costs

        q_k = (1 − α) y_k + α/K
        v [−Σ_k w_k q_k ln a_k + ζ (ln Σ_k exp z_k)² Σ_k w_k y_k]

    and weighs v Σ_k w_k y_k in the mean. Without class weights Σ_k w_k y_k stands for 1.

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        labels: Integers (*batch), the class of each example; or floating-point probabilities of the
            logits' shape, or of a shape with fewer or shorter batch axes that broadcasts to it.
        axis: The class axis. Several count as one, in the order given, and None as all: the number of
            a class is its position in them.
        where: The classes that exist, a bool mask broadcastable to `logits`; all if None. A class that
            does not exist has probability 0, as with logit −inf, and takes no share of the smoothing.
        sample_weight: v, a number for each example (*batch), or a bool mask. An example of weight 0
            counts for nothing, whatever it holds: NaN, infinity, or a label that names no class. With
            negative ones, such as advantages, set `normalizer` to the number of examples: the mean
            would divide by their sum.
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
        ValueError: If shapes do not fit, an option is out of its range, or floating-point labels of the
            examples' shape would broadcast to the logits'. What is known outside jit is refused too:
            for "mean" without `normalizer` negative class weights, and sample weights, some of them
            negative, that do not add up to more than 0; and an integer label not in [0, classes). Under
            jit such a label gives NaN in the example's cost and gradient, which the float checks of
            `jax.experimental.checkify` report.

    Note:
        Second derivatives work as forward over reverse: `jax.jvp` of `jax.grad`, `jax.hessian`. Forward
        mode alone (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) wants `without_custom_rules(cost)`.

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
    z, axis, labels, v, axes = _as_examples(logits, labels, axis, sample_weight, class_axis)
    dtype = arithmetic_dtype(z.dtype)
    classes = class_size(z.shape, axis)
    options = as_options(class_weight, label_smoothing, z_loss, classes, dtype)
    exists = None if where is None else as_where(where, z.shape)
    normalizer = as_normalizer(reduction, normalizer, sample_weight, class_weight, dtype)
    return _log_likelihood((axes, axis, reduction), z, labels, v, options, exists, normalizer)


@with_hints
def quadratic_cost(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int | tuple[int, ...] | None = -1,
    sample_weight: WeightArray | None = None,
    reduction: Reduction = "mean",
    class_axis: MeshAxis = None,
) -> Float[Array, "..."]:
    """Quadratic cost of the softmax of `logits`.

        C = ½ Σ_k (a_k − y_k)²
        ∂C/∂z_j = a_j [(a_j − y_j) − Σ_k a_k (a_k − y_k)]

    Its gradient carries the softmax's derivative, which vanishes for a saturated output, right or wrong:
    the learning slowdown that the log-likelihood cost does not have. Even where all gradients of a row
    are small, the largest keeps its digits, and no other has a larger absolute error.

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

    Note:
        Forward mode and second derivatives: as for `log_likelihood_cost`.

    Example:
        >>> wrong_and_saturated = jnp.array([20.0, 0.0])
        >>> jax.grad(quadratic_cost)(wrong_and_saturated, 1)
        Array([ 4.12e-09, -4.12e-09], dtype=float32)

    References:
        Nielsen (2015), "Neural Networks and Deep Learning", chapter 3, on the learning slowdown.
    """
    z, axis, labels, v, axes = _as_examples(logits, labels, axis, sample_weight, class_axis)
    as_normalizer(reduction, None, sample_weight, None, z.dtype)
    return _quadratics((axes, axis, reduction), z, labels, v)


def weight_penalty(params: PyTree) -> Float[Array, ""]:
    """Weight penalty, with gradient w: multiply by λ and add it to a cost.

        ½ Σ w²

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
    class_weight: Any, label_smoothing: Any, z_loss: Any, classes: Any, dtype: jax.typing.DTypeLike
) -> Options:
    """The options of a cost over so many classes, checked, in the dtype to compute in."""
    return Options(
        None if class_weight is None else as_class_weight(class_weight, classes, dtype),
        _unless_zero(as_number("label_smoothing", label_smoothing, dtype, most=1)),
        _unless_zero(as_number("z_loss", z_loss, dtype)),
    )


class Known(NamedTuple):
    """What an earlier pass over the same logits found of each row. Their gradient needs no other sums."""

    sums: RowSums
    cost: Float[Array, "*batch"] | None = None  # −Σ_k t_k ln a_k
    of_targets: Split | None = None
    behind: Float[Array, "*batch 1"] | None = None  # Σ_k e_k (z_w − z_k), of which the entropy is made.


class RowStatistics(NamedTuple):
    """ln Σ_k exp z_k, −Σ_k a_k ln a_k, and Σ_k y_k ln a_k, None without labels; and the winner."""

    log_normalizer: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    label_log_likelihood: Float[Array, "*batch"] | None
    winner: Integer[Array, "*batch"]  # Counted from this device's first class.


def example_costs(
    z: Float[Array, "*batch classes"],
    labels: Array,
    v: Float[Array, "*batch"] | None,
    options: Options,
    exists: Array | None,
    axes: Axes = (),
    in_place: bool | None = False,
    with_statistics: bool = False,
    known: Known | None = None,
) -> tuple[Float[Array, "*batch"], RowStatistics | None, Known]:
    """What each example costs, its sample weight v included; statistics of its row, if so told; its sums.

    `exists` tells, for (classes) or (*batch, classes), which classes do; z must be −inf for the others.
    In place, the gradient by logits that nothing else uses is to take no memory beside theirs. None tells
    that no gradient follows but in forward mode. The statistics are held fixed. The sums are those that
    the next call with the same arguments may be told as `known`.
    """
    w, alpha, zeta = options
    dtype = arithmetic_dtype(z.dtype)
    is_soft = _is_probability(labels)
    if is_soft or alpha is not None:
        # Two uses of the logits: each part of the gradient is wide until it is rounded with the others.
        z = z.astype(dtype)
    given = labels
    z, labels = _alike(z, _as_targets(given, v, dtype))
    smoothed = None if alpha is None else (1 - alpha, alpha * _even(exists, z, axes))
    statistics = None
    if is_soft or with_statistics:
        # The sums without the winner make every class exact, so what else is wanted needs no others.
        targets = labels
        if is_soft and smoothed is not None:
            targets = smoothed[0] * labels + smoothed[1]
        if is_soft and w is not None:
            targets = across(w, labels.ndim) * targets
        plan = axes, in_place, with_statistics
        cost, m, log_sum, entropy, found = _row_cost(plan, z, targets, known)
        if with_statistics:
            # Of the labels as they were given, and nothing else.
            row, of_labels = Row(z, found.sums), cost if is_soft else jnp.where(given < 0, jnp.nan, cost)
            if is_soft and (v is not None or targets is not labels):
                _, given = _alike(z, _as_targets(given, None, dtype))
                of_labels, _ = _cost_of(axes, row, given, _behind_of(axes, row, given))
            statistics = RowStatistics(m + log_sum, entropy, -of_labels, found.sums.number[..., 0])
            statistics = jax.lax.stop_gradient(statistics)
    else:
        cost, m, log_sum, found = _label_cost((axes, in_place), z, labels, known)
    m = jax.lax.stop_gradient(m)
    if v is not None:
        ignored = (v == 0) & ~jnp.isfinite(cost + log_sum)
        cost, m, log_sum = (jnp.where(ignored, 0, each) for each in (cost, m, log_sum))
        if smoothed is not None:
            uncounted = ignored[..., None] | ((v == 0)[..., None] & (z == -jnp.inf))
            z = jnp.where(uncounted, m[..., None], z)
    class_weight = None if w is None else _class_weight(labels, w, axes)
    if not is_soft:
        cost = cost if w is None else _weighted(class_weight, cost)
        if smoothed is not None:
            kept, even = smoothed
            even = even if w is None else across(w, z.ndim) * even
            weight = alpha if w is None else sum_over_classes(even, axes)[..., 0]
            shared = _shared_cost(z, m, log_sum, even, weight, axes)
            cost = _weighted(kept, cost) + shared
    if zeta is not None:
        squared = jnp.square(m + log_sum)
        cost += zeta * (squared if w is None else _weighted(class_weight, squared))
    return cost if v is None else _weighted(v, cost), statistics, found


def total_weight(
    labels: Array,
    v: Float[Array, "*batch"] | None,
    w: Float[Array, " classes"] | None = None,
    axes: Axes = (),
) -> Any:
    """What all examples together weigh in the mean: Σ_n v Σ_k w_k y_k."""
    if w is not None:
        return jnp.sum(example_weights(labels, v, w, axes))
    if v is not None:
        return jnp.sum(v)
    return math.prod(labels.shape[:-1] if _is_probability(labels) else labels.shape)


def example_weights(
    labels: Array,
    v: Float[Array, "*batch"] | None,
    w: Float[Array, " classes"],
    axes: Axes = (),
) -> Float[Array, "*batch"]:
    """What each example weighs in the mean: v Σ_k w_k y_k."""
    weight = _class_weight(_as_targets(labels, v, w.dtype), w, axes)
    return weight if v is None else _weighted(v, weight)


def _as_examples(logits, labels, axis, sample_weight, class_axis):
    """All checked: logits, their class axis, labels with the classes last, sample weights, mesh axes."""
    array, axis, axes = as_spread_logits(logits, axis, class_axis)
    v = None
    if sample_weight is not None:
        v = as_weights(sample_weight, batch_of(array.shape, axis), arithmetic_dtype(array.dtype))
    classes = class_size(array.shape, axis) * device_count(axes)
    labels = as_labels(labels, array.shape, axis, sample_weight, classes)
    return array, axis, labels, v, axes


# Outside jit each operation of these would be compiled by itself.
@partial(jax.jit, static_argnums=0)
def _log_likelihood(plan, z, labels, v, options, exists, normalizer):
    axes, axis, reduction = plan
    z = classes_last(without(exists, z), axis)
    exists = None if exists is None else classes_last(exists, axis)
    cost, *_ = example_costs(z, labels, v, options, exists, axes)
    weight = total_weight(labels, v, options.class_weight, axes)
    return reduced(cost, weight, reduction, normalizer)


@partial(jax.jit, static_argnums=0)
def _quadratics(plan, z, labels, v):
    axes, axis, reduction = plan
    z = classes_last(z, axis).astype(arithmetic_dtype(z.dtype))
    cost = _quadratic(axes, *_alike(z, _as_targets(labels, v, z.dtype)))
    cost = cost if v is None else _weighted(v, cost)
    return reduced(cost, total_weight(labels, v), reduction, None)


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
        return sum_over_classes(across(w, labels.ndim) * labels, axes)[..., 0]
    if is_sharded(labels) or is_sharded(w):
        ndim = labels.ndim + 1
        own = across(jnp.arange(w.shape[0], dtype=labels.dtype), ndim) == labels[..., None]
        weight = jnp.sum(jnp.where(own, across(w, ndim), 0), axis=-1)
    else:
        number = labels - first_class(w, axes)
        weight = from_its_device(jnp.take(w, number, mode="clip"), number, w, axes)
    return jnp.where(labels < 0, jnp.nan, weight)


def _weighted(weight, cost):
    """Weight times cost: 0 for weight 0 whatever the cost, while d/d weight stays the cost."""
    return weight * jnp.where(jnp.equal(weight, 0) & ~jnp.isfinite(cost), 0, cost)


def reduced(
    cost: Float[Array, "*batch"],
    weight: Any,
    reduction: str,
    normalizer: Any,
) -> Float[Array, "..."]:
    """The costs of all examples, which weigh `weight` together, as one number or as they are."""
    if reduction == "none":
        return cost
    if reduction == "sum":
        return jnp.sum(cost)
    weight = weight if normalizer is None else normalizer
    return jnp.where(weight == 0, 0, jnp.sum(cost) / jnp.where(weight == 0, 1, weight))


def _even(exists, z, axes):
    """The even distribution over the classes of z: 1/K for each that exists, 0 for the others."""
    if exists is None:
        return across(jnp.full(z.shape[-1], 1 / class_count(z, axes), z.dtype), z.ndim)
    exists = across(exists.astype(z.dtype), z.ndim)
    return exists / jnp.maximum(sum_over_classes(exists, axes), 1)


def _shared_cost(z, m, log_sum, even, weight, axes):
    """Σ_k c_k (−ln a_k) for the even part c of the target. Its gradient has nothing to lose."""
    nowhere = jnp.full_like(m, -1, jnp.int32)
    behind = targets_behind(axes, z, nowhere[..., None], m[..., None], even)[..., 0]
    return behind + jnp.where(log_sum == -jnp.inf, 0, weight * log_sum)


def _unless_zero(number):
    """None for an option that is known to be 0, so that what it asks for can be left out."""
    return None if isinstance(number, int | float) and number == 0 else number


def _is_probability(labels):
    return jnp.issubdtype(labels.dtype, jnp.floating)


def label_row(logits: Float[Array, "*batch classes"], labels: Array, axes: Axes = ()) -> Row:
    """The logits with their sums, NaN in the row of an integer label that names no class."""
    row = row_of(axes, logits)
    return row if _is_probability(labels) else row._replace(sums=_if_named(labels, row.sums))


def log_likelihood_gradient(
    row: Row, a: Float[Array, "*batch classes"], labels: Array, axes: Axes = ()
) -> Float[Array, "*batch classes"]:
    """∂C/∂z_j = a_j T − y_j for each row, with T = Σ_k y_k and without its cancellation."""
    if _is_probability(labels):
        return -pull_back_log_softmax(row, a, labels, axes)
    # Of no class but the winner a may be more than ½, so of no other a − 1 loses anything.
    missing = jnp.where(_is_winner(axes, row, labels), -share(row.sums.others, row.sums.own), a - 1)
    return jnp.where(is_class(a, _number(labels, a, axes)), missing, a)


def _split(axes, row, labels):
    """The targets' sum without the winner's, and the winner's."""
    if _is_probability(labels):
        return split_at_winner(axes, row, labels)
    own = _is_winner(axes, row, labels).astype(row.sums.ahead.dtype)
    return Split(1 - own, own)


def _number(labels, values, axes):
    """The number of each label's class among this device's, along the last axis of `values`."""
    return labels[..., None] - first_class(values, axes)


def _if_named(labels, sums):
    """The sums, NaN where an integer label names no class."""
    return sums._replace(others=jnp.where(labels[..., None] < 0, jnp.nan, sums.others))


# The cost of integer labels, −ln a_y; m; ln Σ_k e_k, of which smoothing and z-loss are made; the sums.
# With o = Σ_{k≠y} e_k, summed without the label,
#     −ln a_y = ln (1 + o / e_y)                which loses nothing where the label leads, and
#             = (m − z_y) + ln (1 + (s − 1))    where it does not: s = o + e_y is at least 1 then, but
# e_y may be too small to divide by.
@custom_vjp_static_first
def _label_cost(plan, logits, labels, known):
    axes, _ = plan
    return _label_cost_fwd((axes, None), logits, labels, known)[0]


class _LabelResiduals(NamedTuple):
    logits: Array | None
    kept: Array | None  # Instead of them, what the exponentials are made of.
    sums: RowSums


def _label_cost_fwd(plan, logits, labels, known):
    axes, in_place = plan
    if known is None:
        sums, kept = sums_and_kept(axes, in_place, logits, _number(labels, logits, axes))
        residuals = _LabelResiduals(None, kept, _if_named(labels, sums))
    else:
        residuals = _LabelResiduals(logits, None, known.sums)
    return (*_from_sums(residuals.sums), Known(residuals.sums)), residuals


# ∂C/∂z_j = a_j − δ_jy, which is e_j / (o + e_y) for j ≠ y and −o / (o + e_y) for the label;
# m is held fixed, so ∂ ln Σ_k e_k/∂z_j = a_j.
def _label_cost_bwd(plan, residuals, cotangents):
    axes, _ = plan
    logits, kept, sums = residuals
    d_cost, _, d_log_sum = (cotangent[..., None] for cotangent in whole(cotangents[:3], axes))
    at_label = d_log_sum * share(sums.own, sums.others) - d_cost * share(sums.others, sums.own)
    at_others = _times_shares(axes, logits, kept, sums, d_cost + d_log_sum)
    gradient = jnp.where(is_class(at_others, sums.number), at_label, at_others)
    # A row that nobody counts has cotangents 0, whatever it holds: select, since 0 · NaN is NaN.
    ignored = (d_cost == 0) & (d_log_sum == 0) & ~_is_positive(sums.total)
    dtype = gradient.dtype if kept is None else kept.dtype
    return jnp.where(ignored, 0, gradient).astype(dtype), None, None


_label_cost.defvjp(_label_cost_fwd, _label_cost_bwd)


def _times_shares(axes, logits, kept, sums, factor):
    """The factor times a_k for each class k but the one that the sums went without."""
    return _scaled_shares(axes, kept is None, logits if kept is None else kept, sums, factor)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _scaled_shares(_axes, are_logits, kept, sums, factor):
    return scaled_exponentials(are_logits, kept, sums.maximum, factor / sums.total)


@_scaled_shares.defjvp
def _scaled_shares_jvp(axes, are_logits, primals, tangents):
    (kept, sums, factor), (d_logits, _, d_factor) = primals, tangents
    a = _scaled_shares(axes, are_logits, kept, sums, jnp.ones_like(factor))
    a = jnp.where(is_class(a, sums.number), share(sums.own, sums.others), a)
    leader = winner(axes, a) - first_class(a, axes)
    # The softmax's Jacobian is symmetric.
    d_a = pull_back_softmax(a, leader, d_logits.astype(a.dtype), axes)
    return _scaled_shares(axes, are_logits, *primals), factor * d_a + d_factor * a


def _from_sums(sums):
    """−ln a_y, m and ln Σ_k e_k."""
    leads = sums.ahead > -1
    log = jnp.log1p(jnp.where(leads, sums.others / jnp.where(leads, sums.own, 1), sums.total - 1))
    cost = jnp.where(leads, log, log - sums.ahead)
    # Where every class has logit −inf there is no distribution, and the label is impossible.
    cost = jnp.where(sums.total == 0, jnp.inf, cost)
    log_sum = jnp.where(leads, log + sums.ahead, log)
    return cost[..., 0], sums.maximum[..., 0], log_sum[..., 0]


def _is_positive(total):
    """Whether a sum of exponentials makes a distribution."""
    return (total > 0) & jnp.isfinite(total)


# The same by the sums without the winner, for targets t, one for each class, and for integer labels whose
# cost is not all that is wanted; and the entropy, if it is. With d_k = z_w − z_k, so that
# −ln a_k = −ln a_w + d_k for the winner w, it is
#     H = −ln a_w + d̄,    d̄ = Σ_{k≠w} a_k d_k
# which loses nothing where w leads: −ln a_w = ln (1 + r / e_w), and every term is at least 0.
@custom_vjp_static_first
def _row_cost(plan, logits, labels, known):
    axes, _, has_entropy = plan
    return _row_costs((axes, None, has_entropy), logits, labels, known)[0]


class _RowResiduals(NamedTuple):
    logits: Array
    kept: Array | None  # What the exponentials are made of, where they may take the logits' place.
    labels: Array | None
    known: Known


def _row_cost_fwd(plan, *primals):
    return _row_costs(plan, *values_of(primals))


def _row_costs(plan, logits, labels, known):
    axes, in_place, has_entropy = plan
    kept = None
    if known is None:
        known, kept = _found(axes, in_place, has_entropy, logits, labels)
    row, entropy = Row(logits, known.sums), None
    if known.behind is not None:
        entropy = (row.surprise_of_winner + known.behind / row.sums.total)[..., 0]
    values = known.cost, row.sums.maximum[..., 0], row.log_sum[..., 0], entropy, known
    return values, _RowResiduals(logits, kept, labels, known)


def _found(axes, in_place, has_entropy, logits, labels):
    """What is made of each row, and what the exponentials are made of, if they take the logits' place."""
    row, kept, cost, of_targets, in_all = row_of(axes, logits), None, None, None, None
    behind = None if labels is None else _behind_of(axes, row, labels)
    if in_place:
        sums, kept = kept_of(axes, logits, row.sums, behind)
        row = Row(logits, sums)
    if labels is not None:
        cost, of_targets = _cost_of(axes, row, labels, behind)
    if has_entropy and kept is None:
        in_all = behind_in_all(axes, logits, row.sums)
    elif has_entropy:
        in_all = behind_in_kept(axes, kept, row.sums)
    return Known(row.sums, cost, of_targets, in_all), kept


# C = −Σ_k t_k ln a_k with ∂ ln a_k/∂z_j = δ_jk − a_j, so
#     ∂C/∂z_j = a_j T − t_j,                  T = Σ_k t_k
#     ∂C/∂z_w = a_w (T − t_w) − t_w (1 − a_w)  for the winner, where a_w T may be nearly t_w
#     ∂C/∂t_k = −ln a_k
#     ∂H/∂z_j = a_j (−ln a_j − H) = a_j (d_j − d̄)
# and as above ∂ ln Σ_k e_k/∂z_j = a_j
def _row_cost_bwd(plan, residuals, cotangents):
    axes, *_ = plan
    logits, kept, labels, known = residuals
    row, sums = Row(logits, known.sums), known.sums
    cotangents = jax.tree.map(lambda c: c[..., None], whole(wanted(cotangents[:4]), axes))
    d_cost, _, d_log_sum, d_entropy = cotangents
    if d_log_sum is None:
        d_log_sum = jnp.zeros_like(sums.total)
    is_sound, is_ignored = _is_positive(sums.total), d_log_sum == 0
    factor, at_winner = d_log_sum, d_log_sum * share(sums.own, sums.others)
    is_counted = is_sound
    if d_cost is not None:
        is_sound &= jnp.isfinite(known.cost)[..., None]
        is_ignored &= d_cost == 0
        # A cost that nobody counts adds nothing to the gradient, whatever it holds.
        is_counted = is_sound | (d_cost != 0)
        d_cost = _unless_nowhere(labels, d_cost)
        targets = jax.tree.map(lambda sum_: jnp.where(is_counted, sum_, 0), known.of_targets)
        factor += d_cost * sum(targets)
        at_winner -= d_cost * pulled_back_at_winner(sums, targets)
    gradient = _times_shares(axes, logits, kept, sums, factor)
    d_labels = None
    if d_cost is not None and _is_probability(labels):
        gradient -= jnp.where(is_counted, d_cost * labels, 0)
        d_labels = jnp.where(is_counted, d_cost * _surprise(row, labels), 0)
    elif d_cost is not None:
        is_label = is_class(gradient, _number(labels, gradient, axes))
        gradient = jnp.where(is_label, gradient - d_cost, gradient)
    gradient = jnp.where(is_class(gradient, sums.number), at_winner, gradient)
    if d_entropy is not None:
        # The distance first by a_j, which is 0 where it is too large to be multiplied.
        of_entropy = row.probabilities * (row.behind - known.behind / sums.total)
        gradient += d_entropy * of_entropy
        is_ignored &= d_entropy == 0
    return jnp.where(is_ignored & ~is_sound, 0, gradient), d_labels, None


_row_cost.defvjp(_row_cost_fwd, _row_cost_bwd, symbolic_zeros=True)


def row_statistics(
    axes: Axes, logits: Float[Array, "*batch classes"], labels: Array | None, known: Known | None = None
) -> tuple[RowStatistics, Known]:
    """The statistics of each row, and what the next call with the same arguments may be told."""
    if labels is not None:
        logits, labels = _alike(logits, _as_targets(labels, None, arithmetic_dtype(logits.dtype)))
    cost, m, log_sum, entropy, found = _row_cost((axes, False, True), logits, labels, known)
    log_normalizer = jax.lax.stop_gradient(m) + log_sum
    likelihood = None if cost is None else -cost
    return RowStatistics(log_normalizer, entropy, likelihood, found.sums.number[..., 0]), found


def _behind_of(axes, row, labels):
    """Σ_k t_k (m − z_k), or m − z_y: what the cost takes of the logits themselves."""
    if _is_probability(labels):
        return targets_behind(axes, row.logits, row.sums.number, row.sums.maximum, labels)
    return row.sums.maximum - rounded(pick(row.logits, _number(labels, row.logits, axes), axes))


def _cost_of(axes, row, labels, behind):
    """−Σ_k t_k ln a_k, or −ln a_y; and the targets' sums."""
    of_targets = _split(axes, row, labels)
    if not _is_probability(labels):
        return _cost_of_class(axes, row, labels, behind), of_targets
    others, own = of_targets
    # −ln a_k is (m − z_k) + ln Σ e for all but the winner; 0 where t_k is 0.
    cost = behind + row.log_sum * others + row.surprise_of_winner * own
    impossible = (others + own > 0) & (row.sums.total == 0)
    return jnp.where(impossible, jnp.inf, cost)[..., 0], of_targets


def _cost_of_class(axes, row, labels, behind):
    # All devices agree on it, as numbers count alike from their first classes. A maximum tells JAX so.
    is_winner = largest(_is_winner(axes, row, labels).astype(jnp.int32), axes) == 1
    cost = jnp.where(is_winner, row.surprise_of_winner, behind + row.log_sum)
    cost = jnp.where(row.sums.total == 0, jnp.inf, cost)[..., 0]
    return jnp.where(labels < 0, jnp.nan, cost)


def _is_winner(axes, row, labels):
    """Whether each integer label names the winner."""
    return _number(labels, row.logits, axes) == row.sums.number


def _unless_nowhere(labels, cotangent):
    """The cotangent, NaN where an integer label names no class, but for what is not counted."""
    if _is_probability(labels):
        return cotangent
    return jnp.where((labels[..., None] < 0) & (cotangent != 0), jnp.nan, cotangent)


def _surprise(row, targets):
    """−ln a_k for each class; 0 where it is infinite and the target 0, since 0 · ln 0 = 0."""
    surprises = row.surprises
    return jnp.where((targets == 0) & jnp.isposinf(surprises), 0, surprises)


@custom_vjp_static_first
def _quadratic(axes, logits, labels):
    return _quadratic_fwd(axes, logits, labels)[0]


class _QuadraticResiduals(NamedTuple):
    row: Row
    cost: Array
    labels: Array


def _quadratic_fwd(axes, logits, labels):
    row = label_row(logits, labels, axes)
    cost = sum_over_classes(jnp.square(_difference(row, labels, axes)), axes)[..., 0] / 2
    return cost, _QuadraticResiduals(row, cost, labels)


# C = ½ Σ_k d_k² with d = a − t, so ∂C/∂a = d, pulled back through the softmax, and ∂C/∂t = −d.
def _quadratic_bwd(axes, residuals, cotangent):
    row, cost, labels = residuals
    cotangent = whole(cotangent, axes)[..., None]
    ignored = (cotangent == 0) & ~jnp.isfinite(cost)[..., None]
    difference = _difference(row, labels, axes)
    d_logits = cotangent * pull_back_softmax(row.probabilities, row.sums.number, difference, axes)
    d_logits = jnp.where(ignored, 0, d_logits)
    if not _is_probability(labels):
        return d_logits, None
    return d_logits, jnp.where(ignored, 0, -cotangent * difference)


def _difference(row, labels, axes):
    """The difference a − t as a (1 − t) − t (1 − a), exact where a rounds to 1."""
    if _is_probability(labels):
        return row.probabilities * (1 - labels) - labels * row.complements
    return log_likelihood_gradient(row, row.probabilities, labels, axes)


_quadratic.defvjp(_quadratic_fwd, _quadratic_bwd)
