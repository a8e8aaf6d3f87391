"""What is refused, and in which words: shapes, dtypes, labels."""

import inspect
import math
import operator
import reprlib
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer, Num

FloatArray = Float[Array, "..."] | Float[np.ndarray, "..."]
Labels = Integer[Array, "..."] | Integer[np.ndarray, "..."] | int | np.integer | FloatArray
LabelArray = Labels | list[Any] | tuple[Any, ...]
MaskArray = Bool[Array, "..."] | Bool[np.ndarray, "..."]
WeightArray = Num[Array, "..."] | Num[np.ndarray, "..."] | MaskArray

Number = int | float | Num[Array, ""] | np.number

MOST_CLASSES = 2**31 - 1  # An int32 numbers them.

Function = TypeVar("Function", bound=Callable[..., Any])

# What people bring with them from other libraries.
HINTS = {
    "dim": "the class axis is axis",
    "dtype": "convert the logits or the result, for example with .astype(jnp.float32)",
    "initial": "leave it out, since where alone says which classes exist",
    "ignore_index": "pass sample_weight=labels != ignore_index",
    "input": "pass the logits first, then the labels",
    "target": "pass the labels second",
    "ce_weight": "pass class_weight",
    "lse_square_scale": "pass z_loss",
    "weight": "pass class_weight, one number for each class, or sample_weight, one for each example",
    "sample_weight": "leave examples out of the result instead, for example by `where` of jnp.mean",
}


def with_hints(function: Function) -> Function:
    """The function, whose error for an argument that it does not have says what to write instead."""
    known = inspect.signature(function).parameters

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - known.keys():
            hint = HINTS.get(name, "its docstring has all of them")
            raise TypeError(
                f"{function.__name__} has no argument {name!r}: {hint}. The README's table 'Coming from "
                "elsewhere' names the arguments of other libraries"
            )
        return function(*args, **kwargs)

    return cast(Function, called)


def as_array(name: str, value: Any, what: str = "an array of numbers") -> Array:
    """`value` as an array, of whatever dtype."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be {what}, got {reprlib.repr(value)}") from error


def as_floats(name: str, value: Any) -> Array:
    """`value` as an array of real floating-point numbers."""
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be real floating-point numbers, got {array.dtype}: "
            f"convert them first, for example with {name}.astype(jnp.float32)"
        )
    return array


def as_logits(logits: Any, axis: Any) -> tuple[Array, tuple[int, ...]]:
    """Floating-point logits, and their class axes counted from the front."""
    array = as_floats("logits", logits)
    if array.ndim == 0:
        raise ValueError("logits must have a class axis, got a scalar: pass shape (*batch, classes)")
    given = range(array.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    try:
        if any(isinstance(each, bool) for each in given):
            raise TypeError
        axes = [operator.index(each) for each in given]
    except TypeError:
        raise TypeError(
            f"axis must be an integer, a tuple of them, or None for all, got {axis!r}"
        ) from None
    if not all(-array.ndim <= each < array.ndim for each in axes):
        raise ValueError(
            f"axis must be in [{-array.ndim}, {array.ndim}) for logits of shape {array.shape}, got {axis}"
        )
    axes = tuple(each % array.ndim for each in axes)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"axis must name one axis of the logits, or several different ones, got {axis}")
    classes = class_size(array.shape, axes)
    if classes == 0:
        raise ValueError(
            f"logits must have at least one class, got shape {array.shape} with none along axis {axis}"
        )
    if known_size(classes) > MOST_CLASSES:
        raise ValueError(
            f"logits may have {MOST_CLASSES} classes at most, which int32 can number, got {classes}"
        )
    return array, axes


def batch_of(shape: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    """The sizes of all axes but those of the classes."""
    return tuple(size for i, size in enumerate(shape) if i not in axes)


def class_size(shape: tuple[Any, ...], axes: tuple[int, ...]) -> Any:
    """The number of classes, along all their axes."""
    return math.prod(shape[axis] for axis in axes)


def classes_last(array: Array, axes: tuple[int, ...]) -> Array:
    """The array with its class axes as one, the last."""
    moved = jnp.moveaxis(array, axes, range(-len(axes), 0))
    if len(axes) == 1:
        return moved
    return moved.reshape(*batch_of(array.shape, axes), class_size(array.shape, axes))


def classes_back(array: Array, axes: tuple[int, ...], shape: tuple[Any, ...]) -> Array:
    """The reverse of `classes_last`, for an array of the given shape."""
    if len(axes) > 1:
        array = array.reshape(*batch_of(shape, axes), *(shape[axis] for axis in axes))
    return jnp.moveaxis(array, range(-len(axes), 0), axes)


def known_size(size: Any, otherwise: int = 0) -> int:
    """The size, or `otherwise` for a symbolic one of `jax.export`."""
    return size if isinstance(size, int) else otherwise


def arithmetic_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype to compute in: float32 for anything narrower, `dtype` itself otherwise."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def as_where(where: Any, shape: tuple[Any, ...]) -> Array:
    """The mask of the classes that exist, in the logits' full shape."""
    mask = as_array("where", where, "a bool mask of the classes that exist")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"where must be a bool mask of the classes that exist, got {mask.dtype}")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"where {mask.shape} must broadcast to the logits' {shape}: it tells which classes exist. To "
            "leave examples out, pass sample_weight"
        ) from None


