"""The head: FC + softmax + cost in one, without ever holding all the logits."""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from ._blocks import (
    Affine,
    Given,
    IsWhole,
    fits_one_block,
    for_each_row,
    in_one_block,
    logits_of,
    with_gradients,
)
from ._checks import (
    MOST_CLASSES,
    FloatArray,
    LabelArray,
    MaskArray,
    Number,
    WeightArray,
    arithmetic_dtype,
    as_array,
    as_count,
    as_floats,
    as_index,
    as_labels,
    as_normalizer,
    as_number,
    as_weights,
    as_where,
    is_known,
    known_size,
    with_hints,
)
from ._cost import (
    Known,
    Options,
    Reduction,
    as_options,
    example_costs,
    example_weights,
    reduced,
    row_statistics,
    total_weight,
)
from ._mesh import (
    Axes,
    MeshAxis,
    Places,
    across,
    class_count,
    first_class,
    on_devices,
    part,
    places_of,
    smallest,
    spread,
    summed_like,
    total,
    varying,
    whole,
)
from ._rows import rank, shares, taken_once, winner
from ._softmax import custom_vjp_static_first, values_of, wanted, without


class SparseLabels(NamedTuple):
    """Probabilities of a few classes for each example, such as a teacher's largest or several answers.

    All other classes have probability 0. A class that is named twice has the sum. Where a probability is
    0 the class may be any number, as where a short list is filled up.

    Attributes:
        classes: Integers (*batch, k), the numbers of the classes.
        probabilities: Real floating-point numbers (*batch, k), differentiable, taken as they are.

    Example:
        >>> labels = SparseLabels(jnp.array([[0, 3]]), jnp.array([[0.5, 0.5]]))
        >>> x, w = jnp.ones((1, 2)), jnp.zeros((2, 4))
        >>> print(linear_log_likelihood_cost(x, w, None, labels), jnp.log(4.0))
        1.3862944 1.3862944
    """

    classes: Integer[Array, "*batch k"] | np.ndarray | list[Any]
    probabilities: FloatArray | list[Any]


class TeacherLabels(NamedTuple):
    """The softmax of another layer as labels, formed block by block as the logits are.

    Its probabilities are those among the classes that exist for the student. No gradient flows to it.
    The Kullback-Leibler divergence is the cost minus the teacher's `head_statistics(...).entropy`.

    Attributes:
        features: Real floating-point numbers (*batch, features), as many features as the teacher has.
        weights: Real floating-point numbers (features, classes), the student's classes.
        bias: Real floating-point numbers (classes,), or None.
        logit_scale: As for `linear_log_likelihood_cost`, the teacher's own.
        softcap: As for `linear_log_likelihood_cost`, the teacher's own.

    Example:
        >>> teacher = TeacherLabels(jnp.ones((1, 5)), jnp.zeros((5, 4)))
        >>> x, w = jnp.ones((1, 2)), jnp.zeros((2, 4))
        >>> print(linear_log_likelihood_cost(x, w, None, teacher), jnp.log(4.0))
        1.3862944 1.3862944
    """

    features: FloatArray
    weights: FloatArray
    bias: FloatArray | None = None
    logit_scale: Number | None = None
    softcap: Number | None = None


HeadLabels = LabelArray | SparseLabels | TeacherLabels


