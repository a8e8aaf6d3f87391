"""A wide language model teaches a narrow one, and the logits of neither are held.

Teacher and student are the n-gram model of `language_model.py`. The student's labels are the teacher's
softmax (Hinton et al. 2015, "Distilling the knowledge in a neural network"): `TeacherLabels` takes the
teacher's features and output layer, and forms that softmax in blocks, as the student's. Both logits are
divided by a temperature T, and the cost is multiplied by T², so that its gradient keeps its size. It can
be mixed with the cost of the true words.

The teacher reads every third word of the text once, the student every 24th, several times. Of so few
words the student alone learns little, and soon learns them by heart. The teacher's answer tells it more
than the one word that stands there: what else could have stood there, and how likely. The student is
trained twice, from the same weights and on the same words in the same batches: alone, by the true words,
and taught, by the teacher. The teacher's features are computed for each batch, without a gradient. All
are judged by words of the text that `language_model.py` holds out.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import language_model as lm
import matplotlib.pyplot as plt
import numpy as np
import optax
from digits import checked, picture_path
from tqdm import trange

import jaxsoftmax as js

RARE = 5  # A word that the training text has less often is <unknown>.
PARTS = 4  # Of the teacher's text, after each of which it is evaluated.
JUDGED = 4  # Every so many words of the held-out text.
REPEATS = 20  # Of a step that is timed.


class Run(NamedTuple):
    """A trained model, and what training recorded, a number for each epoch."""

    model: lm.Model
    cost: list[float]
    perplexity: list[float]


class Step(NamedTuple):
    """The seconds that a training step takes, and the bytes it holds beside arguments and results."""

    seconds: float
    memory: float


class Result(NamedTuple):
    """The runs "teacher", "alone" and "taught"; a step of the taught student, "in blocks" and "dense"."""

    runs: dict[str, Run]
    steps: dict[str, Step]


class Data(NamedTuple):
    """The words of each model, those to judge it by, and the size of the vocabulary."""

    teacher: lm.Examples
    student: lm.Examples
    held_out: lm.Examples
    classes: int


def every(n: int, examples: lm.Examples, start: int = 0) -> lm.Examples:
    """Every nth word, with the words before it."""
    return jax.tree.map(lambda array: array[start::n], examples)


def divide(options: argparse.Namespace) -> Data:
    """The words for the teacher, those for the student, and those held out."""
    texts, held_out = lm.split(options.text)
    counts = Counter(word for text in texts for word in text)
    names = [lm.UNKNOWN, *(word for word, count in counts.items() if count >= RARE)]
    numbers = {name: number for number, name in enumerate(names)}
    training, held_out = (lm.numbered(part, numbers, options.context) for part in (texts, held_out))
    student = every(options.student_every, training)
    return Data(every(options.teacher_every, training), student, every(JUDGED, held_out), len(names))


def untrained(context: int, width: int, key: jax.Array, examples: lm.Examples, classes: int) -> lm.Model:
    """Random weights; the untrained model is near the unigrams of the words it will learn from."""
    sizes = argparse.Namespace(context=context, embedding=width, hidden=4 * width)
    return lm.init_model(sizes, key, lm.unigrams(np.asarray(examples.word), classes))


def taught_cost(
    options: argparse.Namespace, teacher: lm.Model, model: lm.Model, batch: lm.Examples
) -> jax.Array:
    """The cost of the teacher's softmax, mixed with the cost of the true words."""
    x, scale = lm.features(model, batch.context), 1 / options.temperature
    labels = js.TeacherLabels(lm.features(teacher, batch.context), *teacher.output, logit_scale=scale)
    cost = js.linear_log_likelihood_cost(x, *model.output, labels, logit_scale=scale)
    return mixed(options, cost, lambda: js.linear_log_likelihood_cost(x, *model.output, batch.word))


def dense_cost(
    options: argparse.Namespace, teacher: lm.Model, model: lm.Model, batch: lm.Examples
) -> jax.Array:
    """The same cost from all logits of both models, with JAX and optax alone."""
    z = lm.logits(model, batch.context)
    labels = jax.nn.softmax(lm.logits(teacher, batch.context) / options.temperature)
    cost = optax.softmax_cross_entropy(z / options.temperature, labels).mean()
    return mixed(
        options, cost, lambda: optax.softmax_cross_entropy_with_integer_labels(z, batch.word).mean()
    )


def mixed(options: argparse.Namespace, taught: jax.Array, true: Callable[[], jax.Array]) -> jax.Array:
    """Both costs by their weights; that of the true words is only computed where it counts."""
    cost = options.weight * options.temperature**2 * taught
    return cost + (1 - options.weight) * true() if options.weight < 1 else cost


def measure(costs: dict[str, Callable], model: lm.Model, batch: lm.Examples) -> dict[str, Step]:
    """The time and the temporary memory of a training step by each cost, timed in turns."""
    optimizer = optax.adam(1e-3)
    state = js.init_state(model, optimizer)
    steps = {
        name: jax.jit(js.make_step(cost, optimizer)).lower(state, batch).compile()
        for name, cost in costs.items()
    }
    seconds = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            seconds[name].append(time.perf_counter() - start)
    analyses = {name: step.memory_analysis() for name, step in steps.items()}
    memory = {name: found.temp_size_in_bytes if found else math.nan for name, found in analyses.items()}
    return {name: Step(float(np.median(seconds[name])), memory[name]) for name in steps}


