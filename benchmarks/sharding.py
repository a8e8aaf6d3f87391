"""What the head on a mesh computes and moves, counted in the compiled program.

For 1, 2, 4 and 8 simulated devices, with rows, classes or both spread over them: the floating-point
operations of the matrix products and the bytes sent, by one device in one step of value and gradient,
loops counted as often as they run; each beside the least that the layout needs. Then the least of a job
for thousands of devices, as arithmetic. Saves sharding.md beside this file.
"""

import os

# Before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js

ROWS, FEATURES, CLASSES = 4096, 256, 32_000
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)]
SECTION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
LINE = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*)$")
SHAPE = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")


class Count(NamedTuple):
    """What one device does."""

    operations: float
    sent: float

    def plus(self, other: "Count", times: int = 1) -> "Count":
        """Both together, the other so many times."""
        return Count(self.operations + times * other.operations, self.sent + times * other.sent)


def count(program: str) -> Count:
    """The operations of all products, and the bytes sent, of a compiled program's text."""
    sections: dict[str, list[re.Match[str]]] = {}
    entry = name = ""
    for line in program.splitlines():
        if section := SECTION.match(line):
            name = section[1]
            sections[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and (parsed := LINE.match(line)):
            sections[name].append(parsed)
    return in_section(sections, entry)


def in_section(sections: dict[str, list[re.Match[str]]], name: str) -> Count:
    """The same for one section and all that it calls."""
    shapes = {line[1]: line[2] for line in sections[name]}
    total = Count(0, 0)
    for line in sections[name]:
        _, result, operation, rest = line.groups()
        if operation == "dot":
            total = total.plus(Count(product_operations(result, rest, shapes), 0))
        elif operation.removesuffix("-start") in ("all-reduce", "all-gather", "reduce-scatter"):
            total = total.plus(Count(0, bytes_sent(operation, result, rest)))
        elif operation in ("all-to-all", "collective-permute"):
            raise ValueError(f"not expected in the head: {line[0]}")
        times = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
        if operation == "while" and times is None:
            raise ValueError(f"a loop without a known number of rounds: {line[0]}")
        for called in re.findall(r"(?:calls|body)=%([^\s,)]+)", rest):
            total = total.plus(in_section(sections, called), int(times[1]) if times else 1)
    return total


def product_operations(result: str, rest: str, shapes: dict[str, str]) -> int:
    """Multiplications and additions of a matrix product."""
    left = re.findall(r"%([^\s,)]+)", rest)[0]
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    assert summed
    lengths = dimensions(shapes[left])[0]
    return 2 * math.prod(dimensions(result)[0]) * math.prod(lengths[int(n)] for n in summed[1].split(","))


def bytes_sent(operation: str, result: str, rest: str) -> float:
    """What each device of a ring sends: its share once to gather or scatter, twice to reduce for all."""
    size = sum(
        int(bits) / 8 * math.prod(lengths)
        for (bits, _), lengths in zip(SHAPE.findall(result), dimensions(result), strict=True)
    )
    groups = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    ring = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    devices = int(ring[1]) if ring else len(groups[1].split(",")) if groups else 1
    rounds = 2 if operation.startswith("all-reduce") else 1
    # A scattered result is one device's part.
    whole = size * devices if operation.startswith("reduce-scatter") else size
    return rounds * whole * (devices - 1) / devices


def dimensions(shapes: str) -> list[list[int]]:
    """The lengths of each array's axes."""
    return [[int(n) for n in lengths.split(",") if n] for _, lengths in SHAPE.findall(shapes)]


def measured(rows_over: int, classes_over: int) -> Count:
    """What the compiled program does on a mesh."""
    mesh = jax.make_mesh(
        (rows_over, classes_over), ("rows", "classes"), axis_types=(AxisType.Explicit,) * 2
    )

    def array(shape: tuple[int, ...], *place: str | None, dtype: type = jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*place)))

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(js.linear_log_likelihood_cost, (0, 1, 2)))
        compiled = step.lower(
            array((ROWS, FEATURES), "rows"),
            array((FEATURES, CLASSES), None, "classes"),
            array((CLASSES,), "classes"),
            array((ROWS,), "rows", dtype=jnp.int32),
        ).compile()
    text = compiled.as_text()
    assert text is not None
    return count(text)


def least(rows: int, features: int, classes: int, rows_over: int, classes_over: int) -> Count:
    """Three products, the gradients that several devices add to, and two numbers for each row.

    Rows spread over devices add up d weights and d bias; classes spread over devices add up d features,
    and each row's label logit and sum of exponentials.
    """
    operations = 3 * 2 * rows * features * classes / (rows_over * classes_over)
    d_layer = 4 * (features + 1) * classes / classes_over
    d_features = 4 * (features + 2) * rows / rows_over
    sent = 2 * d_layer * (rows_over - 1) / rows_over + 2 * d_features * (classes_over - 1) / classes_over
    return Count(operations, sent)


def main() -> None:
    """Counts, prints and saves."""
    lines = [
        f"Value and gradient of the head, {ROWS:,} rows, {FEATURES} features, {CLASSES:,} classes,",
        "float32; for each device, as counted in the program compiled for simulated CPU devices.",
        "",
        "| rows over | classes over | GFLOP in products | of the least | MB sent | of the least |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for mesh in MESHES:
        found, needed = measured(*mesh), least(ROWS, FEATURES, CLASSES, *mesh)
        over = f"{found.sent / needed.sent:.3f}" if needed.sent else "none"
        lines.append(
            f"| {mesh[0]} | {mesh[1]} | {found.operations / 1e9:.2f} | "
            f"{found.operations / needed.operations:.3f} | {found.sent / 1e6:.2f} | {over} |"
        )
    rows, features, classes = 1_000_000, 4096, 256_000
    lines += [
        "",
        f"Arithmetic, not a measurement: {rows:,} rows, {features:,} features, {classes:,} classes,",
        "4,096 devices, float32, by the same formulas for the least.",
        "",
        "| rows over | classes over | TFLOP in products | GB sent |",
        "|---:|---:|---:|---:|",
    ]
    for mesh in [(4096, 1), (512, 8), (256, 16), (64, 64), (16, 256), (1, 4096)]:
        needed = least(rows, features, classes, *mesh)
        lines.append(
            f"| {mesh[0]:,} | {mesh[1]:,} | {needed.operations / 1e12:.2f} | {needed.sent / 1e9:.3f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
