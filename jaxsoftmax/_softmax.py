"""Softmax and log-softmax with analytic gradients, and the row sums that make both exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    probabilities = _along_last(_softmax, logits, axis, where)
    return probabilities if where is None else jnp.where(where, probabilities, 0)


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
    log_probabilities = _along_last(_log_softmax, logits, axis, where)
    return log_probabilities if where is None else jnp.where(where, log_probabilities, -jnp.inf)


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
    """The sums over a row of logits z from which everything exact is made.

    With m = max_k z_k and e_k = exp(z_k − m), the e_k add up to 1 + r: the winner's own 1 and the
    *rest* r, which is summed without the 1. So nothing is lost when r is far below 1, and
        a_k = e_k / (1 + r),    1 − a_k = (r + (1 − e_k)) / (1 + r),    −ln a_k = (m − z_k) + log1p(r)
    are sums, products and quotients of non-negative numbers, for the winner as for every other class.
    """

    maximum: Float[Array, "*batch 1"]  # m
    exponentials: Float[Array, "*batch classes"]  # e_k
    rest: Float[Array, "*batch 1"]  # r

    @property
    def probabilities(self) -> Float[Array, "*batch classes"]:
        """a_k."""
        return self.exponentials / (1 + self.rest)

    @property
    def complements(self) -> Float[Array, "*batch classes"]:
        """1 − a_k."""
        return (self.rest + (1 - self.exponentials)) / (1 + self.rest)

    @property
    def winners(self) -> Float[Array, "*batch classes"]:
        """1 for the classes at the maximum, 0 for the others."""
        return jnp.floor(self.exponentials)


def row_sums(logits: Float[Array, "*batch classes"]) -> RowSums:
    """The row sums of logits in the dtype to compute in."""
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - maximum)
    # Since 0 <= e <= 1, floor(e) picks the winners by arithmetic alone; with ties all but one stay.
    winners = jnp.floor(exponentials)
    rest = jnp.sum(exponentials - winners, axis=-1, keepdims=True)
    rest += jnp.sum(winners, axis=-1, keepdims=True) - 1
    return RowSums(maximum, exponentials, rest)


def pull_back_softmax(sums: RowSums, cotangent: Float[Array, "*batch classes"]) -> Array:
    """A cotangent of the probabilities, as one of the logits: a_j (c_j − Σ_k a_k c_k)."""
    # Only differences of c matter. Measured from the winner's own c, the winner's term in Σ a c is
    # exactly 0, and the sum keeps its digits when the winner's a is all but 1.
    winners = sums.winners
    at_winner = jnp.sum(winners * cotangent, -1, keepdims=True) / jnp.sum(winners, -1, keepdims=True)
    relative = cotangent - at_winner
    a = sums.probabilities
    return a * (relative - jnp.sum(a * relative, axis=-1, keepdims=True))


def pull_back_log_softmax(sums: RowSums, cotangent: Float[Array, "*batch classes"]) -> Array:
    """A cotangent of the log-probabilities, as one of the logits: c_j (1 − a_j) − a_j Σ_{k≠j} c_k."""
    others = jnp.sum(cotangent, axis=-1, keepdims=True) - cotangent
    return cotangent * sums.complements - sums.probabilities * others


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
    return (logits - sums.maximum) - jnp.log1p(sums.rest), sums


def _log_softmax_bwd(sums, cotangent):
    return (pull_back_log_softmax(sums, cotangent),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def _along_last(kernel, logits, axis, where):
    """`kernel` over `axis`, in float32 or wider, with masked classes at −inf."""
    array, axis = as_logits(logits, axis)
    z = array.astype(arithmetic_dtype(array.dtype))
    if where is not None:
        z = jnp.where(as_where(where, z.shape), z, -jnp.inf)
    result = jnp.moveaxis(kernel(jnp.moveaxis(z, axis, -1)), -1, axis)
    return result.astype(array.dtype)