@with_hints
def linear_log_likelihood_cost(
    features: FloatArray,
    weights: FloatArray,
    bias: FloatArray | None,
    labels: HeadLabels,
    *,
    sample_weight: WeightArray | None = None,
    class_weight: WeightArray | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: Reduction = "mean",
    normalizer: Number | None = None,
    softcap: Number | None = None,
    logit_scale: Number | None = None,
    num_classes: int | None = None,
    where: MaskArray | None = None,
    return_statistics: bool = False,
    batch_axis: MeshAxis = None,
    class_axis: MeshAxis = None,
    block_size: int | None = None,
) -> Any:
    """Log-likelihood cost of the layer `features @ weights + bias`, whose logits are never held at once.

    Equal to `log_likelihood_cost(features @ weights + bias, labels)`, and as exact. With x the features,
    w the weights, a the probabilities and y the targets, the gradient is a sum over blocks of rows, and
    each block's logits are used and dropped. Targets whose sum is not 1 multiply a by it:

        ∂C/∂w = xᵀ (a − y)
        ∂C/∂b = Σ_n (a − y)
        ∂C/∂x = (a − y) wᵀ

    For "mean" and "sum" a differentiated call forms the gradient in its forward pass: three matrix
    products in all. For "none" the backward pass computes the logits again, but not the sums over a row:
    four in all. Each example's cotangent enters before the products. A call that is not differentiated
    takes one.

    Args:
        features: Real floating-point numbers (*batch, features).
        weights: Real floating-point numbers (features, classes).
        bias: Real floating-point numbers (classes,), or None.
        labels: Integers (*batch), or probabilities (*batch, classes); or what makes probabilities of a
            block at a time, so that there is never an array of all: `SparseLabels`, `TeacherLabels`.
        sample_weight: As for `log_likelihood_cost`; where it is 0 the features too may be NaN or inf.
        class_weight: As for `log_likelihood_cost`.
        label_smoothing: As for `log_likelihood_cost`.
        z_loss: As for `log_likelihood_cost`.
        reduction: As for `log_likelihood_cost`.
        normalizer: As for `log_likelihood_cost`.
        softcap: c above 0, in nats. The logits become c tanh(logits / c), which lie between −c and c; a
            −inf in `bias` becomes −c. None leaves them as they are.
        logit_scale: s above 0, the inverse of a temperature. It multiplies the logits, in float32, after
            bias and softcap. For a bias that is not to be scaled, pass bias / s. None is 1. Under jit,
            an s that is not above 0 makes everything NaN.
        num_classes: How many classes exist, if `weights` has more columns. The other columns are padding
            and may hold any finite numbers: their probability and their gradient are 0. An integer label
            must be below `num_classes`. A label's probability in the padding costs +inf.
        where: The classes that exist, a bool mask (classes,) or one that broadcasts to (*batch, classes),
            as for `log_likelihood_cost`. With `num_classes`, both must hold.
        return_statistics: Whether to return (cost, `HeadStatistics`), as for
            `jax.value_and_grad(..., has_aux=True)`. The statistics are those of `head_statistics`. They
            take no further matrix product, and no gradient goes through them. Under jit, those that
            are not used are not computed.
        batch_axis: The mesh axis or axes over which the first axis of `features` is spread, and with it
            labels, sample weights and costs. Under `jax.set_mesh`, arrays have their full shapes, and
            arrays that lie elsewhere are moved; explicit axes need not be given, as types tell them.
            Inside `jax.shard_map`, arrays are each device's own part. With its `check_vma=False`, nobody
            checks that they are spread as you say, and gradients follow JAX's own collectives: they are
            those of the sum of what all devices return. Where all devices hold the same array, the
            gradient by it is then a part on each of them: add the parts with `jax.lax.psum`.
        class_axis: The same for the columns of `weights`, and with them bias, class weights and
            probability labels. The devices must divide the number of columns: pad, and give
            `num_classes`.
        block_size: The largest number of rows whose logits are held at once. The default, None, depends
            on where the program runs.

            On a CPU, a block is a quarter of the rows, at least 64 and at most 128; of more than 1,024
            rows it is an eighth, but beyond 128 rows only as many as make 2²⁰ logits, or up to 480 that
            make 5 · 2²⁰ at most. It has at most 2²⁴ logits, or two rows if these have more. Labels that
            are formed in blocks, and `head_statistics`, take three quarters as many rows, but not fewer
            than make 2¹⁸ logits. From 64 rows on it is a multiple of 16. Up to 4 rows are one block.

            Elsewhere, a block has about 2²⁶ logits, and 2²⁷ if that is all there are for one product. A
            value alone takes at most 512 rows at once from 16,384 classes on.

            Everywhere, up to 2²⁰ logits are one block. So is a symbolic number of rows, as of
            `jax.export`. On a mesh, rows and logits are those of one device.

            Beyond its results, the gradient on a CPU takes the memory of about one block in float32; of
            two with a bias, a softcap, bfloat16 or float16 features, or labels that are no integers; of
            three with smoothing or a scale, and of up to six with all options. JAX 0.12 takes one more
            for most of these. bfloat16 weights are held once in float32 there. Elsewhere
            it takes two blocks, and the logits' gradient of up to 2 D rows in the features' dtype, for D
            bfloat16 features (D rows for float32). If there are more rows than that, it also takes the
            weights' gradient once in float32.

    Returns:
        Cost in nats, float32 (float64 for float64 features or weights): a scalar, or (*batch) for
        "none". It is differentiable in every floating-point argument but a teacher, each gradient in
        its argument's dtype.

        bfloat16 and float16 features enter the products as they are, float8 ones as bfloat16. For the
        products, weights and the logits' gradient are rounded to the same dtype. Products accumulate in
        float32, so that float32 weights beside bfloat16 features have a float32 gradient. A bfloat16
        gradient is rounded after its last block, and once more if it is then multiplied by a number that
        is no power of two. In float16 the logits' gradient enters in units that keep its digits, however
        a loss is scaled.

        At ±inf, NaN and weight 0 the logits mean what they do for `log_likelihood_cost`. Only an example
        of weight 0 with broken features counts as one whose features are 0.

    Raises:
        TypeError: If an argument has the wrong kind of dtype.
        ValueError: If shapes do not fit, an option is out of its range, or an integer label known
            outside jit is not in [0, classes). Under jit such a label gives NaN, in the example's cost
            and gradient.

    Note:
        Forward mode and second derivatives: as for `log_likelihood_cost`.

        Prefer leading axes of `features` to `jax.vmap`: their blocks go across examples. Under
        `jax.vmap` with shared weights, examples of several blocks take four products, in float32 or
        wider, and each example has its own block. With a jit, scan or checkpoint between vmap and this
        call, these examples, and those in narrow dtypes, have a copy of the weights' gradient each.

    Example:
        >>> x, w = jnp.ones((4, 2)), jnp.zeros((2, 50_000))
        >>> print(linear_log_likelihood_cost(x, w, None, jnp.arange(4)), jnp.log(50_000.0))
        10.819778 10.819778

    References:
        Wijmans et al. (2024), "Cut your losses in large-vocabulary language models", arXiv:2411.09009.
    """
    if labels is None:
        raise TypeError(
            "labels must be integers, probabilities, SparseLabels or TeacherLabels, got None: "
            "head_statistics works without labels"
        )
    layer = _as_layer(
        features, weights, bias, logit_scale, softcap, num_classes, where, batch_axis, class_axis
    )
    dtype, classes = layer.dtype, layer.shape[-1]
    rows, fixed = _as_rows(labels, layer, sample_weight)
    options = as_options(class_weight, label_smoothing, z_loss, classes, dtype)
    normalizer = as_normalizer(reduction, normalizer, sample_weight, class_weight, dtype)
    plan = _as_plan(_costs, layer, labels, block_size)._replace(has_statistics=return_statistics)
    if plan.is_formed and class_weight is not None and reduction == "mean" and normalizer is None:
        plan = plan._replace(has_weights=True)
    cost = partial(_cost, plan, reduction, layer.places.batch_axes)
    by_row = layer.places.batch
    result = by_row if reduction == "none" else P(), by_row
    cost, statistics = _on_mesh(cost, layer, result, rows, fixed, options, normalizer)
    return (cost, statistics) if return_statistics else cost


