"""Relative error of cost and label gradient by confidence and class count, against mpmath.

The label is so many nats ahead of the other classes (behind, where negative); float32. Saves accuracy.md
and accuracy.png beside this file.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mpmath
import numpy as np
import optax

import jaxsoftmax as js

CONFIDENCES = np.arange(-80.0, 81.0, 4.0)
SHOWN = [0.0, 4.0, 8.0, 16.0, 20.0, 40.0, 80.0]
CLASSES = [2, 10, 1000, 131072]
HERE = Path(__file__).parent
mpmath.mp.dps = 60


def jax_nn(z: jax.Array, labels: jax.Array) -> jax.Array:
    """The cost from `jax.nn.log_softmax` and plain autodiff."""
    return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=-1)[:, 0]


COSTS: dict[str, Callable] = {
    "jaxsoftmax": lambda z, labels: js.log_likelihood_cost(z, labels, reduction="none"),
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "jax.nn": jax_nn,
}


def logits(confidence: float, classes: int) -> np.ndarray:
    """Label first; the other classes spread over two nats."""
    row = -np.linspace(0, 2, classes, dtype=np.float32)
    row[0] = np.float32(confidence)
    return row


def truth(row: np.ndarray) -> tuple[float, float]:
    """Cost and label gradient in 60 digits. Equal logits are summed once and multiplied."""
    values, counts = np.unique(row[1:], return_counts=True)
    others = mpmath.fsum(int(n) * mpmath.exp(float(v)) for v, n in zip(values, counts, strict=True))
    own = mpmath.exp(float(row[0]))
    return float(mpmath.log1p(others / own)), float(-others / (others + own))


def torch_results(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """PyTorch's costs and label gradients; None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    tensor = torch.tensor(rows, requires_grad=True)
    costs = torch.nn.functional.cross_entropy(
        tensor, torch.zeros(len(rows), dtype=torch.long), reduction="none"
    )
    (gradient,) = torch.autograd.grad(costs.sum(), tensor)
    return costs.detach().numpy(), gradient[:, 0].numpy()


def errors(classes: int) -> dict[str, np.ndarray]:
    """The larger relative error of cost and label gradient, by confidence, for each library."""
    rows = np.stack([logits(confidence, classes) for confidence in CONFIDENCES])
    exact = np.array([truth(row) for row in rows]).T
    labels = jnp.zeros(len(rows), jnp.int32)
    results = {}
    for name, cost in COSTS.items():
        gradient = jax.jit(jax.grad(lambda z, cost=cost: jnp.sum(cost(z, labels))))(jnp.asarray(rows))
        results[name] = np.asarray(jax.jit(cost)(jnp.asarray(rows), labels)), np.asarray(gradient[:, 0])
    in_torch = torch_results(rows)
    if in_torch:
        results["PyTorch"] = in_torch
    return {
        name: np.max(np.abs(np.stack(pair).astype(float) - exact) / np.abs(exact), axis=0)
        for name, pair in results.items()
    }


def main() -> None:
    """Measures, prints and saves."""
    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, len(CLASSES), figsize=(13, 3.5), sharey=True, layout="constrained")
    lines = [
        "Largest relative error of cost and label gradient, float32, against mpmath.",
        "",
        "| classes | library | " + " | ".join(f"{c:+.0f} nats" for c in SHOWN) + " |",
        "|---" * (len(SHOWN) + 2) + "|",
    ]
    for axes, classes in zip(panels, CLASSES, strict=True):
        found = errors(classes)
        for name, error in found.items():
            axes.semilogy(CONFIDENCES, np.maximum(error, 1e-9), ".-", label=name)
            cells = [f"{error[CONFIDENCES == c][0]:.0e}" for c in SHOWN]
            lines.append(f"| {classes:,} | {name} | " + " | ".join(cells) + " |")
        axes.set(title=f"{classes:,} classes", xlabel="label ahead by (nats)")
    panels[0].set_ylabel("relative error")
    panels[0].legend(fontsize=8)
    figure.savefig(HERE / "accuracy.png", dpi=100)
    print("\n".join(lines))
    (HERE / "accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
