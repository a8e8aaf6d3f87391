"""What the compilers for TPUs and for GPUs make of the cost and the head: no device is needed.

Compiles for TPU v5e, v6e and v5p (extra `accelerators`, Linux x86-64, Python 3.12 or newer) and prints
the compiler's own estimate of cycles, the bytes of temporaries and how deep loops stand in loops. Where
JAX's plugin for CUDA is installed instead, does so for an H100, of which the compiler tells no time:
there it counts the kernels that are launched, and the bytes that they read and write of the dense cost,
in passes over the logits. These figures are compiled, not measured. On a machine with an accelerator all
is also timed on it, and compared with float64. Replaces in accelerators.md, beside this file, the section
of each target given: v5e, v6e, v5p, mesh, h100 and measured, and with _uses behind the name of a chip
what else the head does there; if none is given, of all that can be had.
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
if importlib.util.find_spec("jax_cuda13_plugin") and not os.path.exists("/dev/nvidia0"):
    # Without a device, nothing can be tuned on it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost import medians
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js

# NVIDIA's public figures of the card, as the compiler wants them.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 fpus_per_core: 128
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0"
  runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
"""
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5:2x2x1"}
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

    cycles: float  # its estimate for a TPU; of a GPU the launches
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


def counted(text: str, weight: Callable[[str], float]) -> tuple[float, int]:
    """The weights of all instructions, as often as loops run them, and how deep loops stand in loops."""
    found, entry = computations(text)

    def of(name):
        sum_, depth = 0.0, 0
        for line in found.get(name, []):
            sum_ += weight(line)
            if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                inner, below = of(body[1])
                sum_, depth = sum_ + inner * trips(found, line), max(depth, below + 1)
            if called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                inner, below = of(called[1])
                sum_, depth = sum_ + inner, max(depth, below)
        return sum_, depth

    return of(entry)


def cycles(line: str) -> float:
    """What the compiler for TPUs says of an instruction."""
    known = re.search(r'"estimated_cycles":"(\d+)"', line)
    return int(known[1]) if known else 0


def is_launched(line: str) -> bool:
    """Whether a GPU starts a kernel for an instruction."""
    name = re.search(r"(fusion|custom-call|copy|reduce|sort|scatter|dot|convolution)\(", line)
    return bool(name) and "AllocateBuffer" not in line


def bytes_moved(text: str) -> float:
    """What a GPU's kernels read and write, of a program without loops that takes no slices."""
    size = {"f32": 4, "s32": 4, "bf16": 2, "s8": 0}  # s8 is room to work in.

    types = dict(re.findall(r"^ +(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\(", text, re.MULTILINE))

    def arrays(name):
        """The elements and the bytes of an element of each array with this name."""
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types.get(name, "")):
            yield math.prod(map(int, re.findall(r"\d+", shape))), size.get(dtype, 1)

    def of(line):
        if not is_launched(line) or re.search(r"calls=%\w*scatter", line):  # In place.
            return 0
        # The result and the operands; what it calls has no type here. A loop reads no more of an operand
        # than it has results: where a row's logit is picked, one.
        result, *operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", line))
        most = max(n for n, _ in arrays(result)) if "kind=kLoop" in line else math.inf
        read = (min(n, most) * bytes_ for name in operands for n, bytes_ in arrays(name))
        return sum(read) + sum(n * bytes_ for n, bytes_ in arrays(result))

    return counted(text, of)[0]


def shapes(*arrays: tuple[tuple[int, ...], str], place: Any) -> list[jax.ShapeDtypeStruct]:
    """Arguments that are not there."""
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place) for shape, dtype in arrays]


def figures(function: Callable[..., Any], arguments: list[Any]) -> Figures:
    """Compiles for the devices that the arguments' shardings name."""
    is_gpu = next(iter(arguments[0].sharding.device_set)).platform == "gpu"
    # Every product a call of cuBLAS: Triton's would not be tuned without a device.
    options: dict[str, str | bool] | None = {"xla_gpu_enable_triton_gemm": False} if is_gpu else None
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    text, analysis = compiled.as_text() or "", compiled.memory_analysis()
    count, depth = counted(text, is_launched if is_gpu else cycles)
    return Figures(count or np.nan, analysis.temp_size_in_bytes if analysis else np.nan, depth, text)


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
    """The head's mean cost."""

    def cost(x, w, b, labels):
        return js.linear_log_likelihood_cost(x, w, b if bias else None, labels, **options).mean()

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


