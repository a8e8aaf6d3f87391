"""Steps and epochs: any cost, any optimizer, every example once, the same bits again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, unchecked

import jaxsoftmax as js

pytestmark = pytest.mark.usefixtures("standard_promotion")


def same_bits(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def squared(w, x):
    return jnp.mean((w - x) ** 2)


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1), optax.adam(0.1), optax.adamw(0.1), optax.MultiSteps(optax.sgd(0.1), 2)],
)
def test_step_is_one_optax_update(optimizer):
    params = {"w": jnp.arange(3.0), "b": jnp.ones((), jnp.bfloat16)}

    def cost(params, batch):
        return jnp.sum((params["w"] * batch["x"]) ** 2) + params["b"].astype(jnp.float32)

    batch = {"x": jnp.array([1.0, -2.0, 3.0])}
    state = js.init_state(params, optimizer)
    new, value = js.make_step(cost, optimizer)(state, batch)
    expected_cost, gradient = jax.value_and_grad(cost)(params, batch)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert_close(value, expected_cost, ulps=1)
    assert_close(new.params, optax.apply_updates(params, updates), ulps=1)
    assert int(new.step) == 1
    assert int(state.step) == 0
    assert jax.tree.map(lambda a: a.dtype, new) == jax.tree.map(lambda a: a.dtype, state)


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 3), (9, 3), (2, 5), (1, 1), (7, 7)])
def test_an_epoch_uses_every_example_exactly_once(key, examples, batch_size):
    # A gradient that is one-hot in the batch's members: plain descent then counts their uses.
    def cost(counts, members):
        return -jnp.sum(counts[members])

    optimizer = optax.sgd(1.0)
    epoch = js.make_epoch(cost, optimizer, batch_size)
    state = js.init_state(jnp.zeros(examples), optimizer)
    state, costs = epoch(state, jnp.arange(examples), key)
    assert_close(state.params, np.ones(examples), ulps=0)
    assert costs.shape == (-(-examples // batch_size),) == (int(state.step),)


def test_an_epoch_is_a_loop_of_steps(key):
    optimizer = optax.adam(0.01)
    network = js.init_network(key, 6, 8, 3)
    data = jax.random.normal(key, (10, 6)), jnp.arange(10) % 3

    def cost(network, batch):
        return js.network_cost(network, *batch)

    seen = []

    def recording(network, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch[0], ordered=True)
        return cost(network, batch)

    state = js.init_state(network, optimizer)
    epoch_state, costs = js.make_epoch(recording, optimizer, 4)(state, data, key)
    jax.effects_barrier()
    step = js.make_step(cost, optimizer)
    for number, x in enumerate(seen):
        indices = np.array([np.flatnonzero((np.asarray(data[0]) == row).all(axis=1))[0] for row in x])
        state, value = step(state, (data[0][indices], data[1][indices]))
        assert_close(costs[number], value, ulps=4)
    assert [len(x) for x in seen] == [4, 4, 2]
    assert_close(epoch_state.params, state.params, ulps=64)


@pytest.mark.parametrize("seed", [jax.random.key(5), jax.random.PRNGKey(5)], ids=["key", "legacy"])
def test_the_order_does_not_depend_on_x64(seed):
    epoch = js.make_epoch(lambda w, x: w * jnp.mean(x), optax.sgd(0.1), 1)
    state = js.init_state(jnp.float32(1), optax.sgd(0.1))
    costs = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            _, cost = epoch(state, jnp.arange(1, 8, dtype=jnp.float32), seed)
            costs.append(np.asarray(cost))
    np.testing.assert_array_equal(*costs)


def test_a_key_decides_the_order_and_the_bits(key):
    optimizer = optax.adam(0.1)
    epoch = js.make_epoch(squared, optimizer, 3)
    state, data = js.init_state(jnp.array(0.0), optimizer), jnp.arange(20.0)
    first = epoch(state, data, key)
    assert same_bits(first, js.make_epoch(squared, optimizer, 3)(state, data, key))
    assert not same_bits(first, epoch(state, data, jax.random.fold_in(key, 1)))


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.polyak_sgd()])
def test_optimizers_that_follow_the_cost_get_it(optimizer, key):
    state = js.init_state(jnp.array(0.0), optimizer)
    epoch = js.make_epoch(squared, optimizer, np.int64(4))
    for number in range(5):
        state, _ = epoch(state, jnp.full(8, 3.0), jax.random.fold_in(key, number))
    assert float(state.params) == pytest.approx(3.0, rel=0.01)


def test_states_may_be_donated(key):
    optimizer = optax.sgd(0.1)
    state = js.init_state(jnp.array(0.0), optimizer)
    epoch = jax.jit(js.make_epoch(squared, optimizer, 3), donate_argnums=0)
    for number in range(3):
        state, _ = epoch(state, jnp.arange(20.0), jax.random.fold_in(key, number))
    assert int(state.step) == 21


def test_training_learns(key):
    network = js.init_network(key, 2, 16, 2)
    x = jax.random.normal(key, (200, 2))
    data = x, (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    optimizer = optax.adam(0.03)
    epoch = js.make_epoch(lambda n, batch: js.network_cost(n, *batch), optimizer, 32)
    state = js.init_state(network, optimizer)
    for number in range(60):
        state, _ = epoch(state, data, jax.random.fold_in(key, number))
    assert float(jnp.mean(js.predict(state.params, x) == data[1])) > 0.97


def test_errors_say_what_to_do(key):
    optimizer = optax.sgd(0.1)
    make_epoch = unchecked(js.make_epoch)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_epoch(squared, optimizer, 0)
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 2\.0"):
        make_epoch(squared, optimizer, 2.0)
    epoch = make_epoch(squared, optimizer, 2)
    state = js.init_state(jnp.array(0.0), optimizer)
    for data in (jnp.ones(0), (jnp.ones(3), jnp.ones(4)), jnp.ones(()), ()):
        with pytest.raises(ValueError, match=r"same number of examples, at least one, .* got shapes"):
            epoch(state, data, key)
    with pytest.raises(TypeError, match="scalar"):
        js.make_step(lambda w, x: w - x, optimizer)(state, jnp.ones(3))
