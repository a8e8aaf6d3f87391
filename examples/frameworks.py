"""What the examples of other frameworks share: the same digits, learned under one cost after another."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from digits import Examples, checked, load

STEPS = 10


class Comparison(NamedTuple):
    """What each cost led to, by its function's name."""

    accuracy: dict[str, float]  # the share of test images that are named
    difference: dict[str, float]  # the largest, of any parameter from the first cost's, after STEPS steps


def batches(examples: Examples, epochs: int) -> list[Examples]:
    """Batches of 64, each epoch in an order of its own."""
    count, generator = len(examples.labels), np.random.default_rng(0)
    orders = [generator.permutation(count) for _ in range(epochs)]
    parts = [rows for order in orders for rows in np.split(order, range(64, count, 64))]
    return [Examples(examples.x[rows], examples.labels[rows]) for rows in parts]


def compare(
    costs: Sequence[Callable[..., jax.Array]],
    train: Callable[..., Any],
    logits: Callable[[Any, jax.Array], jax.Array],
    arguments: Sequence[str] | None,
) -> Comparison:
    """Trains under each cost, `train(cost, batches)` → model, and prints how they compare."""
    parser = argparse.ArgumentParser(description="Train on digits under " + ", ".join(map(name, costs)))
    count = checked(int, "a whole number from 1 to 1,000", lambda value: 1 <= value <= 1000)
    parser.add_argument("--epochs", type=count, default=20, help="passes over the images (default: 20)")
    data = load()
    all_batches = batches(data.training, parser.parse_args(arguments).epochs)

    found, first = Comparison({}, {}), None
    for cost in costs:
        early = train(cost, all_batches[:STEPS])
        first = first or early
        distances = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), early, first)
        found.difference[name(cost)] = float(max(jax.tree.leaves(distances)))
        answers = jnp.argmax(logits(train(cost, all_batches), data.test.x), axis=-1)
        found.accuracy[name(cost)] = float(jnp.mean(answers == data.test.labels))
        print(
            f"{name(cost):15} test accuracy {found.accuracy[name(cost)]:.2%}, parameters after {STEPS} "
            f"steps at most {found.difference[name(cost)]:.1e} from {name(costs[0])}'s"
        )
    return found


def name(function: Callable) -> str:
    """The name it was defined by."""
    return function.__name__


if __name__ == "__main__":
    argparse.ArgumentParser(description=f"{__doc__} For flax_nnx.py and equinox_mlp.py.").parse_args()
