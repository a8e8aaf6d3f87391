"""The head against its peers: time, temporary memory and error.

Value and gradient by features and weights (and the bias, where a peer takes one), as ratios to the
layer's three matrix products alone: optax's integer loss on all the logits, plain and under
`jax.checkpoint`; jax-cce, tokamax, and in a process of its own PyTorch and cut-cross-entropy, each where
it is installed. Then the head's block sizes, what else it does, and its growth with classes and with
rows. Saves head.md and head.png beside this file.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from cost import medians

import jaxsoftmax as js

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
SHAPES = [
    (1024, 256, 8192, "float32"),
    (2048, 256, 32000, "float32"),
    (512, 512, 50257, "float32"),
    (4096, 128, 100, "float32"),
    (1024, 256, 8192, "bfloat16"),
]
BLOCKS = [16, 32, 64, 100, 128, None, 512, 2048]
CLASSES = [1_000, 8_000, 32_000, 128_000, 1_000_000]
ROWS = [256, 1024, 4096, 16384]
GROWN = 256  # features
TORCH_PEERS = ["PyTorch", "cut-cross-entropy"]
HERE = Path(__file__).parent


def products(x: jax.Array, w: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The three products that cost and gradient cannot do without."""
    z = jax.lax.optimization_barrier(jnp.matmul(x, w))
    return jnp.matmul(z, w.T), jnp.matmul(x.T, z)


def dense(x: jax.Array, w: jax.Array, b: jax.Array, labels: jax.Array) -> jax.Array:
    """The integer loss of optax on all the logits."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ w + b, labels).mean()


def in_jax_cce(x: jax.Array, w: jax.Array, _: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cost of jax-cce, which takes the weights by class and no bias."""
    from jax_cce import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy(x, w.T, labels)


def in_tokamax(x: jax.Array, w: jax.Array, _: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cost of tokamax without its TPU kernel, which takes no bias."""
    import tokamax

    loss = tokamax.linear_softmax_cross_entropy_loss
    return loss(x, labels, w, reduction="mean", implementation="xla")


COSTS = {
    "jaxsoftmax": js.linear_log_likelihood_cost,
    "optax": dense,
    "optax, jax.checkpoint": jax.checkpoint(dense),
}
if importlib.util.find_spec("jax_cce"):
    COSTS["jax-cce"] = in_jax_cce
if importlib.util.find_spec("tokamax"):
    COSTS["tokamax"] = in_tokamax


def numbers(rows: int, features: int, classes: int) -> Arrays:
    """Features, weights, bias and labels, the same in every process."""
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(rows, features)), generator.normal(size=(features, classes))
    return x, w / features**0.5, np.zeros(classes), generator.integers(0, classes, rows)


def layer(rows: int, features: int, classes: int, dtype: str) -> tuple[jax.Array, ...]:
    """The same as arrays of JAX."""
    *parts, labels = numbers(rows, features, classes)
    return *(jnp.asarray(part, dtype) for part in parts), jnp.asarray(labels, jnp.int32)


def temporary_bytes(compiled: jax.stages.Compiled) -> float:
    """What the program holds beside its arguments and results."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else np.nan


def measured(functions: dict[str, Callable], arguments: tuple, repeats: int) -> dict:
    """Median seconds, temporary bytes and result of each."""
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    runs = {
        name: lambda call=call: jax.block_until_ready(call(*arguments)) for name, call in compiled.items()
    }
    seconds = medians(runs, repeats)
    return {
        name: (seconds[name], temporary_bytes(call), call(*arguments)) for name, call in compiled.items()
    }


def with_gradient(cost: Callable) -> Callable:
    """Value and gradient by features, weights and bias."""
    return jax.value_and_grad(cost, (0, 1, 2))


def in_torch() -> list[dict[str, float]]:
    """Median seconds of each of `TORCH_PEERS` that is installed, a dict for each shape."""
    import torch  # pyright: ignore[reportMissingImports]

    def dense(x, w, b, labels):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), labels)

    costs: dict[str, Callable] = {"PyTorch": dense}
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        def cut(x, w, _, labels):
            return linear_cross_entropy(x, w, labels, impl="torch_compile")

        costs["cut-cross-entropy"] = cut
    seconds = []
    for *shape, dtype in SHAPES:
        x, w, b, labels = numbers(*shape)
        # By class, as its own linear layer keeps them.
        leaves = [
            torch.tensor(part, dtype=getattr(torch, dtype), requires_grad=True) for part in (x, w.T, b)
        ]

        targets = torch.tensor(labels)

        def run(cost, leaves=leaves, targets=targets):
            for leaf in leaves:
                leaf.grad = None
            cost(*leaves, targets).backward()

        seconds.append(medians({name: partial(run, cost) for name, cost in costs.items()}, 9))
    return seconds