def train(
    options: argparse.Namespace, name: str, cost: Callable, model: lm.Model, parts: list[lm.Examples],
    held_out: lm.Examples,
) -> Run:  # fmt: skip
    """Trains with Adam, its rate falling to 0, on one part in each epoch."""
    key = jax.random.key(options.seed)  # The same for both students, and so the order of the words.
    steps = len(parts) * math.ceil(len(parts[0].word) / options.batch_size)
    optimizer = optax.adam(optax.linear_schedule(options.learning_rate, 0, steps))
    epoch = js.make_epoch(cost, optimizer, options.batch_size)
    state, run = js.init_state(model, optimizer), Run(model, [], [])
    with trange(len(parts), desc=name, unit="epoch") as progress:
        for number in progress:
            state, costs = epoch(state, parts[number], jax.random.fold_in(key, number))
            run.cost.append(float(jnp.mean(costs)))
            run.perplexity.append(float(lm.perplexity(state.params, held_out)))
            progress.write(
                f"{name}, epoch {number + 1}: training cost {run.cost[-1]:.4f}, held-out perplexity "
                f"{run.perplexity[-1]:.1f}"
            )
    if not math.isfinite(run.perplexity[-1]):
        sys.exit("training diverged: the cost is no longer finite; try a lower --learning-rate")
    return run._replace(model=state.params)


def draw(result: Result, output: Path) -> None:
    """One picture: the perplexity of each model while it is trained."""
    plt.switch_backend("agg")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, run in result.runs.items():
        x = np.arange(1, len(run.perplexity) + 1) / len(run.perplexity)
        style = "s--" if name == "teacher" else "o-"
        axes.plot(x, run.perplexity, style, label=f"{name}: {run.perplexity[-1]:.0f} at the end")
    axes.set(title="perplexity of the held-out text", xlabel="share of the training")
    axes.legend()
    figure.savefig(output, dpi=100)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    description = "Teach a narrow language model by a wide one, on a text of your own."
    parser = lm.parser_of(description, "the first weights and the order of the words")
    stride = checked(int, "a whole number from 1 to 100", lambda value: 1 <= value <= 100)
    share = checked(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
    parser.add_argument("--epochs", type=lm.count, default=3, help="times the student sees its words")
    for name, n, width in (("teacher", 3, 64), ("student", 24, 16)):
        every_nth, units = f"the {name} learns from every nth word", "numbers for each word"
        parser.add_argument(f"--{name}-every", type=stride, default=n, metavar="N", help=every_nth)
        parser.add_argument(f"--{name}-width", type=lm.count, default=width, help=units)
    parser.add_argument("--temperature", type=lm.above_0, default=1.0, help="divides the logits of both")
    parser.add_argument("--weight", type=share, default=1.0, help="of the teacher, not the true words")
    parser.add_argument("--output", type=picture_path, default="distillation.png", help="the picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains the teacher, then the student alone and taught, measures a step and saves the picture."""
    options = parse(arguments)
    data = divide(options)
    print(
        f"{len(data.teacher.word):,} words for the teacher, {len(data.student.word):,} for the student; "
        f"{len(data.held_out.word):,} held out; {data.classes:,} in the vocabulary"
    )
    keys = jax.random.split(jax.random.key(options.seed))
    teacher = untrained(options.context, options.teacher_width, keys[0], data.teacher, data.classes)
    student = untrained(options.context, options.student_width, keys[1], data.student, data.classes)
    # As many words in each part, so that one compiled program serves them all.
    words = jax.tree.map(lambda a: a[: len(a) // PARTS * PARTS], data.teacher)
    parts = [every(PARTS, words, start) for start in range(PARTS)]
    runs = {"teacher": train(options, "teacher", lm.head_cost, teacher, parts, data.held_out)}
    in_blocks, dense = (partial(f, options, runs["teacher"].model) for f in (taught_cost, dense_cost))
    for name, cost in {"alone": lm.head_cost, "taught": in_blocks}.items():
        runs[name] = train(options, name, cost, student, [data.student] * options.epochs, data.held_out)
    batch = jax.tree.map(lambda a: a[: options.batch_size], data.student)
    costs = {"in blocks": in_blocks, "dense": dense}
    result = Result(runs, measure(costs, student, batch))
    print("\nperplexity of the held-out text:")
    for name, run in runs.items():
        print(f"  {name:9} {run.perplexity[-1]:6.1f} at the end, {min(run.perplexity):.1f} at best")
    print("a training step of the taught student:")
    for name, (seconds, memory) in result.steps.items():
        print(f"  {name:9} {1e3 * seconds:6.1f} ms, {memory / 1e6:.1f} MB of temporary memory")
    draw(result, options.output)
    print(f"picture saved to {options.output}")
    return result


if __name__ == "__main__":
    main()
