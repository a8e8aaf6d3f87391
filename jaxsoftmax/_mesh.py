"""Where rows and classes are on a mesh of devices, and what a sum over all classes is there."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

MeshAxis = str | tuple[str, ...] | None
Axes = tuple[str, ...]

# Inside `jax.shard_map` the classes of a row may be spread over `axes` of the mesh. Then maxima and sums
# go over all of them, and a class's number counts from the first of this device's own: the number of
# another device's class is negative or beyond the last.


def as_axes(name: str, axis: Any) -> Axes:
    """Names of mesh axes, as many as are given."""
    try:
        axes = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    except TypeError:
        raise TypeError(
            f"{name} must be the name of an axis of the mesh, or several, got {axis!r}"
        ) from None
    known = jax.sharding.get_abstract_mesh().axis_names
    unknown = [each for each in axes if each not in known]
    if unknown:
        raise ValueError(
            f"{name} must name axes of the mesh, which has {known}, got {axis!r}: "
            "set a mesh with jax.set_mesh, or call inside jax.shard_map"
        )
    return axes


def varying(array: ArrayLike) -> frozenset[str]:
    """The mesh axes between whose devices an array may differ, inside `jax.shard_map`."""
    return jax.typeof(array).mat.varying


def spread_over(what: str, array: Array, name: str, axis: Any) -> Axes:
    """The mesh axes, inside a `jax.shard_map`, that an array is spread over."""
    axes = as_axes(name, axis)
    inside = jax.sharding.get_abstract_mesh().manual_axes
    if not set(axes) <= set(inside):
        raise ValueError(
            f"{name} must name axes of a jax.shard_map around this call, which has {inside}, got {axis!r}"
        )
    missing = set(axes) - varying(array)
    if missing and _is_checked(axes):
        raise ValueError(
            f"{what} must be spread over {name} {axis!r} by the jax.shard_map around this call, "
            f"but they are not over {sorted(missing)}"
        )
    return axes


# With its check_vma False a `jax.shard_map` does not know what differs between devices. There each device
# has a part of the cotangent of what is the same on all of them, and the parts' sum is the cotangent.


def _is_checked(axes):
    """Whether types tell, inside a `jax.shard_map`, what differs between devices along the axes."""
    return bool(varying(jax.lax.axis_index(axes)))


def whole(cotangents: Any, axes: Axes) -> Any:
    """Cotangents of what is the same on all devices along the axes, of which each may have a part."""
    return cotangents if not axes or _is_checked(axes) else jax.lax.psum(cotangents, axes)


def part(cotangent: Array, axes: Axes) -> Array:
    """What `whole` makes the cotangent of again."""
    return cotangent if not axes or _is_checked(axes) else cotangent / device_count(axes)


def spread(tree: Any, axes: Iterable[str]) -> Any:
    """The same arrays as if they differed along the axes, and gradients by them are summed."""

    def each(array):
        missing = tuple(sorted(set(axes) - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(each, tree)


def summed_like(gradient: Array, primal: ArrayLike) -> Array:
    """A gradient as a sum over the devices between which what it is by does not differ."""
    axes = tuple(sorted(varying(gradient) - varying(primal)))
    return spread(jax.lax.psum(gradient, axes), varying(primal))


def total(values: Any, axes: Axes) -> Any:
    """The sum over all devices along the axes."""
    return jax.lax.psum(values, axes) if axes else values


def largest(values: Array, axes: Axes) -> Array:
    """The maximum over all devices along the axes."""
    return jax.lax.pmax(values, axes) if axes else values


def smallest(values: Array, axes: Axes) -> Array:
    """The minimum over all devices along the axes."""
    return jax.lax.pmin(values, axes) if axes else values


def class_count(values: Float[Array, "*batch classes"], axes: Axes) -> Any:
    """How many classes there are on all devices: a number, symbolic for a symbolic shape."""
    return values.shape[-1] * device_count(axes)


def device_count(axes: Axes) -> int:
    """How many devices there are along the axes."""
    return jax.lax.axis_size(axes) if axes else 1


def first_class(values: Float[Array, "*batch classes"], axes: Axes) -> Array | int:
    """The number, among those of all devices, of the first of this device's classes."""
    return values.shape[-1] * jax.lax.axis_index(axes) if axes else 0


def from_its_device(picked: Array, index: Integer[Array, "..."], values: Array, axes: Axes) -> Array:
    """What was picked of `values` at `index`, on the device that has the class of that number."""
    if not axes:
        return picked
    is_here = (index >= 0) & (index < values.shape[-1])
    return jax.lax.psum(jnp.where(is_here, picked, 0), axes)


def is_sharded(array: Array) -> bool:
    """Whether the array's type says that it is spread over an explicit mesh, which refuses gathers."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def is_local(array: Array) -> bool:
    """Whether the array is spread over no axes that the compiler handles, as far as types tell."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (set(mesh.axis_names) - set(mesh.manual_axes) or is_sharded(array))


def class_numbers(values: Float[Array, "*batch classes"]) -> Integer[Array, "*batch classes"]:
    """0, 1, 2, … along the classes, in the values' shape."""
    # Spread as the values are: between arrays that are, a select takes no other condition.
    place = jax.typeof(values).sharding if is_sharded(values) else None
    return jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1, out_sharding=place)


def across(vector: Array, ndim: int) -> Array:
    """What is one for each class, as a row of an array with so many axes."""
    # Told, or jax_numpy_rank_promotion would have to allow it.
    return jnp.expand_dims(vector, tuple(range(ndim - vector.ndim)))


class Places(NamedTuple):
    """Where on a mesh rows and classes are."""

    batch: P  # The leading axes of the features.
    batch_axes: Axes
    class_axes: Axes
    is_outside: bool  # Of `jax.shard_map`, so that arrays have their full shapes.


def places_of(x: Array, w: Array, batch_axis: Any, class_axis: Any) -> Places:
    """Where features and weights are, as the axes given tell or else the arrays' types."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        batch_axes = spread_over("features", x, "batch_axis", batch_axis)
        return Places(P(), batch_axes, spread_over("weights", w, "class_axis", class_axis), False)
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
    return Places(batch, batch_axes, class_axes, bool(batch_axes or class_axes))


def on_devices(function: Callable[..., Any], specs: Any, result: Any, arguments: Any) -> Any:
    """`function(*arguments)` under `jax.shard_map`: on each device's part of the arrays."""
    arguments = jax.tree.map(jnp.asarray, arguments)
    return jax.shard_map(function, in_specs=specs, out_specs=result)(
        *jax.tree.map(_placed, specs, arguments)
    )


def _names(places):
    """The mesh axes in a partition spec."""
    return tuple(jax.tree.leaves(tuple(places)))


def _placed(place, arrays):
    """The arrays where they must be, as far as types tell: shard_map itself moves along other axes."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return arrays
    place = P(*(tuple(axis for axis in _names([part]) if axis in explicit) or None for part in place))
    return jax.tree.map(lambda array: jax.reshard(array, place), arrays)