class HeadStatistics(NamedTuple):
    """What `head_statistics` tells about each example, in nats and float32 or float64; see there.

    Attributes:
        log_normalizer: ln Σ_k exp z_k (*batch).
        prediction: The first class with the largest logit, int32 (*batch).
        entropy: −Σ_k a_k ln a_k (*batch).
        label_log_likelihood: Σ_k y_k ln a_k (*batch); None without labels.
        label_rank: How many classes are ahead of the label's, with a larger logit or the same and a
            smaller number, int32 (*batch); None without integer labels.

    Example:
        >>> statistics = head_statistics(jnp.zeros((2, 3)), jnp.zeros((3, 4)), None)
        >>> print(jnp.exp(statistics.entropy), statistics.label_log_likelihood)
        [4. 4.] None
    """

    log_normalizer: Float[Array, "*batch"]
    prediction: Integer[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    label_log_likelihood: Float[Array, "*batch"] | None
    label_rank: Integer[Array, "*batch"] | None


@with_hints
def head_statistics(
    features: FloatArray,
    weights: FloatArray,
    bias: FloatArray | None,
    labels: HeadLabels | None = None,
    *,
    softcap: Number | None = None,
    logit_scale: Number | None = None,
    num_classes: int | None = None,
    where: MaskArray | None = None,
    batch_axis: MeshAxis = None,
    class_axis: MeshAxis = None,
    block_size: int | None = None,
) -> HeadStatistics:
    """Statistics of the softmax of `features @ weights + bias`, whose logits are never held at once.

    Log-normaliser, entropy H and the label's log-likelihood are differentiable, so that costs of one's
    own can be made of them: policy gradients, an entropy bonus, a penalty on the log-normaliser. Their
    cotangents c₁, c₂ and c₃ are together this one of the logits:

        c₁ a_j + c₂ a_j (−ln a_j − H) + c₃ (y_j − a_j)

    The backward pass computes the logits again: four products in all, with one block in memory, as for
    `linear_log_likelihood_cost(..., reduction="none")`. Without a cotangent of the entropy it takes the
    same time too.

    Args:
        features: As for `linear_log_likelihood_cost`.
        weights: As for `linear_log_likelihood_cost`.
        bias: As for `linear_log_likelihood_cost`.
        labels: As for `linear_log_likelihood_cost`; None if the label's likelihood is not wanted.
        softcap: As for `linear_log_likelihood_cost`.
        logit_scale: As for `linear_log_likelihood_cost`.
        num_classes: As for `linear_log_likelihood_cost`.
        where: As for `linear_log_likelihood_cost`.
        batch_axis: As for `linear_log_likelihood_cost`.
        class_axis: As for `linear_log_likelihood_cost`.
        block_size: As for `linear_log_likelihood_cost`.

    Returns:
        For each example (*batch), in nats and float32 (float64 for float64 features):
        `log_normalizer` ln Σ_k exp z_k, `prediction` the first class with the largest logit (int32),
        `entropy` −Σ_k a_k ln a_k, `label_log_likelihood` Σ_k y_k ln a_k, None without labels, and
        `label_rank` (int32), None without integer labels: a label is among the first k where it is
        below k, and its reciprocal rank is 1 / (1 + label_rank). Confident rows keep the digits of all
        of these, and of their gradients.

        `softcap` and `logit_scale` may round two logits to the same number: prediction and rank are those
        before that.

        NaN or +inf among an example's logits makes its statistics NaN, and its prediction any class. So
        do logits that are all −inf, but their log-normaliser and the label's log-likelihood are −inf.
        Under jit, a label that names no class makes the label's log-likelihood NaN. Where that is not
        finite, the rank is the number of classes, which no label has.

    Raises:
        TypeError: As for `linear_log_likelihood_cost`.
        ValueError: As for `linear_log_likelihood_cost`.

    Example:
        >>> statistics = head_statistics(jnp.ones((1, 2)), jnp.eye(2, 3), None, jnp.array([2]))
        >>> print(statistics.prediction, jnp.exp(statistics.label_log_likelihood))
        [0] [0.155]
    """
    layer = _as_layer(
        features, weights, bias, logit_scale, softcap, num_classes, where, batch_axis, class_axis
    )
    rows, fixed = _as_rows(labels, layer, None)
    plan = _as_plan(_statistics, layer, labels, block_size)
    statistics = partial(_statistics_of_all, plan, layer.places.batch_axes)
    options = Options(None, None, None)
    return _on_mesh(statistics, layer, layer.places.batch, rows, fixed, options, None)


class _FreeRows(NamedTuple):
    """What belongs to one row each, beside its features, and has a gradient."""

    probabilities: Array | None  # Of all classes, or of those that are numbered.
    sample_weight: Array | None


class _FixedRows(NamedTuple):
    """The same without a gradient."""

    numbers: Array | None  # Of the label's class, or of several.
    features: Array | None  # The teacher's.
    exists: Array | None  # Which classes do.
    known: Known | None  # What the forward pass found, for the backward pass.


class _Bend(NamedTuple):
    """What becomes of a product's logits z: scale · c tanh(z / c)."""

    softcap: Number | None
    scale: Number | None


class _FreeShared(NamedTuple):
    """What every row shares beside the layer, and has a gradient."""

    bend: _Bend
    options: Options


class _FixedShared(NamedTuple):
    """The same without a gradient."""

    teacher: Affine | None
    bend: _Bend  # The teacher's.
    exists: Array | None


class _Plan(NamedTuple):
    """What is known when it is compiled."""

    step: Callable[..., Any]  # What is made of a block's logits; of (plan, z, shared, rows).
    is_formed: bool  # Labels are probabilities that a block forms by itself.
    num_classes: int
    block_size: int | None
    axes: Axes  # of the mesh, over which classes are spread inside `jax.shard_map`
    has_weights: bool = False  # A block tells the examples' weights, as only it has the labels;
    has_statistics: bool = False  # and their statistics.
    in_place: bool | None = True  # Whether exponentials take the logits' place; None without a gradient.

    @property
    def share(self) -> float:
        """Of a block's rows for a cost of classes.

        Formed labels take an array of their own. Statistics alone run no faster in larger blocks.
        """
        return 0.75 if self.is_formed or self.step is _statistics else 1.0


class _Layer(NamedTuple):
    """The arguments that make the logits, checked."""

    features: Array
    affine: Affine
    bend: _Bend
    places: Places
    num_classes: int
    exists: Array | None

    @property
    def shape(self) -> tuple[Any, ...]:
        """The logits'."""
        return *self.features.shape[:-1], self.affine.weights.shape[-1]

    @property
    def dtype(self) -> Any:
        """The logits'."""
        return arithmetic_dtype(self.features.dtype)


def _as_layer(features, weights, bias, logit_scale, softcap, num_classes, where, batch_axis, class_axis):
    x, affine = _as_affine("", features, weights, bias)
    w = affine.weights
    places = places_of(x, w, batch_axis, class_axis)
    classes = class_count(w, () if places.is_outside else places.class_axes)
    if known_size(classes) > MOST_CLASSES:
        raise ValueError(f"weights may have {MOST_CLASSES} classes at most, got {classes}")
    num_classes = classes if num_classes is None else as_count("num_classes", num_classes)
    if num_classes > classes:
        raise ValueError(
            f"num_classes must be at most the {classes} columns of weights, got {num_classes}"
        )
    if where is not None:
        where = as_array("where", where, "a bool mask of the classes that exist")
        where = as_where(where, w.shape[1:] if where.ndim < 2 else (*x.shape[:-1], *w.shape[1:]))
    return _Layer(x, affine, _as_bend("", logit_scale, softcap, x), places, num_classes, where)


def _as_plan(step, layer, labels, block_size):
    block_size = None if block_size is None else as_count("block_size", block_size)
    is_formed = isinstance(labels, SparseLabels | TeacherLabels)
    return _Plan(step, is_formed, layer.num_classes, block_size, layer.places.class_axes)


def _as_affine(of, features, weights, bias):
    """Features, and the layer on them; `of` is whose they are."""
    x, w = as_floats(f"{of}features", features), as_floats(f"{of}weights", weights)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0] or w.shape[-1] == 0:
        raise ValueError(
            f"{of}features (*batch, features) and {of}weights (features, classes) must fit, with one "
            f"class or more, got {x.shape} and {w.shape}"
        )
    b = None if bias is None else as_floats(f"{of}bias", bias)
    if b is not None and b.shape != w.shape[1:]:
        raise ValueError(f"{of}bias must have shape {w.shape[1:]}, one for each class, got {b.shape}")
    if x.dtype.itemsize == 1:
        # Their products are exact in bfloat16, where the logits' gradient has digits and range.
        x = x.astype(jnp.bfloat16)
    elif x.dtype == arithmetic_dtype(x.dtype):
        # Narrow features keep their dtype, and so do weights beside them until a product rounds them.
        x = x.astype(jnp.promote_types(x.dtype, arithmetic_dtype(w.dtype)))
    return x, Affine(w, b)


