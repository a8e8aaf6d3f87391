"""Custom rules that must be linear in their cotangents, tested where they stand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.extend import linear_util
from jax.extend.core import primitives

from ._comparison import usual_ulps
from ._rules import HOLDERS, Rewriting, is_inexact

# What JAX itself has a derivative for, which is linear. Other operations may have rules of their own.
_KNOWN = {value.name for value in vars(primitives).values() if isinstance(value, jax_core.Primitive)}
_KNOWN |= HOLDERS | {"optimization_barrier", "platform_index", "pvary", "reshard", "split"}
_KNOWN -= {"custom_linear_solve"}


class LinearityTests(Rewriting):
    """Has each `custom_vjp` rule in a jaxpr give NaN where it is not linear in its cotangent c.

    Beside r(c), which the program needs anyway, the rule gives r(λ · some of c) and r(λ · the rest), and
    their sum must be λ r(c). So a rule runs twice more, and the layers between rules do not. What is
    linear but for rounding may become NaN as well. Other operations whose rules may not be linear raise
    `NotImplementedError`.
    """

    def _equation(self, equation: Any) -> Any:
        name = equation.primitive.name
        # In the rule of a custom_jvp the backward rule stands in the second.
        if name not in ("custom_vjp_call", "custom_lin"):
            if name not in _KNOWN:
                raise NotImplementedError(f"the rule of {name} cannot be tested alone")
            return super()._equation(equation)
        backward = equation.params["bwd"]
        tested = linear_util.wrap_init(
            partial(_linear_or_nan, backward.call_wrapped, len(equation.outvars)),
            debug_info=backward.debug_info,
        )
        return equation.replace(params=equation.params | {"bwd": tested})


def _linear_or_nan(backward: Callable[..., Any], outputs: int, *arguments: Any) -> Any:
    """A backward rule's gradients, of which those that are not linear in its cotangents are NaN."""
    first = len(arguments) - outputs
    residuals, cotangents = arguments[:first], arguments[first:]
    numbers = [c for c in cotangents if is_inexact(c)]
    if not numbers:
        return backward(*arguments)
    # Many digits show what rounds one number.
    narrowest = max((c.dtype for c in numbers), key=lambda dtype: jnp.finfo(dtype).eps)
    factor = float(np.real(np.asarray(-50.3, narrowest)))

    def run(part):
        parts = [part(i, c) if is_inexact(c) else c for i, c in enumerate(cotangents)]
        return backward(*residuals, *parts)

    def gradients_of(result):
        # From JAX 0.12 on, a dictionary of what the rule logs comes behind them.
        return result[0] if isinstance(result, tuple) else result

    some = gradients_of(run(lambda i, c: jnp.where(_are_some(i, c), factor * c, 0)))
    rest = gradients_of(run(lambda i, c: jnp.where(_are_some(i, c), 0, factor * c)))
    result = run(lambda _, c: c)

    def tested(gradient, some, rest):
        if not is_inexact(gradient):
            return gradient
        whole = factor * gradient
        largest = jnp.max(jnp.abs(some) + jnp.abs(rest) + jnp.abs(whole), initial=0) / 2
        rounding = usual_ulps(gradient.dtype) * float(jnp.finfo(gradient.dtype).eps) * largest
        is_linear = jnp.abs(some + rest - whole) <= rounding
        return jnp.where(is_linear & jnp.isfinite(largest), gradient, jnp.nan)

    gradients = list(map(tested, gradients_of(result), some, rest))
    return (gradients, *result[1:]) if isinstance(result, tuple) else gradients


def _are_some(i, c):
    """Every other entry of output i, beginning with the first output's first."""
    at = (jax.lax.broadcasted_iota(np.int32, c.shape, axis) for axis in range(c.ndim))
    return sum(at, i) % 2 == 0
