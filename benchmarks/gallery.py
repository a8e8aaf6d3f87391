"""Custom derivative rules out of public packages, each compared with plain autodiff and float64.

Every case is a `jax.custom_vjp`, `jax.custom_jvp` or `jax.lax.custom_linear_solve` rule that a package
has, on small float32 arguments. The verdict is the worst of its rows. A case may tell why its rule is
meant to differ from the derivative of what it computes. Packages that are not installed are skipped.
"""
# pyright: reportMissingImports=false

import argparse
import functools
import importlib.metadata
import importlib.util
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax as js


class Case(NamedTuple):
    """One rule: how to call it, why it may differ on purpose, and options of `compare_gradients`."""

    rule: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    reason: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


class Result(NamedTuple):
    """A line of the table."""

    package: str
    rule: str
    kind: str
    verdict: str
    seconds: float
    has_reason: bool = False


def numbers(low: float, high: float, *shape: int, seed: int = 0) -> jax.Array:
    """Uniform float32 numbers, the same at every run."""
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), jnp.float32)


KEY = jax.random.key(0)
SIGNED, OTHERS = numbers(-2, 2, 6), numbers(-2, 2, 6, seed=1)
POSITIVE, LARGER = numbers(0.5, 3, 6), numbers(3.5, 6, 6, seed=1)
UNIT = numbers(0.1, 0.9, 6)
ROWS, WEIGHTS, LABELS = numbers(-2, 2, 4, 5), numbers(-1, 1, 5, 7, seed=1), jnp.array([0, 3, 6, 2])
MATRIX = numbers(-1, 1, 3, 3) + 2 * jnp.eye(3)
SYMMETRIC = MATRIX @ MATRIX.T + jnp.eye(3)
VECTOR = numbers(-1, 1, 3, seed=2)
HEADS = [numbers(-1, 1, 2, 8, 2, 4, seed=seed) for seed in range(3)]
UNDER_JIT = "inside jax.jit it has no gradient: the rule holds on to traced arrays"
IMPLICIT = "by design the implicit derivative of the distribution, not the one of this draw at this seed"
DRAWN = {"precision": "float32"}  # In float64 other numbers are drawn.


def of_jax() -> Iterator[Case]:
    """Activations, special functions, linear algebra, solvers and kernels."""
    from jax.experimental import ode

    yield Case("nn.relu", jax.nn.relu, (SIGNED,))
    yield Case("nn.relu at 0", jax.nn.relu, (jnp.zeros(3),))
    yield Case("nn.relu6", jax.nn.relu6, (4 * SIGNED,))
    yield Case("nn.softmax", jax.softmax_custom_jvp(True)(jax.nn.softmax), (ROWS,))
    yield Case("nn.log1mexp", jax.nn.log1mexp, (POSITIVE,))
    yield Case("numpy.logaddexp", jnp.logaddexp, (SIGNED, OTHERS))
    yield Case("numpy.logaddexp2", jnp.logaddexp2, (SIGNED, OTHERS))
    yield Case("numpy.sinc", jnp.sinc, (SIGNED,))
    yield Case("numpy.sinc at 0", jnp.sinc, (jnp.zeros(2),))
    yield Case("numpy.i0", jnp.i0, (SIGNED,))
    yield Case("numpy.frexp", lambda x: jnp.frexp(x)[0], (SIGNED,))

    yield Case("numpy.linalg.slogdet, 2 × 2", jnp.linalg.slogdet, (MATRIX[:2, :2],))
    yield Case("numpy.linalg.slogdet, lu", jnp.linalg.slogdet, (MATRIX,))
    yield Case("numpy.linalg.slogdet, qr", lambda a: jnp.linalg.slogdet(a, method="qr"), (MATRIX,))
    yield Case("numpy.linalg.det", jnp.linalg.det, (numbers(-1, 1, 4, 4),))
    yield Case("numpy.linalg.pinv", jnp.linalg.pinv, (numbers(-1, 1, 4, 3),))
    yield Case("numpy.linalg.solve", jnp.linalg.solve, (MATRIX, VECTOR))
    yield Case("scipy.linalg.solve, pos", _solve_positive, (SYMMETRIC, VECTOR))

    special = jax.scipy.special
    yield Case("scipy.special.logit", special.logit, (UNIT,))
    yield Case("scipy.special.xlogy", special.xlogy, (SIGNED, POSITIVE))
    yield Case("scipy.special.xlog1py", special.xlog1py, (SIGNED, POSITIVE))
    yield Case("scipy.special.entr", special.entr, (POSITIVE,))
    yield Case("scipy.special.log_ndtr", special.log_ndtr, (3 * SIGNED,))
    yield Case("scipy.special.erfcx", special.erfcx, (SIGNED,))
    yield Case("scipy.special.dawsn", special.dawsn, (SIGNED,))
    yield Case("scipy.special.wofz", lambda x, y: special.wofz(x + 1j * y).real, (SIGNED, POSITIVE))
    yield Case("scipy.special.zeta", special.zeta, (LARGER, POSITIVE), options={"argnums": 1})
    yield Case("scipy.special.expi", special.expi, (POSITIVE,))
    yield Case("scipy.special.expn", lambda x: special.expn(2, x), (POSITIVE,))
    yield Case("scipy.special.sici", special.sici, (POSITIVE,))
    yield Case("scipy.special.fresnel", special.fresnel, (SIGNED,))
    yield Case("scipy.special.poch", special.poch, (POSITIVE, LARGER))
    yield Case("scipy.special.hyp1f1", special.hyp1f1, (POSITIVE, LARGER, UNIT))
    yield Case("scipy.special.hyp2f1", special.hyp2f1, (POSITIVE, UNIT, LARGER, UNIT / 2))
    yield Case("scipy.special.owens_t", special.owens_t, (SIGNED, OTHERS))

    yield Case("lax.custom_root", _cube_root, (POSITIVE,))
    for solver in (
        jax.scipy.sparse.linalg.cg,
        jax.scipy.sparse.linalg.gmres,
        jax.scipy.sparse.linalg.bicgstab,
    ):
        solve = functools.partial(_iterate, solver)
        yield Case(f"scipy.sparse.linalg.{solver.__name__}", solve, (SYMMETRIC, VECTOR))
    yield Case("experimental.ode.odeint", functools.partial(_decay, ode.odeint), (VECTOR, POSITIVE[:3]))
    yield from _kernels()


