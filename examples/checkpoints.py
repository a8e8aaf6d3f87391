"""A training run kept in a folder, so that the same command goes on where it was stopped."""

import argparse
import logging
import sys
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

# Where a write fails, all of these tell the story of each of orbax's threads, some after the event loop
# of the write is gone; here it is told once.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
print_unraisable = sys.unraisablehook


def but_of_late_threads(unraisable: Any) -> None:
    """Prints an exception that cannot be raised, unless a thread came too late to tell of its write."""
    if str(unraisable.exc_value) != "Event loop is closed":
        print_unraisable(unraisable)


sys.unraisablehook = but_of_late_threads


class Saved(NamedTuple):
    """A run after some epochs: the training state, and what it recorded."""

    epochs: int
    state: Any
    history: Mapping[str, list[float]]


class Checkpoints:
    """The newest three checkpoints of one run, each written whole or not at all."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Opens the folder for a run with these settings, which must not change."""
        self.folder, self.settings = folder, dict(settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=3, create=True, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, run: Saved) -> None:
        """Writes a checkpoint, and ends the program in words if it cannot."""
        about = {
            "settings": self.settings,
            "history": dict(run.history),
            "checksum": checksum(run.state),
        }
        content = ocp.args.Composite(
            state=ocp.args.StandardSave(run.state), about=ocp.args.JsonSave(about)
        )
        try:
            self.manager.save(run.epochs, args=content)
        except Exception as error:
            left = [epochs for epochs in self.manager.all_steps() if epochs < run.epochs]
            kept = f"that of epoch {max(left)} is kept" if left else "there is none before it"
            sys.exit(
                f"cannot write the checkpoint of epoch {run.epochs} to {self.folder}: {error}\n{kept}"
            )

    def newest(self, like: Any) -> Saved | None:
        """The newest checkpoint that can be read, of a state like this one; None in an empty folder."""
        found = sorted(self.manager.all_steps(), reverse=True)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged = []
        for epochs in found:
            try:
                about = self.read(epochs, about=ocp.args.JsonRestore()).about
                self.check(about["settings"])
                state = self.read(epochs, state=ocp.args.StandardRestore(shapes)).state
                if checksum(state) != about["checksum"]:
                    raise ValueError("its numbers are not those that were saved")
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"the checkpoint of epoch {epochs} is damaged: {reason}", file=sys.stderr)
                damaged.append(epochs)
                continue
            for number in damaged:
                self.manager.delete(number)
            return Saved(epochs, state, about["history"])
        if found:
            sys.exit(f"no checkpoint in {self.folder} can be read: remove it, or name another folder")
        return None

    def read(self, epochs: int, **what: ocp.args.CheckpointArgs) -> Any:
        """Parts of a checkpoint."""
        return self.manager.restore(epochs, args=ocp.args.Composite(**what))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Ends the program where the folder holds another run."""
        for name, value in self.settings.items():
            if settings[name] != value:
                sys.exit(
                    f"{self.folder} holds a run with {name} {settings[name]}, not {value}: "
                    "use the options it was started with, or another folder"
                )


def checksum(arrays: Any) -> int:
    """A number that tells different bits apart."""
    total = 0
    for leaf in jax.tree.leaves(arrays):
        total = zlib.crc32(np.asarray(leaf).tobytes(), total)
    return total


if __name__ == "__main__":
    argparse.ArgumentParser(description=f"{__doc__} For digits.py.").parse_args()
