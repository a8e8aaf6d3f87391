"""Softmax and log-softmax with analytic gradients, and the row sums that make both exact."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ._checks import (
    Axes,
    FloatArray,
    MaskArray,
    MeshAxis,
    arithmetic_dtype,
    as_logits,
    as_where,
    spread_over,
    varying,
)


def softmax(
    logits: FloatArray,
    axis: int = -1,
    where: MaskArray | None = None,
    *,
    class_axis: MeshAxis = None,
) -> Float[Array, "..."]:
    """Softmax: each logit's share of the whole layer, a probability distribution over the classes.

    a_j = exp(z_j) / Σ_k exp(z_k), with the analytic gradient
    ∂a_j/∂z_i = a_j (1 − a_j) if i = j, −a_j a_i otherwise,
    so that a cotangent c gives ∂/∂z_j = a_j (c_j − Σ_k a_k c_k).

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        axis: The class axis.
        where: The classes that exist, a bool mask broadcastable to `logits`; all if None.
        class_axis: Inside `jax.shard_map` with `check_vma` True, the mesh axis or axes that the classes
            are spread over; elsewhere none is needed, sharded or not.

    Returns:
        Probabilities of the logits' shape and dtype. bfloat16 and float16 are computed in float32 and
        rounded once. A class with logit −inf or masked by `where` has probability 0 and gradient 0;
        a row with no class left by `where` is all 0. A row with a NaN or +inf among its classes, or
        with only −inf, is NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers, or `where` is not bool.
        ValueError: If `axis` is out of range, there is no class, `where` does not broadcast, or the
            logits are not spread over `class_axis`.

    Example:
        >>> print(softmax(jnp.array([0.0, 0.0, -jnp.inf])))
        [0.5 0.5 0. ]

    References:
        Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs".
    """
    return _along_last(_softmax, logits, axis, where, class_axis, masked=0)


def log_softmax(
    logits: FloatArray,
    axis: int = -1,
    where: MaskArray | None = None,
    *,
    class_axis: MeshAxis = None,
) -> Float[Array, "..."]:
    """Logarithm of the softmax, exact in both tails.

    ln a_j = (z_j − m) − log1p(r), where m is the row's maximum and r the sum of exp(z_k − m) over
    all classes but the winner: the winner's log-probability is −log1p(r), never 0 while r > 0.
    A cotangent c gives ∂/∂z_j = c_j (1 − a_j) − a_j Σ_{k≠j} c_k.

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        axis: The class axis.
        where: The classes that exist, a bool mask broadcastable to `logits`; all if None.
        class_axis: As for `softmax`.

    Returns:
        Log-probabilities in nats, of the logits' shape and dtype. bfloat16 and float16 are computed in
        float32 and rounded once. A class with logit −inf has −inf; so has one masked by `where`, whose
        gradient is 0. A row with a NaN or +inf among its classes, or with only −inf, is NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers, or `where` is not bool.
        ValueError: If `axis` is out of range, there is no class, `where` does not broadcast, or the
            logits are not spread over `class_axis`.

    Example:
        >>> log_softmax(jnp.array([40.0, 0.0]))[0]  # jax.nn.log_softmax gives 0
        Array(-4.248354e-18, dtype=float32)
    """
    return _along_last(_log_softmax, logits, axis, where, class_axis, masked=-jnp.inf)


def softmax_jacobian(logits: FloatArray) -> Float[Array, "..."]:
    """Jacobian of the softmax: the two cases of its derivative, side by side.

    J_ji = ∂a_j/∂z_i = a_j (1 − a_j) if i = j, −a_j a_i otherwise. The diagonal takes 1 − a_j from the
    other classes' sum, so it keeps its digits however near a_j is to 1.

    Args:
        logits: Real floating-point numbers (*batch, classes).

    Returns:
        Symmetric matrices (*batch, classes, classes) in the logits' dtype; every row sums to 0.
        A row of logits with NaN, +inf or only −inf gives a matrix of NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers.
        ValueError: If there is no class.

    Example:
        >>> print(softmax_jacobian(jnp.array([0.0, 0.0])))
        [[ 0.25 -0.25]
         [-0.25  0.25]]
    """
    array, _ = as_logits(logits, -1)
    sums = row_sums(array.astype(arithmetic_dtype(array.dtype)))
    same = jnp.eye(array.shape[-1], dtype=bool)
    a = sums.probabilities
    on_diagonal = a * sums.complements
    jacobian = jnp.where(same, on_diagonal[..., None], -a[..., :, None] * a[..., None, :])
    return jacobian.astype(array.dtype)


class RowSums(NamedTuple):
    """The sums over each row of logits z from which everything exact is made.

    With m = max_k z_k and e_k = exp(z_k − m), let w be a winner and r = Σ_{k≠w} e_k the *rest*, summed
    without it. Nothing is lost when r is far below e_w = 1, since
        a_k = e_k / (r + e_w),    1 − a_w = r / (r + e_w),    −ln a_w = ln (1 + r / e_w)
    are sums, products and quotients of non-negative numbers. The winner is told by its number, and its
    e_w need not come out as 1: a compiler may compute the same logits several times and round them
    differently.
    """

    winner: Integer[Array, "*batch 1"]
    maximum: Float[Array, "*batch 1"]  # m
    exponentials: Float[Array, "*batch classes"]  # e_k
    own: Float[Array, "*batch 1"]  # e_w
    rest: Float[Array, "*batch 1"]  # r

    @property
    def probabilities(self) -> Float[Array, "*batch classes"]:
        """a_k."""
        return share(self.exponentials, self._others)

    @property
    def complements(self) -> Float[Array, "*batch classes"]:
        """1 − a_k."""
        return share(self._others, self.exponentials)

    @property
    def log_sum(self) -> Float[Array, "*batch 1"]:
        """The logarithm of Σ_k e_k."""
        return jnp.log(self.rest + self.own)

    def surprises(self, logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
        """−ln a_k."""
        winning = is_class(logits, self.winner)
        return jnp.where(winning, jnp.log1p(self.rest / self.own), (self.maximum - logits) + self.log_sum)

    @property
    def _others(self):
        """Σ_{j≠k} e_j for each class k."""
        rest_without = self.rest + (self.own - self.exponentials)
        return jnp.where(is_class(self.exponentials, self.winner), self.rest, rest_without)


# Inside `jax.shard_map` the classes of a row may be spread over `axes` of the mesh. Then maxima and sums
# go over all of them, and a class's number counts from the first of this device's own: the number of
# another device's class is negative or beyond the last.


def row_sums(logits: Float[Array, "*batch classes"], axes: Axes = ()) -> RowSums:
    """The row sums of the logits, exact for every class; NaN where there is no distribution."""
    maximum = row_maximum(logits, axes=axes)
    winner = first_largest(logits, axes=axes) - first_class(logits, axes)
    own = jnp.exp(pick(logits, winner, axes) - maximum)
    exponentials = jnp.where(is_class(logits, winner), own, jnp.exp(logits - maximum))
    rest = sum_of_other_exponentials(logits, maximum, winner, axes)
    return RowSums(winner, maximum, exponentials, own, rest)


@jax.custom_jvp
def share(part: Array, others: Array) -> Array:
    """The part's share of part + others."""
    return part / (part + others)


