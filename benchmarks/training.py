"""Training FC → FC → softmax: `make_epoch` against what people would otherwise write.

The network 784-128-10 on the images of a folder in the format of MNIST, batches of 128, Adam at 1e-3, ten
epochs. Each run has a process of its own and starts from its framework's own first weights; the ways take
turns. Shown are medians: seconds for an epoch after the first; what the first took longer, which is
compiling; accuracy on the test images; and the process's peak memory. The last row is the products of an
epoch alone, without a gather, a cost or an optimizer. Ways whose framework is not installed are left out.
Saves training.md and training.png beside this file.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jaxsoftmax as js

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from idx import Part, read_folder

FEATURES, HIDDEN, CLASSES = 784, 128, 10
BATCH, RATE, EPOCHS, REPEATS = 128, 1e-3, 10, 5
HERE = Path(__file__).parent
FLOOR = "the products alone"


class Run(NamedTuple):
    """One way to train: an epoch by its number, and then the classes of images."""

    epoch: Callable[[int], Any]
    predict: Callable[[np.ndarray], Any]


def orders(count: int, number: int) -> Iterator[np.ndarray]:
    """The indices of an epoch's batches."""
    order = np.random.default_rng(number).permutation(count)
    yield from np.split(order, range(BATCH, count, BATCH))


def loop(step: Callable[[np.ndarray, np.ndarray], Any], x: np.ndarray, labels: np.ndarray) -> Callable:
    """Epochs of a step for each batch, indexed in NumPy: the fastest way outside a compiled program."""

    def epoch(number: int) -> Any:
        last = None
        for rows in orders(len(x), number):
            last = step(x[rows], labels[rows])
        return jax.block_until_ready(last)

    return epoch


def with_make_epoch(x: np.ndarray, labels: np.ndarray) -> Run:
    """This library's way."""
    optimizer = optax.adam(RATE)
    epoch = js.make_epoch(lambda network, batch: js.network_cost(network, *batch), optimizer, BATCH)
    state = js.init_state(js.init_network(jax.random.key(0), FEATURES, HIDDEN, CLASSES), optimizer)
    data = jnp.asarray(x), jnp.asarray(labels)

    def one(number: int) -> None:
        nonlocal state
        state, costs = epoch(state, data, jax.random.key(number))
        costs.block_until_ready()

    return Run(one, lambda images: js.predict(state.params, jnp.asarray(images)))


