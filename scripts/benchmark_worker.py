"""One contestant of scripts/benchmark.py in a process of its own, which sleeps until it is its turn.

A turn is one training step that is not measured and some that are; between turns a worker holds its weights alone.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.contestants import PRODUCTS, Case, Contestant, build, write_weights
from scripts.matrix_products import MatrixProducts
from swinv2_train.engine.adamw import adamw
from swinv2_train.runtime import tune_allocator

LAPS = ("forward", "forward and backward", "step")
WEIGHTS, BATCH = "weights.safetensors", "batch.pt"
LR = 1e-5
COMPARED_IMAGES = 2
BOUNDS = {"fp32": 1e-4, "autocast": 0.1, "bf16": 0.1}
"""Largest relative difference of logits and images' gradient (of their norms) from the official arithmetic in
float32.
"""


"""What our trainer does to its process before the first tensor."""


@dataclass(frozen=True)
class Setting:
    """What all workers of a table share."""

    case: Case
    folder: Path
    device: torch.device
    threads: int


class Worker:
    """The parent's end of a worker; every call waits for the answer.  Raises Refused with the worker's reason."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch and the rest are imported once for all workers
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise Refused(f"the process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, Refused):
            raise answer
        return answer

    def turn(self, steps: int) -> dict[str, Any]:
        self._connection.send(steps)
        return self.answer()

    def cpu_seconds(self) -> float:
        """CPU time the process has used up to now."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def close(self) -> None:
        """A resting worker ends by itself, a busy one is killed."""
        self._connection.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()


class Refused(Exception):
    """A contestant cannot take part; the message says why."""


def prepare(connection: Connection, setting: Setting) -> None:
    """:func:`write_inputs` in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(setting.threads)
    write_inputs(setting)
    connection.send(None)


def write_inputs(setting: Setting) -> None:
    """Write the weights, a batch, and the official arithmetic's outputs in float32, for all workers of a case."""
    case, weights = setting.case, setting.folder / WEIGHTS
    write_weights(case, weights, setting.device)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "images": torch.randn(case.batch_size, 3, case.img_size, case.img_size, generator=generator),
        "labels": torch.randint(1000, (case.batch_size,), generator=generator),
    }
    official = build(Contestant("official", "fp32"), case, weights, setting.device)
    torch.save(batch | _outputs(official, batch, "fp32", setting.device), setting.folder / BATCH)


def compete(connection: Connection, contestant: Contestant, setting: Setting) -> None:
    """Take part: answer with the difference and the seconds of two steps, then every number of steps with its times."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.folder / f"inductor-{os.getpid()}")  # compiles anew
    if setting.device.type == "cpu":
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or a pool of processes would stay beside each worker
    try:
        torch.backends.cudnn.allow_tf32 = False  # the patch convolution of fp32, as all other products
        if contestant.compiled:
            torch._dynamo.config.recompile_limit = 256  # whole peers have more blocks than the limit of 8
        torch.set_num_threads(setting.threads)
        warnings.filterwarnings("error", message="fused attention is not used")  # or "ours" would be another path
        if contestant.tuned or contestant.implementation == "ours":
            tune_allocator()
        runner = (Products if contestant.implementation == PRODUCTS else Training)(contestant, setting)
        difference = runner.difference()
        connection.send(
            {"difference": difference, "steps_sec": [_seconds_of(runner, setting.device) for _ in range(2)]}
        )
        runner.rest()
        while True:
            connection.send(runner.turn(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    except Exception as error:  # noqa: BLE001 - whatever another's code raises is told in the table
        connection.send(Refused(reason(error)))


def _seconds_of(runner: Runner, device: torch.device) -> float:
    begin = time.perf_counter()
    laps = Laps(device)
    runner.step(laps)
    laps.seconds()  # waits for the GPU
    return time.perf_counter() - begin


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, Refused | ValueError) else f"{type(error).__name__}: {first}"


class Laps:
    """Seconds of wall and CPU time since the beginning of a step, lap by lap; on a GPU by its own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, float]] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((event, time.process_time()))
        else:
            self._marks.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> dict[str, dict[str, float]]:
        """{"wall": {lap: seconds}, "cpu": {lap: seconds}}."""
        first, *rest = self._marks
        if self._cuda:
            torch.cuda.synchronize()
            wall = [first[0].elapsed_time(mark[0]) / 1000 for mark in rest]
        else:
            wall = [mark[0] - first[0] for mark in rest]
        cpu = [mark[1] - first[1] for mark in rest]
        return {"wall": dict(zip(LAPS, wall, strict=True)), "cpu": dict(zip(LAPS, cpu, strict=True))}


