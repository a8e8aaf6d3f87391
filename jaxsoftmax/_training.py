"""Functional training with optax: a jitted step, and a whole epoch as one compiled scan."""

import math
import operator
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Integer, PRNGKeyArray, PyTree, UInt32

Cost = Callable[..., Any]
Optimizer = optax.GradientTransformation | optax.MultiSteps


class TrainState(NamedTuple):
    """Parameters, the optimizer's state, the number of steps taken and a running state: a pytree.

    Attributes:
        params: Any pytree of floating-point arrays.
        opt_state: What the optimizer keeps, a pytree.
        step: How many updates were made, an int32 scalar ().
        model_state: What the model keeps from batch to batch beside its parameters, such as the running
            averages of batch normalisation: any pytree of arrays, or None.

    Example:
        >>> state = init_state(jnp.ones(3), optax.sgd(0.1))
        >>> jax.tree.leaves(state._replace(params=None))
        [Array(0, dtype=int32)]
    """

    params: PyTree
    opt_state: PyTree
    step: Integer[Array, ""]
    model_state: PyTree = None


def init_state(params: PyTree, optimizer: Optimizer, model_state: PyTree = None) -> TrainState:
    """The state before the first step.

    Args:
        params: Parameters, any pytree of floating-point arrays.
        optimizer: Any optax optimizer.
        model_state: What the model keeps from batch to batch beside its parameters, any pytree of
            arrays. The cost gets it and returns the next one, as `make_step` says.

    Returns:
        A `TrainState` of the same parameters with `step` 0, an int32 scalar (), and of the same
        `model_state`. No number is looked at: NaN among the parameters stays there.

    Raises:
        TypeError: If a leaf is no array and no number, such as a function of an Equinox module, or
            `optimizer` is none.

    Example:
        >>> int(init_state({"w": jnp.ones(3)}, optax.adam(1e-3)).step)
        0
    """
    _check(optimizer)
    for name, tree in (("params", params), ("model_state", model_state)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not hasattr(leaf, "shape") and not isinstance(leaf, int | float):
                raise TypeError(
                    f"{name}{jax.tree_util.keystr(path)} must be an array, got {leaf!r}: give the arrays "
                    "alone, in Equinox with params, rest = eqx.partition(model, eqx.is_array)"
                )
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), model_state)


