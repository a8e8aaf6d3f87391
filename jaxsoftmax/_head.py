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

from ._checks import (
    MOST_CLASSES,
    Axes,
    FloatArray,
    LabelArray,
    MeshAxis,
    Number,
    WeightArray,
    arithmetic_dtype,
    as_axes,
    as_count,
    as_floats,
    as_labels,
    as_number,
    as_weights,
    is_known,
    spread_over,
    varying,
)
from ._cost import Options, Reduction, as_options, example_costs, reduced, total_weight
from ._softmax import (
    class_count,
    custom_vjp_static_first,
    first_class,
    first_largest,
    leave_out,
    pick,
    reduce_rows,
    row_maximum,
    spread,
    sum_of_other_exponentials,
)

CHUNK = 2**19  # The most numbers of the weights' gradient that one product adds to.


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
            elsewhere is moved; or that of the `jax.shard_map` around this call, whose `check_vma` must
            be True, and where arrays are each device's own part.
        class_axis: As `batch_axis` for the columns of `weights`, and with them bias, class weights and
            probability labels. Their number must divide evenly: pad, and give `num_classes`.
        block_size: How many rows of logits are held at once, at most: the rows are divided evenly. None
            takes an eighth of the rows, or as many as make 2²⁴ logits if they are fewer; but at least
            128, or a fifth of the rows if that is less, and at least 64. Up to 2²⁰ logits are one block.
            The gradient's memory beyond its results is about one such block in float32, two with
            `num_classes`, and a few megabytes. On a mesh, rows and logits are those of one device.

    Returns:
        Cost in nats, float32 (float64 for float64 features): a scalar, or (*batch) for "none". It is
        differentiable in every floating-point argument, each gradient in its argument's dtype.
        bfloat16 and float16 features and weights enter the products as they are, as does the logits'
        gradient, and accumulate in float32; each gradient is rounded once, after its last block. In
        float16 the logits' gradient enters in units that keep its digits, however a loss is scaled.
        At ±inf, NaN and weight 0 the logits mean what they do for `log_likelihood_cost`, except that an
        example of weight 0 with broken features counts as one whose features are 0.

    Raises:
        TypeError: If an argument has the wrong kind of dtype.
        ValueError: If shapes do not fit, an option is out of its range, or an integer label known
            outside jit is not in [0, classes). Under jit such a label gives NaN, in the example's cost
            and gradient.

    Note:
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
    x, layer, plan, places = _as_layer(
        features, weights, bias, softcap, num_classes, batch_axis, class_axis, block_size
    )
    batch, classes = x.shape[:-1], layer.weights.shape[-1]
    dtype = arithmetic_dtype(x.dtype)
    v = None if sample_weight is None else as_weights(sample_weight, batch, dtype)
    labels = as_labels(labels, (*batch, classes), len(batch), sample_weight, plan.num_classes)
    layer = layer._replace(options=as_options(class_weight, label_smoothing, z_loss, classes, dtype))
    cost = partial(_cost, plan, reduction, places.batch_axes)
    place = P() if reduction in ("mean", "sum") else places.batch
    return _on_mesh(cost, places, place, _Rows(x, labels, v), layer, normalizer)


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
    x, layer, plan, places = _as_layer(
        features, weights, bias, softcap, num_classes, batch_axis, class_axis, block_size
    )
    batch, classes = x.shape[:-1], layer.weights.shape[-1]
    if labels is not None:
        labels = as_labels(labels, (*batch, classes), len(batch), None, plan.num_classes)
    statistics = partial(_all_statistics, plan)
    return _on_mesh(statistics, places, places.batch, _Rows(x, labels, None), layer, None)


class _Rows(NamedTuple):
    """What belongs to one row each."""

    features: Array
    labels: Array | None
    sample_weight: Array | None


class _Layer(NamedTuple):
    """What every row shares: the layer, and the options of its cost."""

    weights: Array
    bias: Array | None
    softcap: Array | float | None
    options: Options


class _Plan(NamedTuple):
    """What is known when it is compiled."""

    num_classes: int
    block_size: int | None
    axes: Axes  # of the mesh, over which classes are spread inside `jax.shard_map`