class Runner:
    """Turns of what a subclass calls a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def weights_gib(self) -> float:
        """What a worker holds between turns."""
        raise NotImplementedError

    def difference(self) -> float | None:
        """From the official arithmetic; None where there is nothing to compare."""
        return None

    def step(self, laps: Laps) -> None:
        """One training step, marking the laps."""
        raise NotImplementedError

    def rest(self) -> None:
        """Give back memory until the next turn."""

    def turn(self, steps: int) -> dict[str, Any]:
        """{"steps": seconds of each, "peak_gib": the most memory of weights, gradients, optimizer and step}."""
        _reset_peak(self._device)
        resting = _resident(self._device)
        self.step(Laps(self._device))
        seconds = []
        for _ in range(steps):
            laps = Laps(self._device)
            self.step(laps)
            seconds.append(laps.seconds())
        result = {"steps": seconds, "peak_gib": self.weights_gib() + _peak(self._device) - resting}
        self.rest()
        return result


class Products(Runner):
    """The limit; it has no optimizer, so its step is its forward and backward pass."""

    def __init__(self, contestant: Contestant, setting: Setting) -> None:
        super().__init__(setting.device)
        shape = setting.case.meta_model()
        self._products = MatrixProducts(shape, setting.case.batch_size, contestant.weights_dtype, setting.device)

    def weights_gib(self) -> float:
        return self._products.buffers_gib()

    def step(self, laps: Laps) -> None:
        self._products.forward()
        laps.mark()
        self._products.backward()
        laps.mark()
        laps.mark()


class Training(Runner):
    """Forward, cross entropy, backward and AdamW on one batch.

    AdamW is our engines' for ours, torch's as it comes for others.  Ours in bf16 trains as under DeepSpeed's bf16:
    float32 masters, from which the bf16 weights are made anew; others in bf16 step their bf16 weights, which is less.
    """

    def __init__(self, contestant: Contestant, setting: Setting) -> None:
        super().__init__(setting.device)
        self.module = build(contestant, setting.case, setting.folder / WEIGHTS, setting.device)
        self._contestant = contestant
        self._batch = torch.load(setting.folder / BATCH, map_location=setting.device)
        self._images = self._batch["images"].to(contestant.weights_dtype)
        self._optimizer: torch.optim.Optimizer | None = None
        self._masters: list[nn.Parameter] = []

    def weights_gib(self) -> float:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.module.parameters()) / 2**30

    def difference(self) -> float:
        """The larger relative difference of logits and images' gradient.  Raises Refused above BOUNDS."""
        precision = self._contestant.precision
        found = _outputs(self.module.eval(), self._batch, precision, self._device)
        self.module.train()
        differences = {name: _relative(found[name], self._batch[name]) for name in found}
        bound = BOUNDS[precision]
        for name, difference in differences.items():
            if not difference <= bound:
                raise Refused(f"its {name} differ by {difference:.1e} from the official arithmetic's (bound {bound:g})")
        return max(differences.values())

    def step(self, laps: Laps) -> None:
        if self._optimizer is None:
            self._make_optimizer()
        for parameter in self.module.parameters():
            parameter.grad = None
        with _autocast(self._contestant.precision, self._device):
            logits = self.module(self._images)
        loss = F.cross_entropy(logits.float(), self._batch["labels"])
        laps.mark()
        loss.backward()
        laps.mark()
        self._update()
        laps.mark()

    def _make_optimizer(self) -> None:
        parameters = list(self.module.parameters())
        if self._contestant.implementation != "ours":
            self._optimizer = torch.optim.AdamW(parameters, lr=LR)
            return
        if self._contestant.precision == "bf16":
            self._masters = parameters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        self._optimizer = adamw([{"params": parameters}], lr=LR)

    def _update(self) -> None:
        assert self._optimizer is not None
        pairs = list(zip(self.module.parameters(), self._masters, strict=True)) if self._masters else []
        for parameter, master in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._optimizer.step()
        with torch.no_grad():
            for parameter, master in pairs:
                parameter.copy_(master)
                master.grad = None

    def rest(self) -> None:
        self._optimizer, self._masters = None, []
        for parameter in self.module.parameters():
            parameter.grad = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast")


def _outputs(module: nn.Module, batch: dict[str, Tensor], precision: str, device: torch.device) -> dict[str, Tensor]:
    """Logits of the first images of a batch, and the gradient of their cross entropy with respect to the images."""
    module.eval()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images = batch["images"][:COMPARED_IMAGES].to(device, dtype).requires_grad_()
    with _autocast(precision, device):
        logits = module(images).float()
    loss = F.cross_entropy(logits, batch["labels"][:COMPARED_IMAGES].to(device))
    (gradient,) = torch.autograd.grad(loss, images)
    return {"logits": logits.detach().cpu(), "image gradients": gradient.float().cpu()}


def _relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.to(found.device)
    return ((found - expected).norm() / expected.norm()).item()


def _resident(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else _status_gib("VmRSS")


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else _status_gib("VmHWM")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(field + ":"))