def make_step(
    cost: Cost, optimizer: Optimizer, has_aux: bool = False
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """A jitted training step.

    Args:
        cost: `cost(params, batch)` → scalar, differentiable in `params`; `batch` is any pytree.
            With `has_aux` it returns (scalar, aux). If the state has a `model_state` too, it is
            `cost(params, batch, model_state)` and returns (scalar, (model_state, aux)).
        optimizer: The optax optimizer that made the state.
        has_aux: Whether the cost returns more than a scalar. `aux` is any pytree of arrays of any
            shape, such as the accuracy on the batch. No gradient goes through it.

    Returns:
        `step(state, batch)` → (state after one update, cost before it, a scalar of its own dtype). With
        `has_aux`, → (state, (cost, aux)). The new state holds the `model_state` that the cost returned,
        which must have the structure, shapes and dtypes of the one before. The state passed in stays
        valid; to reuse its memory instead, wrap it as `jax.jit(step, donate_argnums=0)`, with an
        optimizer whose state holds no array twice. A NaN cost is returned, and NaN goes into the
        parameters.

    Raises:
        TypeError: If `cost` is no function or `optimizer` none of optax; from the returned function, if
            `state` is no `TrainState`, `cost` does not return a scalar or what `has_aux` asks for, or
            the state has a `model_state` without `has_aux`.
        ValueError: From the returned function, if the `model_state` that `cost` returns differs from
            the one before in structure, shapes or dtypes.

    Example:
        >>> step = make_step(lambda w, x: jnp.sum((w - x) ** 2), optax.sgd(0.5))
        >>> state, cost = step(init_state(jnp.array(0.0), optax.sgd(0.5)), jnp.array(3.0))
        >>> float(state.params), float(cost)
        (3.0, 9.0)

        A running mean as `model_state`, and the largest error as `aux`:

        >>> def cost(w, x, mean):
        ...     error = w - x
        ...     return jnp.mean(error**2), (0.9 * mean + 0.1 * jnp.mean(x), jnp.max(jnp.abs(error)))
        >>> step = make_step(cost, optax.sgd(0.5), has_aux=True)
        >>> state = init_state(jnp.array(0.0), optax.sgd(0.5), model_state=jnp.array(0.0))
        >>> state, (cost, largest) = step(state, jnp.array([1.0, 3.0]))
        >>> float(state.params), float(state.model_state), float(cost), float(largest)
        (2.0, 0.2, 5.0, 3.0)
    """
    _check(optimizer, cost)

    def step(state, batch):
        return _step(cost, optimizer, has_aux, state, batch)

    return jax.jit(step)


def make_epoch(
    cost: Cost, optimizer: Optimizer, batch_size: Any, has_aux: bool = False
) -> Callable[[TrainState, Any, PRNGKeyArray | UInt32[Array, "2"]], tuple[TrainState, Any]]:
    """A jitted epoch: every example once, in an order drawn from a key, in one compiled scan.

    Args:
        cost: As for `make_step`; `batch` is a part of the data.
        optimizer: The optax optimizer that made the state.
        batch_size: Examples in a batch. The last batch holds what is left over; if fewer examples
            than `batch_size` exist it is the only one.
        has_aux: As for `make_step`.

    Returns:
        `epoch(state, data, key)` → (state, costs). `data` is a pytree of arrays with examples along
        their first axis; a batch is the same pytree of fewer examples. `costs` (batches,), in the
        cost's dtype, are those before each update; a NaN goes into the parameters and all later costs.
        With `has_aux`, → (state, (costs, auxes)): each array of aux is stacked in the order of the
        batches, of shape (batches, ...). A `model_state` goes from each batch to the next.
        Where types say that data is spread over a mesh, batches are too, if its devices divide them.
        The same state, data and key give the same bits. The state passed in stays valid; to reuse its
        memory instead, wrap it as `jax.jit(epoch, donate_argnums=0)`.

    Raises:
        TypeError: If `cost` is no function, `optimizer` none of optax, or `batch_size` not an integer;
            from the returned function, as from `make_step`.
        ValueError: If `batch_size` is below 1; from the returned function, if there are no examples, the
            arrays in `data` disagree about how many there are, `aux` has another shape for the short
            last batch, or as from `make_step`.

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
        size = min(batch_size, examples)

        def update(state, indices):
            batch = jax.tree.map(lambda array: _examples(array, indices), data)
            return _step(cost, optimizer, has_aux, state, batch)

        whole = examples - examples % size
        state, results = jax.lax.scan(update, state, order[:whole].reshape(-1, size))
        if whole < examples:
            state, last = update(state, order[whole:])
            if has_aux:
                first = jax.tree.map(lambda stacked: stacked[0], results[1])
                advice = ": reduce over the batch, for example to a mean"
                _same("aux", first, last[1], "for every batch, the short last one too", advice)
            results = jax.tree.map(lambda a, b: jnp.append(a, jnp.expand_dims(b, 0), 0), results, last)
        return state, results

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


def _step(cost, optimizer, has_aux, state, batch):
    if not isinstance(state, TrainState):
        raise TypeError(f"state must be a TrainState, as init_state makes one, got {type(state)}")
    if state.model_state is not None and not has_aux:
        raise TypeError("has_aux must be True if the state has a model_state: pass has_aux=True")

    def evaluate(params):
        # A copy, since Equinox marks a state that it has read, and a line search reads it again.
        kept = jax.tree.map(lambda leaf: leaf, state.model_state)
        output = cost(params, batch) if kept is None else cost(params, batch, kept)
        return _parts(output, has_aux, kept is not None)

    (value, (model_state, aux)), gradient = jax.value_and_grad(evaluate, has_aux=True)(state.params)
    _same("model_state", state.model_state, model_state, "before and after each batch")
    # What line searches and schedules that follow the cost ask for; others take no notice of it.
    extra = {"value": value, "grad": gradient, "value_fn": lambda params: evaluate(params)[0]}
    if not isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    result = (value, aux) if has_aux else value
    return TrainState(params, opt_state, state.step + 1, model_state), result


def _parts(output, has_aux, has_model_state):
    """What a cost returns, as (value, (model_state, aux)) with None for what is not there."""
    value, aux, model_state = output, None, None
    if has_aux:
        value, aux = _pair(output, "(cost, (model_state, aux))" if has_model_state else "(cost, aux)")
    if has_model_state:
        model_state, aux = _pair(aux, "(cost, (model_state, aux))")
    shape = jax.tree.map(jnp.shape, value)
    if shape != ():
        advice = "" if has_aux else ": if it returns (cost, aux), pass has_aux=True"
        raise TypeError(f"cost must return a scalar, got shape {reprlib.repr(shape)}{advice}")
    return value, (model_state, aux)


def _pair(output, form):
    if isinstance(output, tuple | list) and len(output) == 2:
        return output
    raise TypeError(f"cost must return {form}, got {reprlib.repr(output)} in place of a pair")


def _same(name, before, after, when, advice=""):
    """Raises in words that name the first leaf in which two pytrees differ."""
    types = [
        {jax.tree_util.keystr(path): str(jax.typeof(leaf)).lstrip("~") for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (before, after))
    ]
    for path in types[0] | types[1]:
        a, b = (each.get(path, "nothing") for each in types)
        if a != b:
            what = "must have the same shape and dtype"
            raise ValueError(f"{name}{path} {what} {when}, got {a} and then {b}{advice}")
    a, b = map(jax.tree.structure, (before, after))
    if a != b:
        raise ValueError(f"{name} must have the same structure {when}, got {a} and then {b}")


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
