"""A neural language model, whose softmax layer over the whole vocabulary is what costs.

Each word is predicted from the words before it: their embeddings → FC with ReLU → FC → softmax, with a
direct path past the ReLU (Bengio et al. 2003, "A neural probabilistic language model"). It is trained
with `linear_log_likelihood_cost`, so that the logits, a row of the whole vocabulary for every word of a
batch, are never held; `--dense` trains the same model on all of them.

Words are runs of letters and digits, with apostrophes inside them, and every other sign is a word too.
A word that the training text has once or never is <unknown>, to the model and the baseline alike; so
training meets some, and learns how often to expect one. What stands before a text is unknown as well.

Every tenth text is held out, in the order of the names: names that start with a year split the text by
year. That tells how well the model knows an unseen text among others of its time, not how well it
foretells later years, which is harder. Of fewer than ten texts the last tenth of all words is held out.
The baseline is the bigram model interpolated with the unigram one, its weight fitted on a part of the
training text that is split off in the same way.
"""

import argparse
import math
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from digits import checked, picture_path
from tqdm import trange

import jaxsoftmax as js

WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
UNKNOWN = "<unknown>"
FEWEST = 1000  # Words to learn from.
PARTS = 4  # Of an epoch, after each of which the model is evaluated.
SAMPLES, LENGTH = 3, 50  # Texts drawn from the model, and words in each.

Texts = list[list[str]]


class Examples(NamedTuple):
    """The words before each word, the nearest last, and the word itself, as numbers."""

    context: jax.Array
    word: jax.Array


class Model(NamedTuple):
    """The parameters."""

    embedding: jax.Array
    hidden: js.Dense
    projection: js.Dense
    direct: jax.Array
    output: js.Dense


class Baseline(NamedTuple):
    """The weight of the bigrams, and the perplexity of the mixture on the held-out text."""

    weight: float
    perplexity: float


class History(NamedTuple):
    """What training recorded, a number for each part of an epoch."""

    cost: list[float]
    perplexity: list[float]
    speed: list[float]


class Result(NamedTuple):
    """A finished run; `memory` is the training step's, in bytes, with the head and with all logits."""

    model: Model
    history: History
    baseline: Baseline
    memory: dict[str, float]
    samples: list[str]