def _solve_positive(matrix, right):
    return jax.scipy.linalg.solve(_symmetric(matrix), right, assume_a="pos")


def _cube_root(a):
    def newton(f, x):
        return jax.lax.fori_loop(
            0, 30, lambda _, x: x - f(x) / jax.jvp(f, (x,), (jnp.ones_like(x),))[1], x
        )

    return jax.lax.custom_root(
        lambda x: x**3 - a, jnp.ones_like(a), newton, lambda g, y: y / g(jnp.ones_like(y))
    )


def _iterate(solver, matrix, right):
    return solver(lambda x: _symmetric(matrix) @ x, right, tol=1e-6)[0]


def _symmetric(matrix):
    """Solvers that take symmetry for granted have no derivative in one of two equal entries alone."""
    return (matrix + matrix.T) / 2


def _decay(odeint, start, rates):
    return odeint(lambda y, _, rates: -rates * y, start, jnp.array([0.0, 0.5, 1.0], start.dtype), rates)


def _kernels() -> Iterator[Case]:
    """The kernels that come with JAX, interpreted, and their references."""
    from jax.experimental.pallas.ops.gpu import attention, layer_norm, rms_norm
    from jax.experimental.pallas.ops.tpu import flash_attention
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    heads = tuple(jnp.swapaxes(head, 1, 2) for head in HEADS)
    yield Case(
        "pallas mha_reference",
        functools.partial(_with_bias, flash_attention.mha_reference),
        (*heads, numbers(-1, 1, 2, 2, 8, 8)),
    )
    mask = jnp.tril(jnp.ones((8, 8), bool))
    yield Case(
        "pallas splash reference",
        lambda q, k, v, sinks: splash.attention_reference_custom(mask, q, k, v, None, sinks),
        (*(head[0, 0] for head in heads), jnp.float32(0.3)),
    )
    rows = numbers(-2, 2, 1, 4, 128)
    scale, bias = numbers(0.5, 2, 128, seed=1), numbers(-1, 1, 128, seed=2)
    for name, norm in (("layer_norm", layer_norm.layer_norm), ("rms_norm", rms_norm.rms_norm)):
        yield Case(f"pallas {name}", functools.partial(norm, interpret=True), (rows, scale, bias))
    mha = functools.partial(attention.mha, segment_ids=None, interpret=True)
    yield Case(
        "pallas mha",
        lambda q, k, v: mha(q, k, v),
        tuple(numbers(-1, 1, 1, 16, 1, 16, seed=s) for s in range(3)),
    )