@share.defjvp
def _share_jvp(primals, tangents):
    # Plain autodiff would subtract part / s² from 1 / s, and lose the share of others far smaller.
    (part, others), (d_part, d_others) = primals, tangents
    total = part + others
    tangent = (others / total) * (d_part / total) - (part / total) * (d_others / total)
    return share(part, others), tangent


def row_maximum(
    logits: Float[Array, "*batch classes"],
    offsets: Float[Array, " classes"] | None = None,
    axes: Axes = (),
) -> Float[Array, "*batch 1"]:
    """The maximum of each row plus offsets, in float32 or wider, held fixed: no cost changes with it.

    It is 0 where all logits are −inf, so that they differ from it. It may pass over NaN, as XLA on the
    CPU does in long rows; sums do not.
    """
    dtype = arithmetic_dtype(logits.dtype)
    z = jax.lax.stop_gradient(logits)
    if offsets is None:
        maximum = reduce_rows(jnp.max, lambda z, _: z.astype(dtype), z, axes=axes)
    else:
        given = jax.lax.optimization_barrier((z, jax.lax.stop_gradient(offsets)))
        maximum = reduce_rows(jnp.max, lambda z, _, more: z.astype(dtype) + more, *given, axes=axes)
    return jnp.where(maximum == -jnp.inf, 0, maximum)


