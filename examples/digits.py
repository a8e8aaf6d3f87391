"""The main job: FC → FC → softmax on real handwritten digits, and its gradient four ways.

With --data it learns from a folder of your own, in the format of MNIST, instead of scikit-learn's digits;
with --checkpoint it keeps every epoch, and a run that was stopped goes on by the same command.
Run `python examples/digits.py --help` for the options.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from checkpoints import Checkpoints, Saved, checksum
from idx import Part, read_folder
from matplotlib.backend_bases import FigureCanvasBase
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsoftmax as js


class Examples(NamedTuple):
    """Images as rows of numbers, and the class of what each shows."""

    x: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """What to learn from and what to test with."""

    training: Examples
    test: Examples
    classes: int
    image_shape: tuple[int, ...]


class History(NamedTuple):
    """What training recorded, a number for each epoch."""

    cost: list[float]
    train_accuracy: list[float]
    test_accuracy: list[float]


class Training(NamedTuple):
    """What is ready to run: an epoch, compiled; where it begins; and where it is kept."""

    epoch: Callable
    run: Saved
    checkpoints: Checkpoints | None


class Result(NamedTuple):
    """A finished run."""

    network: js.Network
    history: History
    gradient_errors: dict[str, dict[str, float]]
    gradient_where_sure: dict[str, float]


def load(parts: tuple[Part, Part] | None = None) -> Data:
    """Training and test images, by default scikit-learn's, the largest number in the former made 1.

    scikit-learn's 1,797 digits of 8×8 pixels are split 80/20 with every digit in proportion.
    """
    if parts is None:
        images, digits = load_digits(return_X_y=True)
        split = train_test_split(
            images.reshape(-1, 8, 8), digits, test_size=0.2, stratify=digits, random_state=0
        )
        images, test_images, labels, test_labels = map(np.asarray, split)
        parts = Part(images, labels), Part(test_images, test_labels)
    largest = max(parts[0].images.max(), 1)
    training, test = (
        Examples(
            jnp.asarray(part.images.reshape(len(part.images), -1) / largest, jnp.float32),
            jnp.asarray(part.labels, jnp.int32),
        )
        for part in parts
    )
    return Data(training, test, int(parts[0].labels.max()) + 1, parts[0].images.shape[1:])


@jax.jit
def accuracy(network: js.Network, examples: Examples) -> jax.Array:
    """The share of examples whose most probable class is their label."""
    return jnp.mean(js.predict(network, examples.x) == examples.labels)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C ends the program at the end of this. In the middle of XLA's compiling it can crash it."""
    came = []

    def wait(*_: object) -> None:
        came.append(True)
        print("\nstops as soon as this is compiled", file=sys.stderr)

    before = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def prepare(options: argparse.Namespace, data: Data) -> Training:
    """A new network or one from a checkpoint, and an epoch of Adam, compiled."""
    print("compiling", file=sys.stderr)
    key_network, key_epochs = jax.random.split(jax.random.key(options.seed))
    optimizer = optax.adam(options.learning_rate)

    def cost(network: js.Network, batch: Examples) -> jax.Array:
        return js.network_cost(network, batch.x, batch.labels, penalty=options.penalty)

    train_once = js.make_epoch(cost, optimizer, options.batch_size)

    @jax.jit
    def epoch(
        state: js.TrainState, training: Examples, test: Examples, number: int
    ) -> tuple[js.TrainState, tuple[jax.Array, jax.Array, jax.Array]]:
        state, costs = train_once(state, training, jax.random.fold_in(key_epochs, number))
        accuracies = accuracy(state.params, training), accuracy(state.params, test)
        return state, (jnp.mean(costs), *accuracies)

    network = js.init_network(key_network, data.training.x.shape[1], options.hidden, data.classes)
    run = Saved(0, js.init_state(network, optimizer), History([], [], [])._asdict())
    checkpoints = None
    if options.checkpoint is not None:
        names = "batch_size", "hidden", "learning_rate", "penalty", "seed"
        settings = {name: getattr(options, name) for name in names}
        checkpoints = Checkpoints(options.checkpoint, settings | {"data": checksum(data.training)})
        run = checkpoints.newest(run.state) or run
        if run.epochs > options.epochs:
            sys.exit(
                f"{options.checkpoint} holds {run.epochs} epochs, more than --epochs {options.epochs}: "
                "ask for at least as many, or use another folder"
            )
    return Training(epoch.lower(run.state, data.training, data.test, 0).compile(), run, checkpoints)