def _as_bend(of, scale, softcap, x):
    bends = ("softcap", softcap), ("logit_scale", scale)
    dtype = arithmetic_dtype(x.dtype)
    return _Bend(
        *(
            None if value is None else as_number(of + name, value, dtype, positive=True)
            for name, value in bends
        )
    )


def _as_rows(labels, layer, sample_weight):
    """What belongs to rows, checked, and the teacher."""
    v = None if sample_weight is None else as_weights(sample_weight, layer.shape[:-1], layer.dtype)
    probabilities = numbers = features = teacher = None
    bend = _Bend(None, None)
    if isinstance(labels, TeacherLabels):
        layer_of = labels.features, labels.weights, labels.bias
        features, teacher = jax.lax.stop_gradient(_as_affine("labels.", *layer_of))
        bend = jax.lax.stop_gradient(_as_bend("labels.", labels.logit_scale, labels.softcap, features))
        shape = *features.shape[:-1], teacher.weights.shape[-1]
        if shape != layer.shape:
            raise ValueError(
                f"labels.features and labels.weights must give logits of shape {layer.shape}, got {shape}"
            )
    elif isinstance(labels, SparseLabels):
        probabilities, numbers = _as_sparse(labels, layer, sample_weight)
    elif labels is not None:
        labels = as_labels(labels, layer.shape, (len(layer.shape) - 1,), sample_weight, layer.num_classes)
        is_probability = jnp.issubdtype(labels.dtype, jnp.floating)
        probabilities, numbers = (labels, None) if is_probability else (None, labels)
    of_all = of_rows = None
    if layer.exists is not None:
        of_all, of_rows = (layer.exists, None) if layer.exists.ndim == 1 else (None, layer.exists)
    rows = Given(_FreeRows(probabilities, v), _FixedRows(numbers, features, of_rows, None))
    return rows, _FixedShared(teacher, bend, of_all)


