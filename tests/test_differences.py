"""Rules given where plain autodiff cannot go, is not finite or is wrong: faults in them are found."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from helpers import every, mostly_slow
from jax import lax
from jax.experimental import pallas

import jaxsoftmax as js


def same(found):
    return found


def scaled(factor):
    return lambda found: jax.tree.map(lambda d: d * factor, found)


def dropped(position):
    return lambda found: tuple(d if i != position else scaled(0)(d) for i, d in enumerate(found))


def in_first(change):
    """A fault in the first gradient alone."""

    def fault(found):
        (first, *others), tree = jax.tree.flatten(found)
        return jax.tree.unflatten(tree, [change(first), *others])

    return fault


percent = scaled(1.01)
flipped = in_first(lambda d: d.at[(0,) * d.ndim].multiply(-1))
row_lost = in_first(lambda d: d.at[0].set(0))


def case(primal, rule, *arguments, fault=percent, dtype="float32", wrap=same, **options):
    """A maker of a function whose rule's results go through a fault; the fault; what it is called with.

    `rule` takes a cotangent, the value and the arguments. With jvp=True it is given for forward mode: it
    must be the same both ways, as it is of one array entry by entry.
    """

    def make(fault):
        if "jvp" in options:
            function = jax.custom_jvp(lambda x: primal(x))
            function.defjvp(lambda x, t: ((y := function(*x)), fault(rule(*t, y, *x))[0]))
        else:
            function = jax.custom_vjp(lambda *args: primal(*args))
            function.defvjp(
                lambda *args: ((y := primal(*args)), (y, *args)), lambda kept, c: fault(rule(c, *kept))
            )
        return wrap(function)

    return make, fault, arguments, dtype, options


def like(smooth):
    """The rule of another formula for the same function, one that plain autodiff is right of."""
    return lambda c, _, *args: jax.vjp(smooth, *args)[1](c)


def iterate(step, start):
    """The fixed point of a step, in a loop whose length depends on the numbers."""
    return lax.while_loop(
        lambda s: (s[0] < 200) & jnp.any(s[1] != s[2]),
        lambda s: (s[0] + 1, step(s[1]), s[1]),
        (0, start, start + 1),
    )[1]


def fixed(step, start, *arguments, **options):
    """A step's fixed point y = step(y, *args), with the rule of the implicit function theorem."""

    def rule(c, y, *args):
        slope = jax.jacobian(step)(y, *args).reshape(y.size, y.size)
        d = jnp.linalg.solve(jnp.eye(y.size, dtype=y.dtype) - slope.T, c.ravel())
        return jax.vjp(lambda *args: step(y, *args), *args)[1](d.reshape(y.shape))

    def primal(*args):
        return iterate(lambda y: step(y, *args), start(*args))

    return case(primal, rule, *arguments, **options)


def heron(y, x):
    return (y + x / y) / 2


def from_1(x):
    return iterate(lambda y: heron(y, x), jnp.ones_like(x))


def heron_rule(c, y, _):
    return (c / (2 * y),)


def kepler(mean, eccentricity):
    def step(y):
        error = y - eccentricity * jnp.sin(y) - mean
        return y - error / (1 - eccentricity * jnp.cos(y))

    return iterate(step, mean + eccentricity)


def kepler_rule(c, y, _, eccentricity):
    d = c / (1 - eccentricity * jnp.cos(y))
    return d, d * jnp.sin(y)


def eigenvector(a):
    return iterate(lambda v: a @ v / jnp.linalg.norm(a @ v), jnp.ones_like(a[0]))


def transport(cost):
    """The plan of entropic transport between even marginals, by Sinkhorn's steps."""

    def columns(rows):
        return -jax.nn.logsumexp(rows - cost, axis=0, keepdims=True)

    def both(rows):
        return -jax.nn.logsumexp(columns(rows) - cost, axis=1, keepdims=True) - math.log(len(cost))

    rows = iterate(both, jnp.zeros_like(cost[:, :1]))
    return jnp.exp(rows + columns(rows) - cost)


