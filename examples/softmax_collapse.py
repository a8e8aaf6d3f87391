"""Softmax collapse: training far past 100 % training accuracy, with a rounded and with an exact cost.

The same FC → FC → softmax network learns addition modulo a prime from some of its pairs. Only the cost
differs: optax's integer loss, or this library's. Once a label leads by about 17 nats, float32 rounds
optax's cost and its gradient at the label to exactly 0.

What follows from it: a gradient without its labels' share no longer points downhill. Progress stops for
thousands of steps, and Adam, which divides by the gradient's size, magnifies what is left of it.
What does not follow: better answers on unseen pairs. Both networks know the pairs they were shown
and no others; for that they would need regularisation, not digits. Nor is the exact cost without an
end: float32 holds no exp(−z) beyond about 88 nats. And in JAX the gradient of the classes that are
not the label rounds to 0 only there, so that hardly an example falls silent altogether.
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
from digits import Examples, accuracy, checked, picture_path
from tqdm import trange

import jaxsoftmax as js

RECORDS = 100


class Run(NamedTuple):
    """What training under one cost recorded, RECORDS times; "true" is measured with the exact cost."""

    cost: np.ndarray  # as training saw it
    true_cost: np.ndarray
    silent_labels: np.ndarray  # the share of examples whose label has a gradient of exactly 0
    silent_examples: np.ndarray  # the share of examples whose gradient is exactly 0 for every class
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray


def addition(modulus: int) -> tuple[Examples, Examples]:
    """Every pair (a, b) as two one-hot vectors, labelled (a + b) mod `modulus`; 70 % for training."""
    a, b = np.divmod(np.arange(modulus**2), modulus)
    x = np.hstack([np.eye(modulus)[a], np.eye(modulus)[b]])
    order = np.random.default_rng(0).permutation(modulus**2)
    parts = np.split(order, [round(0.7 * modulus**2)])
    training, test = (
        Examples(jnp.asarray(x[part], jnp.float32), jnp.asarray((a + b)[part] % modulus, jnp.int32))
        for part in parts
    )
    return training, test


def optax_cost(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of optax's integer loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(
    output_cost: Callable[..., jax.Array],
    network: js.Network,
    training: Examples,
    test: Examples,
    options: argparse.Namespace,
) -> Run:
    """Trains on the whole training set at once, recording at regular intervals."""

    def cost(network: js.Network, batch: Examples) -> jax.Array:
        return output_cost(js.logits(network, batch.x), batch.labels)

    @jax.jit
    def record(network: js.Network, cost: jax.Array) -> tuple[jax.Array, ...]:
        z = js.logits(network, training.x)
        gradient = jax.grad(output_cost)(z, training.labels)
        at_label = jnp.take_along_axis(gradient, training.labels[:, None], axis=-1)
        return (
            cost,
            js.log_likelihood_cost(z, training.labels),
            jnp.mean(at_label == 0),
            jnp.mean(jnp.all(gradient == 0, axis=-1)),
            accuracy(network, training),
            accuracy(network, test),
        )

    # Adam's own ε of 1e−8 would outweigh gradients this small, whichever cost they come from.
    optimizer = optax.adam(options.learning_rate, eps=1e-30)
    step = js.make_step(cost, optimizer)
    state = js.init_state(network, optimizer)
    records, value = [], jnp.zeros(())
    for _ in trange(RECORDS, desc="training", leave=False):
        for _ in range(options.steps // RECORDS):
            state, value = step(state, training)
        records.append(jax.device_get(record(state.params, value)))
    return Run(*np.transpose(records))


def draw(runs: dict[str, Run], steps: np.ndarray, output: Path) -> None:
    """The true cost of both, and the share of labels without a gradient."""
    plt.switch_backend("agg")
    figure, (cost_axes, share_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run in runs.items():
        cost_axes.semilogy(steps, run.true_cost, label=name)
        share_axes.plot(steps, run.silent_labels, label=name)
    cost_axes.set(title="true training cost in nats", xlabel="step")
    cost_axes.legend()
    share_axes.set(
        title="share of labels with a gradient of exactly 0", xlabel="step", ylim=(-0.02, 1.02)
    )
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Trains under both costs, prints what each recorded and saves the picture."""
    parser = argparse.ArgumentParser(
        description="Training past 100 % accuracy with a rounded and with an exact cost.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--modulus", default=23, help="what the addition is taken modulo",
        type=checked(int, "a whole number from 5 to 97", lambda value: 5 <= value <= 97),
    )  # fmt: skip
    parser.add_argument(
        "--steps", default=30_000, help=f"training steps, a multiple of {RECORDS}",
        type=checked(int, f"a positive multiple of {RECORDS}", lambda n: n > 0 and n % RECORDS == 0),
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate", default=0.01, help="Adam's",
        type=checked(float, "a number above 0", lambda value: 0 < value < np.inf),
    )  # fmt: skip
    parser.add_argument("--output", type=picture_path, default="softmax_collapse.png", help="the picture")
    options = parser.parse_args(arguments)

    training, test = addition(options.modulus)
    network = js.init_network(jax.random.key(0), training.x.shape[1], 128, options.modulus)
    costs = {"optax": optax_cost, "jaxsoftmax": js.log_likelihood_cost}
    runs = {name: train(cost, network, training, test, options) for name, cost in costs.items()}

    steps = options.steps // RECORDS * np.arange(1, RECORDS + 1)
    print(
        f"{'':10} {'step':>8} {'cost':>9} {'true cost':>9} {'gradient 0 at':>14} {'gradient 0':>11}"
        f" {'accuracy':>15}\n"
        f"{'':10} {'':8} {'':9} {'':9} {'the label':>14} {'everywhere':>11} {'training / test':>15}"
    )
    for name, run in runs.items():
        for index in range(RECORDS // 10 - 1, RECORDS, RECORDS // 10):
            cost, true_cost, labels, examples, train_accuracy, test_accuracy = (r[index] for r in run)
            print(
                f"{name:10} {steps[index]:8,} {cost:9.1e} {true_cost:9.1e} {labels:14.1%} "
                f"{examples:11.1%} {train_accuracy:8.0%} / {test_accuracy:4.0%}"
            )
    draw(runs, steps, options.output)
    print(f"\npicture saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