def _as_sparse(labels, layer, sample_weight):
    """The probabilities and the numbers of sparse labels."""
    numbers = as_array("labels.classes", labels.classes, "integers, several classes for each example")
    probabilities = as_floats("labels.probabilities", labels.probabilities)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(f"labels.classes must be integers, got {numbers.dtype}")
    batch = layer.shape[:-1]
    if numbers.shape != probabilities.shape or numbers.shape[:-1] != batch or not numbers.ndim:
        raise ValueError(
            f"labels.classes and labels.probabilities must both have shape {batch} and an axis more, got "
            f"{numbers.shape} and {probabilities.shape}"
        )
    counts = labels.probabilities
    if sample_weight is not None and is_known((sample_weight, counts)):
        counts = np.where(np.asarray(sample_weight)[..., None] == 0, 0, np.asarray(counts))
    return probabilities, as_index(labels.classes, numbers, layer.num_classes, counts)


def _on_mesh(function, layer, result, rows, fixed, options, normalizer):
    """`function` on each device's part of the arrays."""
    x, affine, bend, places, *_ = layer
    shared = Given(_FreeShared(bend, options), fixed)
    arguments = x, rows, affine, shared, normalizer
    if not places.is_outside:
        return function(*arguments)
    batch, classes = places.batch, places.class_axes
    by_class = P(*batch, *[None] * (x.ndim - 1 - len(batch)), classes)
    probabilities = by_class if rows.fixed.numbers is None else batch
    of_affine, options = (
        Affine._make([P(None, classes), P(classes)]),
        Options._make([P(classes), P(), P()]),
    )
    teacher = P() if fixed.teacher is None else of_affine
    of_rows = _FreeRows._make([probabilities, batch]), _FixedRows._make([batch, batch, by_class, P()])
    of_all = _FreeShared._make([P(), options]), _FixedShared._make([teacher, P(), P(classes)])
    specs = batch, Given(*of_rows), of_affine, Given(*of_all), P()
    return on_devices(function, specs, result, arguments)