def _with_bias(attention, q, k, v, bias):
    return attention(q, k, v, bias)


def of_optax() -> Iterator[Case]:
    """Losses and projections."""
    import optax

    rows = jax.nn.softmax(numbers(-1, 1, 4, 5, seed=1))
    yield Case("safe_softmax_cross_entropy", optax.safe_softmax_cross_entropy, (ROWS, rows))
    yield Case("projections.projection_simplex", optax.projections.projection_simplex, (SIGNED,))
    yield Case(
        "scale_gradient",
        lambda x: optax.scale_gradient(x, 0.5),
        (SIGNED,),
        "scales the gradient by design",
    )


def of_flax() -> Iterator[Case]:
    """Eight-bit products, and rules around modules."""
    from flax import linen, nnx
    from flax.linen import fp8_ops

    scale, history = jnp.ones(1), jnp.zeros(4)
    dimensions = (((1,), (0,)), ((), ()))
    meta = "gradients of scale and history carry their next values; straight through the rounding"
    quantized = functools.partial(fp8_ops.in_qdq, jnp.float32, jnp.float8_e4m3fn)
    yield Case("fp8_ops.in_qdq", quantized, (SIGNED, scale, history), meta)
    quantized = functools.partial(fp8_ops.out_qdq, jnp.float32, jnp.float8_e5m2)
    rounded = "gradients of scale and history carry their next values; the cotangent is rounded"
    yield Case("fp8_ops.out_qdq", quantized, (SIGNED, scale, history), rounded)
    eight_bits = functools.partial(fp8_ops.in_q, jnp.float32, jnp.float8_e4m3fn)
    yield Case(
        "fp8_ops.in_q",
        lambda *args: jnp.float32(jax.tree.leaves(eight_bits(*args))[0]),
        (SIGNED, scale, history),
        meta,
    )
    yield Case(
        "fp8_ops.out_dq",
        functools.partial(fp8_ops.out_dq, jnp.float32),
        (scale, scale, SIGNED),
        "half of a product: the other half has the gradients",
    )
    yield Case(
        "fp8_ops.dot_general_with_precision",
        lambda x, w: fp8_ops.dot_general_with_precision(x, w, dimensions),
        (ROWS, WEIGHTS),
    )
    yield Case(
        "fp8_ops.fp8_scaled_dot_general",
        lambda x, w: fp8_ops.fp8_scaled_dot_general(
            x,
            w,
            dimensions,
            preferred_element_type=jnp.float32,
            lhs_scale=scale,
            rhs_scale=scale,
            grad_scale=scale,
            lhs_amax_history=history,
            rhs_amax_history=history,
            grad_amax_history=history,
        ),
        (ROWS, WEIGHTS),
        "straight through the rounding to eight bits",
    )
    yield Case("nnx.custom_vjp", _nnx_rule(nnx), (VECTOR, VECTOR + 1))
    yield Case("linen.custom_vjp", *_linen_rule(linen))


def _nnx_rule(nnx):
    def product(x, y):
        return jnp.sin(x) * y

    rule = nnx.custom_vjp(product, graph_updates=False)
    rule.defvjp(
        lambda x, y: (product(x, y), (x, y)),
        lambda kept, cotangent: (jnp.cos(kept[0]) * kept[1] * cotangent, jnp.sin(kept[0]) * cotangent),
    )
    return rule


def _linen_rule(linen):
    class Signed(linen.Module):
        @linen.compact
        def __call__(self, x):
            def run(module, x):
                return module(x)

            def backward(pull_back, cotangent):
                d_params, *d_inputs = pull_back(cotangent)
                return jax.tree.map(jnp.sign, d_params), *d_inputs

            rule = linen.custom_vjp(run, functools.partial(linen.vjp, run), backward)
            return rule(linen.Dense(2), x)

    params = Signed().init(KEY, ROWS)
    return Signed().apply, (params, ROWS), "its documentation's example: signs of gradients by design"


