"""Softmax and log-softmax with analytic gradients, exact in both tails."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Integer

from ._checks import (
    FloatArray,
    MaskArray,
    arithmetic_dtype,
    as_logits,
    as_where,
    classes_back,
    classes_last,
    with_hints,
)
from ._mesh import Axes, MeshAxis, spread_over
from ._rows import (
    RowSums,
    bounded,
    centred,
    differences,
    is_class,
    pick,
    rounded,
    shares,
    sum_of_all_but,
    sum_over_classes,
    sums_without_winner,
)


@with_hints
def softmax(
    logits: FloatArray,
    axis: int | tuple[int, ...] | None = -1,
    where: MaskArray | None = None,
    *,
    class_axis: MeshAxis = None,
) -> Float[Array, "..."]:
    """Softmax: each logit's share of the whole layer, a probability distribution over the classes.

        a_j = exp z_j / Σ_k exp z_k
        ∂a_j/∂z_i = a_j (1 − a_j) if i = j, −a_j a_i otherwise

    So a cotangent c of the probabilities is this one of the logits:

        a_j (c_j − Σ_k a_k c_k)

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        axis: The class axis; several count as one, None as all.
        where: The classes that exist, a bool mask broadcastable to `logits`; all if None.
        class_axis: Inside `jax.shard_map`, the mesh axis or axes that the classes are spread over;
            elsewhere none is needed, sharded or not.

    Returns:
        Probabilities of the logits' shape and dtype. bfloat16 and float16 are computed in float32 and
        rounded once. A class with logit −inf or masked by `where` has probability 0 and gradient 0;
        a row with no class left by `where` is all 0. A row with a NaN or +inf among its classes, or
        with only −inf, is NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers, or `where` is not bool.
        ValueError: If `axis` is out of range, there is no class, `where` does not broadcast, or the
            logits are not spread over `class_axis`.

    Note:
        Second derivatives work as forward over reverse. Forward mode alone (`jax.jvp`, `jax.jacfwd`)
        wants `without_custom_rules(softmax)`.

    Example:
        >>> print(softmax(jnp.array([0.0, 0.0, -jnp.inf])))
        [0.5 0.5 0. ]

    References:
        Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs".
    """
    return _along_last(_softmax, logits, axis, where, class_axis, masked=0)


@with_hints
def log_softmax(
    logits: FloatArray,
    axis: int | tuple[int, ...] | None = -1,
    where: MaskArray | None = None,
    *,
    class_axis: MeshAxis = None,
) -> Float[Array, "..."]:
    """Logarithm of the softmax, exact in both tails.

        ln a_j = (z_j − m) − log1p(r)

    m is the row's maximum, and r the sum of exp(z_k − m) over all classes but the winner. So the
    winner's log-probability is −log1p(r), and never 0 while r > 0. A cotangent c is this one of the
    logits:

        c_j (1 − a_j) − a_j Σ_{k≠j} c_k

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        axis: The class axis; several count as one, None as all.
        where: The classes that exist, a bool mask broadcastable to `logits`; all if None.
        class_axis: As for `softmax`.

    Returns:
        Log-probabilities in nats, of the logits' shape and dtype. bfloat16 and float16 are computed in
        float32 and rounded once. A class with logit −inf has −inf; so has one masked by `where`, whose
        gradient is 0 (NaN in a float8 that has no infinity). A row with a NaN or +inf among its classes,
        or with only −inf, is NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers, or `where` is not bool.
        ValueError: If `axis` is out of range, there is no class, `where` does not broadcast, or the
            logits are not spread over `class_axis`.

    Note:
        Second derivatives work as forward over reverse. Forward mode alone (`jax.jvp`, `jax.jacfwd`)
        wants `without_custom_rules(log_softmax)`.

    Example:
        >>> log_softmax(jnp.array([40.0, 0.0]))[0]  # jax.nn.log_softmax gives 0
        Array(-4.248354e-18, dtype=float32)
    """
    return _along_last(_log_softmax, logits, axis, where, class_axis, masked=-jnp.inf)


def softmax_jacobian(logits: FloatArray) -> Float[Array, "..."]:
    """Jacobian of the softmax: the two cases of its derivative, side by side.

        J_{ji} = ∂a_j/∂z_i = a_j (1 − a_j) if i = j, −a_j a_i otherwise

    The diagonal takes 1 − a_j from the other classes' sum, so it keeps its digits however near a_j is
    to 1.

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
    row = row_of((), array.astype(arithmetic_dtype(array.dtype)))
    same = jnp.eye(array.shape[-1], dtype=bool)
    a = row.probabilities
    on_diagonal = a * row.complements
    jacobian = jnp.where(same, on_diagonal[..., None], -a[..., :, None] * a[..., None, :])
    return jacobian.astype(array.dtype)


