"""The cost in a training loop of Equinox: one line is changed.

The loop is the one that Equinox's own documentation writes, for a model that takes one example:
`jax.vmap` makes it one for a batch, and the cost takes the batch. It runs three times from the same
start: with optax's loss, with `log_likelihood_cost` of the logits, and with `linear_log_likelihood_cost`,
which takes the features in front of the last layer and that layer's weights and bias instead. Equinox
keeps weights as (outputs, inputs), so the head is given their transpose. All three take the same steps,
to rounding.
"""

from collections.abc import Callable, Iterable, Sequence

import equinox as eqx
import jax
import optax
from digits import Examples
from frameworks import Comparison, compare

import jaxsoftmax as js

ADAM = optax.adam(3e-3)


class Model(eqx.Module):
    """FC → ReLU → FC."""

    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        """Draws the first weights."""
        key_hidden, key_output = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 128, key=key_hidden)
        self.output = eqx.nn.Linear(128, 10, key=key_output)

    def features(self, x: jax.Array) -> jax.Array:
        """What goes into the last layer."""
        return jax.nn.relu(self.hidden(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits (10,) of one image x (64,)."""
        return self.output(self.features(x))


Cost = Callable[[Model, Examples], jax.Array]


def logits(model: Model, x: jax.Array) -> jax.Array:
    """The logits (batch, 10) of images x (batch, 64)."""
    return jax.vmap(model)(x)


def optax_cost(model: Model, batch: Examples) -> jax.Array:
    """Before."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(model, batch.x), batch.labels).mean()


def dense_cost(model: Model, batch: Examples) -> jax.Array:
    """After: this line is all that changes."""
    return js.log_likelihood_cost(logits(model, batch.x), batch.labels)


def head_cost(model: Model, batch: Examples) -> jax.Array:
    """Or the last layer and the cost in one."""
    features, layer = jax.vmap(model.features)(batch.x), model.output
    return js.linear_log_likelihood_cost(features, layer.weight.T, layer.bias, batch.labels)


@eqx.filter_jit
def step(cost: Cost, model: Model, state: optax.OptState, batch: Examples):
    """The model and the optimizer's state after one batch, and the cost before it."""
    value, gradient = eqx.filter_value_and_grad(cost)(model, batch)
    updates, state = ADAM.update(gradient, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, value


def train(cost: Cost, batches: Iterable[Examples]) -> Model:
    """A trained model, always from the same start."""
    model = Model(jax.random.key(0))
    state = ADAM.init(eqx.filter(model, eqx.is_array))
    for batch in batches:
        model, state, _ = step(cost, model, state, batch)
    return model


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Trains with each cost and prints how they compare."""
    return compare([optax_cost, dense_cost, head_cost], train, logits, arguments)


if __name__ == "__main__":
    main()
