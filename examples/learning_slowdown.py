"""The learning slowdown: a saturated, wrong start under the quadratic and the log-likelihood cost.

The same FC → FC → softmax network starts from the same weights, its output layer biased so that it is
all but sure that every digit is a 0. Only the cost differs.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from digits import Data, Examples, accuracy, checked, load, picture_path
from jax.flatten_util import ravel_pytree

import jaxsoftmax as js

GOAL = 0.9


class Run(NamedTuple):
    """What training under one cost recorded, a number for each epoch, before any training first."""

    accuracy: np.ndarray
    gradient_norm: np.ndarray

    @property
    def epochs_needed(self) -> int | None:
        """Epochs until the accuracy reached the goal; None if it never did."""
        reached = np.flatnonzero(self.accuracy >= GOAL)
        return int(reached[0]) if reached.size else None


def saturated_network(data: Data) -> js.Network:
    """A random network whose bias puts class 0 eight nats ahead."""
    network = js.init_network(jax.random.key(0), data.training.x.shape[1], 32, data.classes)
    bias = network.output.bias.at[0].add(8.0)
    return network._replace(output=network.output._replace(bias=bias))


def train(
    output_cost: Callable[..., jax.Array], network: js.Network, training: Examples, epochs: int
) -> Run:
    """Trains with plain gradient descent, recording accuracy and the output layer's gradient."""
    optimizer = optax.sgd(0.5)

    def cost(network: js.Network, batch: Examples) -> jax.Array:
        return output_cost(js.logits(network, batch.x), batch.labels)

    @jax.jit
    def gradient_norm(network: js.Network) -> jax.Array:
        return jnp.linalg.norm(ravel_pytree(jax.grad(cost)(network, training).output)[0])

    epoch = js.make_epoch(cost, optimizer, batch_size=64)
    state = js.init_state(network, optimizer)
    records = []
    for number in range(epochs + 1):
        records.append((float(accuracy(state.params, training)), float(gradient_norm(state.params))))
        state, _ = epoch(state, training, jax.random.key(number))
    return Run(*np.transpose(records))


def draw(runs: dict[str, Run], output: Path) -> None:
    """Both curves, and the output layer's gradient behind them."""
    plt.switch_backend("agg")
    figure, (accuracy_axes, gradient_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run in runs.items():
        accuracy_axes.plot(run.accuracy, label=name)
        gradient_axes.semilogy(run.gradient_norm, label=name)
    accuracy_axes.axhline(GOAL, color="gray", linestyle=":")
    accuracy_axes.set(title="training accuracy", xlabel="epoch", ylim=(0, 1))
    accuracy_axes.legend()
    gradient_axes.set(title="norm of the output layer's gradient", xlabel="epoch")
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Trains under both costs, prints how many epochs each needs and saves the picture."""
    parser = argparse.ArgumentParser(
        description="The learning slowdown, and the cost that does not have it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--epochs", default=60, help="the most to train for",
        type=checked(int, "a whole number from 1 to 100,000", lambda value: 1 <= value <= 100_000),
    )  # fmt: skip
    parser.add_argument(
        "--output", type=picture_path, default="learning_slowdown.png", help="the picture"
    )
    options = parser.parse_args(arguments)

    data = load()
    network = saturated_network(data)
    costs = {"quadratic": js.quadratic_cost, "log-likelihood": js.log_likelihood_cost}
    runs = {name: train(cost, network, data.training, options.epochs) for name, cost in costs.items()}
    for name, run in runs.items():
        needed = (
            f"{run.epochs_needed} epochs"
            if run.epochs_needed
            else f"more than the {options.epochs} epochs allowed"
        )
        print(
            f"{name:15} cost: {needed} to {GOAL:.0%} training accuracy; output layer's gradient at "
            f"the start {run.gradient_norm[0]:.1e}"
        )

    print("\nOne saturated, wrong output: logits [20, 0], label 1")
    for name, cost in costs.items():
        slope = jax.grad(cost)(jnp.array([20.0, 0.0]), jnp.array(1))
        print(f"{name:15} cost: ∂C/∂z = [{slope[0]:.3g}, {slope[1]:.3g}]")
    draw(runs, options.output)
    print(f"\npicture saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