def of_equinox() -> Iterator[Case]:
    """Loops with checkpoints, errors, and filtered rules."""
    import equinox as eqx
    import equinox.internal as eqxi

    def loop(x, y):
        carry = eqxi.while_loop(
            lambda carry: carry[0] < 9,
            lambda carry: (carry[0] + 1, jnp.sin(carry[1]) + y, y),
            (0, x, y),
            kind="checkpointed",
            checkpoints=3,
        )
        return carry[1]

    def scan(x, xs):
        return eqxi.scan(lambda x, y: (jnp.sin(x) * y, x), x, xs, kind="checkpointed", checkpoints=2)

    @eqx.filter_custom_vjp
    def product(pair):
        return jnp.sin(pair[0]) * pair[1]

    product.def_fwd(lambda _, pair: (product(pair), None))
    product.def_bwd(
        lambda _, cotangent, __, pair: (
            jnp.cos(pair[0]) * pair[1] * cotangent,
            jnp.sin(pair[0]) * cotangent,
        )
    )

    @eqx.filter_custom_jvp
    def quotient(x, y):
        return x / y

    def quotient_jvp(primals, tangents):
        (x, y), (d_x, d_y) = primals, tangents
        d_x, d_y = (jnp.zeros_like(x) if d is None else d for d in (d_x, d_y))
        return x / y, d_x / y - x * d_y / y**2

    quotient.def_jvp(quotient_jvp)
    yield Case("internal.while_loop", loop, (VECTOR, VECTOR + 1))
    yield Case("internal.scan", scan, (jnp.float32(0.5), POSITIVE))
    yield Case("internal.nextafter", eqxi.nextafter, (SIGNED,))
    yield Case("internal.prevbefore", eqxi.prevbefore, (SIGNED,))
    yield Case("error_if", lambda x: eqx.error_if(x, jnp.any(x > 9), "too large"), (SIGNED,))
    yield Case("filter_custom_vjp", lambda x, y: product((x, y)), (SIGNED, OTHERS))
    yield Case("filter_custom_jvp", quotient, (SIGNED, POSITIVE))


def of_tokamax() -> Iterator[Case]:
    """Fused layers, in the implementations for XLA."""
    import tokamax
    from tokamax._src.ops.attention import base

    def xla(function, **options):
        return functools.partial(function, implementation="xla", **options)

    loss = xla(tokamax.linear_softmax_cross_entropy_loss, reduction="mean")
    yield Case("linear_softmax_cross_entropy_loss", lambda x, w: loss(x, LABELS, w), (ROWS, WEIGHTS))
    yield Case("layer_norm", xla(tokamax.layer_norm), (ROWS, POSITIVE[:5], SIGNED[:5]))
    yield Case(
        "gated_linear_unit",
        xla(tokamax.gated_linear_unit, activation=jax.nn.swish),
        (ROWS, numbers(-1, 1, 5, 2, 7)),
    )
    sizes = jnp.array([1, 3], jnp.int32)
    yield Case(
        "ragged_dot", lambda x, w: xla(tokamax.ragged_dot)(x, w, sizes), (ROWS, numbers(-1, 1, 2, 5, 7))
    )
    yield Case("dot_product_attention", xla(tokamax.dot_product_attention), tuple(HEADS))
    yield Case(
        "dot_product_attention, chunked",
        functools.partial(tokamax.dot_product_attention, implementation="xla_chunked"),
        tuple(HEADS),
    )
    yield Case(
        "triangle_multiplication", _triangle(xla(tokamax.triangle_multiplication)), _triangle_args()
    )
    yield Case("attention softmax", lambda x: base._softmax(x, True)[0], (ROWS,))


def _triangle(function):
    mask = jnp.ones((3, 3), bool)
    return lambda x, *layers: function(x, mask, *layers, triangle_type="outgoing")


def _triangle_args():
    shapes = [(3, 3, 4), (4, 2, 2), (4, 2, 2), (2, 3), (4, 3), (4,), (4,), (2,), (2,)]
    return tuple(numbers(-1, 1, *shape, seed=seed) for seed, shape in enumerate(shapes))


def of_jax_cce() -> Iterator[Case]:
    """The head in chunks."""
    import jax_cce

    loss = functools.partial(jax_cce.linear_cross_entropy, labels=LABELS, chunk_size=4)
    yield Case("linear_cross_entropy", lambda x, w: loss(x, w), (ROWS, WEIGHTS.T))