def gauss_mean(a, b):
    """The arithmetic-geometric mean."""
    return iterate(lambda s: jnp.stack([(s[0] + s[1]) / 2, jnp.sqrt(s[0] * s[1])]), jnp.stack([a, b]))[0]


def gauss_integral(a, b):
    angle = jnp.asarray(np.arange(64) * np.pi / 32, a.dtype)[:, None]
    return 1 / jnp.mean(1 / jnp.hypot(a[None] * jnp.cos(angle), b[None] * jnp.sin(angle)), 0)


def bisect(f, low, high, scan=False):
    """Where the increasing f is 0. In a scan plain autodiff sees what the bounds depend on, no more."""

    def halve(s):
        middle = (s[1] + s[2]) / 2
        below = f(middle) < 0
        return s[0] + 1, jnp.where(below, middle, s[1]), jnp.where(below, s[2], middle)

    if scan:
        return lax.fori_loop(0, 60, lambda _, s: halve(s), (0, low, high))[1]
    return lax.while_loop(lambda s: s[0] < 60, halve, (0, low, high))[1]


def by_halves(f, x):
    return bisect(f, -1 - jnp.abs(x), 1 + jnp.abs(x))


def simplex(v):
    """The nearest point whose entries are not negative and sum to 1."""
    top = jnp.max(v)
    level = bisect(lambda t: 1 - jnp.sum(jnp.maximum(v - t, 0)), top - 1, top, scan=True)
    return jnp.maximum(v - level, 0)


def simplex_rule(c, y, _):
    kept = (y > 0).astype(c.dtype)
    return (kept * (c - jnp.sum(kept * c) / jnp.sum(kept)),)


def called(f, rule, *arguments, shape=None, only=None, **options):
    """A function of NumPy's kind, called from JAX."""

    def primal(*args):
        def run(*args):
            return np.asarray(f(*(np.asarray(x, np.float64) for x in args)), dtype)

        dtype, like = only or args[0].dtype, args[0].shape if shape is None else shape
        result = jax.ShapeDtypeStruct(like, dtype)
        return jax.pure_callback(run, result, *args, vmap_method="sequential").astype(args[0].dtype)

    return case(primal, rule, *arguments, **options)


def assignment(cost):
    return cost[scipy.optimize.linear_sum_assignment(cost)].sum()


def kernel(body, smooth, *arguments, **options):
    """A Pallas kernel, with the rule of a formula for the same."""

    def write(*refs):
        refs[-1][...] = body(*(ref[...] for ref in refs[:-1]))

    def primal(*args):
        return pallas.pallas_call(write, jax.typeof(args[0]), interpret=True)(*args)

    return case(primal, like(smooth), *arguments, **options)


def rms(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * scale[None]


def narrow_rms(x, scale):
    return rms(x.astype(jnp.float32), scale.astype(jnp.float32)).astype(x.dtype)


def cubic_root(fault):
    def tangent(g, t):
        return fault(t / g(jnp.ones_like(t)))

    return lambda x: lax.custom_root(lambda y: y**3 + y - x, x, by_halves, tangent)


def linear_solve(fault):
    def solve(matvec, b):
        return iterate(lambda x: x + 0.4 * (b - matvec(x)), jnp.zeros_like(b))

    def transposed(matvec, c):
        return fault(solve(matvec, c))

    return lambda a, b: lax.custom_linear_solve(lambda x: a @ x, b, solve, transposed)


def length(x):
    return jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))


def cordic(x):
    """The sine by turns of which no more than the direction depends on x."""
    powers = 2.0 ** -np.arange(55)

    def turn(state, step):
        (cos, sin, rest), (power, angle) = state, (jnp.where(state[2] >= 0, s, -s) for s in step)
        return (cos - power * sin, sin + power * cos, rest - angle), None

    start = (jnp.full_like(x, np.prod(1 / np.sqrt(1 + powers**2))), jnp.zeros_like(x), x)
    steps = tuple(jnp.asarray(s, x.dtype) for s in (powers, np.arctan(powers)))
    return lax.scan(turn, start, steps)[0][1]


