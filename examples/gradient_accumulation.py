"""A batch in parts: why the mean of the parts' means is not the batch's mean, and what to divide by.

`optax.MultiSteps` adds up the gradients of k parts and divides by k. Let example n cost c_n and weigh
v_n, 0 if it is padding, and all parts together weigh W = Σ v_n. Wanted is the cost of the whole batch,
Σ v_n c_n / W. A mean over part i divides by that part's own weight W_i, so that an example in a part with
much padding counts for more than one in a full part.

With `normalizer` = W / k part i costs k Σ v_n c_n / W, summed over that part, and MultiSteps' mean of k
such gradients is the one wanted. With `use_grad_mean=False` it adds without dividing, and W is right.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from digits import load
from jax.flatten_util import ravel_pytree

import jaxsoftmax as js

KEPT = jnp.array([64, 48, 20, 4])  # How many of the 64 rows of each part are examples.


class Batch(NamedTuple):
    """Images, their digits, and which rows are examples; the others are padding."""

    x: jax.Array
    labels: jax.Array
    is_example: jax.Array


def load_batch() -> Batch:
    """256 rows of digits in four parts (4, 64, ...), padded with blank images and label −1."""
    training = load().training
    x, labels = training.x[:256].reshape(4, 64, -1), training.labels[:256].reshape(4, 64)
    is_example = jnp.arange(64) < KEPT[:, None]
    return Batch(jnp.where(is_example[..., None], x, 0), jnp.where(is_example, labels, -1), is_example)


def cost(network: js.Network, batch: Batch, normalizer: jax.Array | None = None) -> jax.Array:
    """Mean cost of the examples, or their total divided by `normalizer`."""
    return js.log_likelihood_cost(
        js.logits(network, batch.x),
        batch.labels,
        sample_weight=batch.is_example,
        normalizer=normalizer,
    )


@partial(jax.jit, static_argnames="use_grad_mean")
def accumulated(
    network: js.Network, parts: Batch, normalizer: jax.Array | None, use_grad_mean: bool = True
) -> js.Network:
    """The gradient that MultiSteps hands on after the last part, to the optimizer inside it."""
    optimizer = optax.MultiSteps(optax.identity(), len(KEPT), use_grad_mean)

    def step(state, part):
        gradient = jax.grad(cost)(network, part, normalizer)
        updates, state = optimizer.update(gradient, state, network)
        return state, updates

    _, updates = jax.lax.scan(step, optimizer.init(network), parts)
    return jax.tree.map(lambda array: array[-1], updates)


def main() -> dict[str, float]:
    """Prints how far each accumulated gradient is from that of the whole batch, and returns it."""
    network, parts = js.init_network(jax.random.key(0), 64, 32, 10), load_batch()
    weight = jnp.sum(parts.is_example)
    found = {
        "mean of the means": accumulated(network, parts, None),
        "normalizer W / k": accumulated(network, parts, weight / len(KEPT)),
        "normalizer W, added": accumulated(network, parts, weight, use_grad_mean=False),
    }
    wanted, _ = ravel_pytree(jax.jit(jax.grad(cost))(network, jax.tree.map(jnp.concatenate, parts)))
    errors = {}
    for name, gradient in found.items():
        difference = ravel_pytree(gradient)[0] - wanted
        errors[name] = float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted))
        print(f"{name:20} off by {errors[name]:.1e} of the whole batch's gradient")
    return errors


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
