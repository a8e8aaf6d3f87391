"""The head: FC + softmax + cost in one, without ever holding all the logits."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from ._blocks import Affine, IsWhole, fits_one_block, for_each_row, in_one_block, with_gradients
from ._checks import (
    MOST_CLASSES,
    FloatArray,
    LabelArray,
    Number,
    WeightArray,
    arithmetic_dtype,
    as_count,
    as_floats,
    as_labels,
    as_normalizer,
    as_number,
    as_weights,
    is_known,
    known_size,
    with_hints,
)
from ._cost import Options, Reduction, as_options, example_costs, reduced, total_weight
from ._mesh import (
    Axes,
    MeshAxis,
    across,
    class_count,
    first_class,
    on_devices,
    part,
    places_of,
    spread,
    summed_like,
    total,
    varying,
    whole,
)
from ._rows import rounded, sum_of_all_but, sums_without, winner
from ._softmax import custom_vjp_static_first, without


@with_hints
def linear_log_likelihood_cost(
    features: FloatArray,
    weights: FloatArray,
    bias: FloatArray | None,
    labels: LabelArray,
    *,
    sample_weight: WeightArray | None = None,
    class_weight: WeightArray | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: Reduction = "mean",
    normalizer: Number | None = None,
    softcap: Number | None = None,
    num_classes: int | None = None,
    batch_axis: MeshAxis = None,
    class_axis: MeshAxis = None,
    block_size: int | None = None,
) -> Float[Array, "..."]:
    """Log-likelihood cost of the layer `features @ weights + bias`, whose logits are never held at once.

    Equal to `log_likelihood_cost(features @ weights + bias, labels)`, and as exact. With x the features,
    w the weights, a the probabilities and y the targets, the gradient is the sum over blocks of rows of
    ∂C/∂w = xᵀ (a − y), ∂C/∂b = Σ_n (a − y), ∂C/∂x = (a − y) wᵀ, each block's logits used and dropped.

    For "mean" and "sum" a differentiated call forms the gradient in its forward pass: three matrix
    products in all. For "none" the backward pass computes the logits again, four in all, and each
    example's cotangent enters before the products. A call that is not differentiated takes one.

    Args:
        features: Real floating-point numbers (*batch, features).
        weights: Real floating-point numbers (features, classes).
        bias: Real floating-point numbers (classes,), or None.
        labels: Integers (*batch), or probabilities (*batch, classes).
        sample_weight: As for `log_likelihood_cost`; where it is 0 the features too may be NaN or inf.
        class_weight: As for `log_likelihood_cost`.
        label_smoothing: As for `log_likelihood_cost`.
        z_loss: As for `log_likelihood_cost`.
        reduction: As for `log_likelihood_cost`.
        normalizer: As for `log_likelihood_cost`.
        softcap: c above 0, in nats: the logits become c tanh(logits / c), so that none is below −c,
            a −inf in `bias` included. None leaves them.
        num_classes: The classes that exist, if fewer than `weights` has columns. The others are
            padding, to be filled with any finite numbers: probability 0 and gradient 0. An integer
            label must be below it; a probability there costs +inf.
        batch_axis: The axis or axes of the mesh over which the first axis of `features` is spread, and
            with it labels, sample weights and costs. The mesh is that of `jax.set_mesh`, where arrays
            have their full shapes, explicit axes need not be given, as types tell them, and what is
            elsewhere is moved; or that of the `jax.shard_map` around this call, where arrays are each
            device's own part. Where its `check_vma` is False, nobody checks that they are spread so, and
            gradients are those of JAX's own collectives there: of the sum of what all devices return,
            and by an array that several devices hold alike, parts to be added with `jax.lax.psum`.
        class_axis: As `batch_axis` for the columns of `weights`, and with them bias, class weights and
            probability labels. Their number must divide evenly: pad, and give `num_classes`.
        block_size: How many rows of logits are held at once, at most. The default, None, depends on
            where the program runs. On a CPU it is an eighth of the rows, but at least 128, or a fifth of
            the rows if that is less, and at least 64; and never more than make 2²⁴ logits. Elsewhere it
            is as many as make about 2²⁶ logits, 2²⁷ where that is all there are for one product; for a
            value alone at most 512 from 16,384 classes on. Up to 2²⁰ logits are one block everywhere.
            Beyond its results the gradient takes memory for about one such block in float32 on a CPU,
            two with a bias, smoothing or narrow features, up to six with all options or probability
            labels, and weights of bfloat16 once in float32. Elsewhere it takes two, and the logits'
            gradient of up to 2 D rows for D bfloat16 features (D rows for float32) in the features'
            dtype; for more rows also the weights' gradient once in float32. On a mesh, rows and logits
            are those of one device. A symbolic number of rows, as of `jax.export`, is one block.

    Returns:
        Cost in nats, float32 (float64 for float64 features or weights): a scalar, or (*batch) for
        "none". It is differentiable in every floating-point argument, each gradient in its argument's
        dtype.
        bfloat16 and float16 features enter the products as they are, float8 ones as bfloat16. Weights
        beside them, and the logits' gradient, are rounded to that dtype for the products, which
        accumulate in float32. So float32 weights beside bfloat16 features have a float32 gradient. A
        bfloat16 gradient is rounded after its last block, and once more if it is then scaled by other
        than a power of two. In float16
        the logits' gradient enters in units that keep its digits, however a loss is scaled.
        At ±inf, NaN and weight 0 the logits mean what they do for `log_likelihood_cost`, except that an
        example of weight 0 with broken features counts as one whose features are 0.

    Raises:
        TypeError: If an argument has the wrong kind of dtype.
        ValueError: If shapes do not fit, an option is out of its range, or an integer label known
            outside jit is not in [0, classes). Under jit such a label gives NaN, in the example's cost
            and gradient.

    Note:
        Forward mode and second derivatives: as for `log_likelihood_cost`.

        Under `jax.vmap` with shared weights the examples share the weights' gradient too: larger ones
        take four products then, in float32 at least, and the block is one of each example. With a jit,
        scan or checkpoint between vmap and this call, it cannot know, and examples of several blocks,
        and narrow ones, have a copy of that gradient each. Further batch axes as leading axes of
        `features` have neither cost, and take blocks across examples.

    Example:
        >>> x, w = jnp.ones((4, 2)), jnp.zeros((2, 50_000))
        >>> print(linear_log_likelihood_cost(x, w, None, jnp.arange(4)), jnp.log(50_000.0))
        10.819778 10.819778

    References:
        Wijmans et al. (2024), "Cut your losses in large-vocabulary language models", arXiv:2411.09009.
    """
    x, layer, settings, plan, places = _as_layer(
        features, weights, bias, softcap, num_classes, batch_axis, class_axis, block_size
    )
    batch, classes = x.shape[:-1], layer.weights.shape[-1]
    dtype = arithmetic_dtype(x.dtype)
    v = None if sample_weight is None else as_weights(sample_weight, batch, dtype)
    labels = as_labels(labels, (*batch, classes), (len(batch),), sample_weight, plan.num_classes)
    options = as_options(class_weight, label_smoothing, z_loss, classes, dtype)
    normalizer = as_normalizer(reduction, normalizer, sample_weight, dtype)
    cost = partial(_cost, plan, reduction, places.batch_axes)
    place = P() if reduction in ("mean", "sum") else places.batch
    arguments = x, _Rows(labels, v), layer, settings._replace(options=options), normalizer
    return _on_mesh(cost, places, place, *arguments)


class HeadStatistics(NamedTuple):
    """What `head_statistics` tells about each example, in nats and float32 or float64; see there.

    Attributes:
        log_normalizer: ln Σ_k exp z_k (*batch).
        prediction: The first class with the largest logit, int32 (*batch).
        entropy: −Σ_k a_k ln a_k (*batch).
        label_log_likelihood: Σ_k y_k ln a_k (*batch); None without labels.

    Example:
        >>> statistics = head_statistics(jnp.zeros((2, 3)), jnp.zeros((3, 4)), None)
        >>> print(jnp.exp(statistics.entropy), statistics.label_log_likelihood)
        [4. 4.] None
    """

    log_normalizer: Float[Array, "*batch"]
    prediction: Integer[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    label_log_likelihood: Float[Array, "*batch"] | None


@with_hints
def head_statistics(
    features: FloatArray,
    weights: FloatArray,
    bias: FloatArray | None,
    labels: LabelArray | None = None,
    *,
    softcap: Number | None = None,
    num_classes: int | None = None,
    batch_axis: MeshAxis = None,
    class_axis: MeshAxis = None,
    block_size: int | None = None,
) -> HeadStatistics:
    """Statistics of the softmax of `features @ weights + bias`, whose logits are never held at once.

    Args:
        features: As for `linear_log_likelihood_cost`.
        weights: As for `linear_log_likelihood_cost`.
        bias: As for `linear_log_likelihood_cost`.
        labels: As for `linear_log_likelihood_cost`; None if the label's likelihood is not wanted.
        softcap: As for `linear_log_likelihood_cost`.
        num_classes: As for `linear_log_likelihood_cost`.
        batch_axis: As for `linear_log_likelihood_cost`.
        class_axis: As for `linear_log_likelihood_cost`.
        block_size: As for `linear_log_likelihood_cost`.

    Returns:
        For each example (*batch), in nats and float32 (float64 for float64 features):
        `log_normalizer` ln Σ_k exp z_k, `prediction` the first class with the largest logit (int32),
        `entropy` −Σ_k a_k ln a_k, and `label_log_likelihood` Σ_k y_k ln a_k, None without labels.
        NaN or +inf among an example's logits makes it NaN, and its prediction any class, as do logits
        that are all −inf but for their log-normaliser, −inf. A label under jit that names no class makes
        the label's log-likelihood NaN.

    Raises:
        TypeError: As for `linear_log_likelihood_cost`.
        ValueError: As for `linear_log_likelihood_cost`.

    Example:
        >>> statistics = head_statistics(jnp.ones((1, 2)), jnp.eye(2, 3), None, jnp.array([2]))
        >>> print(statistics.prediction, jnp.exp(statistics.label_log_likelihood))
        [0] [0.155]
    """
    x, layer, settings, plan, places = _as_layer(
        features, weights, bias, softcap, num_classes, batch_axis, class_axis, block_size
    )
    batch, classes = x.shape[:-1], layer.weights.shape[-1]
    if labels is not None:
        labels = as_labels(labels, (*batch, classes), (len(batch),), None, plan.num_classes)
    statistics = partial(_all_statistics, plan)
    return _on_mesh(statistics, places, places.batch, x, _Rows(labels, None), layer, settings, None)


class _Rows(NamedTuple):
    """What belongs to one row each, beside its features."""

    labels: Array | None
    sample_weight: Array | None


class _Settings(NamedTuple):
    """What every row shares beside the layer: what becomes of its logits."""

    softcap: Array | float | None
    options: Options


class _Plan(NamedTuple):
    """What is known when it is compiled."""

    num_classes: int
    block_size: int | None
    axes: Axes  # of the mesh, over which classes are spread inside `jax.shard_map`


def _as_layer(features, weights, bias, softcap, num_classes, batch_axis, class_axis, block_size):
    """The arguments that make the logits, checked."""
    x, w = as_floats("features", features), as_floats("weights", weights)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0] or w.shape[-1] == 0:
        raise ValueError(
            "features (*batch, features) and weights (features, classes) must fit, with one class or "
            f"more, got {x.shape} and {w.shape}"
        )
    places = places_of(x, w, batch_axis, class_axis)
    classes = class_count(w, () if places.is_outside else places.class_axes)
    if known_size(classes) > MOST_CLASSES:
        raise ValueError(f"weights may have {MOST_CLASSES} classes at most, got {classes}")
    b = None if bias is None else as_floats("bias", bias)
    if b is not None and b.shape != w.shape[1:]:
        raise ValueError(f"bias must have shape {w.shape[1:]}, one for each class, got {b.shape}")
    if x.dtype.itemsize == 1:
        # Their products are exact in bfloat16, where the logits' gradient has digits and range.
        x = x.astype(jnp.bfloat16)
    elif x.dtype == arithmetic_dtype(x.dtype):
        # Narrow features keep their dtype, and so do weights beside them until a product rounds them.
        x = x.astype(jnp.promote_types(x.dtype, arithmetic_dtype(w.dtype)))
    if softcap is not None:
        softcap = as_number("softcap", softcap, arithmetic_dtype(x.dtype), positive=True)
    num_classes = classes if num_classes is None else as_count("num_classes", num_classes)
    if num_classes > classes:
        raise ValueError(
            f"num_classes must be at most the {classes} columns of weights, got {num_classes}"
        )
    block_size = None if block_size is None else as_count("block_size", block_size)
    plan = _Plan(num_classes, block_size, places.class_axes)
    return x, Affine(w, b), _Settings(softcap, Options(None, None, None)), plan, places


def _on_mesh(function, places, result, x, rows, layer, settings, normalizer):
    """`function` of all others, on each device's part of the arrays."""
    arguments = x, rows, layer, settings, normalizer
    if not places.is_outside:
        return function(*arguments)
    batch, classes = places.batch, places.class_axes
    is_probability = rows.labels is not None and jnp.issubdtype(rows.labels.dtype, jnp.floating)
    padded = (*batch, *[None] * (x.ndim - 1 - len(batch)))
    labels = P(*padded, classes) if is_probability else batch
    specs = (
        batch,
        _Rows._make([labels, batch]),
        Affine._make([P(None, classes), P(classes)]),
        _Settings._make([P(), Options._make([P(classes), P(), P()])]),
        P(),
    )
    return on_devices(function, specs, result, arguments)