def use_cases() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of features, weights and what labels are made of, by name."""

    def gradient(cost, has_aux=False):
        return jax.value_and_grad(cost, (0, 1), has_aux=has_aux)

    def of_statistic(name):
        def cost(x, w, labels, *_):
            return jnp.mean(getattr(js.head_statistics(x, w, None, labels), name))

        return gradient(cost)

    def with_statistics(x, w, labels, *_):
        return js.linear_log_likelihood_cost(x, w, None, labels, return_statistics=True)

    def sparse(x, w, _, classes, probabilities, *__):
        labels = js.SparseLabels(classes, probabilities)
        return js.linear_log_likelihood_cost(x, w, None, labels)

    def taught(x, w, _, __, ___, *teacher):
        return js.linear_log_likelihood_cost(x, w, None, js.TeacherLabels(*teacher))

    def with_teacher(x, w, _, __, ___, *teacher):
        return products(x, w), jnp.matmul(*teacher, preferred_element_type=jnp.float32)

    yield "the three products", products
    yield "three products and a teacher's", with_teacher
    yield "the cost", gradient(lambda x, w, labels, *_: of_head(bias=False)(x, w, None, labels))
    yield "the cost, statistics beside it", gradient(with_statistics, has_aux=True)
    yield (
        "costs, none",
        gradient(lambda x, w, labels, *_: of_head(bias=False, reduction="none")(x, w, None, labels)),
    )
    for name in ("log_normalizer", "entropy", "label_log_likelihood"):
        yield name.replace("_", " "), of_statistic(name)
    yield "labels of 20 classes each", gradient(sparse)
    yield "a teacher as wide", gradient(taught)


Cases = Iterator[tuple[str, Callable[..., Any]]]


def table(title: str, cases: Cases, arguments: list[Any], logits: float = 0) -> list[str]:
    """All cases on these arguments; `logits` are the bytes of one pass over the dense cost's on a GPU."""
    is_gpu = next(iter(arguments[0].sharding.device_set)).platform == "gpu"
    columns = ["launches", "passes" if logits else ""] if is_gpu else ["Mcycles", "over the first"]
    lines = [
        "",
        title,
        "",
        f"| | {' | '.join(columns)} | temporary MB | loops deep |",
        "|---|---|---|---|---|",
    ]
    floor = 0.0
    for name, function in cases:
        try:
            found = figures(function, arguments)
        except Exception as error:  # A peer may not compile for it, or not fit.
            lines.append(f"| {name} | {type(error).__name__} | | | |")
        else:
            floor = floor or found.cycles
            if is_gpu:
                passes = f"{bytes_moved(found.text) / logits:.2f}" if logits else ""
                cells = f"{found.cycles:.0f} | {passes}"
            else:
                cells = f"{found.cycles / 1e6:.2f} | {found.cycles / floor:.2f}"
            lines.append(f"| {name} | {cells} | {found.temporary / 1e6:.1f} | {found.depth} |")
        print(lines[-1], flush=True)
    return lines


def on_mesh() -> list[str]:
    """The head over rows, classes and both on sixteen chips."""
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    lines = [
        "",
        "TPU v5e 4 x 4: head with bias, features 32768 x 4096, 128256 classes, by rows, classes, both",
        "",
        "| by | Mcycles | temporary MB | loops deep | between devices |",
        "|---|---|---|---|---|",
    ]
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


def true_head(x: jax.Array, w: jax.Array, b: jax.Array, labels: jax.Array) -> jax.Array:
    """The cost of a layer, plainly."""
    return optax_cost(x @ w + b, labels)


def true_head_without_bias(x: jax.Array, w: jax.Array, b: jax.Array, labels: jax.Array) -> jax.Array:
    """The same of one without a bias."""
    return true_head(x, w, jnp.zeros_like(b), labels)


# What gives the right numbers of each case if its arguments are float64: of logits the peer before ours.
OF_LOGITS = list(dense_cases())
TRUE_GRADIENTS = partial(jax.value_and_grad, argnums=(0, 1, 2))(true_head)
TRUTHS = {
    **{name: OF_LOGITS[i - i % 2][1] for i, (name, _) in enumerate(OF_LOGITS)},
    **dict.fromkeys(
        ["head", "jax-cce", "tokamax"],
        partial(jax.value_and_grad, argnums=(0, 1))(true_head_without_bias),
    ),
    **dict.fromkeys(["head with bias", "head, none", "optax, float32 logits"], TRUE_GRADIENTS),
    "head, value": true_head,
}


def largest_error(found: Any, true: Any) -> float:
    """The largest difference in any array, over the largest number of the truth in that array."""

    def of(one, exact):
        return float(jnp.abs(one.astype(exact.dtype) - exact).max() / jnp.abs(exact).max())

    return max(map(of, jax.tree.leaves(found), jax.tree.leaves(true)))


def timed(title: str, cases: Cases, arguments: list[jax.Array], count: int) -> list[str]:
    """The time of all cases on these arguments, each `count` times in a row, and their errors."""
    lines = ["", title, "", "| | milliseconds | over the first | error |", "|---|---|---|---|"]
    with jax.enable_x64():
        double = [a.astype("float64") if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arguments]
    runs, errors, exact = {}, {}, {}
    for name, function in cases:
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
            found = compiled(*arguments)
        except Exception as error:  # A peer may not compile for it, or not fit.
            lines.append(f"| {name} | {type(error).__name__} | | |")
            continue
        errors[name] = ""
        if true := TRUTHS.get(name):
            with jax.enable_x64():
                if true not in exact:
                    exact[true] = jax.jit(true)(*double)
                errors[name] = f"{largest_error(found, exact[true]):.1e}"
        del found

        def run(call=compiled):
            for _ in range(count - 1):
                call(*arguments)
            jax.block_until_ready(call(*arguments))

        runs[name] = run
    del double, exact
    taken = medians(runs, 11)
    first = next(iter(taken.values()))
    for name, seconds in taken.items():
        cells = f"{seconds / count * 1e3:.3f} | {seconds / first:.2f} | {errors[name]}"
        lines.append(f"| {name} | {cells} |")
    print(*lines[1:], sep="\n", flush=True)
    return lines


