"""`python -m torchmae` for tests: without pictures at the end, and a step takes the seconds in the file SLOW_STEPS."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchmae import runs
from torchmae.cli import main
from torchmae.training import trainer

step, slow = trainer.train_step, Path(os.environ["SLOW_STEPS"])


def train_step(*args: Any) -> trainer.Step:
    with suppress(FileNotFoundError):
        time.sleep(float(slow.read_text()))
    return step(*args)


trainer.train_step = train_step
runs.write_pictures = lambda *_: None
sys.exit(main())