def of_lineax() -> Iterator[Case]:
    """Norms."""
    import lineax

    yield Case("internal two_norm", lineax.internal.two_norm, (SIGNED,))
    yield Case("internal two_norm at 0", lineax.internal.two_norm, (jnp.zeros(3),))
    yield Case("internal rms_norm", lineax.internal.rms_norm, (SIGNED,))
    yield Case("internal max_norm", lineax.internal.max_norm, (SIGNED,))


def of_optimistix() -> Iterator[Case]:
    """Solvers with implicit derivatives."""
    import optimistix as optx

    def solve(run, solver, function):
        return lambda a: run(function, solver, jnp.ones_like(a), a, throw=False, max_steps=200).value

    newton, bfgs = optx.Newton(1e-6, 1e-6), optx.BFGS(1e-6, 1e-6)
    yield Case("root_find", solve(optx.root_find, newton, lambda x, a: x**3 - a), (POSITIVE,))
    yield Case(
        "fixed_point",
        solve(optx.fixed_point, optx.FixedPointIteration(1e-6, 1e-6), lambda x, a: jnp.cos(x) * a / 4),
        (POSITIVE,),
    )
    yield Case("minimise", solve(optx.minimise, bfgs, lambda x, a: jnp.sum((x**2 - a) ** 2)), (POSITIVE,))
    yield Case(
        "least_squares",
        solve(optx.least_squares, optx.LevenbergMarquardt(1e-6, 1e-6), lambda x, a: x**2 - a),
        (POSITIVE,),
    )


def of_diffrax() -> Iterator[Case]:
    """Ordinary differential equations, differentiated in two ways."""
    import diffrax

    def solve(adjoint, start, rates):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_slope),
            diffrax.Tsit5(), 0.0, 1.0, 0.125, start, args=rates, adjoint=adjoint, max_steps=16,
        ).ys  # fmt: skip

    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()):
        yield Case(type(adjoint).__name__, functools.partial(solve, adjoint), (VECTOR, POSITIVE[:3]))


def of_jaxopt() -> Iterator[Case]:
    """Projections, perturbed maxima and solvers with implicit derivatives."""
    import jaxopt
    from jaxopt import isotonic, perturbations, projection

    yield Case("projection_simplex", projection.projection_simplex, (SIGNED,))
    yield Case(
        "projection_sparse_simplex", lambda x: projection.projection_sparse_simplex(x, 3), (SIGNED,)
    )
    yield Case(
        "projection_box_section",
        lambda x: projection.projection_box_section(x, (jnp.zeros(6), jnp.ones(6), jnp.ones(6), 2.0)),
        (SIGNED,),
        UNDER_JIT,
    )
    yield Case("isotonic_l2_pav", isotonic.isotonic_l2_pav, (SIGNED,))
    perturbed = perturbations.make_perturbed_argmax
    yield Case(
        "make_perturbed_argmax",
        lambda x: perturbed(lambda x: jax.nn.one_hot(jnp.argmax(x), 6))(x, KEY),
        (SIGNED,),
        "the smoothed function's derivative, estimated",
    )
    perturbed_max = perturbations.make_perturbed_max
    yield Case(
        "make_perturbed_max",
        lambda x: perturbed_max(lambda x: jax.nn.one_hot(jnp.argmax(x), 6))(x, KEY),
        (SIGNED,),
    )

    for solver in (
        jaxopt.GradientDescent(lambda x, a: jnp.sum((x**2 - a) ** 2) / 8, maxiter=300, tol=1e-6),
        jaxopt.FixedPointIteration(lambda x, a: jnp.cos(x) * a / 4, maxiter=200, tol=1e-7),
    ):
        run = solver.run
        yield Case(type(solver).__name__, lambda a, run=run: run(jnp.ones_like(a), a).params, (POSITIVE,))


def of_numpyro() -> Iterator[Case]:
    """Truncated power laws."""
    from numpyro import distributions
    from numpyro.distributions import util

    def law(method, value, exponent, low, high):
        return getattr(distributions.DoublyTruncatedPowerLaw(exponent, low, high), method)(value)

    yield Case("util.log1mexp", util.log1mexp, (-POSITIVE,))
    limits = jnp.float32(0.25), jnp.float32(4.0)
    for method, value in (("log_prob", POSITIVE), ("cdf", POSITIVE), ("icdf", UNIT)):
        function = functools.partial(law, method)
        yield Case(f"DoublyTruncatedPowerLaw.{method}", function, (value, jnp.float32(-1.5), *limits))
        yield Case(f"DoublyTruncatedPowerLaw.{method} at −1", function, (value, jnp.float32(-1), *limits))


