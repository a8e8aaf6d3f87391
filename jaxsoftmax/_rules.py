"""Custom derivative rules: found, named, and removed from a function."""

import functools
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.extend.core.primitives import closed_call_p


def without_custom_rules(function: Callable[..., Any], jvp: bool = False) -> Callable[..., Any]:
    """The same function with every `jax.custom_vjp` inside it replaced by what it computes.

    `jax.grad` of the result is plain automatic differentiation, and forward mode works on it. Rules
    are found wherever they sit: in nested functions, jit, scan, while, cond, vmap, checkpoint, shard_map
    and other rules. `jax.custom_derivatives.linear_call` rules go too, and so do
    `jax.custom_batching.custom_vmap` rules, which have no reverse mode. Operations of other libraries
    that hold functions of their own are left as they are.

    Args:
        function: Any function that JAX can trace. Array arguments are traced; others, Python numbers
            among them, are passed on as they are.
        jvp: Whether `jax.custom_jvp` rules and those of `jax.lax.custom_linear_solve` go too.

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
    refuse_uncallable(function=function)

    @functools.wraps(function)
    def plain(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def of_arrays(arrays):
            new_args, new_kwargs = jax.tree.unflatten(tree, filled(leaves, traced, arrays))
            return function(*new_args, **new_kwargs)

        arrays = [leaves[i] for i in traced]
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        results = jax_core.jaxpr_as_fun(Removal(jvp).of(closed))(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), map(jnp.asarray, results))

    return plain


class Rule(NamedTuple):
    """A custom rule that was found, and whether it was compared.

    Attributes:
        kind: The JAX function that makes such a rule: "custom_vjp", "custom_jvp", "linear_call",
            "custom_linear_solve" or "custom_root".
        name: The name of the function that the rule belongs to; of a lambda also its file and line.
        calls: How many calls of it there are; one in a loop counts once.
        compared: Whether it was removed from the reference, so that the two were compared.
    """

    kind: str
    name: str
    calls: int
    compared: bool


# What stands in a rule's place: a call of the function that the rule belongs to, which each keeps under
# another name. Rules for vmap go too, as their calls have no reverse mode at all.
_BODIES = {"custom_vjp_call": "call_jaxpr", "custom_vmap_call": "call", "linear_call": "callee"}
_JVP_BODIES = {"custom_jvp_call": "call_jaxpr"}

# The operations that are known to hold nothing but programs. Others may need theirs as they are.
HOLDERS = {
    "jit", "pjit", "closed_call", "core_call", "call", "checkpoint", "remat", "remat2", "scan", "while",
    "cond", "shard_map", "custom_jvp_call", "custom_linear_solve",
}  # fmt: skip


class Rewriting:
    """Rewrites the equations of jaxprs."""

    def of(self, part: Any) -> Any:
        """A jaxpr, or whatever holds jaxprs among an equation's parameters, rewritten."""
        # Open before closed: from JAX 0.12 on the two are one class.
        if isinstance(part, jax_core.Jaxpr):
            return part.replace(eqns=list(map(self._equation, part.eqns)))
        if isinstance(part, jax_core.ClosedJaxpr):
            return part.replace(jaxpr=self.of(part.jaxpr))
        if isinstance(part, tuple | list):
            parts = [self.of(each) for each in part]
            return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
        return part

    def _equation(self, equation: Any) -> Any:
        """What stands in an equation's place: the same, with the programs that it holds rewritten."""
        if equation.primitive.name not in HOLDERS:
            return equation
        params = {key: self.of(value) for key, value in equation.params.items()}
        if equation.primitive.name == "custom_jvp_call":
            params["jvp_jaxpr_fun"] = _RewrittenRule(params["jvp_jaxpr_fun"], self._for_forward_rules())
        return equation.replace(params=params)

    def _for_forward_rules(self) -> "Rewriting":
        """What rewrites the rule of a `custom_jvp` that stays."""
        return self


