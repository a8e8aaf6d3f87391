"""How much `make_epoch` saves over a Python loop over `make_step`, on scikit-learn's digits.

Both train the same network on the same batches; interleaved, medians, in one process.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsoftmax as js

BATCH, REPEATS = 64, 31


def main() -> None:
    """Prints the medians and their ratio."""
    images, digits = load_digits(return_X_y=True)
    # NumPy for the loop: indexing it is the fastest way to make a batch outside jit.
    on_host = (images / 16).astype(np.float32), digits.astype(np.int32)
    data = jax.tree.map(jnp.asarray, on_host)
    optimizer = optax.adam(3e-3)

    def cost(network: js.Network, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return js.network_cost(network, *batch)

    step = js.make_step(cost, optimizer)
    epoch = js.make_epoch(cost, optimizer, BATCH)
    state = js.init_state(js.init_network(jax.random.key(0), 64, 128, 10), optimizer)

    def loop(arrays: tuple, state: js.TrainState) -> js.TrainState:
        order = np.random.default_rng(0).permutation(len(digits))
        for start in range(0, len(digits), BATCH):
            indices = order[start : start + BATCH]
            state, _ = step(state, jax.tree.map(lambda array, indices=indices: array[indices], arrays))
        return state

    ways = {
        "make_step, batches indexed on the device": lambda state, _: loop(data, state),
        "make_step, batches indexed in NumPy": lambda state, _: loop(on_host, state),
        "make_epoch": lambda state, key: epoch(state, data, key),
    }
    times = {way: [] for way in ways}
    for repeat in range(REPEATS + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run(state, jax.random.key(repeat)))
            times[way].append(time.perf_counter() - start)
    medians = {way: float(np.median(taken[1:])) for way, taken in times.items()}
    for way, median in medians.items():
        print(
            f"{way:42}{median * 1e3:7.2f} ms an epoch, {median / medians['make_epoch']:.2f} of make_epoch"
        )


if __name__ == "__main__":
    main()