def as_labels(
    labels: Any,
    shape: tuple[Any, ...],
    axes: tuple[int, ...],
    weight: Any,
    num_classes: Any = None,
) -> Array:
    """Labels for logits of `shape`: int32 (*batch), −1 for one that names no class, or probabilities.

    Probabilities have their classes last. Where `weight` is 0 the label may be anything. Integer labels
    name one of the first `num_classes` classes, of all if None.
    """
    if hasattr(labels, "_fields"):
        raise TypeError(
            f"labels must be integers or probabilities, got a {type(labels).__name__}: only the costs of "
            "features take SparseLabels and TeacherLabels"
        )
    array = as_array("labels", labels, "integers (one class per example) or probabilities")
    batch = batch_of(shape, axes)
    classes = class_size(shape, axes) if num_classes is None else num_classes
    if jnp.issubdtype(array.dtype, jnp.integer):
        if array.shape != batch:
            hint = ": for one-hot labels use a floating-point dtype" if array.shape == shape else ""
            raise ValueError(
                f"integer labels must have shape {batch}, one for each row of logits {shape} "
                f"along axis {', '.join(map(str, axes))}, got {array.shape}{hint}"
            )
        # The labels as given: inside jit, jnp.asarray has already made a tracer of a known array.
        return as_index(labels, array, classes, weight)
    if jnp.issubdtype(array.dtype, jnp.floating):
        # One row may stand for all examples, but one number not for all classes.
        given = array.shape
        try:
            fits = all(given[axis - len(shape)] == shape[axis] for axis in axes)
            array = jnp.broadcast_to(array, shape)
        except (IndexError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"probability labels must have the logits' shape {shape}, or that of one row for all "
                f"examples, got {given}: pass integer labels to name one class per example"
            )
        if given == batch:
            raise ValueError(
                f"floating-point labels {given} may be classes, one for each example, or a row of "
                "probabilities for all: pass classes as integers, and a row as labels[None]"
            )
        return classes_last(array, axes)
    raise TypeError(
        f"labels must be integers (one class per example) or floating-point probabilities, got "
        f"{array.dtype}: convert them first, for example with labels.astype(jnp.int32)"
    )


def as_index(given: Any, labels: Array, classes: Any, weight: Any) -> Array:
    """Integer labels as int32, −1 for one that names no class, which is refused where it is known.

    Where the weight is known to be 0 it is not.
    """
    _check_range(given, classes, weight)
    return _as_index(labels, classes)