class Removal(Rewriting):
    """Removes rules from jaxprs, and counts what it meets.

    Attributes:
        rules: How often each (kind, name, whether removed) was met.
        stopped: How many `stop_gradient` stop a gradient, but for those in what removed rules belong to.
        used: Whether a derivative inside has used a rule, which is not there any more.
        random: Whether random numbers are drawn.
        opaque: Operations left alone that hold rules.
    """

    def __init__(self, jvp: bool):
        self._jvp = jvp
        self._bodies = _BODIES | _JVP_BODIES if jvp else _BODIES
        self.rules: Counter[tuple[str, str, bool]] = Counter()
        self.stopped = 0
        self.used = self.random = False
        self.opaque: set[str] = set()

    def of(self, part: Any) -> Any:
        """The same without custom rules."""
        if isinstance(part, jax_core.Jaxpr):
            self.stopped += _stopped(part)
        return super().of(part)

    def found(self) -> tuple[Rule, ...]:
        """The rules met, those removed first."""
        rules = [Rule(kind, name, n, gone) for (kind, name, gone), n in self.rules.items()]
        return tuple(sorted(rules, key=lambda rule: (not rule.compared, rule.kind, rule.name)))

    def _equation(self, equation: Any) -> Any:
        name, params = equation.primitive.name, equation.params
        self.random |= name in ("random_bits", "random_gamma", "rng_uniform", "rng_bit_generator")
        if "jvp" in str(equation.source_info.name_stack):
            self.used |= name not in _BODIES | _JVP_BODIES and _is_of_a_rule(equation)
        if name in self._bodies:
            body = params[self._bodies[name]]
            if name != "custom_vmap_call":
                self._count(name, _name(body), True)
            return self._call(equation, body, equation.invars)
        if name == "custom_linear_solve" and self._jvp:
            return self._solve(equation)
        if name == "call_hi_primitive" and type(params["_prim"]).__name__ == "CustomRoot":
            return self._root(equation, params["_prim"].solve_jaxpr)
        if name not in HOLDERS:
            inside = Removal(self._jvp)
            inside.of(tuple(params.values()))
            if inside.rules:
                self.opaque.add(name)
            return equation
        if name in ("custom_jvp_call", "custom_linear_solve"):
            body = params["jaxprs"].solve if name == "custom_linear_solve" else params["call_jaxpr"]
            self._count(name, _name(body), False)
        return super()._equation(equation)

    def _for_forward_rules(self) -> "Removal":
        return Removal(jvp=False)

    def _solve(self, equation: Any) -> Any:
        """A linear solution by its algorithm alone, without the implicit derivative."""
        lengths, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
        self._count("custom_linear_solve", _name(jaxprs.solve), True)
        start = lengths.matvec + lengths.vecmat
        constants = equation.invars[start : start + lengths.solve]
        return self._call(equation, jaxprs.solve, [*constants, *equation.invars[sum(lengths) :]])

    def _root(self, equation: Any, solve: Any) -> Any:
        """A root by its algorithm alone, from JAX 0.12 on; before, it is a `custom_jvp`."""
        self._count("custom_root", _name(solve), self._jvp)
        if not self._jvp:
            return equation
        return self._call(equation, solve.replace(consts=[]), equation.invars[: len(solve.invars)])

    def _call(self, equation: Any, body: Any, inputs: list[Any]) -> Any:
        """A plain call of a body in an equation's place."""
        inner = getattr(body, "jaxpr", body)
        # Arguments that have a default are inputs without a name, which JAX refuses in a call.
        nameless = inner.replace(debug_info=inner.debug_info._replace(arg_names=None, result_paths=None))
        stopped = self.stopped
        body = self.of(nameless if inner is body else body.replace(jaxpr=nameless))
        self.stopped = stopped  # What is hidden in here the rule need not hide.
        return equation.replace(primitive=closed_call_p, params={"call_jaxpr": body}, invars=inputs)

    def _count(self, primitive: str, name: str, removed: bool) -> None:
        kind = primitive.replace("vjp_call", "vjp").replace("jvp_call", "jvp")
        self.rules[kind, name, removed] += 1


def _name(body: Any) -> str:
    """The name of the function that became this jaxpr, and where a function without a name stands."""
    about = getattr(body, "jaxpr", body).debug_info
    name = getattr(about, "func_name", None) or "a function"
    if name == "<lambda>" and about.func_filename:
        name += f" at {Path(about.func_filename).name}:{about.func_lineno}"
    return name


def _stopped(jaxpr: Any) -> int:
    """How many equations stop a gradient that would come from an output."""
    reached, count = set(map(id, filter(_is_inexact, jaxpr.outvars))), 0
    for equation in reversed(jaxpr.eqns):
        if not reached.isdisjoint(map(id, equation.outvars)):
            reached.update(map(id, filter(_is_inexact, equation.invars)))
            count += equation.primitive.name == "stop_gradient"
    return count


def _is_of_a_rule(equation: Any) -> bool:
    """Whether it comes from a custom rule that says a derivative.

    The forward rule of a `jax.custom_vjp` alone does not: it gives the value.
    """
    rule = "__call__" if "transpose" in str(equation.source_info.name_stack) else "custom_jvp.__call__"
    frames = getattr(equation.source_info.traceback, "frames", ())
    return any(
        frame.file_name.endswith("custom_derivatives.py") and rule in frame.function_name
        for frame in frames
    )


def coarsest(jaxpr: Any) -> float:
    """The eps of the narrowest floating-point numbers that a program computes with."""
    eps = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for value in equation.outvars:
            if _is_inexact(value):
                eps = max(eps, float(jnp.finfo(value.aval.dtype).eps))
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_program):
            eps = max(eps, coarsest(part) if _is_program(part) else 0.0)
    return eps


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(getattr(value.aval, "dtype", bool), jnp.inexact)


def _is_program(part: Any) -> bool:
    return isinstance(part, jax_core.Jaxpr | jax_core.ClosedJaxpr)


class _RewrittenRule:
    """The rule of a `custom_jvp`, with what it holds rewritten."""

    def __init__(self, rule: Any, rewriting: Rewriting):
        self._rule, self._rewriting = rule, rewriting
        self.debug_info = rule.debug_info

    def call_wrapped(self, *zeros: bool) -> tuple[Any, Any, Any]:
        jaxpr, constants, out_zeros = self._rule.call_wrapped(*zeros)
        return self._rewriting.of(jaxpr), constants, out_zeros


def filled(leaves: list[Any], at: list[int], arrays: Any) -> list[Any]:
    """The leaves, with arrays at these places."""
    new = list(leaves)
    for i, array in zip(at, arrays, strict=True):
        new[i] = array
    return new


def is_array(leaf: Any) -> bool:
    """Whether it is an array, or says what one would be."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_inexact(leaf: Any) -> bool:
    """Whether it is an array of real or complex floating-point numbers."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def refuse_uncallable(**functions: Any) -> None:
    """Raises `TypeError` for what cannot be called."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {reprlib.repr(function)}")