def train(options: argparse.Namespace, data: Data, training: Training) -> tuple[js.Network, History]:
    """Trains the network, an epoch at a time, behind a progress bar."""
    epoch, run, checkpoints = training
    history = History(**run.history)
    try:
        numbers, total = range(run.epochs, options.epochs), options.epochs
        # Short enough for 80 columns.
        form = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}"
        with tqdm(numbers, "training", total, initial=run.epochs, bar_format=form) as progress:
            for number in progress:
                state, records = epoch(run.state, data.training, data.test, number)
                for name, record in zip(History._fields, records, strict=True):
                    getattr(history, name).append(float(record))
                progress.set_postfix_str(
                    f"cost {history.cost[-1]:.4f}, test {history.test_accuracy[-1]:.2%}"
                )
                done = Saved(number + 1, state, history._asdict())
                if checkpoints is not None:
                    checkpoints.save(done)
                run = done
    except KeyboardInterrupt:
        where = f"--checkpoint {options.checkpoint}"
        kept = (
            "--checkpoint would have kept them" if checkpoints is None else f"{where} goes on from there"
        )
        print(f"\ninterrupted after {run.epochs} epochs: {kept}", file=sys.stderr)
        sys.exit(130)
    return run.state.params, history


def gradient_four_ways(network: js.Network, examples: Examples) -> dict[str, dict[str, float]]:
    """Largest error of each parameter's gradient, by each way of getting it.

    The truth is plain automatic differentiation in float64. Errors are in float32 ulps of its largest
    entry. Central differences are taken in float64, at five entries of each parameter.
    """
    x, labels = examples
    custom_gradient = jax.jit(jax.grad(js.network_cost))
    plain_gradient = jax.jit(jax.grad(js.without_custom_rules(js.network_cost)))
    with jax.enable_x64(True):
        network64, x64 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (network, x))
        truth = jax.tree.map(np.asarray, plain_gradient(network64, x64, labels))
        cost64 = jax.jit(lambda network: js.network_cost(network, x64, labels))
        differences = central_differences(cost64, network64)

    ways = {
        "custom_vjp": custom_gradient(network, x, labels),
        "plain jax.grad": plain_gradient(network, x, labels),
        "backpropagate": jax.jit(js.backpropagate)(network, x, labels)[1],
        "central differences": differences,
    }
    return {way: errors_in_ulps(gradient, truth) for way, gradient in ways.items()}


def central_differences(
    cost: Callable[[js.Network], jax.Array],
    network: js.Network,
    entries: int = 5,
    step: float = 1e-6,
) -> js.Network:
    """(C(w + h) − C(w − h)) / 2h at random entries of each parameter, NaN at all others."""
    generator = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(network)
    slopes = []
    for number, leaf in enumerate(leaves):
        slope = np.full(leaf.shape, np.nan)
        for flat_index in generator.choice(leaf.size, min(entries, leaf.size), replace=False):
            index = np.unravel_index(flat_index, leaf.shape)

            def moved(distance, number=number, leaf=leaf, index=index):
                nearby = [*leaves[:number], leaf.at[index].add(distance), *leaves[number + 1 :]]
                return float(cost(jax.tree.unflatten(tree, nearby)))

            slope[index] = (moved(step) - moved(-step)) / (2 * step)
        slopes.append(slope)
    return jax.tree.unflatten(tree, slopes)


def errors_in_ulps(gradient: js.Network, truth: js.Network) -> dict[str, float]:
    """The largest error of each parameter, in float32 ulps of the true gradient's largest entry."""
    errors = {}
    for (path, true), leaf in zip(
        jax.tree_util.tree_leaves_with_path(truth), jax.tree.leaves(gradient), strict=True
    ):
        known = ~np.isnan(true) if leaf.dtype == np.float32 else ~np.isnan(leaf)
        error = np.max(np.abs(np.asarray(leaf, np.float64)[known] - true[known]))
        errors[jax.tree_util.keystr(path).lstrip(".")] = float(
            error / np.spacing(np.float32(np.max(np.abs(true))))
        )
    return errors