class _Places(NamedTuple):
    """Where on a mesh rows and classes are."""

    batch: P  # The leading axes of the features.
    batch_axes: Axes
    class_axes: Axes
    is_outside: bool  # Of `jax.shard_map`, so that arrays have their full shapes.


def _as_layer(features, weights, bias, softcap, num_classes, batch_axis, class_axis, block_size):
    """The arguments that make the logits, checked: features and weights in one dtype."""
    x, w = as_floats("features", features), as_floats("weights", weights)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0] or w.shape[-1] == 0:
        raise ValueError(
            "features (*batch, features) and weights (features, classes) must fit, with one class or "
            f"more, got {x.shape} and {w.shape}"
        )
    places = _places(x, w, batch_axis, class_axis)
    classes = class_count(w, () if places.is_outside else places.class_axes)
    if classes > MOST_CLASSES:
        raise ValueError(f"weights may have {MOST_CLASSES} classes at most, got {classes}")
    b = None if bias is None else as_floats("bias", bias)
    if b is not None and b.shape != w.shape[1:]:
        raise ValueError(f"bias must have shape {w.shape[1:]}, one for each class, got {b.shape}")
    dtype = jnp.promote_types(x.dtype, w.dtype)
    if softcap is not None:
        softcap = as_number("softcap", softcap, arithmetic_dtype(dtype), positive=True)
    num_classes = classes if num_classes is None else as_count("num_classes", num_classes)
    if num_classes > classes:
        raise ValueError(
            f"num_classes must be at most the {classes} columns of weights, got {num_classes}"
        )
    block_size = None if block_size is None else as_count("block_size", block_size)
    plan = _Plan(num_classes, block_size, places.class_axes)
    layer = _Layer(w.astype(dtype), b, softcap, Options(None, None, None))
    return x.astype(dtype), layer, plan, places


def _places(x, w, batch_axis, class_axis):
    """Where features and weights are, as the axes given tell or else the arrays' types."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        batch_axes = spread_over("features", x, "batch_axis", batch_axis)
        return _Places(P(), batch_axes, spread_over("weights", w, "class_axis", class_axis), False)
    batch_axes, class_axes = as_axes("batch_axis", batch_axis), as_axes("class_axis", class_axis)
    batch = P(batch_axes) if batch_axes else P(*jax.typeof(x).sharding.spec[:-1])
    batch_axes = batch_axes or _names(batch)
    class_axes = class_axes or _names(jax.typeof(w).sharding.spec[1:])
    if set(batch_axes) & set(class_axes):
        raise ValueError(
            f"rows and classes must be over different axes of the mesh, got {batch_axes} and "
            f"{class_axes}, as given or from the types: name others with batch_axis and class_axis"
        )
    if batch_axes and x.ndim == 1:
        raise ValueError("batch_axis needs features with an axis before the last, got one example")
    for what, count, axes in (("examples", x.shape[0], batch[:1]), ("classes", w.shape[1], class_axes)):
        devices = math.prod(mesh.shape[axis] for axis in _names(axes))
        if count % devices:
            raise ValueError(
                f"{count} {what} do not divide evenly over {devices} devices: pad them, examples with "
                "sample_weight 0, or classes with num_classes"
            )
    return _Places(batch, batch_axes, class_axes, bool(batch_axes or class_axes))


def _names(places):
    """The mesh axes in a partition spec."""
    return tuple(jax.tree.leaves(tuple(places)))


def _on_mesh(function, places, result, rows, layer, normalizer):
    """`function(rows, layer, normalizer)`, on each device's part of the arrays."""
    if not places.is_outside:
        return function(rows, layer, normalizer)
    batch, classes = places.batch, places.class_axes
    is_probability = rows.labels is not None and jnp.issubdtype(rows.labels.dtype, jnp.floating)
    padded = (*batch, *[None] * (rows.features.ndim - 1 - len(batch)))
    labels = P(*padded, classes) if is_probability else batch
    options = Options._make([P(classes), P(), P()])
    specs = (
        _Rows._make([batch, labels, batch]),
        _Layer._make([P(None, classes), P(classes), P(), options]),
        P(),
    )
    arguments = jax.tree.map(jnp.asarray, (rows, layer, normalizer))
    arguments = jax.tree.map(_placed, specs, arguments)
    return jax.shard_map(function, in_specs=specs, out_specs=result)(*arguments)


