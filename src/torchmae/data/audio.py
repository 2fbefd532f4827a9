"""Sound: WAV, FLAC and Ogg files by soundfile, as waveforms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.formats import CUT_SHORT, Context, FileItem, Image, Region, opened
from torchmae.errors import DataError, require

_MISSING = re.compile(r"^data : (\d+) \(should be \d+\)", re.MULTILINE)  # in libsndfile's words on a WAV file
_UNKNOWN_LENGTH = 2**31 - 2**16  # bytes, or more: written by programs that cannot go back to the header


class SoundItem(FileItem):
    """A recording, (samples,) with its channels: float32, full scale is 1. `meta` has the "rate" in hertz."""

    def __init__(self, file: bytes | Path, context: Context) -> None:
        self._file = file
        with self._sound() as sound:
            stated = _MISSING.search(sound.extra_info)
            if stated and int(stated[1]) < _UNKNOWN_LENGTH:
                raise DataError(f"{CUT_SHORT}: the file ends before its samples do")
            meta = {"rate": sound.samplerate, "spacing": (1 / sound.samplerate,)}
            super().__init__((sound.frames,), sound.channels, np.float32, context, form=sound.format, meta=meta)

    @contextmanager
    def _sound(self) -> Iterator[Any]:
        with opened(self._file) as stream, require("soundfile", "audio").SoundFile(stream) as sound:
            yield sound

    def _take(self, region: Region) -> Image:
        ((start, length),) = region
        with self._sound() as sound:
            sound.seek(start)
            values: Image = sound.read(length, dtype="float32", always_2d=True)
        return values