def torch_seconds() -> list[dict[str, float]]:
    """`in_torch` in another process; nothing where PyTorch is not installed."""
    if not importlib.util.find_spec("torch"):
        return [{} for _ in SHAPES]
    command = [sys.executable, __file__, "--torch"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def gradient_error(gradients: tuple[jax.Array, ...], arguments: tuple[jax.Array, ...]) -> float:
    """Largest error of a gradient against float64, over the largest entry of that gradient."""
    x, w, b, labels = (np.asarray(part, np.float64) for part in arguments)
    z = x @ w + b
    a = np.exp(z - z.max(axis=1, keepdims=True))
    a /= a.sum(axis=1, keepdims=True)
    a[np.arange(len(a)), labels.astype(int)] -= 1
    a /= len(a)
    exact = a @ w.T, x.T @ a
    return max(
        float(np.abs(np.asarray(g, np.float64) - e).max() / np.abs(e).max())
        for g, e in zip(gradients[:2], exact, strict=True)
    )


def peers() -> list[str]:
    """The table of the head and its peers."""
    by_torch = torch_seconds()
    there = [name for name in TORCH_PEERS if name in by_torch[0]]
    names = [*COSTS, *there]
    lines = [
        f"JAX {jax.__version__}, {jax.devices()[0].device_kind}. Value and gradient: time over that of "
        "the three products alone; of JAX's functions also temporary bytes over those of the logits, and "
        "the largest gradient error over the gradient's largest entry.",
        "",
        "| rows, features, classes | dtype | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    functions = {name: with_gradient(cost) for name, cost in COSTS.items()}
    for (rows, features, classes, dtype), others in zip(SHAPES, by_torch, strict=True):
        arguments = layer(rows, features, classes, dtype)
        results = measured({**functions, "products": products}, arguments, 60 if classes < 1000 else 11)
        floor = results["products"][0]
        logits = rows * classes * arguments[0].dtype.itemsize
        cells = [
            f"{results[name][0] / floor:.2f}, {results[name][1] / logits:.2f}, "
            f"{gradient_error(results[name][2][1], arguments):.0e}"
            for name in COSTS
        ] + [f"{others[name] / floor:.2f}" for name in there]
        lines.append(f"| {rows}, {features}, {classes} | {dtype} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def blocks() -> list[str]:
    """The table of block sizes."""
    rows, features, classes, dtype = SHAPES[1]
    lines = [
        "",
        f"The head by `block_size`, {rows} rows, {features} features, {classes} classes: these ratios.",
        "",
        "| block_size | time | memory |",
        "|---|---|---|",
    ]
    functions = {
        str(size): with_gradient(partial(js.linear_log_likelihood_cost, block_size=size))
        for size in BLOCKS
    }
    results = measured({**functions, "products": products}, layer(rows, features, classes, dtype), 9)
    for name in functions:
        seconds, memory, _ = results[name]
        ratio = seconds / results["products"][0]
        lines.append(f"| {name} | {ratio:.2f} | {memory / (rows * classes * 4):.3f} |")
        print(lines[-1], flush=True)
    return lines


def four_products(x: jax.Array, w: jax.Array, *_: jax.Array) -> tuple[jax.Array, ...]:
    """The three, and the logits once more, as a gradient that enters each row by itself takes them."""
    again = jnp.matmul(*jax.lax.optimization_barrier((x, w)))
    return *products(x, w), jax.lax.optimization_barrier(again)


def with_teacher(x: jax.Array, w: jax.Array, more: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The three, and the teacher's logits."""
    return *products(x, w), jax.lax.optimization_barrier(jnp.matmul(more[-2], more[-1]))


def beside(x: jax.Array, w: jax.Array, more: tuple[jax.Array, ...], names: Sequence[str]) -> tuple:
    """The cost and some of its statistics."""
    cost, statistics = js.linear_log_likelihood_cost(x, w, None, more[0], return_statistics=True)
    return cost, [getattr(statistics, name) for name in names]


def policy(
    x: jax.Array, w: jax.Array, more: tuple[jax.Array, ...], bonus: float
) -> tuple[jax.Array, tuple[()]]:
    """A policy gradient with an entropy bonus, or without."""
    statistics = js.head_statistics(x, w, None, more[0])
    likelihood = statistics.label_log_likelihood
    assert likelihood is not None
    return -jnp.mean(likelihood + bonus * statistics.entropy if bonus else likelihood), ()


def sparse(x: jax.Array, w: jax.Array, more: tuple[jax.Array, ...]) -> jax.Array:
    """The cost of labels of a few classes each."""
    shares = jnp.full(more[1].shape, 1 / more[1].shape[-1])
    return js.linear_log_likelihood_cost(x, w, None, js.SparseLabels(more[1], shares))


def taught(x: jax.Array, w: jax.Array, more: tuple[jax.Array, ...]) -> jax.Array:
    """The cost of a teacher's softmax as labels."""
    return js.linear_log_likelihood_cost(x, w, None, js.TeacherLabels(*more[2:]))


# The products that each use cannot do without, and the use.
FLOORS = {"3": products, "4": four_products, "3 and the teacher's": with_teacher}
USES = {
    "the cost": ("3", lambda x, w, more: (js.linear_log_likelihood_cost(x, w, None, more[0]), ())),
    "beside it the predictions": ("3", partial(beside, names=["prediction"])),
    "beside it the entropies": ("3", partial(beside, names=["entropy"])),
    "beside it all statistics": ("3", partial(beside, names=js.HeadStatistics._fields)),
    "labels of 20 classes each": ("3", lambda *numbers: (sparse(*numbers), ())),
    "a teacher of 512 features": ("3 and the teacher's", lambda *numbers: (taught(*numbers), ())),
    "log-likelihood": ("4", partial(policy, bonus=0.0)),
    "entropy and log-likelihood": ("4", partial(policy, bonus=0.01)),
}


def uses() -> list[str]:
    """The table of what else the head does."""
    lines = [
        "",
        "What else the head does, value and gradient by features and weights in float32: time over that "
        "of its products alone, temporary bytes over those of the logits.",
        "",
        "| use | products | rows, features, classes | time | memory |",
        "|---|---|---|---|---|",
    ]
    for rows, features, classes in ((2048, 64, 32_000), (2048, 256, 32_000), (1024, 128, 32_000)):
        x, w, _, labels = layer(rows, features, classes, "float32")
        few = jnp.asarray(np.random.default_rng(1).integers(0, classes, (rows, 20)), jnp.int32)
        more = labels, few, *layer(rows, 512, classes, "float32")[:2]
        functions = {
            name: jax.value_and_grad(use, (0, 1), has_aux=True) for name, (_, use) in USES.items()
        }
        results = measured({**functions, **FLOORS}, (x, w, more), 9)
        for name, (floor, _) in USES.items():
            seconds, memory, _ = results[name]
            ratio, share = seconds / results[floor][0], memory / (rows * classes * 4)
            shape = f"{rows}, {features}, {classes}"
            lines.append(f"| {name} | {floor} | {shape} | {ratio:.2f} | {share:.3f} |")
            print(lines[-1], flush=True)
    return lines


def grown(shapes: list[tuple[int, int]], block_size: int | None) -> list[tuple[float, float]]:
    """Nanoseconds for each logit and feature, and temporary megabytes, by rows and classes."""
    cost = partial(js.linear_log_likelihood_cost, block_size=block_size)
    runs, memory = {}, []
    for rows, classes in shapes:
        arguments = layer(rows, GROWN, classes, "float32")
        compiled = jax.jit(with_gradient(cost)).lower(*arguments).compile()
        memory.append(temporary_bytes(compiled) / 1e6)
        runs[f"{rows}, {classes}"] = lambda call=compiled, arguments=arguments: jax.block_until_ready(
            call(*arguments)
        )
    seconds = medians(runs, 5).values()
    return [
        (taken * 1e9 / (GROWN * rows * classes), megabytes)
        for taken, megabytes, (rows, classes) in zip(seconds, memory, shapes, strict=True)
    ]


def main() -> None:
    """Measures, prints and saves."""
    lines = peers() + blocks() + uses()
    by_classes = grown([(1024, classes) for classes in CLASSES], None)
    by_rows = grown([(rows, 32_000) for rows in ROWS], 128)
    lines += [
        "",
        f"Growth of the head, {GROWN} features: time for each row, feature and class; temporary memory.",
        "By classes at the default block size, by rows at 128.",
        "",
        "| rows | classes | nanoseconds | megabytes |",
        "|---|---|---|---|",
    ]
    shapes = [(1024, classes) for classes in CLASSES] + [(rows, 32_000) for rows in ROWS]
    for (rows, classes), (nanoseconds, megabytes) in zip(shapes, by_classes + by_rows, strict=True):
        lines.append(f"| {rows} | {classes} | {nanoseconds:.4f} | {megabytes:.0f} |")
        print(lines[-1])
    (HERE / "head.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(by_classes, by_rows)


def draw(by_classes: list[tuple[float, float]], by_rows: list[tuple[float, float]]) -> None:
    """The head's memory beside that of the logits alone, by classes and by rows."""
    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axes, counts, found, title, count_of, other in (
        (panels[0], CLASSES, by_classes, "1,024 rows", "classes", 1024),
        (panels[1], ROWS, by_rows, "32,000 classes, blocks of 128 rows", "rows", 32_000),
    ):
        axes.loglog(counts, [megabytes for _, megabytes in found], "o-", label="head, beyond its results")
        axes.loglog(counts, [count * other * 4 / 1e6 for count in counts], "k:", label="the logits alone")
        axes.set(title=title, xlabel=f"number of {count_of}", ylabel="temporary memory (MB)")
        axes.legend()
    figure.savefig(HERE / "head.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1:] == ["--torch"]:
        print(json.dumps(in_torch()))
    else:
        main()
