"""Softmax and log-softmax with analytic gradients, and the row sums that make both exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ._checks import FloatArray, MaskArray, arithmetic_dtype, as_logits, as_where


def softmax(logits: FloatArray, axis: int = -1, where: MaskArray | None = None) -> Float[Array, "..."]:
    """Softmax: each logit's share of the whole layer, a probability distribution over the classes.

    a_j = exp(z_j) / Σ_k exp(z_k), with the analytic gradient
    ∂a_j/∂z_i = a_j (1 − a_j) if i = j, −a_j a_i otherwise,
    so that a cotangent c gives ∂/∂z_j = a_j (c_j − Σ_k a_k c_k).

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        axis: The class axis.
        where: The classes that exist, broadcastable to `logits`; all if None.

    Returns:
        Probabilities of the logits' shape and dtype. bfloat16 and float16 are computed in float32 and
        rounded once. A class with logit −inf or masked by `where` has probability 0 and gradient 0;
        a row with no class left by `where` is all 0. A row with a NaN or +inf among its classes, or
        with only −inf, is NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers, or `where` is not bool.
        ValueError: If `axis` is out of range, there is no class, or `where` does not broadcast.

    Example:
        >>> print(softmax(jnp.array([0.0, 0.0, -jnp.inf])))
        [0.5 0.5 0. ]

    References:
        Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs".
    """
    return _along_last(_softmax, logits, axis, where, masked=0)


def log_softmax(
    logits: FloatArray, axis: int = -1, where: MaskArray | None = None
) -> Float[Array, "..."]:
    """Logarithm of the softmax, exact in both tails.

    ln a_j = (z_j − m) − log1p(r), where m is the row's maximum and r the sum of exp(z_k − m) over
    all classes but the winner: the winner's log-probability is −log1p(r), never 0 while r > 0.
    A cotangent c gives ∂/∂z_j = c_j (1 − a_j) − a_j Σ_{k≠j} c_k.

    Args:
        logits: Real floating-point numbers (*batch, classes), classes along `axis`.
        axis: The class axis.
        where: The classes that exist, broadcastable to `logits`; all if None.

    Returns:
        Log-probabilities in nats, of the logits' shape and dtype. bfloat16 and float16 are computed in
        float32 and rounded once. A class with logit −inf has −inf; so has one masked by `where`, whose
        gradient is 0. A row with a NaN or +inf among its classes, or with only −inf, is NaN.

    Raises:
        TypeError: If the logits are not real floating-point numbers, or `where` is not bool.
        ValueError: If `axis` is out of range, there is no class, or `where` does not broadcast.

    Example:
        >>> log_softmax(jnp.array([40.0, 0.0]))[0]  # jax.nn.log_softmax gives 0
        Array(-4.248354e-18, dtype=float32)
    """
    return _along_last(_log_softmax, logits, axis, where, masked=-jnp.inf)


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
    sums = row_sums(array)
    same = jnp.eye(array.shape[-1], dtype=bool)
    a = sums.probabilities
    on_diagonal = a * sums.complements
    jacobian = jnp.where(same, on_diagonal[..., None], -a[..., :, None] * a[..., None, :])
    return jacobian.astype(array.dtype)


class RowSums(NamedTuple):
    """The sums over each row of logits z from which everything exact is made.

    With m = max_k z_k and e_k = exp(z_k − m), the e_k add up to 1 + r: the winner's own 1 and the
    *rest* r, which is summed without the 1. So nothing is lost when r is far below 1, and
        a_k = e_k / (1 + r),    1 − a_k = (r + (1 − e_k)) / (1 + r),    −ln a_k = (m − z_k) + log1p(r)
    are sums, products and quotients of non-negative numbers, for the winner as for every other class.
    """

    maximum: Float[Array, "*batch 1"]  # m
    exponentials: Float[Array, "*batch classes"]  # e_k
    rest: Float[Array, "*batch 1"]  # r
    own: Float[Array, "*batch 1"]  # e_k of the class that was left out of the sum: a winner, or the label

    @property
    def probabilities(self) -> Float[Array, "*batch classes"]:
        """a_k."""
        return self.exponentials / (1 + self.rest)

    @property
    def complements(self) -> Float[Array, "*batch classes"]:
        """1 − a_k."""
        return (self.rest + (1 - self.exponentials)) / (1 + self.rest)

    def surprises(self, logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
        """−ln a_k."""
        return -below(logits.astype(self.maximum.dtype), self.maximum) + jnp.log1p(self.rest)


def row_sums(
    logits: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"] | None = None
) -> RowSums:
    """The row sums of the logits, in float32 or wider.

    `index` names the class of each row whose numbers need be exact, its label. If None they are exact
    for every class; finding the winner costs one more pass over the logits.
    """
    dtype = arithmetic_dtype(logits.dtype)
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)).astype(dtype)
    if index is None:
        index = _first_largest(logits.astype(dtype))
    exponentials = jnp.exp(below(logits.astype(dtype), maximum))
    own = jnp.exp(below(pick(logits, index).astype(dtype), maximum))
    # The sum without the class at `index`. If that is a winner, own is 1 and the rest has lost nothing.
    # If not, the winner's 1 is in the sum, and what adding it rounds off is below the last digit.
    # No exponential is above 1, so the smaller of it and the distance from `index` leaves that class out.
    rest = _sum_of_others(exponentials, index, jnp.minimum) + (own - 1)
    return RowSums(maximum, exponentials, rest, own)


def below(logits: Float[Array, "*batch classes"], maximum: Float[Array, "*batch 1"]) -> Array:
    """z_k − m, which is exactly 0 for a winner.

    A compiler may compute the logits again where they are used, and merge a product in them with this
    subtraction into one rounding: 0.3 x − m would then not be 0 for the winner. No product reaches
    across a minimum, and this one, with a number above every logit, changes nothing else.
    """
    return jnp.minimum(logits, 2 * jnp.abs(maximum) + 1) - maximum


def pick(
    logits: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]
) -> Float[Array, "*batch 1"]:
    """The logit of each row at `index`."""
    if is_sharded(logits):
        # A gather along a sharded axis is refused; a sum over it is not.
        return jnp.sum(jnp.where(is_class(logits, index), logits, 0), axis=-1, keepdims=True)
    return jnp.take_along_axis(logits, index, axis=-1, mode="clip")


# XLA on the CPU runs a sum, and what it sums, as one pass over the logits that stores nothing, as long
# as everything between is arithmetic on rows and columns. A comparison or a select there would store
# one more array of the logits' size. So classes are told apart by arithmetic on their numbers.


def _first_largest(values):
    """The first class of each row with the largest value, as (*batch, 1) integers."""
    values = jax.lax.stop_gradient(values)
    huge = jnp.finfo(values.dtype).max
    numbers = jnp.arange(values.shape[-1], dtype=values.dtype)
    # 0 at the largest, huge elsewhere: twice, so that the smallest difference that there is becomes huge.
    behind = -below(values, jnp.max(values, axis=-1, keepdims=True))
    behind = jnp.minimum(behind * huge, 1) * huge
    first = jnp.min(numbers + behind, axis=-1, keepdims=True)
    # Should no class be the largest, for NaN or because values were rounded otherwise here, any will do.
    return jnp.minimum(first, values.shape[-1] - 1).astype(jnp.int32)


def _sum_of_others(values, index, leave_out):
    """Σ_{k ≠ index} v_k. `leave_out(v, distance)` is 0 at distance 0 and v from distance 2."""
    *batch, classes = values.shape
    block = 0 if is_sharded(values) else _block(classes)
    if block:
        # Long rows as several short ones: faster, and a sum of sums rounds less.
        first = block * jnp.arange(classes // block, dtype=index.dtype)
        sums = _sum_of_others(values.reshape(-1, block), (index - first).reshape(-1, 1), leave_out)
        return jnp.sum(sums.reshape(*batch, classes // block), axis=-1, keepdims=True)
    # Twice the distance: at 1 the derivative of min(v, distance) would be undecided where v is 1 too.
    distance = jnp.abs(2 * jnp.arange(classes, dtype=values.dtype) - 2 * index.astype(values.dtype))
    return jnp.sum(leave_out(values, distance), axis=-1, keepdims=True)


def _block(classes):
    """The length of the blocks that a row of so many classes is summed in; 0 for one block."""
    if classes <= 4096:
        return 0
    # Blocks must not cross the boundary between two devices' classes, whose number is mostly a power
    # of two: the number of blocks keeps the most factors of two, then the blocks the most classes.
    lengths = [length for length in range(256, 2049) if classes % length == 0]
    return max(lengths, key=lambda n: ((classes // n) & -(classes // n), n), default=0)


def is_sharded(array: Array) -> bool:
    """Whether the array's type says that it is spread over an explicit mesh, which refuses gathers."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def is_class(logits: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]) -> Array:
    """Whether each class is the one of its row at `index`."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == index


def pull_back_softmax(sums: RowSums, cotangent: Float[Array, "*batch classes"]) -> Array:
    """A cotangent of the probabilities, as one of the logits: a_j (c_j − Σ_k a_k c_k)."""
    # Only differences of c matter. Measured from a winner's own c, the winner's term in Σ a c is
    # exactly 0, and the sum keeps its digits when the winner's a is all but 1.
    winner = _first_largest(sums.exponentials)
    relative = jnp.where(is_class(cotangent, winner), 0, cotangent - pick(cotangent, winner))
    a = sums.probabilities
    return a * (relative - jnp.sum(a * relative, axis=-1, keepdims=True))


def pull_back_log_softmax(sums: RowSums, cotangent: Float[Array, "*batch classes"]) -> Array:
    """A cotangent of the log-probabilities, as one of the logits: c_j (1 − a_j) − a_j Σ_{k≠j} c_k."""
    return cotangent * sums.complements - sums.probabilities * sum_of_others(cotangent)


def sum_of_others(values: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """Σ_{k≠j} v_k for each class j, which Σ_k v_k − v_j would lose where v_j is nearly all of it."""
    largest = _first_largest(jnp.abs(values))
    rest = _sum_of_others(values, largest, lambda v, distance: v * jnp.minimum(distance, 1))
    # All others but the largest, and the largest where the class is another.
    return jnp.where(is_class(values, largest), rest, (rest - values) + pick(values, largest))


@jax.custom_vjp
def _softmax(logits):
    return _softmax_fwd(logits)[0]


def _softmax_fwd(logits):
    sums = row_sums(logits)
    return sums.probabilities, sums


def _softmax_bwd(sums, cotangent):
    return (pull_back_softmax(sums, cotangent),)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


@jax.custom_vjp
def _log_softmax(logits):
    return _log_softmax_fwd(logits)[0]


def _log_softmax_fwd(logits):
    sums = row_sums(logits)
    return -sums.surprises(logits), sums


def _log_softmax_bwd(sums, cotangent):
    return (pull_back_log_softmax(sums, cotangent),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def _along_last(kernel, logits, axis, where, masked):
    """`kernel` over `axis`, in float32 or wider; `masked` for the classes that do not exist."""
    array, axis = as_logits(logits, axis)
    z = array.astype(arithmetic_dtype(array.dtype))
    exists = None if where is None else as_where(where, z.shape)
    if exists is not None:
        z = jnp.where(exists, z, -jnp.inf)
    result = jnp.moveaxis(kernel(jnp.moveaxis(z, axis, -1)), -1, axis).astype(array.dtype)
    return result if exists is None else jnp.where(exists, result, masked)