def _placed(place, arrays):
    """The arrays where they must be, as far as types tell: shard_map itself moves along other axes."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return arrays
    place = P(*(tuple(axis for axis in _names([part]) if axis in explicit) or None for part in place))
    return jax.tree.map(lambda array: jax.reshard(array, place), arrays)


def _cost(plan, reduction, batch_axes, rows, layer, normalizer):
    """The cost of a device's rows and classes: that of all for "mean" and "sum"."""
    batch, dtype = rows.features.shape[:-1], arithmetic_dtype(rows.features.dtype)
    rows = _flat(spread(rows, batch_axes), len(batch))
    plan = _with_block_size(plan, rows, layer)
    weight = total_weight(rows.labels, rows.sample_weight, layer.options.class_weight, plan.axes)
    weight = jax.lax.psum(weight, batch_axes)
    if shared := _is_shared(rows, layer.weights):
        rows = rows._replace(features=rows.features.astype(dtype))
        layer = layer._replace(weights=layer.weights.astype(dtype))
    if rows.features.dtype == dtype and plan.block_size >= math.prod(batch):
        cost = _whole(plan, layer, rows)
    elif shared:
        cost = _recomputed(plan, layer, rows)
    elif reduction == "none":
        cost = _each(plan, layer, rows)
    else:
        # What one nat of each example adds to the result enters the gradient before its products.
        scale = reduced(jnp.ones((), dtype), weight, reduction, normalizer)
        return jax.lax.psum(_total(plan, layer, rows, scale), batch_axes)
    cost = reduced(jnp.reshape(cost, batch), weight, reduction, normalizer)
    return cost if reduction == "none" else jax.lax.psum(cost, batch_axes)


def _with_block_size(plan, rows, layer):
    """The plan, with a block size for these rows and classes if none is given."""
    count, classes = rows.features.shape[0], layer.weights.shape[1]
    return plan._replace(block_size=plan.block_size or _block_size(count, classes))


def _block_size(rows, classes):
    """Rows in a block: enough to keep the products busy, few enough to keep the logits small."""
    if rows * classes <= 2**20:
        return max(1, rows)
    return max(64, min(-(-rows // 5), 128), min(-(-rows // 8), 2**24 // classes))


def _flat(rows, axes):
    """Rows in one axis instead of the leading `axes`."""
    return jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:axes]), *a.shape[axes:]), rows)


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


# No loop is made for one round: XLA on the CPU cannot run narrow products from a loop it has unrolled.


