"""Rules removed wherever they sit, and comparisons that see what is wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_labels, random_logits

import jaxsoftmax as js


@jax.custom_vjp
def doubled(x):
    """2x, with a rule that says 3."""
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (3 * cotangent,))


@jax.custom_jvp
def tripled(x):
    """3x, with a rule that says 5."""
    return 3 * x


tripled.defjvp(lambda primals, tangents: (tripled(*primals), 5 * tangents[0]))


@jax.custom_vjp
def around(x):
    """A rule around a rule."""
    return doubled(x) / 2


around.defvjp(lambda x: (x, None), lambda _, cotangent: (7 * cotangent,))


def in_scan(x):
    return jax.lax.scan(lambda carry, _: (doubled(carry) / 2, None), x, length=3)[0] * 2


NESTS = {
    "plain": doubled,
    "jit": jax.jit(lambda x: jax.jit(doubled)(x)),
    "checkpoint": jax.checkpoint(doubled),
    "vmap": jax.vmap(doubled),
    "scan": in_scan,
    "while": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: doubled(y) / 2, x) * 2,
    "cond": lambda x: jax.lax.cond(x.sum() > -1e9, doubled, jnp.sin, x),
    "switch": lambda x: jax.lax.switch(1, [jnp.sin, doubled, jnp.cos], x),
    "rule in rule": lambda x: 2 * around(x),
    "captured array": lambda x: doubled(x * jnp.asarray(np.ones(3, np.float32))),
    "custom_jvp": lambda x: jax.nn.relu(doubled(x) + 10),
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS.keys())
@pytest.mark.parametrize("jit", [False, True])
def test_rules_are_found_wherever_they_sit(nest, jit):
    x = jnp.array([0.5, -1.0, 2.0])
    plain = js.without_custom_rules(nest)
    if jit:
        plain = jax.jit(plain)
    gradient = jax.grad(lambda x: plain(x).sum())(x)
    assert_close(plain(x), nest(x), ulps=1)
    assert_close(gradient, [2.0, 2.0, 2.0], ulps=1)
    _, tangent = jax.jvp(plain, (x,), (jnp.ones(3),))
    assert_close(tangent, [2.0, 2.0, 2.0], ulps=1)
    assert_close(jax.vmap(plain)(jnp.stack([x, x]))[1], nest(x), ulps=1)


def test_jvp_rules_stay_unless_asked():
    def slope(**options):
        return float(jax.grad(js.without_custom_rules(tripled, **options))(1.0))

    assert (slope(), slope(jvp=True)) == (5.0, 3.0)


def test_arguments_that_are_no_arrays_pass_through():
    def function(x, *, kind, scale):
        return {"double": doubled(x) * scale, "same": x}[kind]

    plain = js.without_custom_rules(function)
    assert_close(jax.grad(lambda x: plain(x, kind="double", scale=2))(jnp.float32(1)), 4.0, ulps=0)
    assert plain.__name__ == "function"


def test_without_rules_nothing_changes():
    def function(x):
        return jax.lax.scan(lambda c, y: (jnp.tanh(c * y), c), x, jnp.arange(3.0))[0].sum()

    def instructions(f):
        text = jax.jit(jax.grad(f)).lower(jnp.ones(4)).compile().as_text()
        return [re.sub(r", metadata=.*", "", line) for line in text.splitlines() if " = " in line]

    assert instructions(js.without_custom_rules(function)) == instructions(function)


def wrong(backward):
    """The cost's logits gradient with `backward` applied to it on the way out."""

    @jax.custom_vjp
    def cost(logits, labels):
        return js.log_likelihood_cost(logits, labels)

    def forward(logits, labels):
        return jax.value_and_grad(js.log_likelihood_cost)(logits, labels)

    cost.defvjp(forward, lambda gradient, cotangent: (backward(gradient, cotangent), None))
    return cost


WRONG = {
    "one percent": lambda gradient, cotangent: gradient * cotangent * 1.01,
    "zeroed row": lambda gradient, cotangent: (gradient * cotangent).at[3].set(0),
    "flipped sign": lambda gradient, cotangent: (gradient * cotangent).at[2, 0].mul(-1),
    "NaN": lambda gradient, cotangent: (gradient * cotangent).at[2, 0].set(jnp.nan),
    "no gradient": lambda gradient, _: gradient * 0,
}


