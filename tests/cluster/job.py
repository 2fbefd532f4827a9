"""`python -m torchmae` for tests: without pictures at the end; while the file SLOW_STEPS exists, steps are slow."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from torchmae import runs
from torchmae.cli import main
from torchmae.training import trainer

step, slow = trainer.train_step, Path(os.environ["SLOW_STEPS"])


def train_step(*args: Any) -> trainer.Step:
    if slow.exists():
        time.sleep(1)
    return step(*args)


trainer.train_step = train_step
runs.write_pictures = lambda *_: None
sys.exit(main())
