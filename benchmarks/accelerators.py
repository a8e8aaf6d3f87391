"""What the compiler for TPUs makes of the cost and the head: no device is needed.

Compiles for TPU v5e, v6e and v5p (extra `accelerators`, Linux x86-64, Python 3.12 or newer) and prints
the compiler's own estimate of cycles, the bytes of temporaries and how deep loops stand in loops. These
figures are compiled, not measured. On a machine with an accelerator the head is also timed on it.
Saves accelerators.md beside this file. Arguments name the chips, all if there are none.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost import medians
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5:2x2x1"}
MESH = {"v5e 4 x 4": "v5e:4x4"}
DENSE = [
    (8192, 1000, "float32"),
    (8192, 32768, "float32"),
    (8192, 32768, "bfloat16"),
    (8192, 128256, "bfloat16"),
]
HEADS = [
    (8192, 4096, 32768),
    (8192, 4096, 128256),
    (8192, 4096, 151936),
    (8192, 1024, 50257),
    (32768, 4096, 128256),
]
HERE = Path(__file__).parent


class Figures(NamedTuple):
    """What a compiler says of a program."""

    cycles: float  # its estimate; NaN of a GPU's
    temporary: float  # bytes
    depth: int  # of the loops
    text: str


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of an optimized program, and the name of the first to run."""
    found, name, entry = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        found.setdefault(name, []).append(line)
    return found, entry


def trips(found: dict[str, list[str]], loop: str) -> int:
    """How often a loop runs: as the compiler notes, or else the largest number in its condition."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = found.get(condition[1], []) if condition else []
    return max((int(n) for line in lines for n in re.findall(r"constant\((\d+)\)", line)), default=1)


def estimate(text: str) -> tuple[float, int]:
    """The cycles of all instructions, as often as loops run them, and how deep loops stand in loops."""
    found, entry = computations(text)

    def of(name):
        cycles, depth = 0.0, 0
        for line in found.get(name, []):
            if own := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += int(own[1])
            if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                inner, below = of(body[1])
                cycles, depth = cycles + inner * trips(found, line), max(depth, below + 1)
            if called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                inner, below = of(called[1])
                cycles, depth = cycles + inner, max(depth, below)
        return cycles, depth

    return of(entry)


def shapes(*arrays: tuple[tuple[int, ...], str], place: Any) -> list[jax.ShapeDtypeStruct]:
    """Arguments that are not there."""
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place) for shape, dtype in arrays]


def figures(function: Callable[..., Any], arguments: list[Any]) -> Figures:
    """Compiles for the devices that the arguments' shardings name."""
    compiled = jax.jit(function).lower(*arguments).compile()
    text, analysis = compiled.as_text() or "", compiled.memory_analysis()
    cycles, depth = estimate(text)
    return Figures(cycles or np.nan, analysis.temp_size_in_bytes if analysis else np.nan, depth, text)


def optax_cost(z: jax.Array, labels: jax.Array) -> jax.Array:
    """The integer loss of optax."""
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


def optax_head(x: jax.Array, w: jax.Array, b: jax.Array, labels: jax.Array) -> jax.Array:
    """The same on all logits, in float32."""
    return optax_cost(
        jnp.matmul(x, w, preferred_element_type=jnp.float32) + b.astype(jnp.float32), labels
    )


