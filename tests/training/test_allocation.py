from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from torchmae.training.runtime import callers_state, keep_freed_memory

def faults(values=2**24, times=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(values).fill_(0)  # 64 MiB or more, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
with callers_state():
    kept = keep_freed_memory()
    faults()
    tuned = faults()
print(int(kept), usual, tuned, faults(2**26, 5))  # too large for a hole that the tuned heap has left
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")


def run(**environment: str) -> tuple[int, int, int, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    printed = subprocess.run(
        [sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=clean | environment
    ).stdout
    kept, usual, tuned, after = map(int, printed.split())
    return kept, usual, tuned, after


@glibc
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    kept, usual, tuned, after = run()
    assert kept == 1
    assert usual > 100  # huge pages or not
    assert tuned < usual / 4
    assert after > usual / 2  # as the caller had it: as many bytes, each time from the system


@glibc
def test_an_allocator_that_the_environment_tunes_is_left_alone() -> None:
    kept, usual, tuned, _ = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == 0
    assert tuned > usual / 2
