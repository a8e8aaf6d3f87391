"""The cost in a training loop of Flax NNX: one line is changed.

The loop is the one that Flax's own documentation writes. It runs three times from the same start: with
optax's loss, with `log_likelihood_cost` of the logits, and with `linear_log_likelihood_cost`, which takes
the features in front of the last layer and that layer's kernel and bias instead, and never holds all the
logits where there are many. All three take the same steps, to rounding.

Then the same model learns with `make_epoch`, which is given all that changes: the parameters, and the
running averages of batch normalisation as the state's `model_state`. Beside the cost of each batch it
hands back how many images were named right.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import optax
from digits import Examples, load
from flax import nnx
from frameworks import Comparison, compare

import jaxsoftmax as js

ADAM = optax.adam(3e-3)


class Model(nnx.Module):
    """FC → batch normalisation → ReLU → FC."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the first weights."""
        self.hidden = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """What goes into the last layer."""
        return nnx.relu(self.norm(self.hidden(x)))

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


def train_by_epochs(training: Examples, epochs: int = 10) -> tuple[Model, list[float]]:
    """The same with `make_epoch`: a trained model, and the accuracy while it learned, of each epoch."""
    graph, params, averages = nnx.split(Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def cost(params: nnx.State, batch: Examples, averages: nnx.State):
        model = nnx.merge(graph, params, averages)
        outputs = model(batch.x)
        right = jnp.sum(jnp.argmax(outputs, axis=-1) == batch.labels)
        return js.log_likelihood_cost(outputs, batch.labels), (nnx.state(model, nnx.BatchStat), right)

    epoch = js.make_epoch(cost, ADAM, batch_size=64, has_aux=True)
    state, history = js.init_state(params, ADAM, averages), []
    for number in range(epochs):
        state, (_, right) = epoch(state, training, jax.random.key(number))
        history.append(int(jnp.sum(right)) / len(training.labels))
    return nnx.merge(graph, state.params, state.model_state), history


def logits(model: Model, x: jax.Array) -> jax.Array:
    """The logits of a trained model, normalised by its running averages."""
    model.eval()
    return model(x)


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Trains with each cost and prints how they compare, then with `make_epoch`."""
    comparison = compare([optax_cost, dense_cost, head_cost], train, logits, arguments)
    data = load()
    model, history = train_by_epochs(data.training)
    for number, accuracy in enumerate(history, 1):
        print(f"make_epoch, epoch {number:2}: training accuracy {accuracy:.2%}")
    answers = jnp.argmax(logits(model, data.test.x), axis=-1)
    print(f"make_epoch, test accuracy {jnp.mean(answers == data.test.labels):.2%}")
    return comparison


if __name__ == "__main__":
    main()
