"""Going on from a checkpoint, at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from swinv2_train.checkpoint.finding import read_marker
from swinv2_train.checkpoint.random_states import derived_seed, has_gpu_state, restore_random_states
from swinv2_train.checkpoint.saved_state import read_state
from swinv2_train.config import ConfigError
from swinv2_train.distributed import World, raise_together
from swinv2_train.engine.state.files import StateFiles
from swinv2_train.runtime import StopRequest, seed_everything
from swinv2_train.storage.lazy_tensors import LazyTensors


class Loadable(Protocol):
    """The part of an engine that a resume needs."""

    def load(self, directory: Path, stop: StopRequest | None = None) -> None: ...


def load_checkpoint(
    path: Path, engine: Loadable, world: World, seed: int, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Restore engine and random states on every rank; returns the saved state.  Collective.

    Random states are restored where as many ranks saved them; at another number of ranks each rank's is derived from
    (seed, step, rank), and so are a GPU's after a CPU (device_note).  Raises ConfigError on all ranks when path is no
    complete checkpoint or does not fit the engine.  stop: may come meanwhile; StopNow on every rank.
    """
    error: BaseException | None = None
    marker: dict[str, Any] = {}
    state: dict[str, Any] = {}
    try:
        marker = read_marker(path)
        state = read_state(path)
    except ConfigError as caught:
        error = caught
    raise_together(error)
    engine.load(path / "engine", stop)
    derived = derived_seed(seed, state["step"])
    if marker["world_size"] == world.world_size:  # last: loading may draw random numbers
        raise_together(restore_random_states(path / "rng", world, derived))
    else:
        seed_everything(derived, world.rank)
    return state


def device_note(checkpoint: Path, world: World) -> str | None:
    """That a resume changes between CPU and GPU, whose random numbers and roundings differ; None = it does not."""
    saved_on_gpu, on_gpu = has_gpu_state(checkpoint / "rng"), world.device.type == "cuda"
    if saved_on_gpu is None or saved_on_gpu == on_gpu:
        return None
    names = {True: "a GPU", False: "a CPU"}
    return (
        f"note: {checkpoint} was saved on {names[saved_on_gpu]} and goes on on {names[on_gpu]}: the images stay the "
        "same, but stochastic depth draws other numbers and sums are rounded differently"
    )


def ema_note(checkpoint: Path, ema_decay: float | None) -> str | None:
    """What a resume with this optim.ema_decay does to averages of the weights; None = they go on, or there are none.

    Raises ConfigError when the checkpoint cannot be read.
    """
    saved = StateFiles(checkpoint / "engine").ema_decay
    if (saved is None) == (ema_decay is None):
        return None
    if saved is None:
        return f"note: {checkpoint} holds no averages of the weights (optim.ema_decay); they begin at its weights"
    return f"note: the averages of the weights in {checkpoint} are dropped, for optim.ema_decay is null"


def read_checkpoint_weights(checkpoint: Path, averaged: bool = False) -> LazyTensors:
    """The float32 weights of a checkpoint by official name, read one at a time; saved by any number of ranks.

    averaged: their averages (optim.ema_decay); ConfigError where it has none.
    """
    from swinv2_train.engine.state.consolidate import read_state_weights

    return read_state_weights(checkpoint / "engine", averaged)