def _cost(plan, reduction, batch_axes, x, rows, layer, settings, normalizer):
    """The cost of a device's rows and classes: that of all for "mean" and "sum"."""
    batch, dtype = x.shape[:-1], arithmetic_dtype(x.dtype)
    x, rows = _flat(spread((x, rows), batch_axes), len(batch))
    weight = total_weight(rows.labels, rows.sample_weight, settings.options.class_weight, plan.axes)
    weight = total(weight, batch_axes)
    x = _sound(x, rows.sample_weight)
    if shared := _is_shared((x, rows), layer.weights):
        x = x.astype(dtype)
    arguments = x, layer, settings, rows
    if x.dtype == dtype and fits_one_block(x.shape[0], layer.weights.shape[1], plan.block_size):
        cost = _whole(plan, *arguments)
    elif shared:
        cost = _recomputed(plan, *arguments)
    elif reduction == "none":
        cost = _each(plan, *arguments)
    else:
        # What one nat of each example adds to the result enters the gradient before its products.
        scale = reduced(jnp.ones((), dtype), weight, reduction, normalizer)
        return total(_total(plan, *arguments, scale), batch_axes)
    cost = reduced(jnp.reshape(cost, batch), weight, reduction, normalizer)
    return cost if reduction == "none" else total(cost, batch_axes)


