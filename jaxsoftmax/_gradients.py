"""Custom gradient rules removed, and gradients compared with and without them."""

import functools
import inspect
import math
import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.extend.core.primitives import closed_call_p
from jaxtyping import PRNGKeyArray


def without_custom_rules(function: Callable[..., Any], jvp: bool = False) -> Callable[..., Any]:
    """The same function with every `jax.custom_vjp` inside it replaced by what it computes.

    `jax.grad` of the result is plain automatic differentiation, and forward mode works on it. Rules
    are found wherever they sit: in nested functions, jit, scan, while, cond, vmap, checkpoint, shard_map
    and other rules. `jax.custom_batching.custom_vmap` rules go with them: they have no reverse mode.

    Args:
        function: Any function that JAX can trace. Array arguments are traced; others, Python numbers
            among them, are passed on as they are.
        jvp: Whether `jax.custom_jvp` rules go too.

    Returns:
        A function of the same arguments and results. It is traced anew at every call; put `jax.jit`
        around it to trace once. Like all that is traced, `function` must have no side effects. A rule
        that a derivative inside it, or inside a rule, has already used (as in `jax.lax.custom_root`) is
        no longer there to be removed.

    Raises:
        TypeError: If `function` cannot be called; from the returned function, if a result is not an
            array.

    Example:
        >>> @jax.custom_vjp
        ... def double(x):
        ...     return 2 * x
        >>> double.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (3 * cotangent,))
        >>> float(jax.grad(double)(1.0)), float(jax.grad(without_custom_rules(double))(1.0))
        (3.0, 2.0)
    """
    _refuse_uncallable(function=function)

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


# What stands in a rule's place: a call of the function that the rule belongs to, which each keeps under
# another name. Rules for vmap go too, as their calls have no reverse mode at all.
_BODIES = {"custom_vjp_call": "call_jaxpr", "custom_vmap_call": "call"}


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
    bodies = _BODIES | {"custom_jvp_call": "call_jaxpr"} if jvp else _BODIES
    if equation.primitive.name in bodies:
        body = _without_rules(equation.params[bodies[equation.primitive.name]], jvp)
        return equation.replace(primitive=closed_call_p, params={"call_jaxpr": body})
    params = {name: _without_rules(value, jvp) for name, value in equation.params.items()}
    if equation.primitive.name == "custom_jvp_call":
        params["jvp_jaxpr_fun"] = _RuleWithoutRules(params["jvp_jaxpr_fun"])
    return equation.replace(params=params)


class _RuleWithoutRules:
    """The rule of a `custom_jvp` that stays, without the custom rules that it uses itself."""

    def __init__(self, rule: Any):
        self._rule = rule
        self.debug_info = rule.debug_info

    def call_wrapped(self, *zeros: bool) -> tuple[Any, Any, Any]:
        jaxpr, constants, out_zeros = self._rule.call_wrapped(*zeros)
        return _without_rules(jaxpr, jvp=False), constants, out_zeros


class GradientRow(NamedTuple):
    """One output's values or one parameter's gradients: the function's own beside the reference's.

    Errors are largest absolute ones. `ulps` are errors in units of the last place of the leaf's largest
    float64 entry, in the leaf's dtype. Both runs are measured against the same float64 run.
    """

    path: str
    kind: Literal["value", "gradient"]
    shape: tuple[int, ...]
    dtype: str  # The dtype that the function's result must have.
    custom_dtype: str  # The dtype that it has.
    norm: float  # Euclidean norm in float64.
    largest: float  # Largest absolute entry in float64.
    difference: float  # Largest absolute difference between custom and reference.
    relative: float  # The same over `largest`.
    ulps: float  # The same in ulps.
    worst: tuple[int, ...]  # Where custom is furthest from float64.
    custom: float  # The values there.
    reference: float
    truth: float
    custom_ulps: float  # The custom result's own error, and the reference's.
    reference_ulps: float
    custom_nonfinite: int  # How many entries are NaN or infinite.
    reference_nonfinite: int
    as_close: float  # Ulps up to which custom counts as close to float64 as the reference is.

    def is_right(self, ulps: float | int | None = None) -> bool:
        """Whether the custom result is right; see `compare_gradients` for the rule."""
        if ulps is None:
            ulps = 4 if jnp.finfo(self.dtype).bits < 32 else 32
        return self.custom_dtype == self.dtype and self.custom_ulps <= max(ulps, self.as_close)