def products(x: jax.Array, w: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The three products that the head cannot do without."""
    z = jax.lax.optimization_barrier(x @ w)
    return z @ w.T, x.T @ z


def in_jax_cce(x: jax.Array, w: jax.Array, _: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cost of jax-cce, which takes no bias."""
    from jax_cce import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy(x, w.T, labels)


def in_tokamax(x: jax.Array, w: jax.Array, _: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cost of tokamax without its kernel, which takes no bias."""
    import tokamax

    loss = tokamax.linear_softmax_cross_entropy_loss
    return loss(x, labels, w, reduction="mean", implementation="xla")


def of_head(bias: bool = True, **options: Any) -> Callable[..., jax.Array]:
    """The head's cost, summed if there is one for each example."""

    def cost(x, w, b, labels):
        return js.linear_log_likelihood_cost(x, w, b if bias else None, labels, **options).sum()

    return cost


def dense_cases() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of logits and labels, by name."""
    for kind, transform in (("value and gradient", jax.value_and_grad), ("value", lambda f: f)):
        yield f"optax, {kind}", transform(optax_cost)
        yield f"log_likelihood_cost, {kind}", transform(js.log_likelihood_cost)
    yield "jax.nn.softmax", lambda z, _: jax.nn.softmax(z)
    yield "softmax", lambda z, _: js.softmax(z)
    yield "jax.nn.log_softmax", lambda z, _: jax.nn.log_softmax(z)
    yield "log_softmax", lambda z, _: js.log_softmax(z)


def head_cases(rows: int) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of features, weights, bias and labels, by name."""
    gradient = partial(jax.value_and_grad, argnums=(0, 1, 2))
    yield "the three products", products
    yield "head", partial(jax.value_and_grad, argnums=(0, 1))(of_head(bias=False))
    yield "head with bias", gradient(of_head())
    if rows == 8192:
        yield "head, none", gradient(of_head(reduction="none"))
        yield "head, value", of_head()
        yield "optax, float32 logits", gradient(optax_head)
        if importlib.util.find_spec("jax_cce"):
            yield "jax-cce", partial(jax.value_and_grad, argnums=(0, 1))(in_jax_cce)
        if importlib.util.find_spec("tokamax"):
            yield "tokamax", partial(jax.value_and_grad, argnums=(0, 1))(in_tokamax)


def row(name: str, function: Callable[..., Any], arguments: list[Any], floor: float) -> tuple[str, float]:
    """A line of a table, and the cycles in it."""
    try:
        found = figures(function, arguments)
    except Exception as error:  # A peer may not compile for it, or not fit.
        return f"| {name} | {type(error).__name__} | | | |", floor
    over = found.cycles / floor if floor else 1
    cells = f"{found.cycles / 1e6:.2f} | {over:.2f} | {found.temporary / 1e6:.1f} | {found.depth}"
    return f"| {name} | {cells} |", found.cycles


def table(title: str, cases: Iterator[tuple[str, Callable[..., Any]]], arguments: list[Any]) -> list[str]:
    """All cases on these arguments; ratios to the first."""
    lines = [
        "",
        title,
        "",
        "| | Mcycles | over the first | temporary MB | loops deep |",
        "|---|---|---|---|---|",
    ]
    floor = 0.0
    for name, function in cases:
        line, cycles = row(name, function, arguments, floor)
        floor = floor or cycles
        lines.append(line)
        print(line, flush=True)
    return lines


def on_mesh(target: str) -> list[str]:
    """The head over rows, classes and both on sixteen chips."""
    devices = topologies.get_topology_desc(target, platform="tpu").devices
    lines: list[str] = []
    for by, shape, axes in (("rows", (16, 1), "ab"), ("classes", (1, 16), "ab"), ("both", (4, 4), "ab")):
        mesh = jax.sharding.Mesh(
            np.array(devices).reshape(shape),
            tuple(axes),
            axis_types=(jax.sharding.AxisType.Explicit,) * 2,
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            places = P("a"), P(None, "b"), P("b"), P("a")
            sizes = (
                ((32768, 4096), "bfloat16"),
                ((4096, 128256), "bfloat16"),
                ((128256,), "bfloat16"),
                ((32768,), "int32"),
            )
            arguments = [
                jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=jax.NamedSharding(mesh, place))
                for (size, dtype), place in zip(sizes, places, strict=True)
            ]
            function = partial(jax.value_and_grad, argnums=(0, 1, 2))(of_head())
            found = figures(function, arguments)
        moved = sorted(
            set(re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", found.text))
        )
        cells = (
            f"{found.cycles / 1e6:.2f} | {found.temporary / 1e6:.0f} | {found.depth} | {', '.join(moved)}"
        )
        lines.append(f"| {by} | {cells} |")
        print(lines[-1], flush=True)
    return lines


def measured() -> list[str]:
    """Value and gradient on the accelerator that is there; nothing without one."""
    if jax.default_backend() == "cpu":
        return []
    lines = ["", f"Measured on {jax.devices()[0].device_kind}: milliseconds, medians.", ""]
    generator = np.random.default_rng(0)
    for rows, features, classes in HEADS[:2]:
        x, w, b = (
            jnp.asarray(generator.normal(size=size) / features**0.25, "bfloat16")
            for size in ((rows, features), (features, classes), (classes,))
        )
        arguments = x, w, b, jnp.asarray(generator.integers(0, classes, rows), jnp.int32)
        runs = {}
        for name, function in head_cases(rows):
            compiled = jax.jit(function).lower(*arguments).compile()
            runs[name] = lambda call=compiled, given=arguments: jax.block_until_ready(call(*given))
        for name, seconds in medians(runs, 11).items():
            lines.append(f"- {rows} x {features} x {classes}, {name}: {seconds * 1e3:.2f}")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Compiles, prints and saves."""
    lines = [
        f"JAX {jax.__version__}. Compiled, not measured: what the compiler estimates for one core, "
        "1.5 cycles a nanosecond on v5e, 1.75 on v6e and v5p. Ratios are to the first row of each table.",
    ]
    for chip in sys.argv[1:] or TPUS:
        target = TPUS[chip]
        device = topologies.get_topology_desc(target, platform="tpu").devices[0]
        shaped = partial(shapes, place=jax.sharding.SingleDeviceSharding(device))
        for rows, classes, dtype in DENSE:
            arguments = shaped(((rows, classes), dtype), ((rows,), "int32"))
            lines += table(f"TPU {chip}: logits {rows} x {classes}, {dtype}", dense_cases(), arguments)
        for rows, features, classes in HEADS:
            layer = (
                ((rows, features), "bfloat16"),
                ((features, classes), "bfloat16"),
                ((classes,), "bfloat16"),
            )
            title = f"TPU {chip}: features {rows} x {features}, {classes} classes, bfloat16"
            lines += table(title, head_cases(rows), shaped(*layer, ((rows,), "int32")))
    for name, target in MESH.items():
        lines += [
            "",
            f"TPU {name}: head with bias, features 32768 x 4096, 128256 classes, by rows, classes, both",
            "",
            "| by | Mcycles | temporary MB | loops deep | between devices |",
            "|---|---|---|---|---|",
            *on_mesh(target),
        ]
    lines += measured()
    (HERE / "accelerators.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
