"""Custom gradient rules removed, and gradients compared with and without them."""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jaxtyping import PRNGKeyArray


def without_custom_rules(function: Callable[..., Any], jvp: bool = False) -> Callable[..., Any]:
    """The same function with every `jax.custom_vjp` inside it replaced by what it computes.

    `jax.grad` of the result is plain automatic differentiation, and forward mode works on it. Rules
    are found wherever they sit: in nested functions, jit, scan, while, cond, vmap and checkpoint.

    Args:
        function: Any function that JAX can trace. Array arguments are traced; others, Python numbers
            among them, are passed on as they are.
        jvp: Whether `jax.custom_jvp` rules go too.

    Returns:
        A function of the same arguments and results. It is traced anew at every call; put `jax.jit`
        around it to trace once. A rule that a derivative inside `function` has already used, or that
        stands in a `custom_jvp` rule, is no longer there to be removed.

    Raises:
        TypeError: From the returned function, if a result is not an array.

    Example:
        >>> @jax.custom_vjp
        ... def double(x):
        ...     return 2 * x
        >>> double.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (3 * cotangent,))
        >>> float(jax.grad(double)(1.0)), float(jax.grad(without_custom_rules(double))(1.0))
        (3.0, 2.0)
    """

    @functools.wraps(function)
    def plain(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

        def of_arrays(arrays):
            filled = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                filled[i] = array
            new_args, new_kwargs = jax.tree.unflatten(tree, filled)
            return function(*new_args, **new_kwargs)

        arrays = [leaves[i] for i in traced]
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        results = jax_core.jaxpr_as_fun(_without_rules(closed, jvp))(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), map(jnp.asarray, results))

    return plain


def _without_rules(part: Any, jvp: bool) -> Any:
    """A jaxpr, or whatever holds jaxprs among an equation's parameters, without custom rules."""
    # Open before closed: from JAX 0.12 on the two are one class.
    if isinstance(part, jax_core.Jaxpr):
        return part.replace(eqns=[_equation_without_rules(equation, jvp) for equation in part.eqns])
    if isinstance(part, jax_core.ClosedJaxpr):
        return part.replace(jaxpr=_without_rules(part.jaxpr, jvp))
    if isinstance(part, tuple | list):
        parts = [_without_rules(each, jvp) for each in part]
        return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
    return part


def _equation_without_rules(equation: Any, jvp: bool) -> Any:
    removed = ("custom_vjp_call", "custom_jvp_call") if jvp else ("custom_vjp_call",)
    if equation.primitive.name in removed:
        body = _without_rules(equation.params["call_jaxpr"], jvp)
        # A call of the body takes the rule's place: tracing one writes the equation for us.
        call = jax.make_jaxpr(jax.jit(jax_core.jaxpr_as_fun(body)))(*body.in_avals).eqns[0]
        return equation.replace(primitive=call.primitive, params=call.params)
    params = {name: _without_rules(value, jvp) for name, value in equation.params.items()}
    return equation.replace(params=params)