def measured() -> list[str]:
    """Milliseconds and errors on the device that is there."""
    lines = [
        "",
        f"Measured on one {jax.devices()[0].device_kind}, medians of 11. An error is the largest of the "
        "value and of each gradient, over the largest number of that array, against float64.",
    ]
    keys = jax.random.split(jax.random.key(0), 4)
    for rows, classes, dtype in DENSE:
        z = (3 * jax.random.normal(keys[0], (rows, classes))).astype(dtype)
        labels = jax.random.randint(keys[3], (rows,), 0, classes)
        # To start a program takes as long as to run a small one.
        lines += timed(f"Logits {rows} x {classes}, {dtype}", dense_cases(), [z, labels], 8)
    for rows, features, classes in (HEADS[0], HEADS[1], HEADS[3]):
        sizes = (rows, features), (features, classes), (classes,)
        parts = [
            # Logits of order one.
            (jax.random.normal(key, size) / features**0.25).astype("bfloat16")
            for key, size in zip(keys, sizes, strict=False)
        ]
        labels = jax.random.randint(keys[3], (rows,), 0, classes)
        title = f"Features {rows} x {features}, {classes} classes, bfloat16"
        lines += timed(title, head_cases(rows), [*parts, labels], 2)
    return lines


def on_chip(name: str) -> Callable[..., list[jax.ShapeDtypeStruct]]:
    """`shapes` on one device of a kind."""
    if name == "h100":
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    else:
        topology = topologies.get_topology_desc(TPUS[name], platform="tpu")
    return partial(shapes, place=jax.sharding.SingleDeviceSharding(topology.devices[0]))


def use_arguments(shaped: Callable[..., list[jax.ShapeDtypeStruct]]) -> list[jax.ShapeDtypeStruct]:
    """What `use_cases` are functions of; `shaped` is `shapes` on some device."""
    rows, features, classes = HEADS[1]
    layer = ((rows, features), "bfloat16"), ((features, classes), "bfloat16")
    few = ((rows, 20), "int32"), ((rows, 20), "float32")
    return shaped(*layer, ((rows,), "int32"), *few, *layer)


def uses_on_one_device(name: str) -> list[str]:
    """What else the head does, for one device of a kind."""
    rows, features, classes = HEADS[1]
    title = f"{name}: features {rows} x {features}, {classes} classes, bfloat16, value and gradient"
    return table(title, use_cases(), use_arguments(on_chip(name)))


def on_one_device(name: str) -> list[str]:
    """Dense costs and heads for one device of a kind."""
    shaped = on_chip(name)
    lines: list[str] = []
    for rows, classes, dtype in DENSE:
        arguments = shaped(((rows, classes), dtype), ((rows,), "int32"))
        logits = rows * classes * jnp.dtype(dtype).itemsize
        lines += table(f"{name}: logits {rows} x {classes}, {dtype}", dense_cases(), arguments, logits)
    for rows, features, classes in HEADS:
        sizes = (rows, features), (features, classes), (classes,)
        arguments = shaped(*((size, "bfloat16") for size in sizes), ((rows,), "int32"))
        title = f"{name}: features {rows} x {features}, {classes} classes, bfloat16"
        lines += table(title, head_cases(rows), arguments)
    return lines


def main() -> None:
    """Compiles, measures, prints and saves."""
    file = HERE / "accelerators.md"
    printed = {"mesh": on_mesh, "measured": measured}
    for chip in (*TPUS, "h100"):
        printed[chip] = partial(on_one_device, chip)
        printed[f"{chip}_uses"] = partial(uses_on_one_device, chip)
    tpus = [*TPUS, "mesh"] if importlib.util.find_spec("libtpu") else []
    gpus = ["h100"] if importlib.util.find_spec("jax_cuda13_plugin") else []
    uses = [f"{name}_uses" for name in (*tpus, *gpus) if name != "mesh"]
    here = ["measured"] if jax.default_backend() != "cpu" else []
    names = sys.argv[1:] or [*tpus, *gpus, *uses, *here]
    known = re.split(r"^(?=Target \w+,)", file.read_text("utf-8"), flags=re.MULTILINE)[1:]
    sections = {section.split()[1].rstrip(","): section for section in known}
    for name in names:
        print(f"\n{name}")
        sections[name] = "\n".join([f"Target {name}, JAX {jax.__version__}:", *printed[name](), "", ""])
    about = (
        "Compiled, not measured, but for the section that says so. Cycles are what the compiler for "
        "TPUs estimates for one core: 1.5 in a nanosecond on v5e, 1.75 on v6e and v5p; ratios are to "
        "the first row of each table. Of the H100 launches of kernels are counted, and what they read "
        "and write, in passes over the logits.\n\n"
    )
    file.write_text((about + "".join(sections.values())).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