def read(path: str) -> Texts:
    """The words of a file of UTF-8 text, or of every *.txt under a folder, a list for each."""
    folder = Path(path)
    files = sorted(folder.rglob("*.txt")) if folder.is_dir() else [folder]
    if not files:
        raise argparse.ArgumentTypeError(f"{path}: no *.txt in this folder")
    texts = []
    for file in files:
        try:
            texts.append(WORD.findall(file.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise argparse.ArgumentTypeError(f"{file}: not UTF-8 at byte {error.start}") from None
    texts = [text for text in texts if text]
    count = sum(map(len, split(texts)[0]))
    if count < FEWEST:
        raise argparse.ArgumentTypeError(
            f"{path}: too little text, {count} words to learn from instead of {FEWEST:,} or more"
        )
    return texts


def split(texts: Texts) -> tuple[Texts, Texts]:
    """What to learn from, and what to hold out: every tenth text, or of fewer the last tenth of all."""
    if len(texts) >= 10:
        return [text for number, text in enumerate(texts) if number % 10 != 9], texts[9::10]
    words = [word for text in texts for word in text]
    start = len(words) - len(words) // 10
    return [words[:start]], [words[start:]]


def numbered(texts: Texts, numbers: dict[str, int], context: int) -> Examples:
    """Every word of the texts, with the `context` words before it."""
    contexts, words = [], []
    for text in texts:
        padded = np.array([0] * context + [numbers.get(word, 0) for word in text], np.int32)
        contexts.append(np.lib.stride_tricks.sliding_window_view(padded, context)[: len(text)])
        words.append(padded[context:])
    return Examples(jnp.asarray(np.concatenate(contexts)), jnp.asarray(np.concatenate(words)))


def unigrams(word: np.ndarray, classes: int) -> np.ndarray:
    """The probability of each word, as if each had been met once more."""
    return (np.bincount(word, minlength=classes) + 1) / (len(word) + classes)


def mixture(counted: Texts, judged: Texts, numbers: dict[str, int]) -> Callable[[float], float]:
    """The perplexity of one text by the counts of another, as a function of the bigrams' weight."""
    classes = len(numbers)
    (before, word), (judged_before, judged_word) = (
        (np.asarray(examples.context[:, 0], np.int64), np.asarray(examples.word))
        for examples in (numbered(texts, numbers, 1) for texts in (counted, judged))
    )
    pairs = Counter((before * classes + word).tolist())
    both = np.array([pairs[pair] for pair in (judged_before * classes + judged_word).tolist()])
    first = np.bincount(before, minlength=classes)[judged_before]
    single = unigrams(word, classes)[judged_word]
    # After a word that was never counted, the unigrams alone.
    double = np.where(first > 0, both / np.maximum(first, 1), single)
    return lambda weight: float(np.exp(-np.mean(np.log(weight * double + (1 - weight) * single))))


def interpolated_bigrams(training: Texts, held_out: Texts, numbers: dict[str, int]) -> Baseline:
    """Bigrams and unigrams in the proportion that serves a part of the training text best."""
    weight = float(min(np.linspace(0, 0.99, 100), key=mixture(*split(training), numbers)))
    return Baseline(weight, mixture(training, held_out, numbers)(weight))


def init_model(options: argparse.Namespace, key: jax.Array, probabilities: np.ndarray) -> Model:
    """Random weights; the output's bias puts the untrained model near the unigrams."""
    keys = jax.random.split(key, 5)
    size, classes = options.embedding, len(probabilities)
    he, lecun = jax.nn.initializers.he_normal(), jax.nn.initializers.lecun_normal()
    bias = jnp.asarray(np.log(probabilities), jnp.float32)
    return Model(
        embedding=0.1 * jax.random.normal(keys[0], (classes, size)),
        hidden=js.Dense(he(keys[1], (options.context * size, options.hidden)), jnp.zeros(options.hidden)),
        projection=js.Dense(lecun(keys[2], (options.hidden, size)), jnp.zeros(size)),
        direct=lecun(keys[3], (options.context * size, size)),
        output=js.Dense(0.1 * jax.random.normal(keys[4], (size, classes)), bias),
    )


def features(model: Model, context: jax.Array) -> jax.Array:
    """What the output layer sees of each context."""
    # Kept at a tenth of its size: Adam's steps, alike for all, then move a rare word ten times as far.
    x = 10 * model.embedding[context].reshape(len(context), -1)
    hidden = jax.nn.relu(x @ model.hidden.weights + model.hidden.bias)
    return hidden @ model.projection.weights + model.projection.bias + x @ model.direct


def head_cost(model: Model, batch: Examples) -> jax.Array:
    """The cost of a batch, a few of its logits at a time."""
    return js.linear_log_likelihood_cost(features(model, batch.context), *model.output, batch.word)


def logits(model: Model, context: jax.Array) -> jax.Array:
    """All logits of each context."""
    return features(model, context) @ model.output.weights + model.output.bias


def dense_cost(model: Model, batch: Examples) -> jax.Array:
    """The same cost from all logits at once."""
    return js.log_likelihood_cost(logits(model, batch.context), batch.word)


@jax.jit
def perplexity(model: Model, examples: Examples) -> jax.Array:
    """The exponential of the mean cost of a word."""
    statistics = js.head_statistics(features(model, examples.context), *model.output, examples.word)
    return jnp.exp(-jnp.mean(jnp.asarray(statistics.label_log_likelihood)))


def step_memory(
    cost: Callable, optimizer: optax.GradientTransformation, state: js.TrainState, batch: Examples
) -> float:
    """The bytes that a training step holds beside its arguments and results."""
    step = jax.jit(js.make_step(cost, optimizer)).lower(state, batch).compile()
    analysis = step.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else math.nan


def train(
    options: argparse.Namespace, key: jax.Array, model: Model, training: Examples, held_out: Examples
) -> tuple[Model, History, dict[str, float]]:
    """Trains with Adam, its rate falling to 0; tells the memory of a step under either cost as well."""
    length = len(training.word) // PARTS
    # Every fourth word each, as many in each, so that one compiled program serves them all.
    parts = [jax.tree.map(lambda a, p=p: a[p::PARTS][:length], training) for p in range(PARTS)]
    steps = options.epochs * PARTS * math.ceil(length / options.batch_size)
    optimizer = optax.adam(optax.linear_schedule(options.learning_rate, 0, steps))
    state = js.init_state(model, optimizer)
    batch = jax.tree.map(lambda a: a[: options.batch_size], parts[0])
    costs = {"head": head_cost, "dense": dense_cost}
    memory = {name: step_memory(cost, optimizer, state, batch) for name, cost in costs.items()}

    epoch = js.make_epoch(costs["dense" if options.dense else "head"], optimizer, options.batch_size)
    epoch = jax.jit(epoch).lower(state, parts[0], key).compile()  # Not a part of the first one's time.
    history = History([], [], [])
    with trange(options.epochs * PARTS, desc="training", unit="part") as progress:
        for number in progress:
            start = time.perf_counter()
            state, found = epoch(state, parts[number % PARTS], jax.random.fold_in(key, number))
            history.cost.append(float(jnp.mean(found)))
            history.speed.append(length / (time.perf_counter() - start))
            history.perplexity.append(float(perplexity(state.params, held_out)))
            progress.write(
                f"epoch {(number + 1) / PARTS:.2f}: training cost {history.cost[-1]:.4f}, held-out "
                f"perplexity {history.perplexity[-1]:.1f}, {history.speed[-1]:,.0f} words a second"
            )
    return state.params, history, memory


def sample(options: argparse.Namespace, key: jax.Array, model: Model, names: list[str]) -> list[str]:
    """Texts drawn from the model word by word, as after a full stop, without unknown words."""

    def draw(context: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = logits(model, context).at[:, 0].set(-jnp.inf) / options.temperature
        word = jax.random.categorical(key, z)
        return jnp.column_stack([context[:, 1:], word]), word

    start = jnp.zeros((SAMPLES, options.context), jnp.int32)
    start = start.at[:, -1].set(names.index(".") if "." in names else 0)
    _, words = jax.lax.scan(draw, start, jax.random.split(key, LENGTH))
    texts = (" ".join(names[number] for number in row) for row in np.asarray(words).T)
    return [re.sub(r" (?=[,.;:?!)%-])|(?<=[($-]) |(?<=\d ,) (?=\d)", "", text) for text in texts]


def draw(result: Result, output: Path) -> None:
    """One picture: perplexity by epoch beside the baseline's, and the memory of a step."""
    plt.switch_backend("agg")
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    found, baseline = result.history.perplexity, result.baseline.perplexity
    epochs = np.arange(1, len(found) + 1) / PARTS
    curve.plot(epochs, found, "o-", label=f"the model: {found[-1]:.0f} at the end")
    curve.axhline(baseline, color="gray", linestyle="--", label=f"bigrams and unigrams: {baseline:.0f}")
    curve.set(
        title="perplexity of the held-out text", xlabel="epoch", xticks=epochs[:: -(-len(epochs) // 8)]
    )
    curve.legend()
    sizes = [size / 1e6 for size in result.memory.values()]
    drawn = bars.bar(["the head", "all logits"], sizes, color=["tab:blue", "tab:gray"], width=0.6)
    bars.bar_label(drawn, fmt="%.0f MB")
    bars.set(title="temporary memory of a training step", ylabel="megabytes")
    bars.margins(y=0.1)
    figure.savefig(output, dpi=100)
    plt.close(figure)


count = checked(int, "a whole number from 1 to 100,000", lambda value: 1 <= value <= 100_000)
above_0 = checked(float, "a number above 0", lambda value: 0 < value < math.inf)


def parser_of(description: str, seeded: str) -> argparse.ArgumentParser:
    """A parser of what every training on a text is told; `seeded` is what the seed decides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text", type=read, required=True, help="a UTF-8 file, or a folder of *.txt")
    parser.add_argument("--batch-size", type=count, default=512, help="words in a batch")
    parser.add_argument(
        "--context", default=4, help="words that predict the next one",
        type=checked(int, "a whole number from 1 to 100", lambda value: 1 <= value <= 100),
    )  # fmt: skip
    parser.add_argument("--learning-rate", type=above_0, default=6e-3, help="of Adam, at first")
    parser.add_argument(
        "--seed", default=0, help=f"of {seeded}",
        type=checked(int, "a whole number from 0 to 2³² − 1", lambda value: 0 <= value < 2**32),
    )  # fmt: skip
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    seeded = "the first weights, the order of the words and the words drawn"
    parser = parser_of("Train a neural language model on a text of your own.", seeded)
    parser.add_argument("--epochs", type=count, default=1, help="passes over the training text")
    parser.add_argument("--embedding", type=count, default=32, help="numbers for each word")
    parser.add_argument("--hidden", type=count, default=128, help="units in the hidden layer")
    parser.add_argument("--temperature", type=above_0, default=0.7, help="of the words drawn")
    parser.add_argument("--dense", action="store_true", help="train on all logits at once")
    parser.add_argument("--output", type=picture_path, default="language_model.png", help="the picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains the model, compares it with the baseline, draws texts from it and saves the picture."""
    options = parse(arguments)
    texts, held_out_texts = split(options.text)
    counts = Counter(word for text in texts for word in text)
    names = [UNKNOWN, *(word for word, count in counts.items() if count > 1)]
    numbers = {name: number for number, name in enumerate(names)}
    training, held_out = (numbered(part, numbers, options.context) for part in (texts, held_out_texts))
    print(
        f"{len(training.word):,} words to learn from, {len(counts):,} of them distinct; "
        f"{len(held_out.word):,} held out; {len(names):,} in the vocabulary"
    )
    baseline = interpolated_bigrams(texts, held_out_texts, numbers)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    model = init_model(options, keys[0], unigrams(np.asarray(training.word), len(names)))
    model, history, memory = train(options, keys[1], model, training, held_out)
    if not math.isfinite(history.perplexity[-1]):
        sys.exit("training diverged: the cost is no longer finite; try a lower --learning-rate")
    print(
        f"\nperplexity of the held-out text: {history.perplexity[-1]:.1f} by the model, "
        f"{baseline.perplexity:.1f} by bigrams and unigrams ({baseline.weight:.2f} and "
        f"{1 - baseline.weight:.2f} of it)\ntemporary memory of a training step: "
        f"{memory['head'] / 1e6:.1f} MB with the head, {memory['dense'] / 1e6:.1f} MB with all logits\n\n"
        "The model writes:"
    )
    result = Result(model, history, baseline, memory, sample(options, keys[2], model, names))
    for text in result.samples:
        print(textwrap.fill(f"{text} ...", 100, initial_indent="- ", subsequent_indent="  "))
    draw(result, options.output)
    print(f"\npicture saved to {options.output}")
    return result


if __name__ == "__main__":
    main()
