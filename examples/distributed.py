"""Several processes train one network: examples spread over the processes, classes over their devices.

Alone, this script starts two processes on this machine, each with two simulated devices, and ends with
them. On a cluster, start it once on every machine with JAX_COORDINATOR_ADDRESS set to host:port of the
first. Slurm, Open MPI, Kubernetes and Cloud TPUs tell the rest; elsewhere set JAX_NUM_PROCESSES and
JAX_PROCESS_ID too.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxsoftmax as js

PROCESSES, DEVICES = 2, 2  # On this machine.
BATCH = 64
PATIENCE = 10  # Seconds after which a silent process counts as lost.


class Job(NamedTuple):
    """What to train, how, with what, and where on the mesh each of its parameters is."""

    title: str
    cost: Callable[[Any, tuple[jax.Array, jax.Array]], jax.Array]
    learning_rate: float
    data: tuple[np.ndarray, np.ndarray]
    params: Any
    places: Any


def digits() -> Job:
    """FC → FC → softmax on scikit-learn's digits, the output layer's weights spread by class."""
    images, labels = load_digits(return_X_y=True)
    count = len(labels) - len(labels) % BATCH

    def cost(network: js.Network, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return js.network_cost(network, *batch, penalty=1e-4)

    return Job(
        "network on digits",
        cost,
        3e-3,
        ((images[:count] / 16).astype(np.float32), labels[:count].astype(np.int32)),
        js.init_network(jax.random.key(0), 64, 128, 10),
        js.Network(js.Dense._make([P(), P()]), js.Dense._make([P(None, "classes"), P("classes")])),
    )


def many_classes() -> Job:
    """The head alone, with 9,999 classes to tell apart and one of padding."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(16 * BATCH, 32)).astype(np.float32)
    labels = np.argmax(x @ generator.normal(size=(32, 9999)), axis=1).astype(np.int32)

    def cost(head: js.Dense, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        # Where on the mesh rows and classes are, their types tell.
        x, labels = batch
        return js.linear_log_likelihood_cost(x, head.weights, head.bias, labels, num_classes=9999)

    return Job(
        "head of 9,999 classes",
        cost,
        0.03,
        (x, labels),
        js.Dense(jnp.zeros((32, 10_000)), jnp.zeros(10_000)),
        js.Dense._make([P(None, "classes"), P("classes")]),
    )


def train(job: Job, epochs: int, mesh: jax.sharding.Mesh | None = None) -> Any:
    """The parameters after so many epochs, on a mesh or on one device."""
    params, data = job.params, job.data
    if mesh is not None:
        params, data = jax.tree.map(
            lambda place, array: jax.device_put(np.asarray(array), NamedSharding(mesh, place)),
            (job.places, (P("examples"), P("examples"))),
            (params, data),
        )
    optimizer = optax.adam(job.learning_rate)
    epoch = js.make_epoch(job.cost, optimizer, BATCH)
    state = jax.jit(lambda params: js.init_state(params, optimizer))(params)
    for number in range(epochs):
        state, costs = epoch(state, data, jax.random.key(number))
        if mesh is not None:
            say(f"{job.title}, epoch {number + 1}: cost {jnp.mean(costs):.5f}")
    return state.params


def say(text: str) -> None:
    """Prints, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def fingerprint(params: Any) -> int:
    """A checksum of what this process holds."""
    checksum = 0
    for leaf in jax.tree.leaves(params):
        for shard in sorted(leaf.addressable_shards, key=lambda shard: str(shard.index)):
            checksum = zlib.crc32(np.asarray(shard.data).tobytes(), checksum)
    return checksum


def compare(job: Job, epochs: int, mesh: jax.sharding.Mesh) -> None:
    """Trains on the mesh and on one device, and prints how the results differ."""
    with jax.set_mesh(mesh):
        params = train(job, epochs, mesh)
        checksums = multihost_utils.process_allgather(np.uint32(fingerprint(params)))
        everywhere = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() > 0:
        return
    alone = train(job, epochs)
    largest = max(
        float(np.max(np.abs(a - np.asarray(b))) / np.max(np.abs(np.asarray(b))))
        for a, b in zip(jax.tree.leaves(everywhere), jax.tree.leaves(alone), strict=True)
    )
    same = "the same bits" if len(set(checksums.tolist())) == 1 else "DIFFERENT BITS"
    say(f"{job.title}: {same} in all {len(checksums)} processes")
    say(f"{job.title}: {largest:.1e} from one device, relative to a parameter's largest entry")


def work(epochs: int) -> None:
    """One process of several."""
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"),
        process_id=number("JAX_PROCESS_ID"),
        heartbeat_timeout_seconds=PATIENCE,
    )
    shape = jax.process_count(), jax.local_device_count()
    mesh = jax.make_mesh(shape, ("examples", "classes"), axis_types=(AxisType.Explicit,) * 2)
    say(f"{shape[0]} processes with {shape[1]} devices each")
    try:
        for job in (digits(), many_classes()):
            compare(job, epochs, mesh)
    except jax.errors.JaxRuntimeError as error:
        print(f"process {jax.process_index()}: stopped, as another one has: {error}", file=sys.stderr)
        # Without a goodbye: the shutdown that Python would wait for needs the other processes.
        sys.stderr.flush()
        os._exit(1)


def number(name: str) -> int | None:
    """A number from the environment, None for JAX to find out."""
    return int(os.environ[name]) if name in os.environ else None


def start() -> int:
    """Starts the processes on this machine, and says how the first bad one ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(PROCESSES),
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, *sys.argv]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"JAX_PROCESS_ID": str(number)})
        for number in range(PROCESSES)
    ]
    print("started processes", *(process.pid for process in processes), flush=True)
    # Whoever ends this process ends the others too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # The others end by themselves when one is lost, unless it was lost before they met.
        while not any(codes(processes)) and None in codes(processes):
            time.sleep(0.1)
        deadline = time.monotonic() + 2 * PATIENCE
        while None in codes(processes) and time.monotonic() < deadline:
            time.sleep(0.1)
    except KeyboardInterrupt:
        return 130
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for number, code in enumerate(codes(processes)):
        if code:
            print(f"process {number} ended with code {code}", file=sys.stderr)
    return int(any(codes(processes)))


def codes(processes: list[subprocess.Popen]) -> list[int | None]:
    """How each process ended, None for one that has not."""
    return [process.poll() for process in processes]


def main(arguments: Sequence[str] | None = None) -> int:
    """One process of several, or the start of them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the examples")
    epochs = parser.parse_args(arguments).epochs
    if epochs < 1:
        parser.error(f"argument --epochs: must be a whole number from 1, got {epochs}")
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return start()
    work(epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