def _flat(rows, axes):
    """Rows in one axis instead of the leading `axes`."""
    return jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:axes]), *a.shape[axes:]), rows)


def _sound(x, v):
    """The features, with numbers in place of what weight 0 ignores, so that no product meets it."""
    if v is None:
        return x
    return jnp.where(((v == 0) & ~jnp.all(jnp.isfinite(x), axis=-1))[:, None], 0, x)


# A rule's gradient of weights that `vmap` shares would be one for each example, summed afterwards.
# Plain autodiff sums before; so this tells, as far as a trace can, whether the examples share them.
@custom_vmap
def _shares(_rows, _weights):
    return np.zeros((), bool)


@_shares.def_vmap
def _shares_under_vmap(_size, in_batched, rows, weights):
    rows_batched, weights_batched = in_batched
    if any(jax.tree.leaves(rows_batched)) and not weights_batched:
        return np.ones((), bool), False
    first = partial(jax.tree.map, lambda array, is_batched: array[0] if is_batched else array)
    return _shares(first(rows, rows_batched), first(weights, weights_batched)), False


def _is_shared(rows, weights):
    shares = _shares(*jax.lax.stop_gradient((rows, weights)))
    return is_known(shares) and bool(shares)


def _costs(plan, z, settings, rows):
    """The cost of each row of logits."""
    exists = _existing(plan, z)
    z = without(exists, _capped(settings, z))
    return example_costs(
        z, rows.labels, rows.sample_weight, settings.options, exists, plan.axes, in_place=True
    )