def of_distrax() -> Iterator[Case]:
    """Von Mises' distribution, and products without NaN."""
    import distrax
    from distrax._src.utils import math

    yield Case("multiply_no_nan", math.multiply_no_nan, (SIGNED, OTHERS))
    yield Case("power_no_nan", math.power_no_nan, (POSITIVE, SIGNED))
    yield Case(
        "VonMises.cdf", lambda x, loc, c: distrax.VonMises(loc, c).cdf(x), (SIGNED, OTHERS / 4, POSITIVE)
    )
    yield Case(
        "VonMises.sample",
        lambda c: distrax.VonMises(jnp.zeros_like(c), c).sample(seed=KEY),
        (POSITIVE,),
        IMPLICIT,
        DRAWN,
    )


def of_tfp() -> Iterator[Case]:
    """Special functions, matrices and samples of TensorFlow Probability on JAX."""
    from tensorflow_probability.substrates import jax as tfp
    from tensorflow_probability.substrates.jax.distributions import student_t, von_mises
    from tensorflow_probability.substrates.jax.math import hypergeometric, special

    math, none = tfp.math, "by design it has no derivative, but 0, in the"
    yield Case("math.betainc", math.betainc, (POSITIVE, LARGER, UNIT))
    yield Case("math.betaincinv", special.betaincinv, (POSITIVE, LARGER, UNIT))
    yield Case("math.dawsn", special.dawsn, (SIGNED,))
    yield Case("math.erfcx", math.erfcx, (SIGNED,))
    yield Case("math.igammainv", math.igammainv, (POSITIVE, UNIT))
    yield Case("math.igammacinv", math.igammacinv, (POSITIVE, UNIT))
    yield Case("math.lambertw", math.lambertw, (POSITIVE,))
    yield Case("math.log_gamma_difference", math.log_gamma_difference, (POSITIVE, 2 * LARGER))
    yield Case("math.lbeta", math.lbeta, (POSITIVE, LARGER))
    yield Case("math.owens_t", math.owens_t, (SIGNED, OTHERS))
    yield Case("math.log_cosh", math.log_cosh, (SIGNED,))
    yield Case("math.bessel_iv_ratio", math.bessel_iv_ratio, (LARGER, POSITIVE), f"{none} order")
    for bessel in (math.bessel_ive, math.bessel_kve, math.log_bessel_ive, math.log_bessel_kve):
        yield Case(f"math.{bessel.__name__}", functools.partial(bessel, UNIT), (POSITIVE,))
    yield Case(
        "math.hyp2f1_small_argument",
        lambda z: hypergeometric.hyp2f1_small_argument(
            jnp.full_like(z, 1.5), jnp.full_like(z, 0.75), jnp.full_like(z, 4.0), z
        ),
        (UNIT / 2,),
    )
    yield Case("math.hpsd_logdet", math.hpsd_logdet, (SYMMETRIC,))
    yield Case("math.hpsd_solve", math.hpsd_solve, (SYMMETRIC, MATRIX))
    yield Case(
        "math.hpsd_quadratic_form_solve",
        lambda matrix, rhs: math.hpsd_quadratic_form_solve(_symmetric(matrix), rhs),
        (SYMMETRIC, MATRIX),
    )
    yield Case(
        "math.hpsd_quadratic_form_solvevec", math.hpsd_quadratic_form_solvevec, (SYMMETRIC, VECTOR)
    )
    yield Case("math.ode.DormandPrince", _tfp_decay(math), (VECTOR, POSITIVE[:3]), UNDER_JIT)
    yield Case(
        "experimental retrying_cholesky",
        lambda a: tfp.experimental.distributions.marginal_fns.retrying_cholesky(a)[0],
        (SYMMETRIC,),
    )
    yield Case("bijectors.Softplus", tfp.bijectors.Softplus(low=1.0).forward, (SIGNED,))
    yield Case(
        "bijectors.Sigmoid", tfp.bijectors.Sigmoid(1.0, 3.0).inverse_log_det_jacobian, (UNIT + 1.5,)
    )
    yield Case("distributions.student_t.stdtr", student_t.stdtr, (POSITIVE, SIGNED))
    yield Case("distributions.student_t.stdtrit", student_t.stdtrit, (POSITIVE, UNIT))
    yield Case(
        "distributions.NoncentralChi2.cdf",
        lambda x, d, n: tfp.distributions.NoncentralChi2(d, n).cdf(x),
        (LARGER, POSITIVE, UNIT),
        f"{none} degrees of freedom",
    )
    yield Case(
        "distributions.NoncentralChi2.quantile",
        lambda x, d, n: tfp.distributions.NoncentralChi2(d, n).quantile(x),
        (UNIT, POSITIVE, UNIT),
        f"{none} parameters",
    )
    yield Case("distributions.von_mises_cdf", von_mises.von_mises_cdf, (SIGNED, POSITIVE))
    laws = tfp.distributions
    for name, draw, args in (
        ("VonMises", lambda c: laws.VonMises(0.0, c).sample(seed=KEY), (POSITIVE,)),
        ("Gamma", lambda a, b: laws.Gamma(a, b).sample(seed=KEY), (POSITIVE, LARGER)),
        ("InverseGaussian", lambda a, b: laws.InverseGaussian(a, b).sample(seed=KEY), (POSITIVE, LARGER)),
        ("TwoPieceNormal", lambda s: laws.TwoPieceNormal(0.0, 1.0, s).sample(seed=KEY), (POSITIVE,)),
    ):
        yield Case(f"distributions.{name}.sample", draw, args, IMPLICIT, DRAWN)


