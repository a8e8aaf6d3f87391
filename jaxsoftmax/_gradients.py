"""Gradients by custom rules, compared with plain automatic differentiation, float64 and differences."""

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jax_core
from jaxtyping import PRNGKeyArray

from ._comparison import GradientComparison, GradientRow, usual_ulps
from ._differences import Contradiction, Verdict, are_few, judge
from ._linearity import LinearityTests
from ._rules import Removal, coarsest, filled, is_array, is_inexact, refuse_uncallable

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def compare_gradients(
    function: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | Literal["differences"] | None = None,
    argnums: int | np.integer | Sequence[int] | None = None,
    has_aux: bool = False,
    key: PRNGKeyArray | None = None,
    precision: Literal["float64", "float32"] = "float64",
    jvp: bool = False,
) -> GradientComparison:
    """Compares a function's values and gradients with a reference's, and both with float64.

    A custom result is right if it has its argument's or output's dtype, and each of its entries is
    within some ulps of float64, or within twice the reference's own largest error, here and with
    arguments one ulp away. The ulp is that of the leaf's largest entry: an error of rounding grows with
    what is summed, not with the size of the array, so one wrong row fails among millions, and nothing
    that is right fails for being large. A reference that is itself far off excuses nothing: its error
    counts up to 1/256 of the largest entry of all gradients (1/32 for bfloat16 and float16) and not at
    all if it is not finite, so that a factor 1.01 fails (1.07 in bfloat16). A gradient that is truly 0,
    as of a bias in front of a normalisation, may so be as small as the reference's noise. A result that
    is the reference's to the last bit is right whatever float64 says, but for overflow and NaN: no rule
    has changed it.

    A gradient r(c) must also be linear in the cotangent c. Each `jax.custom_vjp` is tested where it
    stands: r of −50.3 times some of c's entries and r of −50.3 times the others add up to −50.3 r(c).
    Where a rule fails in this or cannot be reached, the whole function is tested. Of one scalar,
    r(−50.3) = −50.3 r(1). Of other outputs, r(−64c) = −64 r(c), and r of some of c's entries and r of the
    others add up to r(c).

    Where plain automatic differentiation is impossible, not finite or says another thing than the rule,
    differences judge: central ones, extrapolated, in float64 where the function can. Up to 20 entries are
    judged one by one, more along a few directions in at most 20 evaluations, and some more where these
    contradict a gradient or show a kink. What they cannot tell is not judged, and never right. So is an
    entry that is NaN or infinite in truth.

    Args:
        function: Returns any pytree of arrays; usually it uses `jax.custom_vjp`. It is compiled, in one
            program with the reference if that can run: what both have in common runs once.
        *args: Its positional arguments, any pytrees; bind others by `functools.partial`. Gradients are
            taken for every real or complex floating-point array, Python float and complex number among
            them; the rest is passed on, and its arrays are named under the table, as are outputs that
            are integer or bool.
        reference: A function of the same meaning; `without_custom_rules(function)` if None. In float64
            it is the truth, but for entries below float64's rounding where it has lost its digits and
            plain autodiff of `function` has them. "differences" has differences judge every gradient.
        argnums: The arguments to differentiate in; all if None. The others are not traced.
        has_aux: Whether `function` and `reference` return a pair whose second part is not compared.
        key: Draws the cotangents, one for each entry of each output, normal around ½;
            `jax.random.key(0)` if None. A function of one scalar has cotangent 1, so that its gradient is
            compared.
        precision: What the truth is computed in. It is the arguments' own by itself where float64 cannot
            run, or draws other random numbers.
        jvp: Whether `jax.custom_jvp` rules are compared too, and those of `jax.lax.custom_linear_solve`.

    Returns:
        A `GradientComparison` with a row for each floating-point output and argument. Where the truth is
        NaN or infinite, nothing is judged.

    Raises:
        TypeError: If `function` or `reference` cannot be called, `argnums` holds another thing than
            integers, `key` is no key, or an argument is traced, as it is inside jit, grad and vmap.
        ValueError: If there is nothing to differentiate, `argnums` is out of range, the outputs' shapes
            differ, or `precision` is another.
        RuntimeError: If a run fails. It tells which one and what may help, with JAX's error as its cause.

    Example:
        >>> comparison = compare_gradients(jax.nn.relu, jnp.array([0.5]), jvp=True)
        >>> comparison.assert_close()
        >>> [(row.kind, row.path, row.shape) for row in comparison.rows]
        [('value', 'output', (1,)), ('gradient', 'x', (1,))]
    """
    refuse_uncallable(function=function)
    everywhere = isinstance(reference, str) and reference == "differences"
    given = None if everywhere else reference
    if isinstance(given, str):
        raise TypeError(f"reference must be a function, 'differences' or None, got {given!r}")
    if given is not None:
        refuse_uncallable(reference=given)
    if precision not in ("float64", "float32"):
        raise ValueError(f"precision must be 'float64' or 'float32', got {precision!r}")
    task = _Task(args, _argument_names(function, len(args)), argnums, has_aux, precision)
    key = jax.random.key(0) if key is None else key
    if not _is_key(key):
        raise TypeError(f"key must be a jax.random.key or None, got {key!r}")
    removal = Removal(jvp)
    notes: list[str] = []

    with _progress() as step:
        step("custom rules")
        own = _said("function cannot be traced", task.trace, function)
        if not own.outputs:
            raise ValueError("function must return a floating-point array to differentiate, got none")
        plain = own.without_rules(removal)
        # What the outputs must be is told by the function without its rules.
        cotangents = _cotangents(plain.outputs, key)
        if not _is_one_number(cotangents):
            notes.append("gradients are those of all outputs times random numbers, added up")
        program = plain if given is None else _said("reference cannot be traced", task.trace, given)
        custom, narrow = _at_once(task, own, program, plain, cotangents)
        in_draws = partial(_in_draws, task, own, plain, cotangents)
        at_once = custom is not None
        custom = custom or in_draws()
        step("reference")
        if given is None:
            beside = partial(_plain_results, task, function, plain, jvp, cotangents, narrow, notes)
        else:
            beside = partial(
                _reference_results, task, function, given, program, plain, jvp, cotangents, narrow, notes
            )
        results = beside()
        limits = _limits(custom, results)
        is_far = any(limit.off > usual_ulps(c.dtype) for c, limit in zip(custom, limits, strict=True))
        if removal.random and not task.is_wide and is_far:
            task.stay()
            notes.append("random numbers are drawn, others in float64: compared in its own precision")
            results = beside()
            limits = _limits(custom, results)
        if at_once and _any_wrong(custom, results, limits):
            custom = in_draws()
            limits = _limits(custom, results)
        if _any_wrong(custom, results, limits):
            results = _with_noise(task, program, cotangents, results)
            limits = _limits(custom, results)
        disputed = [
            limit.disputed | everywhere
            for c, limit in zip(custom, limits, strict=True)
            if c.kind == "gradient"
        ]
        if given is None and any(mask.any() for mask in disputed):
            step("differences")
            results = _judged(
                task, function, own, cotangents, custom, results, disputed, everywhere, notes
            )
            limits = _limits(custom, results)
    rows = tuple(map(_row, custom, results, limits))
    return GradientComparison(
        rows=rows,
        skipped=(*task.skipped, *plain.skipped),
        rules=removal.found(),
        notes=tuple(dict.fromkeys([*(_unseen(removal) if reference is None else ()), *notes])),
        given=reference is not None,
        arrays=tuple((c.result, r.reference, r.truth) for c, r in zip(custom, results, strict=True)),
    )


