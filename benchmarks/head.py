"""The head against the dense cost of the same layer: time, temporary memory and error.

Value and gradient by features, weights and bias, as ratios to the layer's three matrix products alone,
beside optax's integer loss on all the logits, plain and under `jax.checkpoint`. Then the head's growth
with classes and with rows. Saves head.md and head.png beside this file.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from cost import medians

import jaxsoftmax as js

Layer = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
SHAPES = [
    (1024, 256, 8192, "float32"),
    (2048, 256, 32000, "float32"),
    (512, 512, 50257, "float32"),
    (4096, 128, 100, "float32"),
    (1024, 256, 8192, "bfloat16"),
]
CLASSES = [1_000, 8_000, 32_000, 128_000, 1_000_000]
ROWS = [256, 1024, 4096, 16384]
HERE = Path(__file__).parent


def products(x: jax.Array, w: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The three products that cost and gradient cannot do without."""
    z = jax.lax.optimization_barrier(jnp.matmul(x, w))
    return jnp.matmul(z, w.T), jnp.matmul(x.T, z)


def dense(x: jax.Array, w: jax.Array, b: jax.Array, labels: jax.Array) -> jax.Array:
    """The integer loss of optax on all the logits."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ w + b, labels).mean()


COSTS = {
    "jaxsoftmax": js.linear_log_likelihood_cost,
    "optax": dense,
    "optax, jax.checkpoint": jax.checkpoint(dense),
}


def layer(rows: int, features: int, classes: int, dtype: str) -> Layer:
    """Features, weights, bias and labels."""
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(rows, features)), generator.normal(size=(features, classes))
    labels = generator.integers(0, classes, rows)
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(w / features**0.5, dtype),
        jnp.zeros(classes, dtype),
        jnp.asarray(labels, jnp.int32),
    )


def temporary_bytes(compiled: jax.stages.Compiled) -> float:
    """What the program holds beside its arguments and results."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else np.nan


def measured(functions: dict[str, Callable], arguments: Layer, repeats: int) -> dict:
    """Median seconds, temporary bytes and result of each."""
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    runs = {
        name: lambda call=call: jax.block_until_ready(call(*arguments)) for name, call in compiled.items()
    }
    seconds = medians(runs, repeats)
    return {
        name: (seconds[name], temporary_bytes(call), call(*arguments)) for name, call in compiled.items()
    }


def gradient_error(gradients: tuple[jax.Array, ...], arguments: Layer) -> float:
    """Largest error of a gradient against float64, over the largest entry of that gradient."""
    x, w, b, labels = (np.asarray(part, np.float64) for part in arguments)
    z = x @ w + b
    a = np.exp(z - z.max(axis=1, keepdims=True))
    a /= a.sum(axis=1, keepdims=True)
    a[np.arange(len(a)), labels.astype(int)] -= 1
    a /= len(a)
    exact = a @ w.T, x.T @ a, a.sum(axis=0)
    return max(
        float(np.abs(np.asarray(g, np.float64) - e).max() / np.abs(e).max())
        for g, e in zip(gradients, exact, strict=True)
    )


def grown(shapes: list[tuple[int, int, int]]) -> list[tuple[float, float]]:
    """Nanoseconds for each logit and feature, and temporary megabytes, of the head at each shape."""
    found = []
    for rows, features, classes in shapes:
        function = jax.value_and_grad(js.linear_log_likelihood_cost, (0, 1, 2))
        arguments = layer(rows, features, classes, "float32")
        seconds, memory, _ = measured({"head": function}, arguments, 3)["head"]
        found.append((seconds * 1e9 / (rows * features * classes), memory / 1e6))
        print(
            f"{rows} x {features} x {classes}: {found[-1][0]:.4f} ns, {found[-1][1]:.0f} MB", flush=True
        )
    return found


def main() -> None:
    """Measures, prints and saves."""
    lines = [
        f"JAX {jax.__version__}, {jax.devices()[0].device_kind}. Value and gradient: time over that of "
        "the three products alone, temporary bytes over those of the logits, largest gradient error.",
        "",
        "| rows, features, classes | dtype | " + " | ".join(COSTS) + " |",
        "|---" * (2 + len(COSTS)) + "|",
    ]
    functions = {name: jax.value_and_grad(cost, (0, 1, 2)) for name, cost in COSTS.items()}
    for rows, features, classes, dtype in SHAPES:
        arguments = layer(rows, features, classes, dtype)
        results = measured({**functions, "products": products}, arguments, 9)
        logits = rows * classes * arguments[0].dtype.itemsize
        cells = [
            f"{results[name][0] / results['products'][0]:.2f}, {results[name][1] / logits:.2f}, "
            f"{gradient_error(results[name][2][1], arguments):.0e}"
            for name in COSTS
        ]
        lines.append(f"| {rows}, {features}, {classes} | {dtype} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)

    by_classes = grown([(256, 64, classes) for classes in CLASSES])
    by_rows = grown([(rows, 64, 32_000) for rows in ROWS])
    lines += [
        "",
        "Growth of the head, 64 features: time for each row, feature and class; temporary memory.",
    ]
    lines += ["", "| rows | classes | nanoseconds | megabytes |", "|---|---|---|---|"]
    shapes = [(256, classes) for classes in CLASSES] + [(rows, 32_000) for rows in ROWS]
    for (rows, classes), (nanoseconds, megabytes) in zip(shapes, by_classes + by_rows, strict=True):
        lines.append(f"| {rows} | {classes} | {nanoseconds:.4f} | {megabytes:.0f} |")
    (HERE / "head.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(by_classes, by_rows)


def draw(by_classes: list[tuple[float, float]], by_rows: list[tuple[float, float]]) -> None:
    """The head's memory beside that of the logits alone, by classes and by rows."""
    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axes, counts, grown, title, other in (
        (panels[0], CLASSES, by_classes, "256 rows, by classes", 256),
        (panels[1], ROWS, by_rows, "32,000 classes, by rows", 32_000),
    ):
        axes.loglog(counts, [megabytes for _, megabytes in grown], "o-", label="head, beyond its results")
        axes.loglog(counts, [count * other * 4 / 1e6 for count in counts], "k:", label="the logits alone")
        axes.set(title=title, ylabel="megabytes")
        axes.legend()
    figure.savefig(HERE / "head.png", dpi=100)


if __name__ == "__main__":
    main()
