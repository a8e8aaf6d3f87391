"""Functional training with optax: a jitted step, and a whole epoch as one compiled scan."""

import math
import operator
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree, UInt32

Cost = Callable[[Any, Any], Array]
Optimizer = optax.GradientTransformation | optax.MultiSteps


class TrainState(NamedTuple):
    """Parameters, the optimizer's state and the number of steps taken: a pytree.

    Attributes:
        params: Any pytree of floating-point arrays.
        opt_state: What the optimizer keeps, a pytree.
        step: How many updates were made, an int32 scalar ().

    Example:
        >>> state = init_state(jnp.ones(3), optax.sgd(0.1))
        >>> jax.tree.leaves(state._replace(params=None))
        [Array(0, dtype=int32)]
    """

    params: PyTree
    opt_state: PyTree
    step: Integer[Array, ""]


def init_state(params: PyTree, optimizer: Optimizer) -> TrainState:
    """The state before the first step.

    Args:
        params: Parameters, any pytree of floating-point arrays.
        optimizer: Any optax optimizer.

    Returns:
        A `TrainState` of the same parameters with `step` 0, an int32 scalar (). No number is looked at:
        NaN among the parameters stays there.

    Raises:
        TypeError: If a leaf is no array and no number, such as a function of an Equinox module, or
            `optimizer` is none.

    Example:
        >>> int(init_state({"w": jnp.ones(3)}, optax.adam(1e-3)).step)
        0
    """
    _check(optimizer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "shape") and not isinstance(leaf, int | float):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be an array, got {leaf!r}: train the arrays "
                "alone, in Equinox with params, rest = eqx.partition(model, eqx.is_array)"
            )
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(
    cost: Cost, optimizer: Optimizer
) -> Callable[[TrainState, Any], tuple[TrainState, Float[Array, ""]]]:
    """A jitted training step.

    Args:
        cost: `cost(params, batch)` → scalar, differentiable in `params`; `batch` is any pytree.
        optimizer: The optax optimizer that made the state.

    Returns:
        `step(state, batch)` → (state after one update, cost before it, a scalar of its own dtype). The
        state passed in stays valid; to reuse its memory instead, wrap it as
        `jax.jit(step, donate_argnums=0)`, with an optimizer whose state holds no array twice. A NaN cost
        is returned, and NaN goes into the parameters.

    Raises:
        TypeError: If `cost` is no function or `optimizer` none of optax; from the returned function, if
            `state` is no `TrainState` or `cost` does not return a scalar.

    Example:
        >>> step = make_step(lambda w, x: jnp.sum((w - x) ** 2), optax.sgd(0.5))
        >>> state, cost = step(init_state(jnp.array(0.0), optax.sgd(0.5)), jnp.array(3.0))
        >>> float(state.params), float(cost)
        (3.0, 9.0)
    """
    _check(optimizer, cost)
    return jax.jit(lambda state, batch: _step(cost, optimizer, state, batch))


def make_epoch(
    cost: Cost, optimizer: Optimizer, batch_size: Any
) -> Callable[
    [TrainState, Any, PRNGKeyArray | UInt32[Array, "2"]],
    tuple[TrainState, Float[Array, " batches"]],
]:
    """A jitted epoch: every example once, in an order drawn from a key, in one compiled scan.

    Args:
        cost: `cost(params, batch)` → scalar, differentiable in `params`; `batch` is a part of the data.
        optimizer: The optax optimizer that made the state.
        batch_size: Examples in a batch. The last batch holds what is left over; if fewer examples
            than `batch_size` exist it is the only one.

    Returns:
        `epoch(state, data, key)` → (state, costs). `data` is a pytree of arrays with examples along
        their first axis; a batch is the same pytree of fewer examples. `costs` (batches,), in the
        cost's dtype, are those before each update; a NaN goes into the parameters and all later costs.
        Where types say that data is spread over a mesh, batches are too, if its devices divide them.
        The same state, data and key give the same bits. The state passed in stays valid; to reuse its
        memory instead, wrap it as `jax.jit(epoch, donate_argnums=0)`.

    Raises:
        TypeError: If `cost` is no function, `optimizer` none of optax, or `batch_size` not an integer;
            from the returned function, if `state` is no `TrainState` or `cost` does not return a scalar.
        ValueError: If `batch_size` is below 1; from the returned function, if there are no examples or
            the arrays in `data` disagree about how many there are.

    Example:
        >>> optimizer = optax.sgd(0.1)
        >>> epoch = make_epoch(lambda w, x: jnp.mean((w - x) ** 2), optimizer, batch_size=2)
        >>> state = init_state(jnp.array(0.0), optimizer)
        >>> state, costs = epoch(state, jnp.ones(5), jax.random.key(0))
        >>> int(state.step), costs.shape
        (3, (3,))
    """
    _check(optimizer, cost)
    try:
        batch_size = operator.index(batch_size)
    except TypeError:
        raise TypeError(f"batch_size must be an integer, got {batch_size!r}") from None
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def epoch(state, data, key):
        examples = _count(data)
        order = _order(key, examples)

        def update(state, indices):
            batch = jax.tree.map(lambda array: _examples(array, indices), data)
            return _step(cost, optimizer, state, batch)

        whole = examples - examples % batch_size
        state, costs = jax.lax.scan(update, state, order[:whole].reshape(-1, batch_size))
        if whole < examples:
            state, last = update(state, order[whole:])
            costs = jnp.append(costs, last)
        return state, costs

    return jax.jit(epoch)


def _order(key, examples):
    """All indices, in the order of random numbers that stand in front of them.

    One sort of single numbers: `jax.random.permutation` takes ten times as long, a fifth of an epoch.
    """
    bits = jax.random.bits(key, (examples,), jnp.uint32)
    with jax.enable_x64():
        numbers = bits.astype(jnp.uint64) << 32 | jax.lax.iota(jnp.uint64, examples)
        return jnp.sort(numbers).astype(jnp.int32)


def _examples(array, indices):
    """The examples at the indices, spread as all of them are if the axes of the mesh are explicit."""
    place = jax.typeof(array).sharding
    first, *others = place.spec
    devices = math.prod(place.mesh.shape[axis] for axis in jax.tree.leaves(first))
    if devices == 1:
        return array[indices]
    first = None if indices.shape[0] % devices else first
    spec = jax.sharding.PartitionSpec(first, *others)
    return array.at[indices].get(out_sharding=jax.sharding.NamedSharding(place.mesh, spec))


def _check(optimizer, *costs):
    for cost in costs:
        if not callable(cost):
            raise TypeError(f"cost must be a function of parameters and batch, got {reprlib.repr(cost)}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be one of optax, for example optax.adam(1e-3), got {reprlib.repr(optimizer)}"
        )


def _step(cost, optimizer, state, batch):
    if not isinstance(state, TrainState):
        raise TypeError(f"state must be a TrainState, as init_state makes one, got {type(state)}")
    value, gradient = jax.value_and_grad(cost)(state.params, batch)
    # What line searches and schedules that follow the cost ask for; others take no notice of it.
    extra = {"value": value, "grad": gradient, "value_fn": lambda params: cost(params, batch)}
    if not isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), value


def _count(data: Any) -> int:
    """The number of examples that every array in `data` agrees on."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "data must be arrays with the same number of examples, at least one, along their first "
            f"axis, got shapes {shapes}"
        )
    return counts.pop()