def _over_blocks(plan, step, rows):
    """`step` over every block of rows in turn: what it carries, and what it gives for each row."""
    count = jax.tree.leaves(rows)[0].shape[0]
    blocks = max(1, -(-count // plan.block_size))
    size = -(-count // blocks)

    def block(state, number):
        carry, results = state
        # The last block overlaps the one before, so that one program fits all.
        start = jnp.minimum(number * size, count - size)
        is_new = start + jnp.arange(size) >= number * size
        carry, result = step(carry, jax.tree.map(lambda a: _block(a, start, size), rows), is_new)
        return (carry, jax.tree.map(partial(_with_block, start, is_new), results, result)), None

    # The first alone: it has nothing to add to.
    carry, first = step(None, jax.tree.map(lambda a: a[:size], rows), jnp.ones(size, bool))
    if blocks == 1:
        return carry, first
    results = jax.tree.map(lambda a: jnp.zeros((count, *a.shape[1:]), a.dtype).at[:size].set(a), first)
    return jax.lax.scan(block, (carry, results), jnp.arange(1, blocks), unroll=blocks == 2)[0]


def _block(array, start, size):
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _with_block(start, is_new, array, block):
    """The array with the block's new rows at `start`."""
    chosen = jnp.expand_dims(is_new, range(1, block.ndim))
    block = jnp.where(chosen, block, _block(array, start, block.shape[0]))
    return jax.lax.dynamic_update_slice_in_dim(array, block, start, axis=0)


def _product(a, b):
    """Product of operands as narrow as they are, accumulated in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=arithmetic_dtype(a.dtype))


def _plus_product(total, a, b, unit):
    """The total plus unit a b, some columns at a time: at once takes a second array of its size."""
    if total is None:
        return unit * _product(a, b)
    classes = total.shape[1]
    width = max(1, CHUNK // max(1, total.shape[0]))
    if width >= classes:
        return total + unit * _product(a, b)

    def add(i, total):
        # The last columns overlap those before, to which their part has been added already.
        start = jnp.minimum(i * width, classes - width)
        part = unit * _product(a, jax.lax.dynamic_slice_in_dim(b, start, width, axis=1))
        so_far = jax.lax.dynamic_slice_in_dim(total, start, width, axis=1)
        part = jnp.where(start + jnp.arange(width) < i * width, so_far, so_far + part)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis=1)

    return jax.lax.fori_loop(0, -(-classes // width), add, total)


def _narrowed(d_z, dtype):
    """The logits' gradient in the features' dtype, in units that fill its range: 1 but for float16."""
    if jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp:
        return d_z.astype(dtype), 1
    # A probability of 10⁻⁵ has few digits in float16, and a scaled loss may have no place in it.
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.max(jnp.abs(d_z))))
    unit = jnp.ldexp(jnp.ones((), d_z.dtype), jnp.maximum(exponent, -100) - 15)
    return (d_z / unit).astype(dtype), unit


def _column_sums(d_z):
    """Σ_n over the rows. XLA on the CPU takes several times as long for the sum as for this product."""
    return jnp.matmul(jnp.ones(d_z.shape[0], d_z.dtype), d_z, precision=jax.lax.Precision.HIGHEST)


def _cast(gradients, like):
    """The gradients, each in the dtype of what it is by; None stays for integer labels.

    On a mesh each is the sum over the devices between which that does not differ.
    """
    layer, rows, *others = like
    if gradients[1].labels is None:
        rows = rows._replace(labels=None)

    def cast(gradient, other):
        axes = tuple(sorted(varying(gradient) - varying(other)))
        return spread(jax.lax.psum(gradient, axes), varying(other)).astype(other.dtype)

    return jax.tree.map(cast, gradients, (layer, rows, *others))


class _Logits(NamedTuple):
    """The logits of a block, their rows' maxima, and which of the classes exist."""

    z: Array
    maximum: Array
    exists: Array | None


def _logits(plan, product, layer):
    """The logits, from the product of features and weights."""
    dtype, classes = product.dtype, product.shape[-1]
    offsets = None if layer.bias is None else layer.bias.astype(dtype)
    z = product
    if offsets is not None:
        # As a product, whose gradient is one too: XLA on the CPU sums rows several times as slowly.
        ones = jnp.ones((product.shape[0], 1), dtype)
        z += jnp.matmul(ones, offsets[None], precision=jax.lax.Precision.HIGHEST)
    if layer.softcap is not None:
        z = layer.softcap * jnp.tanh(z / layer.softcap)
    exists = None
    if plan.num_classes < class_count(product, plan.axes):
        exists = first_class(product, plan.axes) + jnp.arange(classes) < plan.num_classes
        z = jnp.where(exists, z, -jnp.inf)
    # Taken from the product, since the compiler would store both product and logits for two uses of
    # the logits. Of capped logits it stores one, and in padding the product may be infinite.
    is_plain = layer.softcap is None and exists is None
    summands = (product, offsets) if is_plain else (z, None)
    maximum = row_maximum(*summands, axes=plan.axes)
    return _Logits(z, maximum, exists)


def _costs(plan, product, layer, rows):
    """The cost of each row, from the product of features and weights."""
    z, maximum, exists = _logits(plan, product, layer)
    return example_costs(z, rows.labels, rows.sample_weight, layer.options, exists, maximum, plan.axes)


def _sound(rows):
    """The features, with numbers in place of what weight 0 ignores, so that no product meets it."""
    x, v = rows.features, rows.sample_weight
    if v is None:
        return x
    return jnp.where(((v == 0) & ~jnp.all(jnp.isfinite(x), axis=-1))[:, None], 0, x)


def _all_statistics(plan, rows, layer, _):
    """The statistics of a device's rows."""
    batch = rows.features.shape[:-1]
    rows = _flat(rows, len(batch))
    statistics = _statistics(_with_block_size(plan, rows, layer), layer, rows)
    return jax.tree.map(lambda array: array.reshape(batch), statistics)


@partial(jax.jit, static_argnums=0)
def _statistics(plan, layer, rows):
    """The statistics of each row."""
    axes = plan.axes

    def step(_, rows, __):
        product = _product(rows.features, layer.weights)
        z, m, _ = _logits(plan, product, layer)
        # The softcap changes no order. Before it nothing is multiplied, but for one feature's product.
        ulps = 4 if rows.features.shape[1] == 1 else 0
        prediction = first_largest(_logits(plan, product, layer._replace(softcap=None)).z, ulps, axes)
        winner = prediction - first_class(z, axes)
        own = jnp.exp(pick(z, winner, axes) - m)
        rest = sum_of_other_exponentials(z, m, winner, axes)
        log_sum = jnp.log(rest + own)
        entropy = own * jnp.log1p(rest / own) + _surprises_of_others(axes, z, m, winner, log_sum)
        label = None
        if rows.labels is not None:
            label = -example_costs(z, rows.labels, None, layer.options, None, m, axes)
        log_normalizer, prediction, entropy = (
            column[:, 0] for column in (m + log_sum, prediction, entropy / (rest + own))
        )
        return None, HeadStatistics(log_normalizer, prediction, entropy, label)

    return _over_blocks(plan, step, rows)[1]


def _surprises_of_others(axes, z, m, winner, log_sum):
    """Σ e_k (−ln a_k) over the classes of each row but the winner."""

    def terms(z, first, m, winner, log_sum):
        # As far behind as there are numbers: a class that does not exist adds 0, and 0 · ∞ would not be.
        behind = jnp.minimum(m - z, jnp.finfo(z.dtype).max / 2)
        return leave_out(jnp.exp(z - m) * (log_sum + behind), winner - first)

    z, m = jax.lax.optimization_barrier((z, m))
    return reduce_rows(jnp.sum, terms, z, m, winner, log_sum, axes=axes)


@partial(jax.jit, static_argnums=0)
def _whole(plan, layer, rows):
    """The cost of each row of one block, which needs no rule but the cost's own."""
    layer, rows = _each_its_own(plan, layer, rows)
    x, w = _sound(rows), layer.weights
    # Not for more classes, which would have the larger gradient copied.
    product = _product(x, _turned(w) if x.shape[0] >= 8 * w.shape[1] else w)
    return _costs(plan, product, layer, rows)


@partial(jax.jit, static_argnums=0)
def _recomputed(plan, layer, rows):
    """The cost of each row, without a rule for all blocks: each is computed again for its gradient."""
    layer, rows = _each_its_own(plan, layer, rows)
    cost = jax.checkpoint(partial(_whole, plan))
    return _over_blocks(plan, lambda _, rows, __: (None, cost(layer, rows)), rows)[1]


# The weights themselves. Their gradient xᵀ D, a sum over many rows for few classes, is taken as the
# transpose of Dᵀ x: twice as fast on the CPU, as long as the compiler does not turn it round again.
@jax.custom_vjp
def _turned(weights):
    return weights


def _turned_fwd(weights):
    return weights, None


def _turned_bwd(_, cotangent):
    return (jax.lax.optimization_barrier(cotangent.T).T,)


_turned.defvjp(_turned_fwd, _turned_bwd)


def _scaled(factor, array):
    """The product, 0 for a factor of 0 whatever the array holds: what nobody counts has no gradient."""
    return jnp.where(factor == 0, 0, factor * array.astype(factor.dtype))


# The cost of all rows together, times the scale; its gradient is formed together with it.
@custom_vjp_static_first
def _total(plan, layer, rows, scale):
    return _scaled(scale, jnp.sum(_forward(plan, layer, rows)))


def _total_fwd(plan, layer, rows, scale):
    cotangent = jnp.broadcast_to(scale, rows.features.shape[:1])
    costs, gradients = _with_gradients(plan, layer, rows, cotangent)
    total = jnp.sum(costs)
    # Layer and rows are kept for their dtypes alone.
    return _scaled(scale, total), ((*gradients, total), (layer, rows, scale))


def _total_bwd(_, residuals, cotangent):
    gradients, like = residuals
    return _cast(jax.tree.map(partial(_scaled, cotangent), gradients), like)


_total.defvjp(_total_fwd, _total_bwd)


# The cost of each row. Its logits are computed again for the gradient.
@custom_vjp_static_first
def _each(plan, layer, rows):
    return _each_fwd(plan, layer, rows)[0]


@partial(jax.jit, static_argnums=0)  # Outside jit a loop would be compiled again for every call.
def _forward(plan, layer, rows):
    """The cost of each row."""

    def step(_, rows, __):
        # By its forward rule, which forward mode can differentiate where it cannot the cost with a rule.
        product = _product(_sound(rows), layer.weights)
        costs, _ = jax.vjp(lambda product: _costs(plan, product, layer, rows), product)
        return None, costs

    return _over_blocks(plan, step, rows)[1]


def _each_fwd(plan, layer, rows):
    return _forward(plan, layer, rows), (layer, rows)


def _each_bwd(plan, residuals, cotangent):
    layer, rows = residuals
    _, gradients = _with_gradients(plan, layer, rows, cotangent)
    return _cast(gradients, (layer, rows))


_each.defvjp(_each_fwd, _each_bwd)


def _each_its_own(plan, layer, rows):
    """The same, each device's own: what varies along one mesh axis in one array does so in all."""
    along = frozenset().union(*map(varying, jax.tree.leaves((layer, rows))))
    layer, rows = spread((layer, rows), along - set(plan.axes))
    return layer, rows._replace(features=spread(rows.features, along))


@partial(jax.jit, static_argnums=0)
def _with_gradients(plan, layer, rows, cotangent):
    """The cost C_n of each row, and the gradient of Σ_n cotangent_n C_n by layer (wide) and rows.

    With D = ∂/∂z of that sum, the logits' gradient, and z = x w + b:
    ∂/∂w = xᵀ D,  ∂/∂b = Σ_n D,  ∂/∂x = D wᵀ.
    On a mesh each device gives its own rows' and classes' part, which nobody has summed yet.
    """
    layer, rows = _each_its_own(plan, layer, rows)

    def step(d_layer, block, is_new):
        rows, cotangent = block
        cotangent = jnp.where(is_new, cotangent, 0)
        x = _sound(rows)
        # Weights, bias and features end in z; what else a cost depends on keeps its place.
        others = layer._replace(weights=None, bias=None), rows._replace(features=None)

        def costs_of(product, others, rows):
            return _costs(plan, product, others._replace(bias=layer.bias), rows)

        costs, pull_back = jax.vjp(costs_of, _product(x, layer.weights), *others)
        d_z, d_others, d_rows = pull_back(spread(cotangent, varying(costs)))
        narrow, unit = _narrowed(d_z, x.dtype)
        # Weights first: faster on the CPU, as long as the compiler does not turn it round again.
        d_x = unit * jax.lax.optimization_barrier(_product(layer.weights, narrow.T)).T
        d_w = _plus_product(None if d_layer is None else d_layer.weights, x.T, narrow, unit)
        d_b = None if layer.bias is None else _column_sums(d_z)
        d_others = d_others._replace(bias=d_b)
        if d_layer is not None:
            d_others = jax.tree.map(jnp.add, d_layer._replace(weights=None), d_others)
        d_labels = d_rows.labels if jnp.issubdtype(rows.labels.dtype, jnp.floating) else None
        d_rows = d_rows._replace(features=d_x, labels=d_labels)
        return d_others._replace(weights=d_w), (costs, d_rows)

    d_layer, (costs, d_rows) = _over_blocks(plan, step, (rows, cotangent))
    return costs, (d_layer, d_rows)