class GradientRow(NamedTuple):
    """One parameter's gradients: the function's own, the reference's, and the float64 reference's.

    An error is a largest absolute one. `ulps` are such errors in units of the last place of the
    float64 gradient's largest entry, in the parameter's dtype.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    largest: float
    difference: float
    worst: tuple[int, ...]
    custom: float
    reference: float
    custom_ulps: float
    reference_ulps: float


class GradientComparison(NamedTuple):
    """What `compare_gradients` found: `rows` as plain data, `str()` as a table."""

    rows: tuple[GradientRow, ...]

    def __str__(self) -> str:
        """The rows as a table."""
        header = (
            "parameter", "shape", "dtype", "largest entry", "largest difference", "at",
            "custom", "reference", "custom error", "reference error",
        )  # fmt: skip
        lines = [
            (
                row.path, str(row.shape), row.dtype, f"{row.largest:.3e}", f"{row.difference:.1e}",
                str(row.worst), f"{row.custom:.6g}", f"{row.reference:.6g}",
                f"{row.custom_ulps:.3g} ulp", f"{row.reference_ulps:.3g} ulp",
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *lines)
        )

    def assert_close(self, ulps: float | int = 32) -> None:
        """Raises `AssertionError` with the table if a custom gradient is wrong.

        Right means: within `ulps` units in the last place of the float64 gradient's largest entry. The
        unit grows with the gradient's own scale, not with the array. NaN and infinity are wrong unless
        float64 has the same.
        """
        wrong = [row.path for row in self.rows if not row.custom_ulps <= ulps]
        if wrong:
            raise AssertionError(
                f"custom gradient more than {ulps} ulp from float64 for {', '.join(wrong)}:\n{self}"
            )


def compare_gradients(
    function: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
) -> GradientComparison:
    """Compares a function's gradient with a reference's, and both with float64.

    Args:
        function: Returns any pytree of arrays; usually it uses `jax.custom_vjp`.
        *args: Its arguments, any pytrees. Gradients are taken for every floating-point array and
            Python float among them; the rest is passed on.
        reference: A function of the same meaning; `without_custom_rules(function)` if None. It is
            also run in float64, as the truth for both: so far as plain autodiff in float64 is right, and
            as the function draws no random numbers and holds no float32 carries of its own.
        argnums: The arguments to differentiate in; all if None.
        key: Draws the cotangents, one for each entry of each output; `jax.random.key(0)` if None. A
            function of one scalar has cotangent 1, so that its gradient is compared.

    Returns:
        A `GradientComparison` with a row for each floating-point leaf. NaN and infinity count as
        equal to themselves and as infinitely far from anything else.

    Raises:
        ValueError: If there is nothing to differentiate, `argnums` is out of range, or the outputs'
            shapes differ.

    Example:
        >>> comparison = compare_gradients(jnp.tanh, jnp.array([0.5]))
        >>> comparison.assert_close()
        >>> comparison.rows[0].shape
        (1,)
    """
    reference = reference or without_custom_rules(function)
    key = jax.random.key(0) if key is None else key
    named_leaves, tree = jax.tree_util.tree_flatten_with_path(args)
    chosen = range(len(args)) if argnums is None else _positions(argnums, len(args))
    at = [i for i, (path, leaf) in enumerate(named_leaves) if path[0].idx in chosen and _is_float(leaf)]
    if not at:
        raise ValueError("args must hold a floating-point array to differentiate in, found none")
    leaves = [leaf for _, leaf in named_leaves]
    floats = [jnp.asarray(leaves[i]) for i in at]

    def vjp(f, floats):
        def of_floats(*floats):
            filled = list(leaves)
            for i, leaf in zip(at, floats, strict=True):
                filled[i] = leaf
            outputs = jax.tree.leaves(f(*jax.tree.unflatten(tree, filled)))
            return [jnp.asarray(output) for output in outputs if _is_float(output)]

        return jax.vjp(of_floats, *floats)

    outputs, pull_back = vjp(function, floats)
    if not outputs:
        raise ValueError("function must return a floating-point array to differentiate, got none")
    cotangents = _cotangents(outputs, key)
    custom = pull_back(cotangents)
    outputs, pull_back = vjp(reference, floats)
    plain = pull_back(_like(cotangents, outputs))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        outputs, pull_back = vjp(reference, [jnp.asarray(leaf, jnp.float64) for leaf in floats])
        truth = [np.asarray(leaf) for leaf in pull_back(_like(cotangents, outputs))]

    names = _argument_names(function, len(args))
    rows = []
    for i, *gradients in zip(at, custom, plain, truth, strict=True):
        path = named_leaves[i][0]
        name = names[path[0].idx] + jax.tree_util.keystr(path[1:])
        rows.append(_row(name, *gradients))
    return GradientComparison(tuple(rows))


def _row(name: str, custom: Any, reference: Any, truth: np.ndarray) -> GradientRow:
    dtype = custom.dtype
    custom, reference = np.asarray(custom, np.float64), np.asarray(reference, np.float64)
    difference = _distance(custom, reference)
    worst = np.unravel_index(np.argmax(difference), difference.shape) if difference.size else ()
    largest = np.max(np.abs(truth), initial=0, where=np.isfinite(truth))
    limits = jnp.finfo(dtype)
    exponent = np.floor(np.log2(max(largest, float(limits.tiny))))
    ulp = float(limits.eps) * 2.0**exponent

    return GradientRow(
        path=name,
        shape=custom.shape,
        dtype=str(dtype),
        largest=float(largest),
        difference=float(np.max(difference, initial=0)),
        worst=tuple(int(i) for i in worst),
        custom=float(custom[worst]) if custom.size else 0.0,
        reference=float(reference[worst]) if custom.size else 0.0,
        custom_ulps=float(np.max(_distance(custom, truth), initial=0) / ulp),
        reference_ulps=float(np.max(_distance(reference, truth), initial=0) / ulp),
    )


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a − b|, where NaN or infinity is 0 from its like and infinitely far from all else."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf))


def _cotangents(outputs: list[Any], key: PRNGKeyArray) -> list[Any]:
    """A random cotangent for each output; 1 for a single scalar."""
    if [output.shape for output in outputs] == [()]:
        return [jnp.ones((), outputs[0].dtype)]
    keys = jax.random.split(key, len(outputs))
    return [
        jax.random.normal(each, out.shape, out.dtype) for each, out in zip(keys, outputs, strict=True)
    ]


def _like(cotangents: list[Any], outputs: list[Any]) -> list[Any]:
    """The same cotangents in the dtypes of another run's outputs."""
    shapes = [cotangent.shape for cotangent in cotangents]
    if shapes != [output.shape for output in outputs]:
        raise ValueError(
            f"function and reference must return floating-point arrays of the same shapes, got {shapes} "
            f"and {[output.shape for output in outputs]}"
        )
    return [c.astype(output.dtype) for c, output in zip(cotangents, outputs, strict=True)]


def _positions(argnums: int | Sequence[int], count: int) -> list[int]:
    """`argnums` counted from the front."""
    numbers = [operator.index(n) for n in ([argnums] if isinstance(argnums, int) else argnums)]
    if not all(-count <= n < count for n in numbers):
        raise ValueError(f"argnums must be in [{-count}, {count}) for {count} arguments, got {argnums}")
    return [n % count for n in numbers]


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """The function's own names for its positional arguments, where it has them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    return names[:count] + [f"args[{i}]" for i in range(len(names), count)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_float(leaf: Any) -> bool:
    if isinstance(leaf, float):
        return True
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
