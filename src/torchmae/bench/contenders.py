"""A contender: the training step of torchmae, or of others' code, on the same images; here or in its own process."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchmae import presets
from torchmae.bench.peers import PEERS, use_timm_blocks
from torchmae.building import overrides, pretrain_settings
from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError
from torchmae.machine import wait_as_usual, wait_briefly
from torchmae.nn.masking import Masker, num_keep
from torchmae.training.pretrain_task import PretrainTask
from torchmae.training.runtime import Runtime, environment, open_runtime
from torchmae.training.trainer import ran_out_of_memory, train_step

OURS = "torchmae"
TIMM_BLOCKS = "timm-blocks"
PHASES = ("mask", "forward", "backward", "optimiser")

_WARM_UP_STEPS = 3
_TURN_S = 1.0
_STATUS = Path("/proc/self/status")


@dataclass
class Contender:
    """A network, and a training step on one batch that stays on the device."""

    model: nn.Module
    task: Any  # has the `forward` and the `optimizers` that a step calls
    run: Callable[[], Tensor]  # does one step and returns the loss, a scalar on the device, without waiting for it
    runtime: Runtime
    arguments: dict[str, Any]  # of torchmae's network
    images: Tensor  # (B, C, *size)
    _memory_before: int = field(init=False)

    def __post_init__(self) -> None:
        gc.collect()
        held = [self.images, *self.model.parameters(), *self.model.buffers()]
        self._memory_before = _status().get("RssAnon", 0) - sum(tensor.nbytes for tensor in held)

    def first_steps(self) -> dict[str, Any]:
        """Runs the first steps, which compile and allocate; returns their figures and what the contender is."""
        first = seconds_of(self.run, 1, self.runtime.device)
        seconds_of(self.run, _WARM_UP_STEPS - 1, self.runtime.device)
        return {
            "first_step_s": first,
            "peak_memory": self.peak_memory(),
            "precision": self.runtime.precision,
            "arguments": self.arguments,
            "shape": tuple(self.images.shape),
            "environment": environment(self.runtime),
        }

    def peak_memory(self) -> int | None:
        """Bytes that training takes at its peak: weights, gradients, the optimiser's state, a batch, activations.

        On CUDA, what PyTorch's allocator has given out at most. On a processor, the largest resident size of this
        process, which does nothing else, less what interpreter and libraries held before the first step; files mapped
        into memory do not count. None where that cannot be measured (another system than Linux).
        """
        if self.runtime.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.runtime.device)
        now = _status()
        return now["VmHWM"] - now["RssFile"] - now["RssShmem"] - self._memory_before if now else None

    def turn(self, steps: int | None) -> float:
        """Images a second over some steps (None: about a second), after one warm-up step."""
        device = self.runtime.device
        step_s = seconds_of(self.run, 1, device)
        steps = steps or max(1, round(_TURN_S / step_s))
        return len(self.images) / seconds_of(self.run, steps, device)

    def matrix_product_rate(self, rows: int | None = None) -> float:
        """Floating-point operations a second of one large square matrix product, where the contender computes.

        By default it has `rows` enough to fill the device, and on a processor takes no more than about a second.
        """
        device, small = self.runtime.device, 256
        if rows is None:
            rows = 8192 if device.type == "cuda" else 2048
            while device.type == "cpu" and rows > small and 2 * rows**3 > self.matrix_product_rate(small):
                rows //= 2
        dtype = torch.bfloat16 if self.runtime.precision == "bf16" else torch.float32
        a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        product()
        return 2 * rows**3 / seconds_of(product, 10 if device.type == "cuda" else 2, device)

    def shares(self) -> dict[str, float]:
        """The share of each of `PHASES` in the time of a few steps, synchronised after each part; the sum is 1.

        "mask" is all before the first forward pass; "backward" includes gradient norm and clipping.
        """
        seconds, forward = dict.fromkeys(PHASES, 0.0), self.task.forward
        phase, since = "", 0.0

        def enter(next_phase: str) -> None:
            nonlocal phase, since
            synchronise(self.runtime.device)
            now = time.perf_counter()
            if phase:
                seconds[phase] += now - since
            phase, since = next_phase, now

        def timed(*inputs: Any) -> Any:
            enter("forward")
            output = forward(*inputs)
            enter("backward")
            return output

        self.task.forward = timed
        hooks = [item.register_step_pre_hook(lambda *_: enter("optimiser")) for item in self.task.optimizers]
        try:
            for _ in range(_WARM_UP_STEPS):
                enter("mask")
                self.run()
            enter("")
        finally:
            self.task.forward = forward
            for hook in hooks:
                hook.remove()
        total = sum(seconds.values())
        return {name: value / total for name, value in seconds.items()}


def model_arguments(config: PretrainConfig) -> dict[str, Any]:
    """The full arguments of a run's network."""
    return presets.arguments(config.model.preset, **overrides(config))