class GradientComparison(NamedTuple):
    """What `compare_gradients` found: `rows` as plain data, `str()` as a table.

    Attributes:
        rows: A row of numbers for each output and each argument, with its path, shape and dtype.
        skipped: Arguments and outputs that are no real floating-point arrays.
        arrays: For each row its custom, reference and float64 arrays, all in NumPy's float64.

    Example:
        >>> comparison = compare_gradients(jnp.tanh, jnp.array([0.5]))
        >>> [row.is_right() for row in comparison.rows]
        [True, True]
    """

    rows: tuple[GradientRow, ...]
    skipped: tuple[str, ...]
    arrays: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]

    def __str__(self) -> str:
        """The rows as a table."""
        header = (
            "", "path", "shape", "dtype", "norm", "difference", "relative", "worst at", "custom",
            "reference", "float64", "custom error", "reference error", "verdict",
        )  # fmt: skip
        lines = [
            (
                row.kind, row.path, str(row.shape), row.custom_dtype, f"{row.norm:.3g}",
                f"{row.difference:.1e}", f"{row.relative:.1e}", str(row.worst), f"{row.custom:.7g}",
                f"{row.reference:.7g}", f"{row.truth:.7g}", _error(row.custom_ulps, row.custom_nonfinite),
                _error(row.reference_ulps, row.reference_nonfinite), _verdict(row),
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *lines)
        ]
        return "\n".join(table + [f"not compared: {', '.join(self.skipped)}"] * bool(self.skipped))

    def assert_close(self, ulps: float | int | None = None) -> None:
        """Does nothing if every custom value and gradient is right.

        Args:
            ulps: How far from float64 is right in any case. None takes 32 for float32 and float64, 4 for
                bfloat16 and float16.

        Raises:
            AssertionError: With the table, if a custom value or gradient is wrong.
        """
        wrong = [f"{row.kind} of {row.path}" for row in self.rows if not row.is_right(ulps)]
        if wrong:
            raise AssertionError(f"custom rules wrong in {', '.join(wrong)}:\n{self}")

    def plot(self, axes: Any) -> None:
        """Draws every gradient entry's custom and reference value over its float64 value.

        Args:
            axes: Matplotlib axes. Rows of more than 2,000 entries are thinned out evenly.
        """
        for row, arrays in zip(self.rows, self.arrays, strict=True):
            if row.kind == "gradient" and row.largest > 0:
                step = -(-arrays[2].size // 2000) or 1
                custom, reference, truth = (array.ravel()[::step] / row.largest for array in arrays)
                axes.plot(truth, reference, "x", markersize=6, label=f"{row.path}, reference")
                axes.plot(truth, custom, ".", markersize=4, label=f"{row.path}, custom")
        axes.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        axes.set(xlabel="float64, over the largest entry", ylabel="gradient, over the same")
        axes.legend()


def compare_gradients(
    function: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    argnums: int | np.integer | Sequence[int] | None = None,
    has_aux: bool = False,
    key: PRNGKeyArray | None = None,
    precision: Literal["float64", "float32"] = "float64",
) -> GradientComparison:
    """Compares a function's values and gradients with a reference's, and both with float64.

    A custom result is right if it has its argument's or output's dtype, and each of its entries is
    within some ulps of float64, or within twice the reference's own largest error. The ulp is that of
    the leaf's largest entry: an error of rounding grows with what is summed, not with the size of the
    array, so one wrong row fails among millions, and nothing that is right fails for being large. A
    reference that is itself far off excuses nothing: its error counts up to 1/256 of the largest entry of
    all gradients (1/32 for bfloat16 and float16) and not at all if it is not finite, so that a factor
    1.01 fails (1.07 in bfloat16). A gradient that is truly 0, as of a bias in front of a normalisation,
    may so be as small as the reference's noise. A result that is the reference's to the last bit is
    right whatever float64 says: no rule has changed it.

    Args:
        function: Returns any pytree of arrays; usually it uses `jax.custom_vjp`.
        *args: Its arguments, any pytrees. Gradients are taken for every floating-point array and
            Python float among them; the rest is passed on, and its arrays are named under the table, as
            are outputs that are integer, bool or complex.
        reference: A function of the same meaning; `without_custom_rules(function)` if None. In float64
            it is the truth, but for entries below float64's rounding where it has lost its digits and
            plain autodiff of `function` has them.
        argnums: The arguments to differentiate in; all if None.
        has_aux: Whether `function` and `reference` return a pair whose second part is not compared.
        key: Draws the cotangents, one for each entry of each output; `jax.random.key(0)` if None. A
            function of one scalar has cotangent 1, so that its gradient is compared.
        precision: What the truth is computed in. "float32" is for functions that cannot run in float64:
            that draw random numbers, or hold float32 numbers of their own where dtypes must agree.

    Returns:
        A `GradientComparison` with a row for each floating-point output and argument. NaN and infinity
        count as equal to themselves and as infinitely far from anything else.

    Raises:
        TypeError: If `function` or `reference` cannot be called, or `argnums` holds another thing than
            integers.
        ValueError: If there is nothing to differentiate, `argnums` is out of range, the outputs' shapes
            differ, or `precision` is another.

    Example:
        >>> comparison = compare_gradients(jnp.tanh, jnp.array([0.5]))
        >>> comparison.assert_close()
        >>> [(row.kind, row.path, row.shape) for row in comparison.rows]
        [('value', 'output', (1,)), ('gradient', 'x', (1,))]
    """
    _refuse_uncallable(function=function, reference=reference or function)
    if precision not in ("float64", "float32"):
        raise ValueError(f"precision must be 'float64' or 'float32', got {precision!r}")
    key = jax.random.key(0) if key is None else key
    chosen = range(len(args)) if argnums is None else _positions(argnums, len(args))
    names = _argument_names(function, len(args))
    flat, tree = jax.tree_util.tree_flatten_with_path(args)
    paths = [names[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in flat]
    leaves = [leaf for _, leaf in flat]
    wanted = [path[0].idx in chosen for path, _ in flat]
    at = [i for i, leaf in enumerate(leaves) if wanted[i] and _is_float(leaf)]
    if not at:
        raise ValueError("args must hold a floating-point array to differentiate in, found none")
    floats = [jnp.asarray(leaves[i]) for i in at]
    first = (lambda f: lambda *args: f(*args)[0]) if has_aux else (lambda f: f)

    def named_outputs(f, floats):
        filled = list(leaves)
        for i, leaf in zip(at, floats, strict=True):
            filled[i] = leaf
        outputs = jax.tree_util.tree_leaves_with_path(f(*jax.tree.unflatten(tree, filled)))
        return {"output" + jax.tree_util.keystr(path): jnp.asarray(out) for path, out in outputs}

    def run(f, floats):
        return jax.vjp(lambda x: list(filter(_is_float, named_outputs(f, x).values())), floats)

    function, plain = first(function), without_custom_rules(first(function))
    reference = first(reference) if reference else None
    outputs, pull_back = run(function, floats)
    if not outputs:
        raise ValueError("function must return a floating-point array to differentiate, got none")
    cotangents = _cotangents(outputs, key)

    def results(f, dtype=None):
        outputs, pull_back = run(f, floats if dtype is None else [x.astype(dtype) for x in floats])
        return [np.asarray(r, np.float64) for r in outputs + pull_back(_like(cotangents, outputs))[0]]

    def both(f):
        try:
            with jax.enable_x64(precision == "float64"), jax.numpy_dtype_promotion("standard"):
                wide = results(f, jnp.dtype(precision))
        except Exception as error:
            error.add_note(
                f"compare_gradients met this in plain autodiff in {precision}: where that cannot run, "
                "give it precision='float32', or a reference that can."
            )
            raise
        return wide if all(x.dtype == precision for x in floats) else results(f), wide

    custom = outputs + pull_back(cotangents)[0]
    beside, truths = both(reference or plain)
    noise = 32 * float(np.finfo(precision).eps) * max(1, *map(_largest, cotangents))
    if reference is not None and (plain_runs := _if_differentiable(both, plain)):
        truths = [
            _with_digits(narrow, wide, own_narrow, own_wide, noise)
            for narrow, wide, own_narrow, own_wide in zip(beside, truths, *plain_runs, strict=True)
        ]

    # What the outputs' dtypes must be is told by the function without its rules.
    named = jax.eval_shape(lambda x: named_outputs(plain, x), floats)
    output_paths = [path for path, out in named.items() if _is_float(out)]
    dtypes = [named[path].dtype for path in output_paths] + [x.dtype for x in floats]
    skipped = [
        f"{paths[i]} ({leaf.dtype})"
        for i, leaf in enumerate(leaves)
        if wanted[i] and _is_array(leaf) and i not in at
    ] + [f"{path} ({out.dtype})" for path, out in named.items() if not _is_float(out)]
    paths = [*output_paths, *(paths[i] for i in at)]
    kinds = ["value"] * len(outputs) + ["gradient"] * len(floats)
    overall = max(map(_largest, truths[len(outputs) :]))
    rows, arrays = [], []
    for path, kind, dtype, result, other, truth in zip(
        paths, kinds, dtypes, custom, beside, truths, strict=True
    ):
        own = np.asarray(result, np.float64)
        scale = overall if kind == "gradient" else _largest(truth)
        rows.append(_row(path, kind, dtype, result.dtype, own, other, truth, scale))
        arrays.append((own, other, truth))
    return GradientComparison(tuple(rows), tuple(skipped), tuple(arrays))


def _row(path, kind, dtype, custom_dtype, custom, reference, truth, scale) -> GradientRow:
    limits = jnp.finfo(dtype)
    largest = _largest(truth)
    ulp = float(limits.eps) * 2.0 ** math.floor(math.log2(max(largest, float(limits.tiny))))
    error, reference_error = _distance(custom, truth), _distance(reference, truth)
    difference = float(np.max(_distance(custom, reference), initial=0))
    worst = np.unravel_index(np.argmax(error), error.shape) if error.size else ()
    cap = scale * (2.0**-5 if limits.bits < 32 else 2.0**-8)
    off = float(np.max(reference_error, initial=0))
    as_close = 2 * min(off, cap) / ulp if math.isfinite(off) else 0.0
    return GradientRow(
        path=path,
        kind=kind,
        shape=custom.shape,
        dtype=str(dtype),
        custom_dtype=str(custom_dtype),
        norm=float(np.linalg.norm(truth.ravel())),
        largest=largest,
        difference=difference,
        relative=difference / largest if largest else (math.inf if difference else 0.0),
        ulps=difference / ulp,
        worst=tuple(int(i) for i in worst),
        custom=float(custom[worst]) if custom.size else 0.0,
        reference=float(reference[worst]) if custom.size else 0.0,
        truth=float(truth[worst]) if custom.size else 0.0,
        custom_ulps=float(np.max(error, initial=0)) / ulp,
        reference_ulps=off / ulp,
        custom_nonfinite=int(np.sum(~np.isfinite(custom))),
        reference_nonfinite=int(np.sum(~np.isfinite(reference))),
        as_close=as_close if difference else math.inf,
    )


def _error(ulps: float, nonfinite: int) -> str:
    return f"{ulps:.3g} ulp" + (f", {nonfinite} not finite" if nonfinite else "")


def _verdict(row: GradientRow) -> str:
    if row.custom_dtype != row.dtype:
        return f"wrong: should be {row.dtype}"
    return "right" if row.is_right() else "wrong"


def _largest(array: Any) -> float:
    """The largest finite absolute entry."""
    array = np.abs(np.asarray(array, np.float64))
    return float(np.max(array, initial=0, where=np.isfinite(array)))


def _with_digits(narrow, wide, own_narrow, own_wide, noise) -> np.ndarray:
    """The reference's entries in float64, or the function's own, where these alone have digits.

    A number has digits where float64 finds the same as the narrower dtype, and not 0.
    """

    def known(narrow, wide):
        return (wide != 0) & (np.abs(narrow - wide) <= np.abs(wide) / 16)

    lost = known(own_narrow, own_wide) & ~known(narrow, wide) & (np.abs(own_wide - wide) <= noise)
    return np.where(lost, own_wide, wide)


def _if_differentiable(run: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """The run of the function, or None where JAX has no derivative of it."""
    try:
        return run(function)
    except Exception:  # What JAX and the libraries on it raise for that has no common type.
        return None


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


def _refuse_uncallable(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {reprlib.repr(function)}")


def _positions(argnums: Any, count: int) -> list[int]:
    """`argnums` counted from the front."""
    try:
        numbers = [operator.index(n) for n in (argnums if isinstance(argnums, Sequence) else [argnums])]
    except TypeError:
        raise TypeError(f"argnums must be an integer or several, got {argnums!r}") from None
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
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_float(leaf: Any) -> bool:
    if isinstance(leaf, float):
        return True
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