def with_jit(x: np.ndarray, labels: np.ndarray) -> Run:
    """JAX's usual loop: a jitted step over optax's loss, which reuses its arguments' memory."""
    optimizer = optax.adam(RATE)
    params = js.init_network(jax.random.key(0), FEATURES, HIDDEN, CLASSES)
    opt_state = optimizer.init(params)

    def logits(params, x):
        hidden = jax.nn.relu(x @ params.hidden.weights + params.hidden.bias)
        return hidden @ params.output.weights + params.output.bias

    def cost(params, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()

    @jax.jit(donate_argnums=(0, 1))
    def update(params, opt_state, x, labels):
        gradient = jax.grad(cost)(params, x, labels)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def step(x, labels):
        nonlocal params, opt_state
        params, opt_state = update(params, opt_state, x, labels)
        return params

    return Run(loop(step, x, labels), lambda images: logits(params, images).argmax(-1))


def with_linen(x: np.ndarray, labels: np.ndarray) -> Run:
    """Flax Linen, its TrainState and a jitted step."""
    from flax import linen
    from flax.training.train_state import TrainState

    model = linen.Sequential([linen.Dense(HIDDEN), linen.relu, linen.Dense(CLASSES)])
    params = model.init(jax.random.key(0), x[:1])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(RATE))

    @jax.jit
    def update(state, x, labels):
        def cost(params):
            logits = state.apply_fn(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return state.apply_gradients(grads=jax.grad(cost)(state.params))

    def step(x, labels):
        nonlocal state
        state = update(state, x, labels)
        return state.params

    return Run(
        loop(step, x, labels),
        lambda images: jnp.argmax(jnp.asarray(model.apply(state.params, images)), -1),
    )


def with_nnx(x: np.ndarray, labels: np.ndarray, cached: bool = False) -> Run:
    """Flax NNX, its Optimizer and a jitted step; `cached` by `nnx.cached_partial`."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(FEATURES, HIDDEN, rngs=rngs), nnx.relu, nnx.Linear(HIDDEN, CLASSES, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, x, labels):
        def cost(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, gradient = nnx.value_and_grad(cost)(model)
        optimizer.update(model, gradient)
        return value

    if cached:
        step = nnx.cached_partial(update, model, optimizer)
    else:

        def step(x, labels):
            return update(model, optimizer, x, labels)

    return Run(loop(step, x, labels), lambda images: model(jnp.asarray(images)).argmax(-1))


def with_equinox(x: np.ndarray, labels: np.ndarray) -> Run:
    """Equinox and its `filter_jit`."""
    import equinox as eqx

    model = eqx.nn.MLP(FEATURES, CLASSES, HIDDEN, depth=1, key=jax.random.key(0))
    optimizer = optax.adam(RATE)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def update(model, opt_state, x, labels):
        def cost(model):
            logits = jax.vmap(model)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradient = eqx.filter_grad(cost)(model)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), opt_state

    def step(x, labels):
        nonlocal model, opt_state
        model, opt_state = update(model, opt_state, x, labels)
        return model.layers[-1].bias

    return Run(loop(step, x, labels), lambda images: jax.vmap(model)(jnp.asarray(images)).argmax(-1))


def with_torch(x: np.ndarray, labels: np.ndarray, threads: int = 2, loader: bool = False) -> Run:
    """PyTorch and its fused Adam; batches by index, or from its DataLoader."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    images, targets = torch.from_numpy(x), torch.from_numpy(labels).long()
    dataset = torch.utils.data.TensorDataset(images, targets)
    batches = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)

    def by_index():
        for rows in torch.randperm(len(images)).split(BATCH):
            yield images[rows], targets[rows]

    def epoch(_: int) -> None:
        for batch, target in batches if loader else by_index():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(images)).argmax(-1).numpy()

    return Run(epoch, predict)


def with_scikit_learn(x: np.ndarray, labels: np.ndarray) -> Run:
    """scikit-learn's MLPClassifier, an epoch at a time."""
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(
        (HIDDEN,),
        alpha=0.0,
        batch_size=BATCH,  # pyright: ignore[reportArgumentType]
        learning_rate_init=RATE,
        random_state=0,
    )
    return Run(lambda _: model.partial_fit(x, labels, classes=range(CLASSES)), model.predict)


def products(x: np.ndarray, _: np.ndarray) -> Run:
    """The five products of forward and backward pass, over batches as they lie."""
    network = js.init_network(jax.random.key(0), FEATURES, HIDDEN, CLASSES)

    def multiply(weights, x):
        w_hidden, w_output = weights
        hidden = x @ w_hidden
        z = hidden @ w_output
        return x.T @ (z @ w_output.T), hidden.T @ z

    @jax.jit
    def epoch(weights, batches, rest):
        d_weights, _ = jax.lax.scan(lambda _, x: (multiply(weights, x), None), weights, batches)
        return d_weights, multiply(weights, rest)

    whole = len(x) - len(x) % BATCH
    weights = network.hidden.weights, network.output.weights
    data = jnp.asarray(x[:whole].reshape(-1, BATCH, FEATURES)), jnp.asarray(x[whole:])
    return Run(lambda _: jax.block_until_ready(epoch(weights, *data)), lambda x: np.full(len(x), -1))