def build(code: str, config: PretrainConfig) -> Contender:
    """The contender `code`: OURS, TIMM_BLOCKS (torchmae's step with timm's blocks in its network) or a key of `PEERS`.

    ConfigError: sizes that do not fit together or that the peer does not have, or a peer that is not installed.
    """
    runtime = open_runtime(config.device, config.precision, config.threads, keep_memory=code not in PEERS)
    arguments = model_arguments(config)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, arguments["in_chans"], *arguments["input_size"])
    images = torch.randn(shape, generator=generator).to(runtime.device)
    torch.manual_seed(config.seed)
    check_equal(config, arguments, code)
    if code not in PEERS:
        ours = presets.construct(arguments)
        if code == TIMM_BLOCKS:
            use_timm_blocks(ours, arguments["mlp_ratio"])
        ours = ours.to(runtime.device).train()
        task = PretrainTask(pretrain_settings(config, ours), ours, runtime, config.batch_size)
        masker, epochs = Masker(ours.encoder, config.mask.strategy, config.mask.ratio), count()

        def run() -> Tensor:
            mask = masker(config.seed, next(epochs), np.arange(len(images)), runtime.device)  # other masks each time
            return train_step(task, (images, mask)).loss

        return Contender(ours, task, run, runtime, arguments, images)
    # As their users run them.
    runtime = replace(runtime, precision="bf16" if runtime.device.type == "cuda" else "fp32")
    model = PEERS[code](peer_sizes(config, arguments)).to(runtime.device).train()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optim.base_lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    theirs = SimpleNamespace(forward=model, optimizers=[optimizer])

    def run_peer() -> Tensor:
        with runtime.autocast():
            loss: Tensor = theirs.forward(images)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(model, theirs, run_peer, runtime, arguments, images)


def check_equal(config: PretrainConfig, arguments: dict[str, Any], code: str) -> None:
    """ConfigError where a contender's code cannot do the same as torchmae's."""
    unlike = {
        "model.preset": "num_heads" not in arguments,
        "model.decoder": arguments.get("decoder", "self") != "self",
        "model.registers": bool(arguments.get("registers")),
        "model.class_token": not arguments.get("class_token", True),
        "model.drop_path": arguments.get("drop_path", 0) != 0,
        "model.input_size": len(set(arguments["input_size"])) != 1 or len(arguments["input_size"]) != 2,
        "model.patch_size": len(set(arguments.get("patch_size", (1,)))) != 1,
        "mask.strategy": config.mask.strategy != "random",
    }
    needed = {OURS: (), TIMM_BLOCKS: ("model.preset", "model.decoder")}.get(code, tuple(unlike))
    for name in (name for name in needed if unlike[name]):
        raise ConfigError(f"{code} has no equal of this {name}", f"leave out --against {code}, or change {name}")


def peer_sizes(config: PretrainConfig, arguments: dict[str, Any]) -> SimpleNamespace:
    """torchmae's arguments, with the pixels of one side as `input_size` and `patch_size`, and `mask_ratio`."""
    size, patch = arguments["input_size"][0], arguments["patch_size"][0]
    length = (size // patch) ** 2
    # They keep int(L (1 - r)) patches; a ratio half a patch lower makes that our number for any r.
    ratio = 1 - (num_keep(length, config.mask.ratio) + 0.5) / length
    return SimpleNamespace(**(arguments | {"input_size": size, "patch_size": patch, "mask_ratio": ratio}))


def _status() -> dict[str, int]:
    """The bytes in the kernel's account of this process; none where it keeps no such account."""
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines() if _STATUS.exists() else []
    fields = [line.split() for line in lines]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1:] == ["kB"]}


@contextmanager
def process_of(code: str, config: PretrainConfig) -> Iterator[Callable[..., Any]]:
    """Yields a function that calls a method of a `Contender`, by name, in another process.

    torchmae's process has the threads that `torchmae` gives itself, a peer's those that torch gives its users. The
    first call raises the errors of `build`; a batch that does not fit into memory is a ConfigError too.
    """
    spawn = get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, code, config), daemon=True)
    environment = dict(os.environ)
    (wait_as_usual if code in PEERS else wait_briefly)(os.environ)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    theirs.close()

    def call(name: str, *arguments: Any) -> Any:
        try:
            pipe.send((name, arguments))
            answer = pipe.recv()
        except (EOFError, OSError):  # the kernel has killed it
            raise _too_large(config) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield call
    finally:
        pipe.close()
        process.terminate()
        process.join()


def _serve(pipe: Connection, code: str, config: PretrainConfig) -> None:
    """Answers calls, with the error where one is raised, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's
    contender = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            contender = contender or build(code, config)
            pipe.send(getattr(contender, name)(*arguments))
        except Exception as error:
            pipe.send(_too_large(config) if ran_out_of_memory(error) else error)


def _too_large(config: PretrainConfig) -> ConfigError:
    return ConfigError(f"batches of {config.batch_size} do not fit into memory", "lower batch_size")


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean wall-clock seconds of `work`, done `times` times, waiting for the device before and after all of them."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / times
