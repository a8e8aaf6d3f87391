"""FC → FC → softmax: its gradient three ways, its penalty, its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, random_logits, unchecked

import jaxsoftmax as js


def example(key, examples=50, features=12, hidden=16, classes=7, dtype=jnp.float32):
    network = js.init_network(key, features, hidden, classes, dtype)
    biases = [random_logits((n,), 1, dtype, seed=n) for n in (hidden, classes)]
    network = js.Network(network.hidden._replace(bias=biases[0]), network.output._replace(bias=biases[1]))
    x = random_logits((examples, features), 1, dtype)
    return network, x, jnp.arange(examples) % classes


@pytest.mark.parametrize("one_hot", [False, True])
def test_three_gradients_are_float64s(key, one_hot):
    network, x, labels = example(key)
    truth = oracle.network_gradient(jax.tree.leaves(network), x, np.asarray(labels))
    given = jax.nn.one_hot(labels, 7) if one_hot else labels
    plain = js.without_custom_rules(js.network_cost)

    @jax.jit
    def three(network):
        costs = js.network_cost, plain
        gradients = (jax.value_and_grad(cost)(network, x, given) for cost in costs)
        return js.backpropagate(network, x, given), *gradients

    for value, gradient in three(network):
        assert_close(value, truth[0], ulps=8)
        assert_close(gradient, jax.tree.unflatten(jax.tree.structure(network), truth[1]), ulps=8)


def test_penalty_is_added_once_and_only_to_weights(key):
    network, x, labels = example(key)
    truth = oracle.network_gradient(jax.tree.leaves(network), x, np.asarray(labels), penalty=0.3)
    cost = jax.jit(partial(js.network_cost, penalty=0.3))
    value, gradient = jax.jit(jax.value_and_grad(cost))(network, x, labels)
    assert_close(value, truth[0], ulps=8)
    assert_close(jax.tree.leaves(gradient), truth[1], ulps=8)
    each = js.network_cost(network, x, labels, penalty=0.3, reduction="none")
    assert_close(each.mean(), truth[0], ulps=16)


@pytest.mark.slow
def test_backpropagate_takes_any_batch_and_any_dtype(key):
    by_hand, by_autodiff = jax.jit(js.backpropagate), jax.jit(jax.value_and_grad(js.network_cost))
    network, x, labels = example(key, examples=12)
    flat = by_hand(network, x, labels)
    shaped = by_hand(network, x.reshape(3, 4, 12), labels.reshape(3, 4))
    assert_close(shaped, flat, ulps=4)
    single = by_hand(network, x[0], labels[0])
    assert_close(single, by_autodiff(network, x[0], labels[0]), ulps=4)
    cost, gradient = by_hand(network, x[:0], labels[:0])
    assert_close((cost, gradient), (0.0, jax.tree.map(np.zeros_like, network)), ulps=0)
    network, x, labels = example(key, dtype=jnp.bfloat16)
    narrow = by_hand(network, x, labels)
    assert narrow[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow[1])} == {jnp.dtype(jnp.bfloat16)}
    assert_close(narrow, by_autodiff(network, x, labels), ulps=2)


def test_backpropagate_keeps_its_digits_when_confident(key):
    network, x, labels = example(key, examples=1)
    network = network._replace(output=js.Dense(network.output.weights * 0, jnp.zeros(7).at[0].set(40.0)))
    _, gradient = js.backpropagate(network, x, labels)
    assert_close(gradient.output.bias[0], -6 * np.exp(-40.0), ulps=4)
    _, gradient = jax.jit(js.backpropagate)(network, x, jnp.array([9]))
    assert np.isnan(gradient.output.bias).all()


def test_an_example_of_weight_zero_may_hold_nan(key):
    network, x, labels = example(key, examples=6)
    weight = jnp.array([1.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    dirty = x.at[1].set(jnp.nan).at[4, 2].set(jnp.inf)
    kept = weight != 0
    value_and_gradient = jax.jit(jax.value_and_grad(js.network_cost))
    actual = value_and_gradient(network, dirty, labels, sample_weight=weight)
    expected = value_and_gradient(network, x[kept], labels[kept], sample_weight=weight[kept])
    assert_close(actual, expected, ulps=4)
    with pytest.raises(TypeError, match=r"penalty must be a real scalar, got float32 of shape \(2,\)"):
        unchecked(js.network_cost)(network, x, labels, penalty=jnp.ones(2))


def test_predictions_agree(key):
    network, x, _ = example(key)
    probabilities = js.predict_probabilities(network, x)
    assert_close(probabilities, oracle.softmax(np.asarray(js.logits(network, x), float)), ulps=4)
    assert (js.predict(network, x) == probabilities.argmax(axis=-1)).all()
    assert js.predict(network, x).dtype == jnp.int32
    with_tanh = js.logits(network, x, activation=jnp.tanh)
    hidden = jnp.tanh(x @ network.hidden.weights + network.hidden.bias[None])
    assert_close(with_tanh, hidden @ network.output.weights + network.output.bias[None], ulps=1)


def test_initial_weights_have_their_variance(key):
    network = js.init_network(key, 400, 300, 200)
    assert float(network.hidden.weights.var()) == pytest.approx(2 / 400, rel=0.03)
    assert float(network.output.weights.var()) == pytest.approx(1 / 300, rel=0.03)
    assert not network.hidden.bias.any()
    assert not network.output.bias.any()
    again = js.init_network(key, 400, 300, 200)
    assert all(map(np.array_equal, jax.tree.leaves(network), jax.tree.leaves(again)))


def test_errors_say_what_to_do(key):
    network = js.init_network(key, 4, 8, 3)
    logits, init_network = unchecked(js.logits), unchecked(js.init_network)
    with pytest.raises(ValueError, match=r"\(\*batch, 4\) for this network's 4 features, got \(2, 5\)"):
        logits(network, jnp.ones((2, 5)))
    with pytest.raises(TypeError, match=r"x must be real floating-point numbers, got uint8"):
        logits(network, jnp.ones((2, 4), jnp.uint8))
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        init_network(key, 4, 0, 3)
    with pytest.raises(TypeError, match=r"classes must be an integer, got 3\.5"):
        init_network(key, 4, 8, 3.5)
    with pytest.raises(TypeError, match="dtype must be floating-point, got int32"):
        init_network(key, 4, 8, 3, jnp.int32)