def _capped(settings, z):
    """The logits, bent below the softcap if there is one."""
    c = settings.softcap
    return z if c is None else c * jnp.tanh(z / c)


def _existing(plan, z):
    """Which of this device's classes exist; None for all."""
    if plan.num_classes == class_count(z, plan.axes):
        return None
    number = first_class(z, plan.axes) + jnp.arange(z.shape[-1])
    return across(number < plan.num_classes, z.ndim)


def _all_statistics(plan, x, rows, layer, settings, _):
    """The statistics of a device's rows."""
    batch = x.shape[:-1]
    x, rows = _flat((x, rows), len(batch))
    statistics = _statistics(plan, x, rows, layer, settings)
    return jax.tree.map(lambda array: array.reshape(batch), statistics)


@partial(jax.jit, static_argnums=0)
def _statistics(plan, x, rows, layer, settings):
    """The statistics of each row."""
    axes = plan.axes

    def step(z, settings, rows):
        exists = _existing(plan, z)
        # The softcap changes no order, but may make logits equal.
        prediction = winner(axes, without(exists, z))
        costs = None if rows.labels is None else _costs(plan, z, settings, rows)
        z = without(exists, _capped(settings, z))
        sums = sums_without(axes, z, prediction - first_class(z, axes))
        log_sum = jnp.log(sums.total)
        # As far behind as there are numbers: a class that does not exist adds 0, and 0 · ∞ would not be.
        behind = jnp.minimum(sums.maximum - rounded(z), jnp.finfo(z.dtype).max / 2)
        surprises = jnp.exp(rounded(z) - sums.maximum) * (log_sum + behind)
        of_others = sum_of_all_but(axes, surprises, sums.number)
        entropy = (sums.own * jnp.log1p(sums.others / sums.own) + of_others) / sums.total
        label = None if costs is None else -costs
        log_normalizer = sums.maximum + log_sum
        return HeadStatistics(log_normalizer[:, 0], prediction[:, 0], entropy[:, 0], label)

    return for_each_row(step, plan.block_size, False, x, layer, settings, rows)