@pytest.mark.parametrize("backward", WRONG.values(), ids=WRONG.keys())
def test_wrong_rules_fail_and_right_ones_pass(backward):
    logits, labels = random_logits((16, 10), 2, jnp.float32), random_labels((16, 10))
    args = (logits, labels)
    js.compare_gradients(wrong(lambda gradient, c: gradient * c), *args).assert_close()
    with pytest.raises(AssertionError, match=r"more than 32 ulp from float64 for logits:\nparameter"):
        js.compare_gradients(wrong(backward), *args).assert_close()


def test_an_ignored_output_is_found():
    @jax.custom_vjp
    def both(x):
        return {"sine": jnp.sin(x), "cosine": jnp.cos(x)}

    both.defvjp(lambda x: (both(x), x), lambda x, c: (c["sine"] * jnp.cos(x),))
    with pytest.raises(AssertionError, match="float64 for x"):
        js.compare_gradients(both, jnp.arange(4.0)).assert_close()


def test_rows_are_plain_numbers(key):
    network = js.init_network(key, 3, 4, 2)
    x, labels = jax.random.normal(key, (5, 3)), jnp.zeros(5, jnp.int32)
    comparison = js.compare_gradients(js.network_cost, network, x, labels, argnums=0)
    comparison.assert_close(ulps=8)
    paths = [row.path for row in comparison.rows]
    assert paths == [
        "network.hidden.weights", "network.hidden.bias", "network.output.weights", "network.output.bias"
    ]  # fmt: skip
    row = comparison.rows[2]
    gradient = jax.grad(js.network_cost)(network, x, labels).output.weights
    assert (row.shape, row.dtype) == ((4, 2), "float32")
    assert row.largest == pytest.approx(float(jnp.abs(gradient).max()), rel=1e-6)
    assert row.custom == float(gradient[row.worst])
    assert len(str(comparison).splitlines()) == 5


def test_a_reference_may_be_given(key):
    logits, labels = random_logits((4, 3), 1, jnp.float32), random_labels((4, 3))

    def article(logits, labels):
        probabilities = jax.nn.softmax(logits)
        return -jnp.mean(jnp.log(probabilities[jnp.arange(4), labels]))

    js.compare_gradients(js.log_likelihood_cost, logits, labels, reference=article, key=key).assert_close(
        ulps=8
    )
    with pytest.raises(ValueError, match=r"same shapes, got \[\(\)\] and \[\(4, 3\)\]"):
        js.compare_gradients(js.log_likelihood_cost, logits, labels, reference=lambda logits, _: logits)
    with pytest.raises(ValueError, match="floating-point array to differentiate in, found none"):
        js.compare_gradients(js.log_likelihood_cost, logits, labels, argnums=1)


@pytest.mark.parametrize("argnums", [2, -3, (0, 7)])
def test_argnums_out_of_range_are_refused(argnums):
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=r"argnums must be in \[-2, 2\) for 2 arguments"):
        js.compare_gradients(jnp.multiply, x, x, argnums=argnums)
    js.compare_gradients(jnp.multiply, x, x, argnums=-1).assert_close()


def test_a_function_without_floating_point_results_is_refused():
    with pytest.raises(ValueError, match="must return a floating-point array"):
        js.compare_gradients(lambda x: jnp.round(x).astype(jnp.int32), jnp.ones(2))


def test_one_exact_gradient_where_plain_autodiff_has_none():
    logits, label = jnp.array([[40.0, 0.0, 0.0]]), jnp.array([0])

    def textbook(logits):
        return -jax.nn.log_softmax(logits)[0, 0]

    def exact(logits):
        return js.log_likelihood_cost(logits, label)

    row = js.compare_gradients(textbook, logits, reference=exact).rows[0]
    assert row.worst == (0, 0)
    assert row.custom == 0
    assert row.reference == pytest.approx(-2 * np.exp(-40.0), rel=1e-6)
    assert row.reference_ulps < 4
    js.compare_gradients(exact, logits).assert_close()