def _cost(plan, reduction, batch_axes, x, rows, layer, shared, normalizer):
    """The cost of a device's rows and classes, that of all for "mean" and "sum", and statistics."""
    batch, dtype = x.shape[:-1], arithmetic_dtype(x.dtype)
    x, rows = _flat(spread((x, rows), batch_axes), len(batch))
    x = _sound(x, rows.free.sample_weight)
    weight = None if plan.has_weights else total(_total_weight(plan, x, rows, shared), batch_axes)
    if weight is not None and reduction != "none" and not _is_by_row(plan, x, rows, layer):
        # What one nat of each example adds to the result enters the gradient before its products.
        scale = reduced(jnp.ones((), dtype), weight, reduction, normalizer)
        cost, statistics = _total(plan, x, layer, shared, rows, scale)
        return total(cost, batch_axes), _unflat(statistics, batch)
    (cost, weights), statistics = _by_row(plan, x, layer, shared, rows)
    if weight is None:
        weight = total(jnp.sum(weights), batch_axes)
    cost = reduced(_unflat(cost, batch), weight, reduction, normalizer)
    return cost if reduction == "none" else total(cost, batch_axes), _unflat(statistics, batch)


def _total_weight(plan, x, rows, shared):
    """What all examples together weigh in the mean, where it does not take blocks to tell."""
    (probabilities, v), (numbers, *_) = rows
    w = None if plan.is_formed else shared.free.options.class_weight
    if w is None:
        return x.shape[0] if v is None else jnp.sum(v)
    return total_weight(probabilities if numbers is None else numbers, v, w, plan.axes)


def _statistics_of_all(plan, batch_axes, x, rows, layer, shared, _):
    """The statistics of a device's rows."""
    batch = x.shape[:-1]
    x, rows = _flat(spread((x, rows), batch_axes), len(batch))
    of_row, numbers = _by_row(plan, x, layer, shared, rows)
    return _unflat(_as_statistics(of_row, numbers), batch)


def _as_statistics(of_row, numbers):
    (log_normalizer, entropy, label), (prediction, label_rank) = of_row, numbers
    return HeadStatistics(log_normalizer, prediction, entropy, label, label_rank)


def _flat(rows, axes):
    """Rows in one axis instead of the leading `axes`."""
    return jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:axes]), *a.shape[axes:]), rows)


def _unflat(rows, batch):
    return jax.tree.map(lambda a: jnp.reshape(a, batch), rows)


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


# Steps: what is made of a block's logits.


def _costs(plan, z, shared, rows):
    """The cost of each row and its weight, and without a gradient statistics and what is known then."""
    axes, v, options = plan.axes, rows.free.sample_weight, shared.free.options
    z, bent, exists = _bent(plan, z, shared, rows)
    labels = _targets(plan, bent, shared, rows, exists)
    cost, found, known = example_costs(
        bent, labels, v, options, exists, axes, plan.in_place, plan.has_statistics, rows.fixed.known
    )
    weight = example_weights(labels, v, options.class_weight, axes) if plan.has_weights else None
    statistics = None if found is None else _as_statistics(*_with_numbers(plan, z, bent, labels, found))
    return (cost, weight), (statistics, known)