def where_sure(network: js.Network, examples: Examples, lead: float = 40) -> dict[str, float]:
    """The gradient in a label's logit, by each way, where the label leads by so many nats.

    The example is the one that the network is surest of. Its logits are scaled to that lead.
    """
    logits, labels = np.asarray(js.logits(network, examples.x), np.float64), np.asarray(examples.labels)
    rows = np.arange(len(labels))
    behind = logits[rows, labels][:, None] - logits
    behind[rows, labels] = np.inf
    surest = behind.min(axis=1).argmax()
    label = labels[surest]
    z = jnp.asarray(logits[surest] * lead / behind[surest].min(), jnp.float32)
    others = np.sum(np.exp(np.delete(np.asarray(z, np.float64) - float(z[label]), label)))
    textbook = jax.grad(lambda z: -jnp.log(jax.nn.softmax(z)[label]))
    return {
        "float64": -others / (1 + others),
        "custom_vjp": float(jax.grad(js.log_likelihood_cost)(z, label)[label]),
        "jax.grad of −ln a": float(textbook(z)[label]),
    }


def print_errors(errors: dict[str, dict[str, float]], sure: dict[str, float]) -> None:
    """A row for each parameter, a column for each way; then the gradient where the network is sure."""
    print("\nGradient of the trained network: largest error of each way, in ulps. One ulp is the")
    print("distance of neighbouring float32 numbers, at the largest entry of the float64 gradient.")
    print(f"{'parameter':16}" + "".join(f"{way:>21}" for way in errors))
    for parameter in next(iter(errors.values())):
        print(f"{parameter:16}" + "".join(f"{by[parameter]:21.3f}" for by in errors.values()))
    print(
        "All four agree, so the rule is right. Central differences ran in float64, the others in float32:"
    )
    print("a few ulps are what rounding leaves in sums over this many examples.")
    print("\nWhere the network is sure, a label 40 nats ahead, the gradient in its logit:")
    print("  ".join(f"{way} {slope:.3e}" for way, slope in sure.items()))
    print(
        "The rule keeps its digits where the textbook's formula, −ln of the softmax, has lost them all."
    )