def _tfp_decay(math):
    times = jnp.array([0.5, 1.0])

    def solve(start, rates):
        solver = math.ode.DormandPrince()
        return solver.solve(_slope, 0.0, start, times, constants={"rates": rates}).states

    return solve


def _slope(t, y, rates):
    del t
    return -rates * y


def of_qwix() -> Iterator[Case]:
    """Quantised products."""
    from qwix._src.core import dot_general_qt

    config = dot_general_qt.DotGeneralQtConfig(lhs_qtype=jnp.int8, rhs_qtype=jnp.int8)
    dimensions = (((1,), (0,)), ((), ()))
    yield Case(
        "dot_general_qt",
        lambda x, w: dot_general_qt.dot_general_qt(x, w, dimensions, config),
        (ROWS, WEIGHTS),
        "straight through the rounding to int8",
    )


PACKAGES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "jax": ("jax", of_jax),
    "optax": ("optax", of_optax),
    "flax": ("flax", of_flax),
    "equinox": ("equinox", of_equinox),
    "tokamax": ("tokamax", of_tokamax),
    "jax-cce": ("jax_cce", of_jax_cce),
    "lineax": ("lineax", of_lineax),
    "optimistix": ("optimistix", of_optimistix),
    "diffrax": ("diffrax", of_diffrax),
    "jaxopt": ("jaxopt", of_jaxopt),
    "numpyro": ("numpyro", of_numpyro),
    "distrax": ("distrax", of_distrax),
    "tensorflow-probability": ("tensorflow_probability", of_tfp),
    "qwix": ("qwix", of_qwix),
}


def compared(package: str, case: Case) -> Result:
    """What `compare_gradients` says of it, and how long that takes, compilation included."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            comparison = js.compare_gradients(case.function, *case.args, jvp=True, **case.options)
        kind, verdict = kinds(comparison), worst(comparison)
    except Exception as error:  # What JAX and the libraries on it raise has no common type.
        kind, verdict = "", f"not compared: {first_line(error)}"
    has_reason = bool(case.reason) and not verdict.startswith("right")
    if has_reason:
        verdict += f" ({case.reason})"
    return Result(package, case.rule, kind, verdict, time.perf_counter() - start, has_reason)


def kinds(comparison: js.GradientComparison) -> str:
    """The kinds of the rules that were compared."""
    return ", ".join(sorted({rule.kind for rule in comparison.rules if rule.compared}))


def worst(comparison: js.GradientComparison) -> str:
    """The worst verdict of all rows, and where it is."""
    if not any(rule.compared for rule in comparison.rules):
        return "not judged: no rule was compared"
    verdicts = {row.verdict(): f"{row.kind} of {row.path}" for row in reversed(comparison.rows)}
    order = ("wrong", "not judged", "right at a kink", "right by differences", "right")
    verdict = min(verdicts, key=lambda text: [text.startswith(word) for word in order].index(True))
    return verdict if verdict.startswith("right") else f"{verdict}, {verdicts[verdict]}"


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its text, cut short."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 100, placeholder=' …')}"


def results(packages: list[str], only: str) -> Iterator[Result]:
    """Every case of the packages that are installed and whose rule's name holds the text."""
    for package in packages:
        module, cases = PACKAGES[package]
        if importlib.util.find_spec(module) is None:
            print(f"{package} is not installed, so its rules are skipped", flush=True)
            continue
        try:
            for case in cases():
                if only in case.rule:
                    yield compared(package, case)
        except Exception as error:  # Another version of the package may lack what a case names.
            yield Result(package, "the other cases", "", f"not compared: {first_line(error)}", 0.0)


