"""`python -m jaxsoftmax`: every differentiable function of the package compared on this device.

Exits 1 if a custom value or gradient is wrong.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoftmax as js

ROWS, FEATURES, CLASSES = 64, 16, 1000
DTYPES = ["float32", "bfloat16", "float64"]


def cases(dtype: str) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Each function with arguments for it."""
    generator = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(generator.normal(size=shape) * scale, dtype)

    labels = jnp.asarray(generator.integers(0, CLASSES, ROWS), jnp.int32)
    # From row to row the label goes from 40 nats behind to 40 nats ahead.
    lead = jnp.asarray(np.linspace(-40, 40, ROWS), dtype)
    logits = normal(ROWS, CLASSES).at[jnp.arange(ROWS), labels].set(lead)
    targets = jax.nn.softmax(normal(ROWS, CLASSES, scale=3.0))
    mask = jnp.arange(ROWS) % 4 > 0
    x, w, b = normal(ROWS, FEATURES), normal(FEATURES, CLASSES), normal(CLASSES)
    network = js.init_network(jax.random.key(0), FEATURES, 32, 10, dtype)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "sample_weight": mask}

    yield "softmax", js.softmax, (logits,)
    yield "log_softmax", js.log_softmax, (logits,)
    yield "softmax_jacobian", js.softmax_jacobian, (logits[:, :10],)
    yield "log_likelihood_cost, integers", js.log_likelihood_cost, (logits, labels)
    yield "log_likelihood_cost, probabilities", js.log_likelihood_cost, (logits, targets)
    yield "log_likelihood_cost, options", partial(js.log_likelihood_cost, **options), (logits, labels)
    yield "quadratic_cost", js.quadratic_cost, (logits, labels)
    head = js.linear_log_likelihood_cost
    # In blocks, since one block has no rule of its own.
    yield "linear_log_likelihood_cost", partial(head, block_size=24), (x, w, b, labels)
    blocks = partial(head, reduction="none", block_size=24, softcap=30.0, num_classes=CLASSES - 1)
    yield "linear_log_likelihood_cost, blocks", blocks, (x, w, b, labels % (CLASSES - 1))
    yield "weight_penalty", js.weight_penalty, (network,)
    yield "network_cost", partial(js.network_cost, penalty=1e-2), (network, x, labels % 10)
    yield "backpropagate", _by_hand(x, labels % 10), (network,)


def _by_hand(x, labels):
    """The network's cost with its gradient by hand as a rule, so that it is compared like the others."""

    @jax.custom_vjp
    def cost(network):
        return js.network_cost(network, x, labels)

    def cost_fwd(network):
        return js.backpropagate(network, x, labels)

    def cost_bwd(gradient, cotangent):
        return (jax.tree.map(lambda g: cotangent.astype(g.dtype) * g, gradient),)

    cost.defvjp(cost_fwd, cost_bwd)
    return cost


def main(arguments: list[str] | None = None) -> int:
    """Compares, prints, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxsoftmax", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--dtype", choices=DTYPES, help="compare in this dtype only")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    about = {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": sys.version.split()[0],
        "platform": device.platform,
        "device": device.device_kind,
    }
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in about.items()))
    results, wrong = [], []
    for dtype in [options.dtype] if options.dtype else DTYPES:
        with jax.enable_x64(dtype == "float64"):
            for name, function, given in cases(dtype):
                comparison = js.compare_gradients(jax.jit(function), *given)
                right = all(row.is_right() for row in comparison.rows)
                wrong += [] if right else [f"{name} in {dtype}"]
                results += [
                    {"function": name, "right": row.is_right(), **row._asdict()}
                    for row in comparison.rows
                ]
                if not options.json:
                    print(f"\n{name}, {dtype}: {'right' if right else 'WRONG'}\n{comparison}")
    if options.json:
        print(json.dumps({**about, "wrong": wrong, "rows": results}, indent=1))
    else:
        print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nall right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
