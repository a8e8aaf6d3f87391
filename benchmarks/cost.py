"""The log-likelihood cost, softmax and log_softmax against their inexact peers: time and memory.

The cost's value-and-gradient and value alone, for integer labels; softmax and log_softmax, and each of
them pulled back. JAX functions run interleaved in one process; PyTorch, where it is installed, in one of
its own. Ratios of medians: below 1 this library is faster. Saves cost.md and cost.png beside this file.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxsoftmax as js

SHAPES = [(256, 10), (8192, 10), (8192, 1000), (4096, 4096), (1024, 32768), (256, 131072)]
DTYPES = ["float32", "bfloat16"]
HERE = Path(__file__).parent


def optax_integer(z: jax.Array, labels: jax.Array) -> jax.Array:
    """What most people use."""
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


def optax_one_hot(z: jax.Array, labels: jax.Array) -> jax.Array:
    """The same with the labels as rows."""
    return optax.softmax_cross_entropy(z, jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)).mean()


def plain_autodiff(z: jax.Array, labels: jax.Array) -> jax.Array:
    """What one writes by hand."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=-1))


def copy(z: jax.Array, labels: jax.Array) -> jax.Array:
    """The logits once through memory."""
    return z * labels[:, None].astype(z.dtype)


COSTS = {
    "jaxsoftmax": js.log_likelihood_cost,
    "optax integer": optax_integer,
    "optax one-hot": optax_one_hot,
    "jax.nn.log_softmax": plain_autodiff,
}


def numbers(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels, the same in every process."""
    generator = np.random.default_rng(0)
    return generator.normal(size=shape) * 3, generator.integers(0, shape[1], shape[0])


def repeats(size: int) -> int:
    """Enough for a steady median in a few seconds."""
    return max(15, min(500, int(1e9 / size)))


def medians(functions: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median seconds of each, interleaved in random order: each reuses the memory that another left."""
    times = {name: [] for name in functions}
    shuffle = np.random.default_rng(0).permutation
    for _ in range(count + 2):
        for name in shuffle(list(functions)).tolist():
            function = functions[name]
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken[2:])) for name, taken in times.items()}


def of_costs(shape: tuple[int, int], dtype: str, gradient: bool) -> tuple[dict[str, float], float]:
    """Median seconds of each cost and of a copy, and our temporary bytes over the logits' bytes."""
    z, labels = numbers(shape)
    transform = jax.value_and_grad if gradient else lambda cost: cost
    functions = {**{name: transform(cost) for name, cost in COSTS.items()}, "copy": copy}
    return in_jax(functions, jnp.asarray(z, dtype), jnp.asarray(labels, jnp.int32))


def in_jax(functions: dict[str, Callable], *arguments: jax.Array) -> tuple[dict[str, float], float]:
    """Median seconds of each function, and the first one's temporary bytes over the first argument's."""
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    analysis = next(iter(compiled.values())).memory_analysis()
    temporary = analysis.temp_size_in_bytes / arguments[0].nbytes if analysis else math.nan
    runs = {
        name: lambda function=function: jax.block_until_ready(function(*arguments))
        for name, function in compiled.items()
    }
    return medians(runs, repeats(arguments[0].size)), temporary