def line(result: Result) -> str:
    """A row of the Markdown table."""
    cells = (result.package, result.rule, result.kind, result.verdict, f"{result.seconds:.1f}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def versions(packages: list[str]) -> str:
    """What ran, and on what."""
    # Some are installed under another name, as nightly builds are.
    names = importlib.metadata.packages_distributions()
    installed = [names.get(PACKAGES[package][0], [package])[0] for package in packages]
    found = [f"{name} {importlib.metadata.version(name)}" for name in installed]
    return f"{', '.join(found)}; {processor()}."


def processor() -> str:
    """The processor's name; JAX's word for it where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else jax.devices()[0].device_kind


def counts(found: list[Result]) -> str:
    """How many got which verdict."""
    words = Counter(
        result.verdict.split(":")[0].split(",")[0].split(" by ")[0]
        + (" with a reason" if result.has_reason else "")
        for result in found
    )
    seconds = sum(result.seconds for result in found)
    text = ", ".join(f"{count} {word}" for word, count in words.most_common())
    return f"{len(found)} cases in {seconds:.0f} seconds: {text}."


@jax.custom_vjp
def activation(x: jax.Array) -> jax.Array:
    """SiLU."""
    return jax.nn.silu(x)


def activation_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    """Its rule."""
    share = jax.nn.sigmoid(x)
    return (cotangent * share * (1 + x * (1 - share)),)


activation.defvjp(lambda x: (activation(x), x), activation_backward)


def network_ratio(rows: int = 8192) -> float:
    """How long the comparison of a 12-layer network takes, over its value and gradient.

    What is compiled is so for both numbers of rows; the difference of two comparisons is without it.
    """
    shapes = [(512, 512)] * 11 + [(512, 1000)]
    network = [numbers(-0.06, 0.06, *shape, seed=i) for i, shape in enumerate(shapes)]

    def cost(network, x, labels):
        for weights in network[:-1]:
            x = x + activation(x @ weights)
        return js.log_likelihood_cost(x @ network[-1], labels)

    def seconds(rows):
        x, labels = numbers(-2, 2, rows, 512), jnp.arange(rows) % 1000
        step = jax.jit(jax.value_and_grad(cost))
        compared = functools.partial(js.compare_gradients, cost, argnums=0)
        times = {step: [], compared: []}
        for _ in range(4):
            for run, taken in times.items():
                start = time.perf_counter()
                jax.block_until_ready(run(network, x, labels))
                taken.append(time.perf_counter() - start)
        return [float(np.median(taken[1:])) for taken in times.values()]

    (few_step, few), (step, many) = seconds(8), seconds(rows)
    return (many - few) / (step - few_step)


def main() -> None:
    """Compares, prints and, if asked to, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="NAME")
    parser.add_argument("--only", default="", metavar="TEXT", help="rules whose names hold this text")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=Path(__file__).with_suffix(".md"), metavar="PATH",
        help="write the table to this Markdown file, gallery.md beside this script if none is named",
    )  # fmt: skip
    options = parser.parse_args()
    del sys.argv[1:]  # tokamax reads flags of its own there.
    table = ["| package | rule | kind | verdict | seconds |", "|---|---|---|---|---:|"]
    print("\n".join(table), flush=True)
    found = []
    for result in results(options.packages, options.only):
        found.append(result)
        table.append(line(result))
        print(table[-1], flush=True)
    said = counts(found)
    if not options.only:
        said += (
            "\n\nA network of 12 layers: the comparison takes "
            f"{network_ratio():.1f} times its compiled value and gradient, compile time aside."
        )
    print(f"\n{said}")
    if options.save:
        present = list(dict.fromkeys(result.package for result in found))
        text = "\n".join([versions(present), "", *table, "", said])
        options.save.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