class _Task:
    """The function's arguments, and those among them to differentiate in."""

    def __init__(self, args, names, argnums, has_aux, precision):
        chosen = range(len(args)) if argnums is None else _positions(argnums, len(args))
        flat, self._tree = jax.tree_util.tree_flatten_with_path(args)
        paths = [names[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in flat]
        self._leaves = [leaf for _, leaf in flat]
        for path, leaf in zip(paths, self._leaves, strict=True):
            if isinstance(leaf, Tracer):
                raise TypeError(
                    f"compare_gradients needs numbers, and {path} is traced: call it outside of jit, "
                    "grad and vmap"
                )
        wanted = [i for i, (path, _) in enumerate(flat) if path[0].idx in chosen]
        self._at = [i for i in wanted if _has_gradients(self._leaves[i])]
        if not self._at:
            where = "args" if argnums is None else f"the arguments of argnums {argnums}"
            raise ValueError(f"{where} must hold a floating-point array to differentiate in, found none")
        self.paths = [paths[i] for i in self._at]
        self.skipped = [
            f"{paths[i]} ({self._leaves[i].dtype})"
            for i in wanted
            if is_array(self._leaves[i]) and i not in self._at
        ]
        self._has_aux, self.precision = has_aux, precision
        self.floats = [jnp.asarray(self._leaves[i]) for i in self._at]
        self.is_wide = False
        with self.wide():
            self.wide_floats = [_placed(x, x, jnp.promote_types(x.dtype, precision)) for x in self.floats]
        self.is_wide = [x.dtype for x in self.floats] == [x.dtype for x in self.wide_floats]

    @contextmanager
    def wide(self) -> Iterator[None]:
        """What the truth is computed in."""
        if self.is_wide:
            yield
            return
        with jax.enable_x64(self.precision == "float64"), jax.numpy_dtype_promotion("standard"):
            yield

    def stay(self) -> None:
        """Takes the arguments' own precision for the truth."""
        self.wide_floats, self.is_wide = self.floats, True

    def retrace(self, function, jvp) -> Callable[..., Any]:
        """Traces the function without its rules for arrays in another dtype."""
        return lambda floats: self.trace(function, floats).without_rules(Removal(jvp))

    def trace(self, function, floats=None) -> "_Program":
        """The function of its floating-point arguments."""
        paths = []

        def outputs(floats):
            leaves = filled(self._leaves, self._at, floats)
            result = function(*jax.tree.unflatten(self._tree, leaves))
            if self._has_aux:
                if not isinstance(result, tuple | list) or len(result) != 2:
                    raise TypeError(f"has_aux is for functions that return a pair, got {result}")
                result = result[0]
            named = jax.tree_util.tree_leaves_with_path(result)
            paths[:] = ["output" + jax.tree_util.keystr(path) for path, _ in named]
            return [jnp.asarray(out) for _, out in named]

        return _Program(jax.make_jaxpr(outputs)(self.floats if floats is None else floats), paths)


class _Program:
    """A traced function of floating-point arrays, compiled once for all its runs."""

    def __init__(self, closed, paths):
        self._closed, self._paths = closed, paths
        kept = [i for i, out in enumerate(closed.out_avals) if jnp.issubdtype(out.dtype, jnp.inexact)]
        self.outputs = [closed.out_avals[i] for i in kept]
        self.paths = [paths[i] for i in kept]
        self.skipped = [
            f"{path} ({out.dtype})"
            for i, (path, out) in enumerate(zip(paths, closed.out_avals, strict=True))
            if i not in kept
        ]

        def values(constants, floats):
            results = jax_core.jaxpr_as_fun(closed.replace(consts=constants))(*floats)
            return [results[i] for i in kept]

        def run(constants, floats, draws):
            outputs, pull_back = jax.vjp(partial(values, constants), floats)
            # In a loop, each draw goes through the same instructions: what is linear stays so to the bit.
            return outputs, jax.lax.map(lambda c: pull_back(list(map(_like, c, outputs)))[0], draws)

        self._untraced = values
        self._values, self._run = jax.jit(values), jax.jit(run)
        self._forward = jax.jit(lambda constants, x: jax.vjp(partial(values, constants), x)[0])

    def eps(self) -> float:
        """That of the narrowest numbers inside."""
        return coarsest(self._closed)

    def tested(self) -> "_Program":
        """The same with rules that give NaN where they may not be linear."""
        return _Program(LinearityTests().of(self._closed), self._paths)

    def without_rules(self, removal: Removal) -> "_Program":
        """The same without custom rules, which `removal` counts."""
        return _Program(removal.of(self._closed), self._paths)

    def values(self, floats) -> list[np.ndarray]:
        """The floating-point outputs."""
        return [_numpy(x) for x in self._values(self._closed.consts, floats)]

    def forward_values(self, floats) -> list[np.ndarray]:
        """The same as they come with a gradient: by the forward rules."""
        return [_numpy(x) for x in self._forward(self._closed.consts, floats)]

    def run(self, floats, draws) -> tuple[list[Any], list[Any]]:
        """The floating-point outputs, and each argument's gradients by each draw of cotangents."""
        return jax.block_until_ready(self._run(self._closed.consts, floats, draws))

    def beside(self, other: "_Program", floats, cotangents) -> tuple[Any, list[np.ndarray]]:
        """The outputs and gradients, and another program's results. What both share is run once."""
        programs = self, other
        constants = {id(c): c for program in programs for c in program._closed.consts}

        @jax.jit
        def run(constants, floats, cotangents):
            results = []
            for program in programs:
                own = [constants[id(c)] for c in program._closed.consts]
                outputs, pull_back = jax.vjp(partial(program._untraced, own), floats)
                results.append((outputs, pull_back(list(map(_like, cotangents, outputs)))[0]))
            return results

        own, (outputs, gradients) = jax.block_until_ready(run(constants, floats, cotangents))
        return own, list(map(_numpy, [*outputs, *gradients]))

    def results(self, floats, cotangents) -> list[np.ndarray]:
        """The floating-point outputs and each argument's gradient."""
        outputs, gradients = self.run(floats, [c[None] for c in cotangents])
        return [*map(_numpy, outputs), *(_numpy(each)[0] for each in gradients)]


def _like(cotangent, output):
    """A cotangent in an output's dtype and, with explicit axes, its sharding."""
    cotangent, sharding = cotangent.astype(output.dtype), jax.typeof(output).sharding
    return cotangent if sharding.mesh.empty else jax.sharding.reshard(cotangent, sharding)


class _Custom(NamedTuple):
    """An output or a gradient by the function's own rules."""

    kind: Literal["value", "gradient"]
    path: str
    dtype: Any  # What it must be.
    custom_dtype: Any  # What it is.
    result: np.ndarray
    factor: float = 1
    multiple: np.ndarray | None = None  # A gradient r(factor · c) instead of r(c).
    parts: tuple[np.ndarray, ...] = ()  # Gradients by some entries of c, and by the others.


def _outputs(plain, outputs) -> list[_Custom]:
    """The function's outputs, which must be what they are without its rules."""
    _refuse_other_shapes("function's rules", outputs, plain.outputs)
    return [
        _Custom("value", path, aval.dtype, x.dtype, _numpy(x))
        for path, aval, x in zip(plain.paths, plain.outputs, outputs, strict=True)
    ]


def _at_once(task, own, program, plain, cotangents) -> tuple[Any, Any]:
    """The function's and the reference's results by one program, None if it cannot run.

    The function's are None as well if a rule may not be linear.
    """
    both, _ = _attempt(lambda: own.tested().beside(program, task.floats, cotangents))
    if both is None:
        return None, None
    (outputs, gradients), narrow = both
    custom = [
        _Custom("gradient", path, x.dtype, gradient.dtype, _numpy(gradient))
        for path, x, gradient in zip(task.paths, task.floats, gradients, strict=True)
    ]
    if not all(np.isfinite(c.result).all() for c in custom):
        return None, narrow
    return [*_outputs(plain, outputs), *custom], narrow


def _in_draws(task, own, plain, cotangents) -> list[_Custom]:
    """The function's results by several cotangents."""
    # A large multiple shows what clips, but may overflow.
    for factors in ((-50.3, -64.0), (-1.7, -2.0)):
        factor, draws = _draws(cotangents, *factors)
        outputs, gradients = _said("function cannot be differentiated", own.run, task.floats, draws)
        by_draws = list(map(_numpy, gradients))
        if all(np.isfinite(each).all() for each in by_draws):
            break
    return _outputs(plain, outputs) + [
        _by_draws(path, x.dtype, gradient.dtype, each, factor)
        for path, x, gradient, each in zip(task.paths, task.floats, gradients, by_draws, strict=True)
    ]


def _by_draws(path, dtype, custom_dtype, draws, factor) -> _Custom:
    """A gradient by the draws of `_draws`."""
    multiple, once, *parts = draws
    return _Custom("gradient", path, dtype, custom_dtype, once, factor, multiple, tuple(parts))


class _Result(NamedTuple):
    """What stands beside it."""

    reference: np.ndarray  # NaN where there is none.
    truth: np.ndarray  # NaN where it is not known.
    noise: np.ndarray  # How far off the reference is.
    differences: Verdict | None = None
    kinks: Any = False  # Which entries are right at one, and so is any other between its slopes.


def _plain_results(task, function, plain, jvp, cotangents, narrow, notes) -> list[Any]:
    """Results of the function without its rules, as far as plain automatic differentiation goes."""
    again = task.retrace(function, jvp)
    narrow, why = (narrow, "") if narrow else _attempt(plain.results, task.floats, cotangents)
    wide, why_wide = _wide_results(task, again, cotangents, narrow)
    why = why or why_wide
    if narrow is None and wide is None:
        notes.append(f"plain autodiff cannot run, so differences judge: {why}")
        values = _said("function cannot run without its rules", plain.values, task.floats)
        with task.wide():
            truths, _ = _attempt(lambda: again(task.wide_floats).values(task.wide_floats))
        return [
            _Result(x, truth, _distance(x, truth))
            for x, truth in zip(values, truths or values, strict=True)
        ] + [_Result(x, x, np.zeros(x.shape)) for x in map(_unknown, task.floats)]
    return _beside(task, narrow, wide, why, notes)


def _reference_results(
    task, function, reference, other, plain, jvp, cotangents, narrow, notes
) -> list[Any]:
    """Results of a reference that was given, with the digits that plain autodiff alone has."""
    _refuse_other_shapes("reference", other.outputs, plain.outputs)
    if narrow is None:
        narrow = _said("reference cannot be differentiated", other.results, task.floats, cotangents)
    wide, why = _wide_results(task, partial(task.trace, reference), cotangents, narrow)
    results = _beside(task, narrow, wide, why, notes)
    own_narrow, _ = _attempt(plain.results, task.floats, cotangents)
    own_wide, _ = _wide_results(task, task.retrace(function, jvp), cotangents, own_narrow)
    if wide is None or own_narrow is None or own_wide is None:
        return results
    noise = 32 * float(np.finfo(task.precision).eps) * max(1, *map(_largest, map(_numpy, cotangents)))
    return [
        result._replace(truth=truth, noise=_distance(result.reference, truth))
        for result, n, w in zip(results, own_narrow, own_wide, strict=True)
        for truth in [_with_digits(result.reference, result.truth, n, w, noise)]
    ]


def _wide_results(task, trace, cotangents, narrow) -> tuple[Any, str]:
    """A program's results in float64, or why there are none."""
    if task.is_wide:
        return narrow, ""
    with task.wide():
        return _attempt(lambda: trace(task.wide_floats).results(task.wide_floats, cotangents))


def _beside(task, narrow, wide, why, notes) -> list[Any]:
    """Results in two precisions as reference and truth, or those in one as both."""
    if narrow is None:
        notes.append(f"the reference can only run in {task.precision}: {why}")
        narrow = [np.full_like(x, np.nan) for x in wide]
    if wide is None:
        notes.append(f"the reference cannot run in {task.precision}, so it is the truth itself: {why}")
        wide = narrow
    return [_Result(x, truth, _distance(x, truth)) for x, truth in zip(narrow, wide, strict=True)]


@np.errstate(all="ignore")  # What is largest, or not finite, may be moved.
def _with_noise(task, program, cotangents, results) -> list[Any]:
    """The results, with the reference's noise as it shows in runs one ulp away.

    One run may be near the truth by chance, where that is 0. Of a few, twice the largest difference is a
    bound that another of the same size rarely passes.
    """
    generator = np.random.default_rng(0)
    for _ in range(4):
        near = []
        for x in task.floats:
            ulp = float(jnp.finfo(x.dtype).eps) * generator.choice([-1, 1], x.shape)
            near.append(_placed(_numpy(x) * (1 + ulp), x))
        shaken, _ = _attempt(program.results, near, cotangents)
        if shaken is None:
            return results
        results = [
            result._replace(noise=np.fmax(result.noise, 2 * _distance(result.reference, x)))
            for result, x in zip(results, shaken, strict=True)
        ]
    return results


def _judged(task, function, own, cotangents, custom, results, disputed, everywhere, notes) -> list[Any]:
    """The results, with gradients that differences confirm where plain autodiff is no judge."""
    at = [i for i, c in enumerate(custom) if c.kind == "gradient"]
    # Plain autodiff that is wrong somewhere may be so elsewhere, where the rule says the same.
    whole = [mask | mask.any() for mask in disputed]
    disputed = whole if are_few(whole) else disputed
    floats, program, wide = task.floats, own, nullcontext
    gradients = [custom[i].result for i in at]
    # A function that iterates to a tolerance follows its ideal derivative no better.
    digits = max(2.0**-9, *(2 * float(jnp.finfo(x.dtype).eps) for x in task.floats))
    if not task.is_wide:
        with task.wide():
            exact, why = _attempt(task.trace, function, task.wide_floats)
            if exact is None:
                notes.append(f"differences are in the arguments' own precision: {why}")
            else:
                floats, program, wide = task.wide_floats, exact, task.wide
                by_exact, _ = _attempt(program.results, floats, cotangents)
                if by_exact is not None:
                    gradients, digits = [by_exact[i] for i in at], 2.0**-9

    def evaluate(arrays):
        return program.forward_values(list(map(_placed, arrays, floats)))

    contradiction = Contradiction(gradients, [results[i].truth for i in at], disputed, digits)
    with wide():
        verdicts, truths, kinks, slopes, used = judge(
            evaluate,
            list(map(_numpy, floats)),
            list(map(_numpy, cotangents)),
            contradiction,
            program.eps(),
        )
    told = f"errors below {100 * digits:.2g} %"
    if not are_few(disputed):
        told = "along a few directions; errors below 1 %, or in few entries,"
    notes.append(f"differences: {used} evaluations; {told} are not seen")
    for i, along in zip(at, slopes, strict=True):
        if along is not None:
            told = ", ".join(map("{} {:.7g}".format, ("custom", "reference", "differences"), along))
            notes.append(f"gradient of {custom[i].path} along one direction: {told}")
    judged = list(results)
    for i, mask, verdict, truth, kink in zip(at, disputed, verdicts, truths, kinks, strict=True):
        if kink.any():
            first = tuple(map(int, np.argwhere(kink)[0]))
            more = f" and {kink.sum() - 1} more" if kink.sum() > 1 else ""
            notes.append(
                f"{custom[i].path} is at a kink at {first}{more}: any slope between both sides' is right"
            )
        before = results[i].truth
        if everywhere and verdict != "both":
            before = np.where(mask, np.nan, before)
        judged[i] = results[i]._replace(
            truth=np.where(mask & np.isfinite(truth), truth, before), differences=verdict, kinks=kink
        )
    return judged


class _Limit(NamedTuple):
    """How far off a result may be."""

    ulp: float
    off: float  # How far off its reference is, in ulps.
    as_close: float  # How much of that excuses it.
    same: bool  # Whether it is its reference to the last bit.
    disputed: np.ndarray  # The entries that are not right by their truth.


def _limits(custom, results) -> list[_Limit]:
    """How far off each custom result may be."""
    sizes = [_largest(result.truth) for result in results]
    overall = max(size for c, size in zip(custom, sizes, strict=True) if c.kind == "gradient")
    limits = []
    for c, result, largest in zip(custom, results, sizes, strict=True):
        about, known = jnp.finfo(c.dtype), np.isfinite(result.truth)
        ulp = float(about.eps) * 2.0 ** math.floor(math.log2(max(largest, float(about.tiny))))
        cap = (overall if c.kind == "gradient" else largest) * (2.0**-5 if about.bits < 32 else 2.0**-8)
        off = float(np.max(result.noise, initial=0, where=known))
        as_close = 2 * min(off, cap) / ulp if math.isfinite(off) else 0.0
        if result.differences in ("custom", "kink"):
            as_close = 2 * cap / ulp
        error = _off(c.result, result.truth, c.dtype)
        # Overflow and NaN where there is a number are no one's right.
        same = np.array_equal(c.result, result.reference, equal_nan=True)
        same = same and bool((np.isfinite(error) | ~known).all())
        allowed = math.inf if same else max(usual_ulps(c.dtype), as_close) * ulp
        limits.append(_Limit(ulp, off / ulp, as_close, same, ~known | (error > allowed)))
    return limits


def _any_wrong(custom, results, limits) -> bool:
    """Whether any result is not right by its truth."""
    return any(limit.disputed.any() for limit in limits) or not all(
        map(_is_linear, custom, results, limits)
    )


def _off(x, truth, dtype) -> np.ndarray:
    """How far each entry is from the truth. Infinity is right for what the dtype cannot hold."""
    off = _distance(x, truth)
    if np.isfinite(np.max(off, initial=0)):
        return off
    with np.errstate(invalid="ignore"):
        beyond = (np.abs(truth) > float(jnp.finfo(dtype).max)) & (x == np.sign(truth) * np.inf)
    return np.where(beyond, 0.0, off)


def _row(custom, result, limit) -> GradientRow:
    own, reference, truth = custom.result, result.reference, result.truth
    known = np.isfinite(truth)
    kinks = np.broadcast_to(result.kinks, own.shape)
    error, reference_error = (_off(x, truth, custom.dtype) for x in (own, reference))
    error[~known | kinks] = reference_error[~known | kinks] = 0.0
    distance = _distance(own, reference)
    most = distance if result.differences == "kink" else error
    worst = np.unravel_index(np.argmax(most), most.shape) if most.size else ()
    difference = float(np.max(distance, initial=0))
    largest = _largest(truth)
    return GradientRow(
        path=custom.path,
        kind=custom.kind,
        shape=own.shape,
        dtype=str(custom.dtype),
        custom_dtype=str(custom.custom_dtype),
        norm=float(np.linalg.norm(truth[known])) if known.any() or not known.size else math.nan,
        largest=largest,
        difference=difference,
        relative=difference / largest if largest else (math.inf if difference else 0.0),
        ulps=difference / limit.ulp,
        worst=tuple(int(i) for i in worst),
        custom=own[worst].item() if own.size else 0.0,
        reference=reference[worst].item() if own.size else 0.0,
        truth=0.0 if not own.size else math.nan if kinks[worst] else truth[worst].item(),
        custom_ulps=float(np.max(error, initial=0)) / limit.ulp,
        reference_ulps=float(np.max(reference_error, initial=0)) / limit.ulp,
        custom_nonfinite=int(np.sum(~np.isfinite(own))),
        reference_nonfinite=int(np.sum(~np.isfinite(reference))),
        unknown=int(np.sum(~known)),
        as_close=math.inf if limit.same else limit.as_close,
        linear=_is_linear(custom, result, limit),
        differences=result.differences,
    )


def _draws(cotangents, of_scalar, of_arrays) -> tuple[float, list[Any]]:
    """A factor; its product with c, c, and but for one scalar, some entries of c, and the others.

    A factor with many digits shows what rounds one number. Random numbers have them; a power of two
    multiplies these exactly.
    """
    if _is_one_number(cotangents):
        draws = np.asarray([of_scalar, 1], cotangents[0].dtype)
        return float(draws[0].real), [draws]
    draws = []
    for i, c in enumerate(cotangents):
        some = (np.arange(c.size).reshape(c.shape) + i) % 2 == 0
        zero = np.zeros_like(c)
        times = np.asarray(of_arrays, c.dtype)
        draws.append(np.stack([times * c, c, np.where(some, c, zero), np.where(some, zero, c)]))
    return of_arrays, draws


def _is_linear(custom, result, limit) -> bool:
    """Whether a gradient is linear in the cotangent, but for rounding and overflow."""
    if custom.multiple is None:
        return True
    about, once = jnp.finfo(custom.dtype), custom.result
    slack = 4 * usual_ulps(custom.dtype) * float(about.eps)
    if not np.isfinite(result.reference).any():
        slack = max(slack, 2.0**-9)  # It may go on until something is small.
    noise = 8 * limit.off * limit.ulp if math.isfinite(limit.off) else 0.0
    noise += max(float(about.smallest_subnormal), 2.0**-126)
    tests = [(custom.multiple, custom.factor * once, abs(custom.factor))]
    tests += [(sum(custom.parts), once, 1)] * bool(custom.parts)
    for found, expected, times in tests:
        known = np.isfinite(once) & (np.abs(expected) <= float(about.max))
        off = np.where(known, _distance(found, expected), 0)
        if np.any(off > slack * max(map(_largest, [expected, *custom.parts])) + times * noise):
            return False
    return True


def _unseen(removal: Removal) -> list[str]:
    """What the comparison cannot see."""
    notes = []
    if not any(rule.compared for rule in removal.found()):
        other = " (jvp=True compares custom_jvp rules)" if removal.rules else ""
        notes.append(f"no rule was found to compare{other}")
    if removal.used:
        notes.append(
            "a derivative inside the function has used rules that could not be removed: "
            "reference='differences' judges them"
        )
    if removal.stopped:
        notes.append(
            f"{removal.stopped} stop_gradient inside: both runs lose what it hides, "
            "reference='differences' does not"
        )
    if removal.opaque:
        notes.append(f"rules left inside {', '.join(sorted(removal.opaque))}")
    return notes


def _placed(array: Any, like: Any, dtype: Any = None) -> Any:
    """An array where another lies and, without a dtype, in its dtype.

    Converted by numpy: JAX would compile a program for each shape.
    """
    array = np.asarray(array, dtype or like.dtype)
    return jax.device_put(array, like.sharding) if like.committed else jnp.asarray(array)


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(x, _numpy_dtype(x.dtype))


def _unknown(x: Any) -> np.ndarray:
    return np.full(x.shape, np.nan, _numpy_dtype(x.dtype))


def _numpy_dtype(dtype: Any) -> type:
    return np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64


def _largest(array: Any) -> float:
    """The largest finite absolute entry."""
    array = np.abs(array)
    largest = np.max(array, initial=0)
    return float(largest if np.isfinite(largest) else np.max(array, initial=0, where=np.isfinite(array)))


def _with_digits(narrow, wide, own_narrow, own_wide, noise) -> np.ndarray:
    """The reference's entries in float64, or the function's own, where these alone have digits.

    A number has digits where float64 finds the same as the narrower dtype, and not 0.
    """

    def known(narrow, wide):
        return (wide != 0) & (np.abs(narrow - wide) <= np.abs(wide) / 16)

    lost = known(own_narrow, own_wide) & ~known(narrow, wide) & (np.abs(own_wide - wide) <= noise)
    return np.where(lost, own_wide, wide)


def _distance(a: Any, b: Any) -> np.ndarray:
    """|a − b|, where NaN or infinity is 0 from its like and infinitely far from all else."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.asarray(a - b)
        distance = np.abs(distance, out=None if np.iscomplexobj(distance) else distance)  # In place.
    if np.isfinite(np.max(distance, initial=0)):
        return distance
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.nan_to_num(distance, nan=np.inf, posinf=np.inf))


def _is_key(key: Any) -> bool:
    """Whether it is one random key, typed or of the older kind."""
    if not is_array(key):
        return False
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == 0 if is_typed else key.ndim == 1 and key.dtype == np.uint32


def _cotangents(outputs: list[Any], key: PRNGKeyArray) -> list[Any]:
    """A random cotangent for each output, with all the digits of its dtype; 1 for a single scalar.

    Their mean is not near 0, so that a rule that forgets a mean of them is seen.
    """
    if _is_one_number(outputs):
        return [np.ones((), outputs[0].dtype)]
    # JAX would compile its generator for each shape.
    generator = np.random.default_rng(np.ravel(jax.random.key_data(key)))

    def draw(out):
        c = generator.normal(0.5, size=out.shape)
        if jnp.issubdtype(out.dtype, jnp.complexfloating):
            c = c + 1j * generator.normal(size=out.shape)
        return np.asarray(c, out.dtype)

    return list(map(draw, outputs))


def _is_one_number(arrays: list[Any]) -> bool:
    return [x.shape for x in arrays] == [()]


def _refuse_other_shapes(name: str, outputs: list[Any], expected: list[Any]) -> None:
    shapes, own = ([x.shape for x in each] for each in (outputs, expected))
    if shapes != own:
        raise ValueError(
            f"{name} must return floating-point arrays of function's shapes {own}, got {shapes}"
        )


def _attempt(run: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What it returns, or why it does not."""
    try:
        return run(*arguments), ""
    except Exception as error:  # What JAX and the libraries on it raise has no common type.
        return None, _brief(error)


def _said(problem: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns; else a sentence on the error."""
    try:
        return run(*arguments)
    except Exception as error:
        advice = ""
        if isinstance(error, jax.errors.ConcretizationTypeError):
            advice = (
                ". A number that Python looks at must not be traced: leave its argument out by argnums, "
                "or bind it by functools.partial"
            )
        raise RuntimeError(f"{problem}: {_brief(error)}{advice}") from error


def _brief(error: Exception) -> str:
    """An error's type and first line."""
    first, *others = str(error).strip().splitlines() or [""]
    if first.endswith("Traceback (most recent call last):"):
        first = others[-1]  # What a callback raised.
    return f"{type(error).__name__}: {first.rstrip('.')}"


@contextmanager
def _progress() -> Iterator[Callable[[str], Any]]:
    """Says what is run, where tqdm is installed and it takes more than ten seconds."""
    if tqdm is None:
        yield lambda _: None
        return
    with tqdm(delay=10, leave=False, bar_format="compare_gradients: {desc}, {elapsed}") as bar:

        def step(name):
            bar.set_description_str(name, refresh=False)
            bar.update()

        yield step


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


def _has_gradients(leaf: Any) -> bool:
    """Whether it has gradients: a real or complex floating-point array or number."""
    return isinstance(leaf, float | complex) or is_inexact(leaf)