@partial(jax.jit, static_argnums=0)
def _whole(plan, x, layer, settings, rows):
    """The cost of each row of one block, which needs no rule but the cost's own."""
    x, layer, settings, rows = _each_its_own(plan, x, layer, settings, rows)
    return in_one_block(partial(_costs, plan), x, layer, settings, rows)


@partial(jax.jit, static_argnums=0)
def _recomputed(plan, x, layer, settings, rows):
    """The cost of each row, without a rule for all blocks: each is computed again for its gradient."""
    x, layer, settings, rows = _each_its_own(plan, x, layer, settings, rows)
    wide = layer._replace(weights=layer.weights.astype(x.dtype))
    return for_each_row(partial(_costs, plan), plan.block_size, True, x, wide, settings, rows)


def _each_its_own(plan, x, layer, settings, rows):
    """The same, each device's own: what varies along one mesh axis in one array does so in all."""
    along = frozenset().union(*map(varying, jax.tree.leaves((x, layer, settings, rows))))
    layer, settings, rows = spread((layer, settings, rows), along - set(plan.axes))
    return spread(x, along), layer, settings, rows


def _scaled(factor, array):
    """The product, 0 for a factor of 0 whatever the array holds: what nobody counts has no gradient."""
    return jnp.where(factor == 0, 0, factor * array.astype(factor.dtype))


def _cast(gradients, like):
    """The gradients, each summed over devices and in the dtype of what it is by; None for integers."""

    def cast(gradient, primal):
        return None if gradient is None else summed_like(gradient, primal).astype(primal.dtype)

    return jax.tree.map(cast, gradients, like, is_leaf=lambda leaf: leaf is None)


# The cost of all rows together, times the scale; its gradient is formed together with it.
@custom_vjp_static_first
def _total(plan, x, layer, settings, rows, scale):
    return _scaled(scale, jnp.sum(_forward(plan, x, layer, settings, rows)))


def _total_fwd(plan, x, layer, settings, rows, scale):
    cotangent = part(jnp.broadcast_to(scale, x.shape[:1]), plan.axes)
    costs, gradients = _with_gradients(plan, x, layer, settings, rows, cotangent)
    total = jnp.sum(costs)
    # The arguments are kept for their dtypes alone.
    gradients = *gradients, part(total, plan.axes)
    return _scaled(scale, total), (gradients, (x, layer, settings, rows, scale))


def _total_bwd(plan, residuals, cotangent):
    gradients, like = residuals
    return _cast(jax.tree.map(partial(_scaled, whole(cotangent, plan.axes)), gradients), like)


_total.defvjp(_total_fwd, _total_bwd)


# The cost of each row. Its logits are computed again for the gradient.
@custom_vjp_static_first
def _each(plan, x, layer, settings, rows):
    return _each_fwd(plan, x, layer, settings, rows)[0]


def _each_fwd(plan, x, layer, settings, rows):
    return _forward(plan, x, layer, settings, rows), (x, layer, settings, rows)


def _each_bwd(plan, like, cotangent):
    return _cast(_with_gradients(plan, *like, cotangent)[1], like)


_each.defvjp(_each_fwd, _each_bwd)


@partial(jax.jit, static_argnums=0)  # Outside jit a loop would be compiled again for every call.
def _forward(plan, x, layer, settings, rows):
    """The cost of each row."""

    def step(z, settings, rows):
        # By its forward rule, which forward mode can differentiate where it cannot the cost with a rule.
        return jax.vjp(lambda z: _costs(plan, z, settings, rows), z)[0]

    return for_each_row(step, plan.block_size, False, x, layer, settings, rows)


@partial(jax.jit, static_argnums=0)
def _with_gradients(plan, x, layer, settings, rows, cotangent):
    """The cost C_n of each row, and the gradient of Σ_n cotangent_n C_n by all others."""
    arguments = _each_its_own(plan, x, layer, settings, rows)
    # Where it varied as much before, no other device has a part of the gradient's sum.
    pairs = zip((x, layer.weights), (arguments[0], arguments[1].weights), strict=True)
    is_whole = IsWhole(*(varying(before) == varying(after) for before, after in pairs))
    return with_gradients(partial(_costs, plan), plan.block_size, is_whole, *arguments, cotangent)
