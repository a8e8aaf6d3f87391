"""The cost in a training loop of Flax NNX: one line is changed.

The loop is the one that Flax's own documentation writes. It runs three times from the same start: with
optax's loss, with `log_likelihood_cost` of the logits, and with `linear_log_likelihood_cost`, which takes
the features in front of the last layer and that layer's kernel and bias instead, and never holds all the
logits where there are many. All three take the same steps, to rounding.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import optax
from digits import Examples
from flax import nnx
from frameworks import Comparison, compare

import jaxsoftmax as js

ADAM = optax.adam(3e-3)


class Model(nnx.Module):
    """FC → ReLU → FC."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the first weights."""
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """What goes into the last layer."""
        return nnx.relu(self.hidden(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits (batch, 10) of images x (batch, 64)."""
        return self.output(self.features(x))


Cost = Callable[[Model, Examples], jax.Array]


def optax_cost(model: Model, batch: Examples) -> jax.Array:
    """Before."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch.x), batch.labels).mean()


def dense_cost(model: Model, batch: Examples) -> jax.Array:
    """After: this line is all that changes."""
    return js.log_likelihood_cost(model(batch.x), batch.labels)


def head_cost(model: Model, batch: Examples) -> jax.Array:
    """Or the last layer and the cost in one, on the arrays that the layer's parameters hold."""
    layer = nnx.to_pure_dict(nnx.state(model.output))
    features = model.features(batch.x)
    return js.linear_log_likelihood_cost(features, layer["kernel"], layer["bias"], batch.labels)


@nnx.jit(static_argnames="cost")
def step(cost: Cost, model: Model, optimizer: nnx.Optimizer, batch: Examples) -> jax.Array:
    """Updates the model and the optimizer by one batch, and returns the cost before it."""
    value, gradient = nnx.value_and_grad(cost)(model, batch)
    optimizer.update(model, gradient)
    return value


def train(cost: Cost, batches: Iterable[Examples]) -> Model:
    """A trained model, always from the same start."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    for batch in batches:
        step(cost, model, optimizer, batch)
    return model


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Trains with each cost and prints how they compare."""
    return compare([optax_cost, dense_cost, head_cost], train, Model.__call__, arguments)


if __name__ == "__main__":
    main()