class Row(NamedTuple):
    """Logits, and the sums over their rows without the winner w, the first class with the largest logit.

    The rest r = Σ_{k≠w} e_k and e_w make every class's share exact:
        a_k = e_k / (r + e_w),    1 − a_w = r / (r + e_w),    −ln a_w = ln (1 + r / e_w)
    are sums, products and quotients of non-negative numbers; of no other class is e_k nearly all.
    """

    logits: Float[Array, "*batch classes"]
    sums: RowSums

    @property
    def probabilities(self) -> Float[Array, "*batch classes"]:
        """a_k."""
        _, maximum, _, rest = self.sums
        of_others = jnp.exp(self._wide - maximum) / self.sums.total
        return jnp.where(self._is_winner, share(self.sums.own, rest), of_others)

    @property
    def complements(self) -> Float[Array, "*batch classes"]:
        """1 − a_k. Only the winner's a may be more than ½, so no other loses anything."""
        of_winner = share(self.sums.others, self.sums.own)
        return jnp.where(self._is_winner, of_winner, 1 - self.probabilities)

    @property
    def log_sum(self) -> Float[Array, "*batch 1"]:
        """The logarithm of Σ_k e_k."""
        return jnp.log(self.sums.total)

    @property
    def surprise_of_winner(self) -> Float[Array, "*batch 1"]:
        """−ln a_w."""
        return jnp.log1p(self.sums.others / self.sums.own)

    @property
    def surprises(self) -> Float[Array, "*batch classes"]:
        """−ln a_k."""
        of_others = (self.sums.maximum - self._wide) + self.log_sum
        return jnp.where(self._is_winner, self.surprise_of_winner, of_others)

    @property
    def behind(self) -> Float[Array, "*batch classes"]:
        """z_w − z_k, as far as there are numbers; 0 for the winner."""
        behind = bounded((self.sums.maximum - self._wide) + self.sums.ahead)
        return jnp.where(self._is_winner, 0, behind)

    @property
    def _is_winner(self):
        return is_class(self.logits, self.sums.number)

    @property
    def _wide(self):
        return rounded(self.logits.astype(self.sums.maximum.dtype))


def row_of(axes: Axes, logits: Float[Array, "*batch classes"]) -> Row:
    """The logits with their sums, exact for every class; NaN where there is no distribution."""
    return Row(logits, sums_without_winner(axes, logits))


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


def pull_back_softmax(
    a: Float[Array, "*batch classes"],
    winner: Integer[Array, "*batch 1"],
    cotangent: Float[Array, "*batch classes"],
    axes: Axes = (),
) -> Float[Array, "*batch classes"]:
    """A cotangent of the probabilities, as one of the logits: a_j (c_j − Σ_k a_k c_k)."""
    # Only differences of c matter. Measured from a winner's own c, the winner's term in Σ a c is
    # exactly 0, and the sum keeps its digits when the winner's a is all but 1.
    relative = differences(axes, cotangent, winner)
    return a * (relative - sum_over_classes(a * relative, axes))


class Split(NamedTuple):
    """The sum of a row's values, one for each class, but the winner's; and the winner's."""

    others: Float[Array, "*batch 1"]
    own: Float[Array, "*batch 1"]


def split_at_winner(axes: Axes, row: Row, values: Float[Array, "*batch classes"]) -> Split:
    """The values' sum in two."""
    number = row.sums.number
    return Split(sum_of_all_but(axes, values, number), pick(values, number, axes))


def pull_back_log_softmax(
    row: Row,
    a: Float[Array, "*batch classes"],
    cotangent: Float[Array, "*batch classes"],
    axes: Axes = (),
) -> Float[Array, "*batch classes"]:
    """A cotangent of ln a as one of the logits: c_j − a_j Σ_k c_k = c_j (1 − a_j) − a_j Σ_{k≠j} c_k."""
    split = split_at_winner(axes, row, cotangent)
    # Only the winner's a may be more than ½, so only its c_j may be lost in a_j Σ_k c_k.
    of_others = cotangent - a * sum(split)
    return jnp.where(is_class(a, row.sums.number), pulled_back_at_winner(row.sums, split), of_others)