def of_softmaxes() -> list[str]:
    """Softmax and log-softmax, and their gradients for any cotangent, over those of JAX."""

    def pulled_back(function):
        return lambda z, cotangent: jax.vjp(function, z)[1](cotangent)

    pairs = (js.softmax, jax.nn.softmax), (js.log_softmax, jax.nn.log_softmax)
    lines = [
        "",
        "Time over that of `jax.nn.softmax`, `jax.nn.log_softmax` and their gradients, temporary bytes "
        "over those of the logits.",
        "",
        "| shape | dtype | softmax | its gradient | log_softmax | its gradient |",
        "|---" * 6 + "|",
    ]
    for dtype in DTYPES:
        for shape in SHAPES:
            cells = [str(shape), dtype]
            z = jnp.asarray(numbers(shape)[0], dtype)
            for ours, of_jax in pairs:
                gradients = pulled_back(ours), pulled_back(of_jax)
                for of_ours, of_theirs, *cotangent in ((ours, of_jax), (*gradients, z[:, ::-1])):
                    seconds, temporary = in_jax({"ours": of_ours, "jax": of_theirs}, z, *cotangent)
                    cells.append(f"{seconds['ours'] / seconds['jax']:.2f}, {temporary:.3f}")
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def in_torch() -> list[float]:
    """Median seconds of PyTorch's cross_entropy over the grid, in the order of `grid`."""
    import torch  # pyright: ignore[reportMissingImports]

    seconds = []
    for shape, dtype, gradient in grid():
        z, labels = numbers(shape)
        tensor = torch.tensor(z, dtype=getattr(torch, dtype), requires_grad=gradient)
        targets = torch.tensor(labels)

        def run(tensor=tensor, targets=targets, gradient=gradient):
            cost = torch.nn.functional.cross_entropy(tensor, targets)
            if gradient:
                tensor.grad = None
                cost.backward()

        seconds.append(medians({"torch": run}, repeats(math.prod(shape)))["torch"])
    return seconds


def grid() -> list[tuple[tuple[int, int], str, bool]]:
    """Every shape, dtype, and with or without gradient."""
    return [(s, d, g) for g in (True, False) for d in DTYPES for s in SHAPES]


def torch_seconds() -> list[float] | None:
    """`in_torch` in another process; None where PyTorch is not installed."""
    command = [sys.executable, __file__, "--torch"]
    finished = subprocess.run(command, capture_output=True, text=True)
    return json.loads(finished.stdout) if finished.returncode == 0 else None


def main() -> None:
    """Measures, prints and saves."""
    in_other_process = torch_seconds()
    peers = [name for name in COSTS if name != "jaxsoftmax"]
    columns = [*peers, *(["PyTorch"] if in_other_process else []), "copy"]
    device = jax.devices()[0].device_kind
    lines = [
        f"JAX {jax.__version__}, {device}. Time of `log_likelihood_cost` over that of each peer and of a "
        "copy of the logits; below 1 it is the faster.",
        "",
        "| | shape | dtype | " + " | ".join(columns) + " | temporary bytes / logits |",
        "|---" * (len(columns) + 4) + "|",
    ]
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for number, (shape, dtype, gradient) in enumerate(grid()):
        seconds, temporary = of_costs(shape, dtype, gradient)
        if in_other_process:
            seconds["PyTorch"] = in_other_process[number]
        over = {name: seconds["jaxsoftmax"] / seconds[name] for name in columns}
        ratios[gradient].append(over["optax integer"])
        kind = "value and gradient" if gradient else "value"
        cells = [kind, str(shape), dtype, *(f"{over[name]:.2f}" for name in columns), f"{temporary:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    for gradient, kind in ((True, "value and gradient"), (False, "value")):
        mean = float(np.exp(np.mean(np.log(ratios[gradient]))))
        worst = max(ratios[gradient])
        lines += ["", f"{kind} over optax integer: geometric mean {mean:.2f}, worst {worst:.2f}"]
        print(lines[-1])
    lines += of_softmaxes()
    (HERE / "cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(ratios)


def draw(ratios: dict[bool, list[float]]) -> None:
    """The ratios to optax's integer loss."""
    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
    for axes, (gradient, values) in zip(panels, ratios.items(), strict=True):
        for row, dtype in enumerate(DTYPES):
            axes.plot(values[row * len(SHAPES) : (row + 1) * len(SHAPES)], "o-", label=dtype)
        axes.axhline(1, color="gray", linestyle=":")
        axes.set_xticks(range(len(SHAPES)), [f"{n:,}\n× {k:,}" for n, k in SHAPES], fontsize=8)
        axes.set(title="value and gradient" if gradient else "value")
        axes.legend()
    panels[0].set(ylabel="time over optax's integer loss", ylim=(0, None))
    figure.savefig(HERE / "cost.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1:] == ["--torch"]:
        print(json.dumps(in_torch()))
    else:
        main()
