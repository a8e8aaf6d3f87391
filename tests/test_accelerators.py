"""What the compiler for TPUs makes of the package, wherever libtpu is installed; no TPU is needed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One process for all: a compiler for TPUs and devices simulated on the CPU do not share one.
PROGRAM = """
import json, sys
sys.path[:0] = ["benchmarks", "."]
import jax
import accelerators as a

device = a.topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
place = jax.sharding.SingleDeviceSharding(device)
found = {}
shapes = (8192, 1000, "float32"), (8192, 32768, "bfloat16"), (512, 151936, "float32")
for rows, classes, dtype in shapes:
    arguments = a.shapes(((rows, classes), dtype), ((rows,), "int32"), place=place)
    for name, function in a.dense_cases():
        if "softmax" not in name:
            found[f"{name}, {rows} x {classes}"] = a.figures(function, arguments)
rows, more = 8192, ["head with bias", "head, none"]
for features, classes, more in (4096, 128256, more), (4096, 32768, []), (1024, 50257, []):
    arguments = a.shapes(
        ((rows, features), "bfloat16"), ((features, classes), "bfloat16"), ((classes,), "bfloat16"),
        ((rows,), "int32"), place=place,
    )
    for name, function in a.head_cases(rows):
        if name in ["the three products", "head", "head, value", *more]:
            found[f"{name}, {classes}"] = a.figures(function, arguments)
arguments = a.use_arguments(a.partial(a.shapes, place=place))
for name, function in a.use_cases():
    if name in ["costs, none", "entropy", "label log likelihood"]:
        found[name] = a.figures(function, arguments)
json.dump({name: each for name, each in found.items()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def figures():
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed: pip install '.[accelerators]'")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize("shape", [(8192, 1000, 4), (8192, 32768, 2), (512, 151936, 4)])
@pytest.mark.parametrize("kind", ["value", "value and gradient"])
def test_the_cost_stores_nothing_of_the_logits_size(figures, kind, shape):
    rows, classes, size = shape
    cycles, temporary, depth, _ = figures[f"log_likelihood_cost, {kind}, {rows} x {classes}"]
    assert temporary < 0.01 * rows * classes * size
    assert depth == 0
    # One pass for the statistics.
    assert (
        cycles
        < (0.6 if kind == "value and gradient" else 0.45)
        * (figures[f"optax, {kind}, {rows} x {classes}"][0])
    )


@pytest.mark.parametrize(
    ("name", "classes", "most"),
    [
        ("head", 128256, 1.27),
        ("head", 32768, 1.30),
        ("head with bias", 128256, 1.31),
        ("head, none", 128256, 1.16 * 4 / 3),
        ("head, value", 128256, 0.5),
        ("head, value", 32768, 0.5),
        # Weights that stay in fast memory.
        ("head, value", 50257, 0.36),
        # Several parts of the rows, whose sum does not begin with a pass of zeros.
        ("head", 50257, 1.45),
    ],
)
def test_the_head_takes_little_more_than_its_products(figures, name, classes, most):
    cycles, temporary, depth, text = figures[f"{name}, {classes}"]
    assert cycles < most * figures[f"the three products, {classes}"][0]
    features, most_temporary = (1024, 0.85e9) if classes == 50257 else (4096, 2.7e9)
    assert temporary < most_temporary
    assert depth <= 1
    # No copy and no gather of what has a number for each row and class.
    for shape in re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|gather|all-gather)\(", text):
        sizes = [int(n) for n in shape.split(",")]
        assert not (
            classes in sizes and max(s for s in sizes if s != classes) >= 512 and features not in sizes
        )


@pytest.mark.parametrize(("name", "most"), [("entropy", 1.15), ("label log likelihood", 1.02)])
def test_a_statistics_gradient_takes_what_a_costs_does(figures, name, most):
    (cycles, temporary, *_), (cycles_of_cost, temporary_of_cost, *_) = (
        figures[name],
        figures["costs, none"],
    )
    assert cycles < most * cycles_of_cost
    # But for some numbers of each row.
    assert temporary < 1.001 * temporary_of_cost