def pulled_back_at_winner(sums: RowSums, split: Split) -> Float[Array, "*batch 1"]:
    """The same at the winner."""
    return split.own * share(sums.others, sums.own) - share(sums.own, sums.others) * split.others


def without(exists: Array | None, logits: Float[Array, "..."]) -> Array:
    """The logits, −inf for the classes that do not exist; None for those that all do."""
    if exists is None:
        return logits
    # There is no infinity in some formats of one byte.
    wide = logits if logits.dtype.itemsize > 1 else logits.astype(arithmetic_dtype(logits.dtype))
    return jnp.where(exists, wide, -jnp.inf)


# A function with a rule, whose first argument is no array but known when it is compiled.
custom_vjp_static_first: Callable[[Callable[..., Any]], Any] = partial(
    jax.custom_vjp, nondiff_argnums=(0,)
)


def values_of(primals: Any) -> Any:
    """Arguments as a forward rule with `symbolic_zeros` is given them, without what else it is told."""
    is_leaf = lambda each: isinstance(each, CustomVJPPrimal)  # noqa: E731
    return jax.tree.map(lambda each: each.value, primals, is_leaf=is_leaf)


def wanted(cotangents: Any) -> Any:
    """Cotangents as its backward rule is given them, None for a result that nothing depends on."""
    return jax.tree.map(lambda each: None if isinstance(each, SymbolicZero) else each, cotangents)


@custom_vjp_static_first
def _softmax(axes, logits):
    return _shares(axes, False, logits)[0].astype(logits.dtype)


def _softmax_fwd(axes, logits):
    a, leader = _shares(axes, True, logits)
    return a.astype(logits.dtype), (a, leader)


def _softmax_bwd(axes, residuals, cotangent):
    a, leader = residuals
    c = cotangent.astype(a.dtype)
    # As `pull_back_softmax`, which is linear, and so can be transposed.
    d_logits = a * centred(axes, a, c, leader)
    return (d_logits.astype(cotangent.dtype),)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _shares(axes, in_place, logits):
    return shares(axes, in_place, logits)


@_shares.defjvp
def _shares_jvp(axes, in_place, primals, tangents):
    # The softmax's Jacobian is symmetric.
    a, leader = _shares(axes, in_place, *primals)
    d_a = pull_back_softmax(a, leader, tangents[0].astype(a.dtype), axes)
    return (a, leader), (d_a, np.zeros(leader.shape, jax.dtypes.float0))


@custom_vjp_static_first
def _log_softmax(axes, logits):
    return _log_softmax_fwd(axes, logits)[0]


def _log_softmax_fwd(axes, logits):
    row = row_of(axes, logits)
    return -row.surprises.astype(logits.dtype), row


def _log_softmax_bwd(axes, row, cotangent):
    c = cotangent.astype(row.sums.maximum.dtype)
    d_logits = pull_back_log_softmax(row, row.probabilities, c, axes)
    return (d_logits.astype(cotangent.dtype),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def _along_last(kernel, logits, axis, where, class_axis, masked):
    """`kernel` over `axis`, in float32 or wider; `masked` for the classes that do not exist."""
    z, axis, axes = as_spread_logits(logits, axis, class_axis)
    exists = None if where is None else as_where(where, z.shape)
    return _of_existing((kernel, axes, axis, masked), z, exists)


def as_spread_logits(logits: Any, axis: Any, class_axis: Any) -> tuple[Array, tuple[int, ...], Axes]:
    """Logits, the axes of their classes, and the axes of the mesh over which these are spread."""
    array, axis = as_logits(logits, axis)
    axes = spread_over("logits", array, "class_axis", class_axis)
    if axes and len(axis) > 1:
        raise ValueError(f"class_axis goes with logits that have one class axis, got axis {axis}")
    return array, axis, axes


@partial(jax.jit, static_argnums=0)  # Outside jit each operation would be compiled by itself.
def _of_existing(plan, logits, exists):
    kernel, axes, axis, masked = plan
    result = kernel(axes, classes_last(without(exists, logits), axis))
    result = classes_back(result, axis, logits.shape).astype(logits.dtype)
    return result if exists is None else jnp.where(exists, result, masked)
