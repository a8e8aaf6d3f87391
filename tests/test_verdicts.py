"""What a comparison sees beyond wrong numbers, and what it must not take for wrong."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import every, mostly_slow, slow, unchecked
from jax.custom_derivatives import linear_call
from jax.extend import core as jax_core

import jaxsoftmax as js
from jaxsoftmax import _gradients
from jaxsoftmax._linearity import LinearityTests


def ruled(backward, primal=jnp.sin, derivative=jnp.cos):
    """A function whose rule is its derivative times whatever `backward` makes of the cotangent."""

    @jax.custom_vjp
    def function(x):
        return primal(x)

    function.defvjp(lambda x: (primal(x), x), lambda x, c: (backward(c) * derivative(x),))
    return function


def around(function):
    """The function within another rule."""

    @jax.custom_vjp
    def outer(x):
        return function(x)

    outer.defvjp(lambda x: jax.vjp(function, x), lambda pull_back, cotangent: pull_back(cotangent))
    return outer


BACKWARD = {
    "right": lambda c: c,
    "dropped": jnp.ones_like,
    "squared": lambda c: c * c,
    "absolute": lambda c: jnp.abs(c).astype(c.dtype),
    "twice": lambda c: 2 * c,
    "clipped": lambda c: c / jnp.maximum(1, jnp.abs(c) / 10).astype(c.dtype),
    "conjugated": jnp.conj,
}
CONSTRUCTS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, row: (c, f(row)), None, x)[1],
    "vmap": jax.vmap,
    "checkpoint": jax.checkpoint,
    "rule": around,
}


@pytest.mark.parametrize("kind", ["scalar", slow("complex")])
def test_a_rule_must_be_linear_in_its_cotangent(kind, key):
    dtype = jnp.complex64 if kind == "complex" else jnp.float32
    faults = [fault for fault in BACKWARD if fault != "conjugated" or kind == "complex"]
    pairs = [("right", construct) for construct in CONSTRUCTS]
    # Each fault and each construct several times.
    pairs += every(5 if kind == "complex" else 7, list(itertools.product(faults[1:], CONSTRUCTS)))
    x = {
        f: {c: jax.random.normal(key, (3, 2), dtype) for _, c in some}
        for f, some in itertools.groupby(pairs, lambda pair: pair[0])
    }

    def function(x):
        results = [
            CONSTRUCTS[construct](ruled(BACKWARD[fault]))(x[fault][construct])
            for fault, construct in pairs
        ]
        return sum(y.sum() for y in results) if kind == "scalar" else results

    comparison = js.compare_gradients(function, x)
    for row in comparison.rows:
        assert row.is_right() == (row.kind == "value" or "right" in row.path), row.path
    if kind == "scalar":
        nonlinear = [
            r.path for r in comparison.rows if r.verdict() == "wrong: not linear in the cotangent"
        ]
        assert len(nonlinear) == sum(fault not in ("right", "twice") for fault, _ in pairs)
        # What is printed is the gradient.
        gradient = jax.jit(jax.grad(function))(x)["dropped"]["plain"]
        row = next(row for row in comparison.rows if row.path == "x['dropped']['plain']")
        assert row.custom == float(gradient[row.worst])


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float32"), slow("complex64")])
def test_rules_are_tested_where_they_stand(dtype, key, monkeypatch):
    pairs = list(itertools.product(CONSTRUCTS, BACKWARD))
    x = {pair: jax.random.normal(key, (3, 2), dtype) for pair in map("/".join, pairs)}

    def function(x):
        results = [
            CONSTRUCTS[construct](ruled(BACKWARD[fault]))(x[f"{construct}/{fault}"]).sum()
            for construct, fault in pairs
        ]
        return sum(results).real

    tested = LinearityTests().of(jax.make_jaxpr(function)(x))
    leaves, tree = jax.tree.flatten(x)
    gradients = jax.jit(jax.grad(lambda leaves: jax_core.jaxpr_as_fun(tested)(*leaves)[0]))(leaves)
    for pair, gradient in jax.tree.unflatten(tree, gradients).items():
        is_linear = pair.endswith(("/right", "/twice", "/conjugated"))
        assert bool(jnp.isfinite(gradient).all()) == is_linear, pair
    # What is right needs no more runs of the whole function.
    monkeypatch.setattr(_gradients, "_in_draws", lambda *_: pytest.fail("more runs"))
    right = [jax.random.normal(key, (3, 2), dtype)] * len(CONSTRUCTS)

    def rightly(right):
        return [f(ruled(BACKWARD["right"]))(x) for f, x in zip(CONSTRUCTS.values(), right, strict=True)]

    js.compare_gradients(rightly, right).assert_close()


def in_forward_rule(inner):
    """A `custom_jvp` of sin whose rule uses an inner function."""

    @jax.custom_jvp
    def outer(x):
        return jnp.sin(x)

    outer.defjvp(lambda primals, tangents: (jnp.sin(*primals), inner(*primals, *tangents)))
    return outer


def linear_of_clipped(x, tangent):
    clipped = lambda _, cotangent: jnp.clip(cotangent, -1, 1)  # noqa: E731
    return linear_call(lambda _, t: t, clipped, (), tangent) * jnp.cos(x)


def with_rule(function, backward):
    ruled = jax.custom_vjp(function)
    ruled.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return ruled


early_out = with_rule(
    lambda x: ((x**2).sum(), (x**3).sum()),
    lambda r, c: (jnp.where(c[0] == 0, 0, 2 * c[0] * r[0] + 3 * c[1] * r[0] ** 2),),
)
cut = with_rule(lambda s, x: s * x, lambda r, c: (jnp.maximum((c * r[1]).sum(), 0), c * r[0]))
HARDLY_WRONG = {
    "every other": lambda x: ruled(lambda c: jnp.where(jnp.arange(c.size) % 2, jnp.abs(c), c))(x).sum(),
    "a sum": lambda x: cut(x.sum(), x).sum(),
    "one output": early_out,
    "in a forward rule": lambda x: in_forward_rule(
        lambda x, t: jax.jvp(ruled(lambda c: jnp.clip(c, -1, 1)), (x,), (t,))[1]
    )(x).sum(),
    "a linear call": lambda x: (in_forward_rule(linear_of_clipped)(x) * ruled(lambda c: c)(x)).sum(),
}


@pytest.mark.parametrize("name", HARDLY_WRONG)
def test_what_is_hardly_not_linear_is_found(name):
    x = jnp.array([-1.0, 3.0, -1.0, 1.0])
    row = js.compare_gradients(HARDLY_WRONG[name], x).rows[-1]
    assert row.verdict() == "wrong: not linear in the cotangent"


@jax.custom_jvp
def tripled(x):
    """3x, with a rule for forward mode that says 5."""
    return 3 * x


tripled.defjvp(lambda primals, tangents: (tripled(*primals), 5 * tangents[0]))
quintupled = ruled(lambda c: 5 * c, lambda x: 3 * x, jnp.ones_like)
X = jnp.array([0.5, -1.0, 2.0])


def test_forward_rules_are_compared_if_asked():
    comparison = js.compare_gradients(tripled, X)
    assert [tuple(rule) for rule in comparison.rules] == [("custom_jvp", "tripled", 1, False)]
    assert "no rule was found to compare (jvp=True compares custom_jvp rules)" in comparison.notes
    with pytest.raises(AssertionError, match="the arguments have no entry to compare"):
        js.compare_gradients(ruled(lambda c: c), jnp.zeros(0)).assert_close()
    with pytest.raises(AssertionError, match="no rule was compared:\n"):
        comparison.assert_close()
    comparison = js.compare_gradients(lambda x: tripled(x) + quintupled(jax.nn.relu(x)), X, jvp=True)
    assert [tuple(rule) for rule in comparison.rules] == [
        ("custom_jvp", "relu", 1, True), ("custom_jvp", "tripled", 1, True),
        ("custom_vjp", "function", 1, True),
    ]  # fmt: skip
    assert [row.is_right() for row in comparison.rows] == [True, False]
    js.compare_gradients(multiplied, X, jvp=True).assert_close()


@jax.custom_jvp
def multiplied(x, factor=2.0):
    """A rule with an argument that JAX has no name for."""
    return x * factor


multiplied.defjvp(lambda primals, tangents: (multiplied(*primals), tangents[0] * primals[1]))


def test_nothing_is_judged_by_what_is_not_finite():
    root = ruled(lambda c: c, jnp.sqrt, lambda x: 0.5 / jnp.sqrt(x))
    comparison = js.compare_gradients(root, jnp.array([4.0, -1.0]))
    assert [row.verdict() for row in comparison.rows] == [
        "not judged: 1 of 2, not finite", "not judged: 1 of 2, not finite"
    ]  # fmt: skip
    js.compare_gradients(
        ruled(lambda c: c, jnp.exp, jnp.exp), jnp.array([1.0, jnp.inf])
    )  # Warns of nothing.
    with pytest.raises(AssertionError, match="not judged: value of output, gradient of x:\n"):
        comparison.assert_close()
    assert "inf ulp" not in str(comparison)


def force(x):
    """A derivative inside the function: its rule is used before it could be removed."""
    return jax.grad(lambda y: (tripled(y) ** 2).sum())(x)


def zeroed(x):
    """A linear function with the wrong transpose."""
    call = jax.custom_derivatives.linear_call
    return call(lambda _, x: 2 * x, lambda _, c: jnp.zeros_like(c), (), x)


def stopped(x):
    """3x whose half is hidden."""
    return 1.5 * (x + jax.lax.stop_gradient(x)) + 0 * jnp.sum(ruled(lambda c: c)(x))


@pytest.mark.slow
def test_what_hides_a_gradient_is_told():
    assert any("stop_gradient inside" in note for note in js.compare_gradients(stopped, X).notes)
    assert any("rules that could not be removed" in note for note in js.compare_gradients(force, X).notes)
    for function in (force, zeroed, stopped):
        comparison = js.compare_gradients(function, X, reference="differences")
        assert [row.verdict()[:5] for row in comparison.rows] == ["right", "wrong"], function
    with pytest.raises(AssertionError, match="gradient of x"):
        js.compare_gradients(zeroed, X).assert_close()
    # A gradient that nothing needs is not hidden: the cost shifts its logits by their largest.
    assert js.compare_gradients(js.log_likelihood_cost, X, 0).notes == ()
    # Nor is a derivative inside that takes a forward rule's value alone, as in the head's blocks.
    head = functools.partial(js.linear_log_likelihood_cost, block_size=2)
    x = jnp.stack([X, 2 * X, -X])
    assert js.compare_gradients(lambda x: head(x, jnp.eye(3), None, jnp.arange(3)), x).notes == ()


@pytest.mark.slow
def test_a_mean_of_the_cotangent_that_is_dropped_is_found_in_bfloat16():
    centred = ruled(lambda c: c, lambda x: x - x.mean(), jnp.ones_like)
    for size in (16, 64, 4096):
        x = jax.random.normal(jax.random.key(size), size, jnp.bfloat16)
        assert not js.compare_gradients(centred, x).rows[1].is_right(), size


def test_a_table_says_what_its_gradients_are():
    step = jax.custom_vjp(lambda x: jnp.maximum(x, 0))
    step.defvjp(lambda x: (step(x), x), lambda x, c: (jnp.where(x > 0, c, 0),))
    x = jnp.array([1.0, 0.0, -1.0])
    gradient = js.compare_gradients(step, x).rows[1]
    assert gradient.verdict() == "right at a kink"
    assert (gradient.worst, gradient.custom_ulps, gradient.reference_ulps) == ((1,), 0, 0)
    assert np.isnan(gradient.truth)
    table = str(js.compare_gradients(step, x))
    assert "\nx is at a kink at (1,): any slope between both sides' is right" in table
    # Entries at kinks that are wrong together are at none.
    twice = ruled(lambda c: c, jnp.max, lambda x: (x == x.max()).astype(x.dtype))
    assert "at a kink" not in str(js.compare_gradients(twice, jnp.array([1.0, 1.0, 0.0])))
    assert re.search(r"<lambda> at test_verdicts.py:\d+ \(custom_vjp\)", table)
    assert "gradients are those of all outputs times random numbers, added up" in table
    assert "random" not in str(js.compare_gradients(lambda x: step(x).sum(), x))


def transformer(parameters, x):
    """Layers of attention and a feed-forward network, with normalisations."""
    for layer in parameters:
        q, k, v = jnp.split(jax.nn.standardize(x) @ layer["qkv"], 3, axis=-1)
        x = x + jax.nn.softmax(q @ k.T / 4) @ v
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ layer["up"]) @ layer["down"]
    return optax.softmax_cross_entropy_with_integer_labels(x, jnp.arange(len(x)) % 16).mean()


@pytest.mark.slow
def test_a_function_without_rules_is_right_in_bfloat16(key):
    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16) / 4

    def layer(key):
        keys = jax.random.split(key, 3)
        return {
            "qkv": normal(keys[0], 16, 48),
            "up": normal(keys[1], 16, 32),
            "down": normal(keys[2], 32, 16),
        }

    parameters = [layer(each) for each in jax.random.split(key, 1)]
    # Not jitted: eagerly each operation would round by itself.
    comparison = js.compare_gradients(transformer, parameters, normal(key, 8, 16))
    assert all(row.is_right() and row.difference == 0 for row in comparison.rows)


def test_operations_of_other_libraries_are_left_alone():
    primitive = jax.extend.core.Primitive("holds_a_program")

    @primitive.def_impl
    def run(x, *, program):
        assert program is kept, "another program than it was given"
        return jax.extend.core.jaxpr_as_fun(program)(x)[0]

    primitive.def_abstract_eval(lambda x, **_: x)
    kept = jax.make_jaxpr(quintupled)(X)
    assert js.without_custom_rules(lambda x: primitive.bind(x, program=kept))(X).shape == (3,)


def test_arguments_of_every_kind():
    right = ruled(lambda c: c)

    @functools.partial(jax.jit, donate_argnums=0)
    def donated(x):
        return right(x)

    x = jnp.array(X)
    js.compare_gradients(donated, x).assert_close()
    assert not x.is_deleted()
    js.compare_gradients(
        lambda x, _key, _nothing, n: n * right(x), 0.5, jax.random.key(0), None, 3
    ).assert_close()
    js.compare_gradients(lambda z: jnp.abs(right(z)), X.astype(jnp.complex64) * (1 + 2j)).assert_close()
    with jax.set_mesh(jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))):
        y = jax.device_put(jnp.arange(8.0) / 4, jax.sharding.PartitionSpec("rows"))
        js.compare_gradients(lambda y: 2 * right(y), y).assert_close()
        js.compare_gradients(lambda y: 2 * right(y), y, reference="differences").assert_close()


def test_what_prevents_a_comparison_is_a_sentence():
    right = ruled(lambda c: c)

    def branching(x, scale):
        return right(x) if scale > 0 else x

    with pytest.raises(
        RuntimeError, match=r"^function cannot be traced: .* leave its argument out by argnums"
    ):
        js.compare_gradients(branching, X, 2.0)
    js.compare_gradients(branching, X, 2.0, argnums=0).assert_close()

    @jax.custom_vjp
    def odd(x):
        return 2 * x

    odd.defvjp(lambda x: ({"y": 2 * x}, None), lambda _, c: (2 * c,))
    with pytest.raises(RuntimeError, match=r"^function cannot be differentiated: .*fwd rule") as error:
        js.compare_gradients(odd, X)
    assert isinstance(error.value.__cause__, TypeError)
    with pytest.raises(RuntimeError, match=r"^function cannot be differentiated: .*Reverse-mode"):
        js.compare_gradients(lambda x: jax.lax.while_loop(lambda x: x[0] < 9, jnp.exp, x), X)
    with pytest.raises(RuntimeError, match=r"^reference cannot be differentiated: .*Reverse-mode"):
        js.compare_gradients(
            right, X, reference=lambda x: jax.lax.while_loop(lambda x: x[0] < 0, jnp.exp, x)
        )
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match="x is traced: call it outside of jit, grad and vmap"):
            transform(lambda x: js.compare_gradients(right, x).rows[0].norm)(
                jnp.ones(3) if transform is jax.vmap else 1.0
            )
    with pytest.raises(TypeError, match="'differences' or None, got 'difference'"):
        unchecked(js.compare_gradients)(right, X, reference="difference")


def test_float64_is_not_needed():
    def narrow(x):
        return jax.lax.scan(lambda c, y: (c + quintupled(y), None), jnp.float32(0), x)[0]

    comparison = js.compare_gradients(narrow, X)
    assert [row.is_right() for row in comparison.rows] == [True, False]
    assert any("cannot run in float64" in note for note in comparison.notes)
    js.compare_gradients(js.without_custom_rules(narrow), X, reference="differences").assert_close()


def test_pytest_shows_the_table_alone():
    comparison = js.compare_gradients(quintupled, jnp.ones((40, 50)))
    with pytest.raises(AssertionError) as error:
        comparison.assert_close()
    shown = str(error.getrepr())
    assert "wrong in gradient of x" in shown
    assert "array(" not in shown
    assert len(shown.splitlines()) < 25
    assert len(repr(comparison)) < 200


def test_a_rule_that_rounds_its_cotangent_is_found():
    rounding = ruled(lambda c: c.astype(jnp.bfloat16).astype(c.dtype))
    with pytest.raises(AssertionError, match="wrong in gradient of x"):
        js.compare_gradients(rounding, X).assert_close()


def test_entries_that_tie_are_judged_together():
    def largest(gradient):
        function = jax.custom_vjp(lambda x: x.max())
        function.defvjp(lambda x: (x.max(), x), lambda x, c: (c * gradient(x),))
        return function

    x = jnp.array([1.0, 1.0, 0.0])
    both = largest(lambda x: (x == x.max()).astype(x.dtype))
    first = largest(lambda x: jnp.zeros_like(x).at[jnp.argmax(x)].set(1))
    for reference in (None, "differences"):
        comparison = js.compare_gradients(both, x, reference=reference)
        assert comparison.rows[1].verdict() == "wrong: differences agree with the reference"
        comparison = js.compare_gradients(first, x, reference=reference)
        assert comparison.rows[1].verdict() == "right at a kink"
    # One kink among smooth entries is told.
    comparison = js.compare_gradients(jax.nn.relu, jnp.array([0.0, 1.0]), reference="differences")
    assert comparison.rows[1].verdict() == "right at a kink"


@pytest.mark.slow
def test_random_numbers_are_compared_as_they_are_drawn(key):
    def dropout(function, x):
        y = function(x)
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), y, jnp.zeros_like(y))

    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.linspace(0.5, 2, 8, dtype=dtype)
        # Right but for its last bits.
        right = ruled(lambda c: c * jnp.asarray(0.7, c.dtype) / jnp.asarray(0.7, c.dtype))
        comparison = js.compare_gradients(functools.partial(dropout, right), x)
        comparison.assert_close()
        assert any("random numbers are drawn" in note for note in comparison.notes)
        wrong = ruled(lambda c: c * jnp.asarray(1.1, c.dtype))
        with pytest.raises(AssertionError, match="wrong in gradient of x"):
            js.compare_gradients(functools.partial(dropout, wrong), x).assert_close()


def test_overflow_is_wrong_where_there_is_a_number():
    exponential = ruled(lambda c: c, jnp.exp, jnp.exp)
    x = jnp.array([12.0, 1.0], jnp.float16)
    # More than float16 holds: infinity is what it should be.
    js.compare_gradients(exponential, x).assert_close()
    comparison = js.compare_gradients(lambda x: exponential(x) / jnp.asarray(100, x.dtype), x)
    assert [row.verdict()[:6] for row in comparison.rows] == ["wrong:", "wrong:"]


@pytest.mark.slow
def test_many_entries_that_are_wrong_come_with_a_number():
    @jax.custom_vjp
    def root(a):
        return jax.lax.while_loop(
            lambda s: jnp.any(jnp.abs(s * s - a) > 1e-6 * a), lambda s: (s + a / s) / 2, a
        )

    root.defvjp(lambda a: (root(a),) * 2, lambda s, c: (-c / (2 * s),))
    comparison = js.compare_gradients(root, jnp.arange(1.0, 61.0))
    assert comparison.rows[1].verdict() == "wrong by differences"
    slopes = next(
        note for note in comparison.notes if note.startswith("gradient of a along one direction")
    )
    custom, differences = (
        float(slopes.split(name + " ")[1].split(",")[0]) for name in ("custom", "differences")
    )
    assert custom == pytest.approx(-differences, rel=1e-3)


def test_misuse_is_named():
    right = ruled(lambda c: c)
    with pytest.raises(RuntimeError, match="has_aux is for functions that return a pair"):
        js.compare_gradients(right, X, has_aux=True)
    with pytest.raises(ValueError, match="the arguments of argnums 0 must hold a floating-point array"):
        js.compare_gradients(lambda n, x: n * right(x), 3, X, argnums=0)
    with pytest.raises(TypeError, match=r"key must be a jax\.random\.key or None, got 3"):
        unchecked(js.compare_gradients)(right, X, key=3)
    for no_key in (jax.random.split(jax.random.key(0)), jnp.ones(2), jnp.ones((2, 2), jnp.uint32)):
        with pytest.raises(TypeError, match=r"key must be a jax\.random\.key or None, got Array"):
            unchecked(js.compare_gradients)(right, X, key=no_key)

    def refuse(_):
        raise ValueError("said by the callback")

    calling = ruled(lambda c: c, lambda x: jax.pure_callback(refuse, x, x))
    with pytest.raises(RuntimeError, match="said by the callback"):
        js.compare_gradients(calling, X)


def given(primal, backward):
    """A function of one array, with a rule of it and its cotangent."""
    function = jax.custom_vjp(lambda x: primal(x))
    function.defvjp(lambda x: (primal(x), x), lambda x, c: (backward(x, c),))
    return function


def opaque(x):
    """x, through a loop that reverse mode cannot go through."""
    return jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, s[1]), (0, x))[1]


def bisected(a):
    """The square root of a, on stairs of 1e-6."""

    def halved(s):
        low, high, middle = *s, sum(s) / 2
        return jnp.where(middle**2 < a, middle, low), jnp.where(middle**2 < a, high, middle)

    start = jnp.zeros_like(a), jnp.full_like(a, 4)
    return jax.lax.while_loop(lambda s: jnp.any(s[1] - s[0] > 1e-6), halved, start)[0]


def ramp(x, c):
    return c * ((x > -1) & (x < 1)).astype(c.dtype)


def equal_to_the_largest(x, c):
    return c * jnp.sign(x) * (jnp.abs(x) == jnp.abs(x).max()).astype(c.dtype)


def as_float32(x):
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    narrow = x.astype(jnp.float32)
    return jax.pure_callback(lambda x: 10 * np.asarray(x, np.float32), shape, narrow)


def lasso(x):
    """What reverse mode cannot go through."""
    cost = lambda s: (s[0] + 1, jnp.sum(jnp.abs(x) + x**2 / 2))  # noqa: E731
    return jax.lax.while_loop(lambda s: s[0] < 1, cost, (0, 0.0))[1]


SPARSE = jnp.asarray(np.r_[np.zeros(15), np.linspace(0.5, 2, 9)], jnp.float32)
SATURATED = jnp.clip(jnp.linspace(-3, 3, 40), -1, 1)
RIGHT = {
    "a convention at many kinks": (lambda x: jnp.clip(x, -1, 1), ramp, SATURATED),
    "a convention at two kinks": (lambda x: jnp.clip(x, -1, 1).sum(), ramp, jnp.array([-1, 1, 0.5])),
    "a tie, shared": (
        lambda x: jnp.abs(x).max(), lambda x, c: equal_to_the_largest(x, c) / 2, jnp.array([2.0, -2]),
    ),
    "some at kinks, some not": (lasso, lambda x, c: c * (jnp.sign(x) + x), SPARSE),
    "stairs": (bisected, lambda x, c: c / (2 * jnp.sqrt(x)), jnp.array([2.0, 3.0])),
    "below the normal numbers": (
        lambda x: x * jnp.asarray(1e-6, x.dtype), lambda _, c: c * jnp.asarray(1e-6, c.dtype),
        jnp.array([1, 2, 3], jnp.float16),
    ),
    "complex": (lambda z: opaque(z) ** 2, lambda z, c: 2 * c * z, jnp.array([2 + 0.5j])),
}  # fmt: skip
WRONG = {
    "a tie, counted twice": (lambda x: jnp.abs(x).max(), equal_to_the_largest, jnp.array([2.0, -2])),
    "too long at 0": (jnp.linalg.norm, lambda _, c: c * jnp.array([1.0, -1, 1]), jnp.zeros(3)),
    "at many kinks": (jax.nn.relu, lambda x, c: 2 * c * (x >= 0).astype(c.dtype), jnp.zeros(40)),
    "beside kinks": (lasso, lambda x, c: c * (jnp.sign(x) + 1.5 * x), SPARSE),
    "beside kinks that plain autodiff knows": (
        lambda x: jnp.maximum(x, 0), lambda x, c: c * jnp.where(x > 0, 1.1, x == 0), SPARSE,
    ),
    "near a kink, with a large value": (
        lambda x: jnp.maximum(x, 0).sum() + 5000,
        lambda x, c: c * jnp.where(x > 0.5, 1, jnp.where(x > 0, 0.3, 0)), jnp.array([1e-8, 1, 2]),
    ),
    "near a kink": (
        lambda x: jnp.maximum(x, x / 10), lambda x, c: c * jnp.where(x > 1e-6, 1, 0.1),
        jnp.array([10, 20, 1e-7]),
    ),
    "one of small size, in float32": (
        as_float32, lambda _, c: 10 * c * jnp.array([1.0, -1, 1]).astype(c.dtype),
        jnp.array([1, 1e-4, 1.5]),
    ),
    "turned": (lambda z: opaque(z) ** 2, lambda z, c: -2j * c * z, jnp.array([2 + 0j])),
    "bounded above": (lambda x: (x**2).sum(), lambda x, c: 2 * x * jnp.minimum(c, 0.5), X),
    "for negative cotangents alone": (lambda x: (x**2).sum(), lambda x, c: 2 * x * jnp.minimum(c, 0), X),
    "rounded": (
        lambda x: (x**2).sum(), lambda x, c: 2 * x * c.astype(jnp.bfloat16).astype(c.dtype), X,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", mostly_slow(2, [*RIGHT, *WRONG]))
def test_what_is_hard_to_tell(name):
    primal, backward, x = (RIGHT | WRONG)[name]
    row = js.compare_gradients(given(primal, backward), x).rows[1]
    assert row.verdict().startswith("right" if name in RIGHT else "wrong"), row.verdict()


def test_an_array_beside_one_at_kinks_is_judged_alone():
    primal = given(
        lambda arrays: sum(map(lasso, arrays)),
        lambda arrays, c: [c * (jnp.sign(x) + (0.0 if i == 1 else x)) for i, x in enumerate(arrays)],
    )
    smooth = jnp.linspace(0.5, 2, 8)
    rows = js.compare_gradients(primal, [jnp.zeros(8), smooth, smooth, smooth]).rows
    assert [row.verdict().split()[0] for row in rows[1:]] == ["right", "wrong", "right", "right"]


def test_the_largest_number_may_be_moved():
    def backward(x, c):
        a = jax.nn.softmax(x)
        return a * (c - 1.001 * (c * a).sum())

    masked = jnp.array([1, 2, jnp.finfo(jnp.float32).min])
    row = js.compare_gradients(given(jax.nn.softmax, backward), masked).rows[1]
    assert row.verdict().startswith("wrong")


def test_the_array_that_is_wrong_is_named():
    def total(arrays):
        return sum((opaque(x) ** 2).sum() for x in arrays)

    def backward(arrays, c):
        gradients = [2 * c * x for x in arrays]
        gradients[1] = -gradients[1]
        return gradients

    # A small one among larger ones.
    arrays = [jnp.linspace(1, 2, 10) * (0.03 if i == 1 else 1) for i in range(6)]
    comparison = js.compare_gradients(given(total, backward), arrays)
    assert [row.path for row in comparison.rows if not row.is_right()] == ["x[1]"]