def _check_range(labels: Any, classes: Any, weight: Any) -> None:
    if not (is_known(labels) and (weight is None or is_known(weight))):
        return
    known = np.asarray(labels)
    if weight is not None:
        known = known[np.asarray(weight) != 0]
    if known.size and not (0 <= known.min() and known.max() < classes):
        raise ValueError(
            f"labels must be in [0, {classes}) for {classes} classes, got {known.min()} to "
            f"{known.max()}. To leave an example out of a cost, set its sample_weight to 0; to leave it "
            "out of statistics, give it any class and do not count it"
        )


@partial(jax.jit, static_argnums=1)
def _as_index(labels: Array, classes: Any) -> Array:
    # Compared before any narrowing cast: a label beyond int32 must not wrap round to a class.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    exists = (labels >= 0) & (labels < classes)
    return jnp.where(exists, labels, -1).astype(jnp.int32)


def is_known(value: Any) -> bool:
    """Whether the numbers can be read here and now, without waiting for another machine."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def as_weights(sample_weight: Any, batch: tuple[Any, ...], dtype: jax.typing.DTypeLike) -> Array:
    """`sample_weight` broadcast to one number for each example; a bool mask becomes 0 and 1."""
    array = as_array("sample_weight", sample_weight)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"sample_weight must be real numbers or a bool mask, got {array.dtype}")
    if array.shape != batch:
        extra = [i for i, size in enumerate(array.shape) if size == 1]
        drop = next((i for i in extra if array.shape[:i] + array.shape[i + 1 :] == batch), None)
        hint = "" if drop is None else f": drop axis {drop}, for example with jnp.squeeze(v, {drop})"
        raise ValueError(
            f"sample_weight must have shape {batch}, one for each example, got {array.shape}{hint}"
        )
    return array.astype(dtype)


def as_class_weight(class_weight: Any, classes: Any, dtype: jax.typing.DTypeLike) -> Array:
    """`class_weight` as one number for each class."""
    array = as_array("class_weight", class_weight)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"class_weight must be real numbers, got {array.dtype}")
    if array.shape != (classes,):
        raise ValueError(
            f"class_weight must have shape ({classes},), one for each class, got {array.shape}"
        )
    return array.astype(dtype)


def as_number(
    name: str,
    value: Any,
    dtype: jax.typing.DTypeLike,
    most: float | int = np.inf,
    positive: bool = False,
) -> Any:
    """`value` as a scalar from 0 on, or positive and finite; arrays in `dtype`, Python numbers kept."""
    array = as_array(name, value, "a real number")
    kinds = (jnp.floating, jnp.integer)
    if array.ndim or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be a real scalar, got {array.dtype} of shape {array.shape}")
    if positive and is_known(value) and not 0 < np.asarray(value) < np.inf:
        raise ValueError(f"{name} must be a number above 0, got {value}")
    if is_known(value) and not 0 <= np.asarray(value) <= most:
        limit = "at least 0" if most == np.inf else f"from 0 to {most}"
        raise ValueError(f"{name} must be {limit}, got {value}")
    return float(value) if isinstance(value, int | float) else array.astype(dtype)


def as_normalizer(
    reduction: Any,
    normalizer: Any,
    sample_weight: Any,
    class_weight: Any,
    dtype: jax.typing.DTypeLike,
) -> Any:
    """What "mean" divides by, if it is given; else the sum of the weights must be of use for it."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer goes with reduction 'mean', got {reduction!r}")
        return as_number("normalizer", normalizer, dtype)
    if reduction == "mean":
        of_examples, of_classes = (
            np.asarray(weight if weight is not None and is_known(weight) else (), np.float64)
            for weight in (sample_weight, class_weight)
        )
        if np.any(of_examples < 0) and np.sum(of_examples) <= 0:
            raise ValueError(
                f"the mean divides by the sum of the sample weights, which is {np.sum(of_examples):.6g}, "
                "as some are negative: set normalizer, for example to the number of examples"
            )
        if np.any(of_classes < 0):
            raise ValueError(
                f"the mean divides by a sum of class weights, and {np.min(of_classes):.6g} is one of "
                "them: set normalizer, for example to the number of examples"
            )
    return None


def as_count(name: str, value: Any) -> int:
    """`value` as a positive Python integer."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count