def _statistics(plan, z, shared, rows):
    """Each row's statistics, and without a gradient its numbers of classes and what is known then."""
    z, bent, exists = _bent(plan, z, shared, rows)
    labels = _targets(plan, bent, shared, rows, exists)
    statistics, known = row_statistics(plan.axes, bent, labels, rows.fixed.known)
    statistics, numbers = _with_numbers(plan, z, bent, labels, statistics)
    return statistics, (numbers, known)


def _with_numbers(plan, z, bent, labels, statistics):
    """Statistics that have a gradient, and the numbers beside them: prediction and rank."""
    axes, first = plan.axes, first_class(z, plan.axes)
    normalizer, entropy, likelihood, number = statistics
    # What bends logits changes no order, but may make them equal. All devices agree on the winner; a
    # minimum tells JAX so.
    prediction = smallest(number + first, axes) if bent is z else winner(axes, z)[:, 0]
    label_rank = None
    if labels is not None and not jnp.issubdtype(labels.dtype, jnp.floating):
        label_rank = rank(axes, z, labels[:, None] - first)[:, 0]
        # The last one where there is no rank, so that nobody counts it as a hit.
        label_rank = jnp.where(jnp.isfinite(likelihood), label_rank, plan.num_classes)
    return (normalizer, entropy, likelihood), (prediction, label_rank)


def _bent(plan, z, shared, rows):
    """The logits, the same as the softmax takes them, and which classes of this device exist.

    Where a class does not both are −∞. None stands for all classes.
    """
    exists = [
        across(mask, z.ndim) for mask in (shared.fixed.exists, rows.fixed.exists) if mask is not None
    ]
    if plan.num_classes != class_count(z, plan.axes):
        number = first_class(z, plan.axes) + jnp.arange(z.shape[-1])
        exists.append(across(number < plan.num_classes, z.ndim))
    exists = reduce(jnp.logical_and, exists) if exists else None
    seen = z if exists is None else taken_once(without(exists, z))
    is_bent = any(each is not None for each in shared.free.bend)
    bent = taken_once(without(exists, _after(shared.free.bend, z))) if is_bent else seen
    return seen, bent, exists


def _after(bend, z):
    c, scale = bend
    z = z if c is None else _capped(z, c)
    # A scale below 0 would turn the order of the classes round.
    return z if scale is None else _times(z, jnp.where(scale > 0, scale, jnp.nan))


# Their derivatives by c and by the scale have z as a factor, which may be −∞ where nothing follows it.
@jax.custom_jvp
def _times(z, scale):
    return z * scale


@_times.defjvp
def _times_jvp(primals, tangents):
    (z, scale), (d_z, d_scale) = primals, tangents
    return z * scale, d_z * scale + jnp.where(z == -jnp.inf, 0, z) * d_scale


@jax.custom_jvp
def _capped(z, c):
    return c * jnp.tanh(z / c)


@_capped.defjvp
def _capped_jvp(primals, tangents):
    (z, c), (d_z, d_c) = primals, tangents
    t = jnp.tanh(z / c)
    # 1 − t², which keeps its digits where t is 1 but for rounding.
    e = jnp.exp(-2 * jnp.abs(z / c))
    slope = 4 * e / ((1 + e) * (1 + e))
    return c * t, slope * d_z + (t - jnp.where(z == -jnp.inf, 0, z / c) * slope) * d_c


def _targets(plan, z, shared, rows, exists) -> Any:
    """Integer labels, or the probabilities of a block's rows."""
    (probabilities, _), (numbers, features, *_) = rows
    if shared.fixed.teacher is not None:
        taught = _after(shared.fixed.bend, logits_of(features, shared.fixed.teacher))
        probabilities, _ = shares(plan.axes, True, without(exists, taught))
        return probabilities.astype(z.dtype)
    if probabilities is None or numbers is None:
        return numbers if probabilities is None else probabilities
    probabilities = probabilities.astype(z.dtype)
    index = numbers - first_class(z, plan.axes)
    # What names no class makes its row NaN, through the first class, unless its probability is 0.
    is_nowhere = (numbers < 0) & (probabilities != 0)
    index = jnp.where(is_nowhere, 0, jnp.where(index < 0, z.shape[-1], index))
    row = jnp.arange(z.shape[0])[:, None]
    probabilities = jnp.where(is_nowhere, jnp.nan, probabilities)
    return jnp.zeros_like(z).at[row, index].add(probabilities, mode="drop")


# How steps are run: with the rules of their own, or with one of all blocks.


def _is_by_row(plan, x, rows, layer):
    return _is_one_block(plan, x, layer) or _is_shared((x, rows), layer.weights)


def _is_one_block(plan, x, layer):
    is_wide = x.dtype == arithmetic_dtype(x.dtype)
    return is_wide and fits_one_block(x.shape[0], layer.weights.shape[1], plan.block_size)