SYMMETRIC = [[3.0, 0.5, 0.2], [0.5, 1.5, -0.3], [0.2, -0.3, 0.5]]
SKEW = [[2.0, 0.3, -0.2], [0.1, 1.5, 0.4], [-0.3, 0.2, 2.5]]
SMALL = [[0.3, -0.4, 0.1], [0.2, 0.5, -0.3], [-0.1, 0.2, 0.4]]
COSTS = [[0.3, 1.0, 2.0], [1.5, 0.2, 0.7]]
VECTOR, POSITIVE, AROUND_0 = [0.5, -1.2, 2.0], [2.0, 9.0, 0.3], [0.0, 1.0, -2.0]
INF = float("inf")

CASES = {
    # Loops.
    "Heron": case(from_1, heron_rule, POSITIVE),
    "Heron, 60 numbers": case(from_1, heron_rule, POSITIVE * 20, fault=flipped),
    "Heron, vmap": case(from_1, heron_rule, POSITIVE, wrap=jax.vmap, fault=scaled(0.99)),
    "Heron, jit of scan": case(from_1, heron_rule, POSITIVE,
        wrap=lambda f: jax.jit(lambda x: lax.scan(lambda s, v: (s, f(v)), None, x)[1])),
    "Heron, complex": case(from_1, heron_rule, 0.3, -2.0,
        wrap=lambda f: lambda a, b: ((z := f(lax.complex(a, b))).real, z.imag)),
    "Heron, forward": case(from_1, heron_rule, POSITIVE, jvp=True),
    "cosine's fixed point": fixed(lambda y, a: jnp.cos(a * y), jnp.ones_like, 0.8),
    "Kepler": case(kepler, kepler_rule, [0.3, 1.0, 2.5], [0.1, 0.5, 0.8], fault=dropped(1)),
    "Lambert": case(
        lambda x: iterate(lambda w: w - (w - x * jnp.exp(-w)) / (1 + w), jnp.log1p(x)),
        lambda c, w, _: (c / (jnp.exp(w) * (1 + w)),), [0.0, 2.0, 30.0],
        wrap=lambda f: lambda x: (f(x), x), has_aux=True),
    "deep equilibrium": fixed(lambda z, layer, x: jnp.tanh(layer["weights"] @ z + layer["bias"] + x),
        lambda _, x: x, {"weights": SMALL, "bias": VECTOR}, [0.1, 0.2, -0.3], fault=dropped(1)),
    "matrix inverse": case(
        lambda a: iterate(lambda y: 2 * y - y @ a @ y, 0.4 * jnp.eye(3, dtype=a.dtype)),
        lambda c, y, _: (-y.T @ c @ y.T,), SKEW, fault=flipped),
    "power iteration": case(lambda a: (v := eigenvector(a)) @ a @ v,
        lambda c, _, a: (c * jnp.outer(v := eigenvector(a), v),), SYMMETRIC, fault=row_lost),
    "Sinkhorn": case(lambda cost: jnp.sum((plan := transport(cost)) * (cost + jnp.log(plan))),
        lambda c, _, cost: (c * transport(cost),), COSTS, fault=row_lost),
    "arithmetic-geometric mean": case(gauss_mean, like(gauss_integral), [1.0, 2.0], [0.5, 3.0],
        dtype="float64", fault=dropped(0)),
    "bisection": case(lambda x: by_halves(lambda y: y**3 + y - x, x),
        lambda c, y, _: (c / (3 * y * y + 1),), VECTOR, dtype="float64"),
    # Callbacks.
    "erf, forward": called(np.vectorize(math.erf), like(jax.scipy.special.erf), AROUND_0, jvp=True),
    "erf, always float32": called(np.vectorize(math.erf), like(jax.scipy.special.erf), AROUND_0,
        only=np.float32, fault=scaled(1.1)),
    "log gamma": called(scipy.special.gammaln, like(jax.scipy.special.gammaln), POSITIVE,
        dtype="float64"),
    "softplus, bfloat16": called(lambda x: np.logaddexp(0, x), like(jax.nn.softplus), VECTOR,
        dtype="bfloat16", fault=scaled(1.1)),
    "determinant": called(np.linalg.det, like(jnp.linalg.det), SKEW, shape=(), fault=row_lost),
    "convolution": called(np.convolve, like(jnp.convolve), VECTOR, [1.0, -0.5], shape=(4,),
        fault=dropped(1)),
    "power spectrum": called(lambda x: np.abs(np.fft.fft(x)) ** 2,
        like(lambda x: jnp.square(jnp.abs(jnp.fft.fft(x)))), VECTOR, fault=row_lost),
    "assignment": called(assignment, lambda c, *_: (c * jnp.eye(3, dtype=c.dtype)[jnp.array([2, 0, 1])],),
        SKEW, shape=(), fault=row_lost),
    # Kernels.
    "SiLU kernel, bfloat16": kernel(lambda x: x / (1 + jnp.exp(-x)), jax.nn.silu, AROUND_0,
        dtype="bfloat16", fault=scaled(1.1)),
    "matmul kernel": kernel(jnp.matmul, jnp.matmul, SKEW, SMALL, fault=dropped(1)),
    "RMS norm kernel, inside float32": kernel(narrow_rms, rms, COSTS, VECTOR, fault=scaled(1.1)),
    # Solvers that come with rules.
    "custom_root": (cubic_root, percent, (VECTOR,), "float64", {"jvp": True}),
    "custom_linear_solve": (linear_solve, percent, (SKEW, VECTOR), "float32", {"jvp": True}),
    # Loops in float32 alone.
    "sum of squares": case(lambda x: lax.scan(lambda s, v: (s + v * v, None), jnp.float32(0), x)[0],
        lambda c, _, x: (2 * c * x,), VECTOR, fault=scaled(1.1)),
    "Heron, float32": case(lambda x: lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + 1,
        heron(s[1], x)), (0, jnp.float32(1)))[1], heron_rule, 2.0, fault=scaled(1.1)),
    # Plain autodiff gives NaN or infinity.
    "log cosh": case(lambda x: jnp.where(jnp.abs(x) > 20, jnp.abs(x) - math.log(2), jnp.log(jnp.cosh(x))),
        lambda c, _, x: (c * jnp.tanh(x),), [0.5, -3.0, 1000.0], fault=flipped),
    "softplus, forward": case(lambda x: jnp.where(x > 20, x, jnp.log1p(jnp.exp(x))),
        like(jax.nn.softplus), [0.5, -3.0, 1000.0], jvp=True),
    "logaddexp": case(lambda a, b: jnp.where(a - b > 30, a, b + jnp.log1p(jnp.exp(a - b))),
        like(jnp.logaddexp), [1.0, 1.0, 500.0], [0.3, -INF, 1.0], fault=dropped(1)),
    "sigmoid": case(lambda x: 1 / (1 + jnp.exp(-x)), like(jax.nn.sigmoid), [0.5, -1000.0, 2.0]),
    "softmax of nothing": case(
        lambda x: jnp.where(jnp.max(x, 1, keepdims=True) > -INF, jax.nn.softmax(x), 0),
        lambda c, y, _: (y * (c - jnp.sum(c * y, 1, keepdims=True)),), [[1.0, 2.0, -INF], [-INF] * 3],
        fault=row_lost),
    "power 1.5": case(lambda x: jnp.abs(x) * jnp.sqrt(jnp.abs(x)),
        lambda c, _, x: (1.5 * c * jnp.sign(x) * jnp.sqrt(jnp.abs(x)),), AROUND_0),
    "power by logarithm": case(lambda x, p: jnp.exp(p * jnp.log(jnp.abs(x))),
        lambda c, y, x, p: (c * p * x ** (p - 1), c * y * jnp.log(jnp.where(x > 0, x, 1))),
        [0.0, 0.5, 2.0], [3.0, 2.0, 1.5], argnums=(0, 1), fault=dropped(1)),
    "bump": case(lambda x: jnp.where(x > 0, jnp.exp(-1 / x), 0),
        lambda c, y, x: (c * y / jnp.where(x > 0, x * x, 1),), [0.0, 0.5, 2.0, -1.0]),
    "thin plate": case(lambda x: jnp.where((r := length(x)) == 0, 0, r * r * jnp.log(r)),
        lambda c, _, x: (c * x * (2 * jnp.log(jnp.where((r := length(x)) == 0, 1, r)) + 1),),
        [[1.0, -2.0], [0.0, 0.0]], fault=flipped),
    "arccos near 1": case(lambda t: jnp.arccos(jnp.cos(t)) ** 2, like(jnp.square), [0.0, 1.0, -0.1]),
    "parallel resistors": case(lambda a, b: 1 / (1 / a + 1 / b), like(lambda a, b: a * b / (a + b)),
        [0.0, 1.0], [2.0, 3.0], fault=row_lost),
    "matrix square by eigenvalues": case(
        lambda a: ((v := (pair := jnp.linalg.eigh(a))[1]) * pair[0][None] ** 2) @ v.T,
        like(lambda a: (b := (a + a.T) / 2) @ b), [[1.0, 0.0], [0.0, 1.0]], fault=flipped),
    # Plain autodiff gives a finite number that is wrong.
    "simplex": case(simplex, simplex_rule, [0.3, 0.9, -0.5, 0.4]),
    "CORDIC": case(cordic, like(jnp.sin), [0.3, -1.2], dtype="float64"),
    "x log y": case(lambda x, y: jnp.where(x == 0, 0, x * jnp.log(y)),
        lambda c, _, x, y: (c * jnp.log(y), c * x / y), [0.0, 2.0], [3.0, 0.5], fault=flipped),
    "double where": case(lambda x: jnp.where(x == 0, 1, jnp.expm1(z := jnp.where(x == 0, 1, x)) / z),
        lambda c, y, x: (c * jnp.where(x == 0, 0.5, (jnp.exp(x) - y) / jnp.where(x == 0, 1, x)),),
        AROUND_0, fault=flipped),
    "two ReLUs": case(lambda x: jax.nn.relu(x) - jax.nn.relu(-x), lambda c, *_: (c,), AROUND_0,
        fault=flipped),
    "sine, 0 at whole numbers": case(lambda x: jnp.where(jnp.round(x) == x, 0, jnp.sin(np.pi * x)),
        lambda c, _, x: (c * np.pi * jnp.cos(np.pi * x),), [0.0, 1.0, -2.0, 0.3], fault=row_lost),
    "held length": case(lambda x: x / lax.stop_gradient(length(x)), like(lambda x: x / length(x)), VECTOR,
        wrap=jax.jit),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(2, every(4, list(CASES))))
def test_right_rules_pass_and_faults_are_found(name):
    make, fault, arguments, dtype, options = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        arguments = jax.tree.map(
            lambda x: jnp.asarray(x, dtype), arguments, is_leaf=lambda x: isinstance(x, list)
        )
        right, wrong = (js.compare_gradients(make(f), *arguments, **options) for f in (same, fault))
    right.assert_close()
    assert right.notes
    assert {row.verdict() for row in right.rows} <= {"right", "right by differences"}
    with pytest.raises(AssertionError, match="wrong in gradient of"):
        wrong.assert_close()
    assert all(row.is_right() for row in wrong.rows if row.kind == "value")
