"""Steps and epochs: any cost, any optimizer, every example once, the same bits again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, random_logits, slow, unchecked

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
    data = random_logits((10, 6), 1, jnp.float32), jnp.arange(10) % 3

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
@pytest.mark.slow
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


def test_aux_and_a_running_state_go_as_in_a_loop_of_numpy(key):
    def cost(w, batch, running):
        x, number = batch
        mean = 0.9 * running["mean"] + 0.1 * jnp.mean(x, axis=0)
        error = w + mean - x
        seen = {"members": jnp.sum(1 << number), "largest": jnp.max(jnp.abs(error), 0), "size": len(x)}
        return jnp.mean(error**2), ({"mean": mean, "batches": running["batches"] + 1}, seen)

    def start():
        return js.init_state(jnp.zeros(2), sgd, {"mean": jnp.ones(2), "batches": jnp.int32(0)})

    sgd, x = optax.sgd(0.5), random_logits((10, 2), 1, jnp.float32)
    epoch = jax.jit(js.make_epoch(cost, sgd, 4, has_aux=True), donate_argnums=0)
    step = js.make_step(cost, sgd, has_aux=True)
    first, state = start(), start()
    middle, *results = epoch(first, (x, jnp.arange(10)), key)
    assert first.model_state["mean"].is_deleted()
    last, *more = epoch(middle, (x, jnp.arange(10)), jax.random.fold_in(key, 1))
    w, mean, used = np.zeros(2), np.ones(2), []
    for costs, seen in results + more:
        assert seen["largest"].shape == (3, 2)
        np.testing.assert_array_equal(seen["size"], [4, 4, 2])
        for number, members in enumerate(seen["members"]):
            indices = np.flatnonzero(int(members) >> np.arange(10) & 1)
            state, (value, aux) = step(state, (x[indices], indices))
            mean = 0.9 * mean + 0.1 * np.mean(x[indices], axis=0, dtype=float)
            error = w + mean - np.asarray(x[indices], float)
            w = w - 0.5 * np.mean(error, axis=0)
            used.extend(indices)
            for result in ((costs[number], seen["largest"][number]), (value, aux["largest"])):
                assert_close(result, (np.mean(error**2), np.max(np.abs(error), axis=0)), ulps=8)
    assert sorted(used) == sorted([*range(10)] * 2)
    for end in (last, state):
        assert_close((end.params, end.model_state["mean"]), (w, mean), ulps=8)
        assert int(end.model_state["batches"]) == int(end.step) == 6


class Centred(eqx.Module):
    w: jax.Array
    mean: eqx.nn.StateIndex

    def __init__(self):
        self.w, self.mean = jnp.array([5.0, -5.0]), eqx.nn.StateIndex(jnp.ones(2))

    def cost(self, x, state):
        mean = 0.5 * state.get(self.mean) + x
        return jnp.sum((self.w - mean) ** 4), state.set(self.mean, mean)


@pytest.mark.parametrize("optimizer", [slow(optax.lbfgs()), optax.MultiSteps(optax.sgd(0.1), 2)])
def test_the_optimizer_sees_the_cost_at_the_running_state_it_began_with(optimizer):
    model, kept = eqx.nn.make_with_state(Centred)()
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def cost(params, x, kept):
        value, kept = eqx.combine(params, rest).cost(x, kept)
        return value, (kept, None)

    @jax.jit
    def by_optax(params, opt_state, mean):
        def fixed(params):
            return jnp.sum((params.w - 0.5 * mean - x) ** 4)

        value, grad = jax.value_and_grad(fixed)(params)
        updates, opt_state = optimizer.update(
            grad, opt_state, params, value=value, grad=grad, value_fn=fixed
        )
        return optax.apply_updates(params, updates), opt_state, value

    x, mean = jnp.array([1.0, 2.0]), jnp.ones(2)
    step, state = js.make_step(cost, optimizer, has_aux=True), js.init_state(params, optimizer, kept)
    opt_state = state.opt_state
    for _ in range(4):
        state, (value, _) = step(state, x)
        params, opt_state, expected = by_optax(params, opt_state, mean)
        mean = 0.5 * mean + x
        assert_close((value, state.params), (expected, params), ulps=8)
        assert_close(state.model_state.get(model.mean), mean, ulps=0)
    assert not same_bits(params, model.w)


@pytest.mark.parametrize(("examples", "shape"), [(8, (2, 4)), (3, (1, 3))])
def test_aux_may_be_for_each_example_where_all_batches_have_one_size(key, examples, shape):
    epoch = js.make_epoch(lambda w, x: (jnp.mean(w * x), [x]), optax.sgd(0.1), 4, has_aux=True)
    state = js.init_state(jnp.array(1.0), optax.sgd(0.1))
    _, (costs, (x,)) = epoch(state, jnp.arange(float(examples)), key)
    assert x.shape == shape
    assert_close(costs[0], np.mean(x[0]), ulps=1)
    assert sorted(x.ravel().tolist()) == list(range(examples))


@pytest.mark.slow
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


KEPT = {"a": np.zeros(3, np.float32), "b": np.int32(0)}
FORM = r"cost must return \(cost, \(model_state, aux\)\), got .* in place of a pair"


@pytest.mark.parametrize(
    ("returned", "kept", "has_aux", "error", "message"),
    [
        (lambda _: 1.0, None, True, TypeError, r"return \(cost, aux\), got 1\.0 in place of a pair"),
        (lambda x: (1.0, x, x), None, True, TypeError, r"return \(cost, aux\), got \(.*\) in place"),
        (lambda x: (1.0, x), None, False, TypeError, "return a scalar, got .*: if .* pass has_aux=True"),
        (lambda x: (x, 1.0), None, True, TypeError, r"cost must return a scalar, got shape \(2,\)"),
        (lambda _: 1.0, KEPT, False, TypeError, "state has a model_state: pass has_aux=True"),
        (lambda _: 1.0, KEPT, True, TypeError, FORM),
        (lambda x: (1.0, x), KEPT, True, TypeError, FORM),
        (
            lambda x: (1.0, (KEPT | {"a": x}, 0)), KEPT, True, ValueError,
            r"^model_state\['a'\] must have the same shape .* got float32\[3\] and then float32\[2\]",
        ),
        (
            lambda _: (1.0, (KEPT | {"b": 0.5}, 0)), KEPT, True, ValueError,
            r"^model_state\['b'\] must have the same .* got int32\[\] and then float32\[\]",
        ),
        (
            lambda x: (1.0, (KEPT | {"c": x}, 0)), KEPT, True, ValueError,
            r"^model_state\['c'\] must .* got nothing and then float32\[2\]",
        ),
        (lambda _: (1.0, (None, 0)), KEPT, True, ValueError, r"^model_state\['a'\] .* and then nothing"),
        (lambda _: (1.0, ((0.5,), 0)), [1.0], True, ValueError, "model_state must have the same struct"),
    ],
)  # fmt: skip
def test_a_cost_that_returns_something_else_is_told_what(key, returned, kept, has_aux, error, message):
    sgd = optax.sgd(0.1)
    state = js.init_state(jnp.array(0.0), sgd, kept)
    for call in (
        lambda cost: js.make_step(cost, sgd, has_aux)(state, jnp.ones(2)),
        lambda cost: js.make_epoch(cost, sgd, 2, has_aux)(state, jnp.ones(4), key),
    ):
        with pytest.raises(error, match=message):
            call(lambda *given: returned(given[1]))


def test_aux_of_another_shape_in_the_last_batch_is_named(key):
    sgd = optax.sgd(0.1)
    epoch = js.make_epoch(lambda w, x: (w, {"w": w, "each": x}), sgd, 4, has_aux=True)
    message = (
        r"^aux\['each'\] must have the same shape and dtype for every batch, the short last one too, "
        r"got float32\[4\] and then float32\[2\]: reduce over the batch"
    )
    with pytest.raises(ValueError, match=message):
        epoch(js.init_state(jnp.array(0.0), sgd), jnp.ones(10), key)


def test_a_running_state_that_is_no_array():
    with pytest.raises(TypeError, match=r"model_state\['f'\] must be an array, got .*eqx\.partition"):
        js.init_state(jnp.ones(2), optax.sgd(0.1), {"f": jnp.tanh})