OURS = "jaxsoftmax, make_epoch"
WAYS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], Run]]] = {
    OURS: ("jaxsoftmax", with_make_epoch),
    "JAX, jit for each step": ("jax", with_jit),
    "Flax Linen": ("flax", with_linen),
    "Flax NNX": ("flax", with_nnx),
    "Flax NNX, cached": ("flax", lambda *data: with_nnx(*data, cached=True)),
    "Equinox": ("equinox", with_equinox),
    "PyTorch, 1 thread": ("torch", lambda *data: with_torch(*data, threads=1)),
    "PyTorch, 2 threads": ("torch", with_torch),
    "PyTorch, DataLoader": ("torch", lambda *data: with_torch(*data, loader=True)),
    "scikit-learn": ("sklearn", with_scikit_learn),
    FLOOR: ("jax", products),
}


def floats(part: Part) -> np.ndarray:
    """Images (count, features) from 0 to 1."""
    return part.images.reshape(len(part.images), -1).astype(np.float32) / np.float32(255)


def measure(way: str, folder: Path) -> dict[str, float]:
    """One run of ten epochs, in this process."""
    training, test = read_folder(folder)
    run = WAYS[way][1](floats(training), training.labels.astype(np.int32))
    seconds = []
    for number in range(EPOCHS):
        start = time.perf_counter()
        run.epoch(number)
        seconds.append(time.perf_counter() - start)
    epoch = float(np.median(seconds[1:]))
    return {
        "epoch": epoch,
        "compile": seconds[0] - epoch,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "accuracy": float(np.mean(np.asarray(run.predict(floats(test))) == test.labels)),
    }


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Markdown."""
    lines = [
        f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {jax.local_device_count()} device. "
        f"Medians of {REPEATS} runs of {EPOCHS} epochs, each in a process of its own.",
        "",
        "| way | seconds an epoch | over make_epoch | compiling, s | test accuracy | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for way, row in found.items():
        accuracy = "" if way == FLOOR else f"{row['accuracy']:.1%}"
        lines.append(
            f"| {way} | {row['epoch']:.3f} | {row['epoch'] / found[OURS]['epoch']:.2f} | "
            f"{max(row['compile'], 0):.1f} | {accuracy} | {row['megabytes']:.0f} |"
        )
    return lines


def draw(found: dict[str, dict[str, float]]) -> None:
    """Seconds an epoch, as bars from the floor up."""
    plt.switch_backend("agg")
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    ways = [way for way in found if way != FLOOR]
    seconds = [found[way]["epoch"] for way in ways]
    colours = ["tab:blue" if way == OURS else "tab:gray" for way in ways]
    bars = axes.barh(ways, seconds, color=colours)
    axes.bar_label(bars, [f"{value:.2f}" for value in seconds], padding=3)
    axes.axvline(found[FLOOR]["epoch"], color="black", linestyle=":", label=FLOOR)
    axes.invert_yaxis()
    axes.set(xlabel="seconds an epoch", xlim=(0, 1.1 * max(seconds)))
    axes.legend(loc="upper right")
    figure.savefig(HERE / "training.png", dpi=100)


def main() -> None:
    """Measures every way that is installed, prints and saves."""
    parser = argparse.ArgumentParser(description="Time the training of FC → FC → softmax")
    parser.add_argument("--data", type=Path, required=True, help="images in the format of MNIST")
    parser.add_argument("--way", choices=WAYS, help="one run of this way alone, printed as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.data)))
        return
    ways = [way for way, (module, _) in WAYS.items() if importlib.util.find_spec(module)]
    runs = {way: [] for way in ways}
    shuffle = np.random.default_rng(0).permutation
    turns = [way for _ in range(REPEATS) for way in shuffle(ways).tolist()]
    for way in tqdm(turns):
        command = [sys.executable, __file__, "--data", str(options.data), "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs[way].append(json.loads(done.stdout))
    found = {
        way: {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
        for way, rows in runs.items()
    }
    lines = table(found)
    print("\n".join(lines))
    (HERE / "training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(found)


if __name__ == "__main__":
    main()