def draw(network: js.Network, history: History, data: Data, output: Path) -> None:
    """One picture: cost and accuracy, the confusion matrix, and the images it got wrong."""
    labels, classes = np.asarray(data.test.labels), data.classes
    probabilities = np.asarray(js.predict_probabilities(network, data.test.x))
    predictions = probabilities.argmax(axis=1)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, predictions), 1)
    wrong = np.flatnonzero(predictions != labels)

    plt.switch_backend("agg")
    figure = plt.figure(figsize=(13, 7.5), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(3, 2)))
    cost_axes, accuracy_axes, confusion_axes = top.subplots(1, 3)
    epochs = np.arange(1, len(history.cost) + 1)
    cost_axes.semilogy(epochs, history.cost)
    cost_axes.set(title="cost, penalty included", xlabel="epoch", ylabel="nats")
    accuracy_axes.plot(epochs, history.train_accuracy, label="training")
    accuracy_axes.plot(epochs, history.test_accuracy, label=f"test: {history.test_accuracy[-1]:.1%}")
    accuracy_axes.set(title="accuracy", xlabel="epoch")
    accuracy_axes.legend()
    ticks = range(0, classes, -(-classes // 20))
    confusion_axes.imshow(np.sqrt(confusion), cmap="Blues")
    confusion_axes.set(
        title="confusion matrix", xlabel="predicted", ylabel="label",
        xticks=ticks, yticks=ticks,
    )  # fmt: skip
    for row, column in np.argwhere(confusion) if classes <= 20 else ():
        confusion_axes.text(
            column, row, confusion[row, column], ha="center", va="center", fontsize=8,
            color="white" if confusion[row, column] > confusion.max() / 4 else "black",
        )  # fmt: skip

    shown = wrong[:9]
    bottom.suptitle(
        f"{len(wrong)} of {len(labels)} test images wrong" + (", the first 9" * (len(wrong) > 9))
    )
    panels = bottom.subplots(2, 9, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for column, index in enumerate(shown):
        image, bars = panels[:, column]
        image.imshow(data.test.x[index].reshape(data.image_shape), cmap="gray_r")
        image.set_title(f"{labels[index]} taken for {predictions[index]}", fontsize=9)
        bars.axis("on")
        colours = ["tab:green" if digit == labels[index] else "tab:gray" for digit in range(classes)]
        bars.bar(range(classes), probabilities[index], color=colours)
        bars.set(ylim=(0, 1), xticks=ticks, yticks=[0, 1])
        bars.tick_params(labelsize=6)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def checked(parse: Callable[[str], float], meaning: str, good: Callable[[float], bool]) -> Callable:
    """An argparse type that says in words what it wants."""

    def convert(text: str) -> float:
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"must be {meaning}, got {text!r}")
        return value

    return convert


def picture_path(text: str) -> Path:
    """A file that matplotlib can write, checked before the work rather than after it."""
    path = Path(text)
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"must end in one of .{', .'.join(sorted(known))}, got {text!r}")
    try:
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from None
    return path


def image_folder(text: str) -> tuple[Part, Part]:
    """The images of a folder, read before the work."""
    try:
        return read_folder(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def checkpoint_folder(text: str) -> Path:
    """A folder that can be written, made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}") from None
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description="Train FC → FC → softmax on handwritten digits and check its gradient.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data", type=image_folder, metavar="FOLDER",
        help="images in the format of MNIST; those of scikit-learn if None",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=checkpoint_folder, metavar="FOLDER",
        help="keeps the newest three epochs here, and goes on from the newest",
    )  # fmt: skip
    count = checked(int, "a whole number from 1 to 100,000", lambda value: 1 <= value <= 100_000)
    parser.add_argument("--epochs", type=count, default=40, help="passes over the training set")
    parser.add_argument("--batch-size", type=count, default=64, help="examples in a batch")
    parser.add_argument("--hidden", type=count, default=128, help="units in the hidden layer")
    parser.add_argument(
        "--learning-rate", default=3e-3, help="of Adam",
        type=checked(float, "a number above 0", lambda value: 0 < value < math.inf),
    )  # fmt: skip
    parser.add_argument(
        "--penalty", default=1e-4, help="λ of the weight penalty (λ/2) Σ w²",
        type=checked(float, "a number of at least 0", lambda value: 0 <= value < math.inf),
    )  # fmt: skip
    parser.add_argument(
        "--seed", default=0, help="of the first weights and the order of the examples",
        type=checked(int, "a whole number from 0 to 2³² − 1", lambda value: 0 <= value < 2**32),
    )  # fmt: skip
    parser.add_argument("--output", type=picture_path, default="digits.png", help="the picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains, reports accuracy, compares gradients and saves the picture."""
    options = parse(arguments)
    with interrupts_wait():
        data = load(options.data)
        training = prepare(options, data)
    network, history = train(options, data, training)
    if not math.isfinite(history.cost[-1]):
        sys.exit(
            "training diverged: the cost is no longer finite; try a lower --learning-rate or --penalty"
        )
    features, classes = data.training.x.shape[1], data.classes
    images = "scikit-learn's handwritten digits" if options.data is None else "images of the folder"
    print(f"{images}: network {features} → {options.hidden} → {classes}, {options.epochs} epochs")
    print(f"training accuracy {history.train_accuracy[-1]:.2%} of {len(data.training.labels)} images")
    print(f"test accuracy     {history.test_accuracy[-1]:.2%} of {len(data.test.labels)} images")
    print("checking the gradient", file=sys.stderr)
    # Of so many images the gradient is computed in seconds even where there are thousands more.
    some = jax.tree.map(lambda array: array[:2000], data.training)
    with interrupts_wait():
        errors, sure = gradient_four_ways(network, some), where_sure(network, some)
    print_errors(errors, sure)
    draw(network, history, data, options.output)
    print(f"\npicture saved to {options.output}")
    return Result(network, history, errors, sure)


if __name__ == "__main__":
    main()