def _by_row(plan, x, layer, shared, rows):
    """What the step gives for each row."""
    is_shared = _is_shared((x, rows), layer.weights)
    x = x.astype(arithmetic_dtype(x.dtype)) if is_shared else x
    if not is_shared and not _is_one_block(plan, x, layer):
        return _each(plan, x, layer, shared, rows)
    run = _whole if _is_one_block(plan, x, layer) else _recomputed
    results, (others, _) = run(plan, x, layer, shared, rows)
    return results, others


@partial(jax.jit, static_argnums=0)
def _whole(plan, x, layer, shared, rows):
    """Of one block, which needs no rule but the step's own."""
    x, layer, shared, rows = _each_its_own(plan, x, layer, shared, rows)
    return in_one_block(partial(plan.step, plan), x, layer, shared, rows)


@partial(jax.jit, static_argnums=0)
def _recomputed(plan, x, layer, shared, rows):
    """Without a rule for all blocks: each is computed again for its gradient."""
    x, layer, shared, rows = _each_its_own(plan, x, layer, shared, rows)
    wide = layer._replace(weights=layer.weights.astype(x.dtype))
    step = partial(plan.step, plan)
    return for_each_row(step, plan.block_size, plan.share, "autodiff", x, wide, shared, rows)


def _each_its_own(plan, x, layer, shared, rows):
    """The same, each device's own: what varies along one mesh axis in one array does so in all."""
    along = frozenset().union(*map(varying, jax.tree.leaves((x, layer, shared, rows))))
    layer, shared, rows = spread((layer, shared, rows), along - set(plan.axes))
    return spread(x, along), layer, shared, rows


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
def _total(plan, x, layer, shared, rows, scale):
    (costs, _), (statistics, _) = _forward(plan, "nothing", x, layer, shared, rows)
    return _scaled(scale, jnp.sum(costs)), statistics


def _total_fwd(plan, x, layer, shared, rows, scale):
    cotangent = part(jnp.broadcast_to(scale, x.shape[:1]), plan.axes)
    results, gradients = _with_gradients(plan, x, layer, shared, rows, (cotangent, None))
    (costs, _), (statistics, _) = results
    total = jnp.sum(costs)
    # The arguments are kept for their dtypes alone.
    gradients = *gradients, part(total, plan.axes)
    return (_scaled(scale, total), statistics), (gradients, (x, layer, shared, rows, scale))


def _total_bwd(plan, residuals, cotangents):
    gradients, like = residuals
    cotangent, _ = cotangents
    return _cast(jax.tree.map(partial(_scaled, whole(cotangent, plan.axes)), gradients), like)


_total.defvjp(_total_fwd, _total_bwd)


# The step's results for each row. Its logits are computed again for the gradient, but not their sums.
@custom_vjp_static_first
def _each(plan, x, layer, shared, rows):
    results, (others, _) = _forward(plan, "nothing", x, layer, shared, rows)
    return results, others


def _each_fwd(plan, *primals):
    primals = values_of(primals)
    results, (others, known) = _forward(plan, "gradient", *primals)
    return (results, others), (primals, known)


def _each_bwd(plan, residuals, cotangents):
    like, known = residuals
    *others, rows = like
    rows = rows._replace(fixed=rows.fixed._replace(known=known))
    return _cast(_with_gradients(plan, *others, rows, wanted(cotangents[0]))[1], like)


_each.defvjp(_each_fwd, _each_bwd, symbolic_zeros=True)


@partial(jax.jit, static_argnums=(0, 1))  # Outside jit a loop would be compiled again for every call.
def _forward(plan, follows, x, layer, shared, rows):
    """What the step gives for each row."""
    plan = plan._replace(in_place=None)

    def step(z, shared, rows):
        # By its forward rule, which forward mode can differentiate where it cannot the cost with a rule.
        results, _, others = jax.vjp(lambda z: plan.step(plan, z, shared, rows), z, has_aux=True)
        return results, others

    return for_each_row(step, plan.block_size, plan.share, follows, x, layer, shared, rows)


@partial(jax.jit, static_argnums=0)
def _with_gradients(plan, x, layer, shared, rows, cotangents):
    """What the step gives for each row, and cotangents of its results as those of all others."""
    arguments = _each_its_own(plan, x, layer, shared, rows)
    # Where it varied as much before, no other device has a part of the gradient's sum.
    pairs = zip((x, layer.weights), (arguments[0], arguments[1].weights), strict=True)
    is_whole = IsWhole(*(varying(before) == varying(after) for before, after in pairs))
    step = partial(plan.step, plan)
    return with_gradients(step, plan.block_size, plan.share, is_whole, *arguments, cotangents)
