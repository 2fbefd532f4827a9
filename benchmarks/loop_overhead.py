"""How much of a training run is not forward pass, backward pass or optimiser step.

    python benchmarks/loop_overhead.py --data PATH [--recipe cifar10] [--steps 60] [--batch-size 256] [OPTIONS]

Runs the real loop on real images and times, within it, what the model and the optimisers do; the rest is reading,
augmenting, drawing masks, logging and Python. Further options go to the settings as in `torchmae pretrain`
(`--model.depth 12`, say). Evaluation and checkpoints are left out: they come a few times a run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from torchmae import settings
from torchmae.config import PretrainConfig
from torchmae.data.loader import open_data
from torchmae.nn import presets
from torchmae.training import pretrain as loop
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import environment, open_runtime
from torchmae.training.tracking import open_trackers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10)
    args, rest = parser.parse_known_args()
    config = settings.parse([f"--data={args.data}", "--progress=none", *rest], args.recipe)
    print(measure(config, args.steps, args.warm_up))


def measure(config: PretrainConfig, steps: int, warm_up: int) -> str:
    """Trains for `warm_up + steps` steps and says where the time of the last `steps` went."""
    runtime = open_runtime(config.device, config.precision, config.threads)
    overrides = {name: value for name, value in vars(config.model).items() if name != "preset"}
    arguments = presets.arguments(config.model.preset, **overrides)
    data = open_data(
        config.data, input_size=arguments["input_size"], channels=config.model.in_chans, device=runtime.device
    )
    model = presets.construct({**arguments, "in_chans": data.channels}).to(runtime.device)
    inside: list[float] = []
    ended: list[float] = []
    original = loop.train_step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        ended.append(time.perf_counter())
        inside.append(ended[-1] - start)
        if len(inside) == warm_up + steps:
            raise StopIteration
        return result

    loop.train_step = timed_step
    with tempfile.TemporaryDirectory() as place, open_trackers(Path(place) / "m.jsonl", Path(place) / "tb") as tracker:
        try:
            loop.pretrain(
                config,
                model=model,
                loader=data.train,
                fingerprint=data.fingerprint,
                runtime=runtime,
                folder=RunFolder(Path(place)),
                tracker=tracker,
                display=Display("none"),
            )
        except StopIteration:
            pass
        finally:
            loop.train_step = original
    total = ended[-1] - ended[warm_up - 1]
    work = sum(inside[warm_up:])
    versions = environment(runtime)
    return (
        f"{versions['processor']}, {runtime.threads} threads, {runtime.precision}, torch {versions['torch']}\n"
        f"{config.recipe}, batch {config.batch_size}: {steps} steps in {total:.1f} s "
        f"({steps * config.batch_size / total:.0f} images/s)\n"
        f"forward, backward, optimiser: {work:.2f} s ({work / total:.1%})\n"
        f"everything else:              {total - work:.2f} s ({1 - work / total:.1%})"
    )


if __name__ == "__main__":
    main()