# Exponentials are summed 2³² times as large, as squares of their roots: in float32 an e_k 87 nats below
# the maximum is 0, but 70,000 of them can add up to what costs and gradients still hold.
LIFT = 2.0**16


def lifted_roots(logits: Float[Array, "*batch classes"], maximum: Float[Array, "*#batch 1"]) -> Array:
    """The roots of the exponentials, 2¹⁶ times as large, in the maximum's dtype."""
    return LIFT * jnp.exp((logits.astype(maximum.dtype) - maximum) / 2)


def sum_of_other_exponentials(
    logits: Float[Array, "*batch classes"],
    maximum: Float[Array, "*batch 1"],
    index: Integer[Array, "*batch 1"],
    axes: Axes = (),
) -> Float[Array, "*batch 1"]:
    """Σ e_k over the classes of each row but the one at `index`."""

    def squares(z, first, m, index):
        return jnp.square(leave_out(lifted_roots(z, m), index - first))

    return reduce_rows(jnp.sum, squares, logits, maximum, index, axes=axes) / LIFT**2


def pick(
    logits: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"], axes: Axes = ()
) -> Float[Array, "*batch 1"]:
    """The logit of each row at `index`."""
    if is_sharded(logits):
        # A gather along a sharded axis is refused; a sum over it is not.
        return jnp.sum(jnp.where(is_class(logits, index), logits, 0), axis=-1, keepdims=True)
    picked = jnp.take_along_axis(*apart(logits, index), axis=-1, mode="clip")
    return from_its_device(picked, index, logits, axes)


def from_its_device(picked: Array, index: Integer[Array, "..."], values: Array, axes: Axes) -> Array:
    """What was picked of `values` at `index`, on the device that has the class of that number."""
    if not axes:
        return picked
    is_here = (index >= 0) & (index < values.shape[-1])
    return jax.lax.psum(jnp.where(is_here, picked, 0), axes)


def spread(tree: Any, axes: Iterable[str]) -> Any:
    """The same arrays as if they differed along the axes, and gradients by them are summed."""

    def each(array):
        missing = tuple(sorted(set(axes) - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(each, tree)


def class_count(values: Float[Array, "*batch classes"], axes: Axes) -> int:
    """How many classes there are on all devices."""
    return values.shape[-1] * (jax.lax.axis_size(axes) if axes else 1)


def first_class(values: Float[Array, "*batch classes"], axes: Axes) -> Array | int:
    """The number, among those of all devices, of the first of this device's classes."""
    return values.shape[-1] * jax.lax.axis_index(axes) if axes else 0


def over_classes(
    reduce: Callable[..., Array], values: Float[Array, "*batch classes"], axes: Axes
) -> Float[Array, "*batch 1"]:
    """A sum, maximum or minimum over each row, the classes of other devices included."""
    reduced = reduce(values, axis=-1, keepdims=True)
    across = {jnp.sum: jax.lax.psum, jnp.max: jax.lax.pmax, jnp.min: jax.lax.pmin}
    return across[reduce](reduced, axes) if axes else reduced


# XLA on the CPU runs a sum, and what it sums, as one pass over the logits that stores nothing, as long
# as everything between is arithmetic on rows and columns. A comparison or a select there would store
# one more array of the logits' size. So classes are told apart by arithmetic on their numbers.


def reduce_rows(
    reduce: Callable[..., Array],
    terms: Callable[..., Array],
    values: Float[Array, "*batch classes"],
    *columns: Array,
    axes: Axes = (),
) -> Float[Array, "*batch 1"]:
    """A sum or maximum over each row of `terms(values, first, *columns)`.

    Long rows are taken in parts: faster, and a sum of sums rounds less. `first` is the number of the
    first class in each part. Every column (*batch, 1) is given to all parts of its row, and of what is
    (classes,) each part is given its own.
    """
    *batch, classes = values.shape
    block = 0 if is_sharded(values) else _block(classes)
    if not block:
        row, *given = apart(values, *columns)
        return over_classes(reduce, terms(row, 0, *given), axes)
    first = block * jnp.arange(classes // block, dtype=jnp.int32)[:, None]
    split = classes // block, block
    parts = (
        values.reshape(*batch, *split),
        *(c.reshape(split) if c.shape == (classes,) else c[..., None] for c in columns),
    )
    # Without the barriers the compiler would apply elementwise terms before the reshape, and make one
    # reduction of the two: each runs several times as long.
    part, *given = jax.lax.optimization_barrier(parts)
    of_parts = reduce(terms(part, first, *given), axis=-1)
    return over_classes(reduce, jax.lax.optimization_barrier(of_parts), axes)


def apart(logits: Array, *columns: Array) -> tuple[Array, ...]:
    """The same arrays; for narrow logits so that the compiler does not know them again from other uses.

    XLA on the CPU stores what it widens or broadcasts for two uses, and stores nothing for one.
    """
    arrays = (logits, *columns)
    return arrays if logits.dtype.itemsize >= 4 else jax.lax.optimization_barrier(arrays)


def first_largest(
    values: Float[Array, "*batch classes"], ulps: int = 4, axes: Axes = ()
) -> Integer[Array, "*batch 1"]:
    """The first class of each row that has the largest value, give or take so many roundings.

    Unlike other numbers of classes, its number counts from the first class of all devices.
    """
    values = jax.lax.stop_gradient(values)
    limits = jnp.finfo(values.dtype)
    numbers = jnp.arange(values.shape[-1], dtype=values.dtype)
    if axes:
        numbers += jnp.asarray(first_class(values, axes), values.dtype)
    maximum = over_classes(jnp.max, values, axes)
    # The compiler may have rounded the values otherwise here than for the maximum, where it multiplies.
    behind = (maximum - values) - jnp.minimum(ulps * limits.eps * jnp.abs(maximum), 1)
    # 0 for the largest, huge elsewhere: twice, so that the smallest difference there is becomes huge.
    behind = jnp.minimum(jnp.maximum(behind, 0) * limits.max, 1) * limits.max
    first = over_classes(jnp.min, numbers + behind, axes)
    # Where none is found, for NaN or infinity, any will do.
    return jnp.minimum(first, class_count(values, axes) - 1).astype(jnp.int32)


def leave_out(values: Array, index: Array) -> Array:
    """The values, but 0 for the class of each row at `index`; NaN stays NaN even there."""
    distance = jnp.abs(jnp.arange(values.shape[-1], dtype=values.dtype) - index.astype(values.dtype))
    return values * jnp.minimum(distance, 1)


def _block(classes):
    """The length of the blocks that a row of so many classes is summed in; 0 for one block."""
    if classes <= 4096:
        return 0
    # Blocks must not cross the boundary between two devices' classes, whose number is mostly a power
    # of two: the number of blocks keeps the most factors of two, then the blocks the most classes.
    lengths = [length for length in range(1024, 4097) if classes % length == 0]
    return max(lengths, key=lambda n: ((classes // n) & -(classes // n), n), default=0)


def is_sharded(array: Array) -> bool:
    """Whether the array's type says that it is spread over an explicit mesh, which refuses gathers."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def is_class(logits: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]) -> Array:
    """Whether each class is the one of its row at `index`."""
    # Spread as the logits are: between arrays that are, a select takes no other condition.
    place = jax.typeof(logits).sharding if is_sharded(logits) else None
    numbers = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1, out_sharding=place)
    return numbers == index


def pull_back_softmax(sums: RowSums, cotangent: Float[Array, "*batch classes"], axes: Axes = ()) -> Array:
    """A cotangent of the probabilities, as one of the logits: a_j (c_j − Σ_k a_k c_k)."""
    # Only differences of c matter. Measured from a winner's own c, the winner's term in Σ a c is
    # exactly 0, and the sum keeps its digits when the winner's a is all but 1.
    winner = is_class(cotangent, sums.winner)
    relative = jnp.where(winner, 0, cotangent - pick(cotangent, sums.winner, axes))
    a = sums.probabilities
    return a * (relative - over_classes(jnp.sum, a * relative, axes))


def pull_back_log_softmax(
    sums: RowSums, cotangent: Float[Array, "*batch classes"], axes: Axes = ()
) -> Array:
    """A cotangent of the log-probabilities, as one of the logits: c_j (1 − a_j) − a_j Σ_{k≠j} c_k."""
    return cotangent * sums.complements - sums.probabilities * sum_of_others(cotangent, axes)


def sum_of_others(
    values: Float[Array, "*batch classes"], axes: Axes = ()
) -> Float[Array, "*batch classes"]:
    """Σ_{k≠j} v_k for each class j, which Σ_k v_k − v_j would lose where v_j is nearly all of it."""
    largest = first_largest(jnp.abs(values), axes=axes) - first_class(values, axes)

    def others(v, first, index):
        return leave_out(v, index - first)

    rest = reduce_rows(jnp.sum, others, values, largest, axes=axes)
    # All others but the largest, and the largest where the class is another.
    return jnp.where(is_class(values, largest), rest, (rest - values) + pick(values, largest, axes))


# A function with a rule, whose first argument is no array but known when it is compiled.
custom_vjp_static_first: Callable[[Callable[..., Any]], Any] = partial(
    jax.custom_vjp, nondiff_argnums=(0,)
)


@custom_vjp_static_first
def _softmax(axes, logits):
    return _softmax_fwd(axes, logits)[0]


def _softmax_fwd(axes, logits):
    sums = row_sums(logits, axes)
    return sums.probabilities, sums


def _softmax_bwd(axes, sums, cotangent):
    return (pull_back_softmax(sums, cotangent, axes),)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


@custom_vjp_static_first
def _log_softmax(axes, logits):
    return _log_softmax_fwd(axes, logits)[0]


def _log_softmax_fwd(axes, logits):
    sums = row_sums(logits, axes)
    return -sums.surprises(logits), sums


def _log_softmax_bwd(axes, sums, cotangent):
    return (pull_back_log_softmax(sums, cotangent, axes),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def _along_last(kernel, logits, axis, where, class_axis, masked):
    """`kernel` over `axis`, in float32 or wider; `masked` for the classes that do not exist."""
    array, axis = as_logits(logits, axis)
    axes = spread_over("logits", array, "class_axis", class_axis)
    z = array.astype(arithmetic_dtype(array.dtype))
    exists = None if where is None else as_where(where, z.shape)
    if exists is not None:
        z = jnp.where(exists, z, -jnp.inf)
    result = jnp.moveaxis(kernel(axes, jnp.moveaxis(z, axis, -1)), -1, axis).astype(array.dtype)
    return result if exists is None else jnp.where(exists, result, masked)
