"""Sound: WAV, FLAC and Ogg files by soundfile, as waveforms or log-mel spectrograms."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.items import CUT_SHORT, Context, FileItem, Image, Item, Region, at_spacing
from torchmae.errors import DataError, require

_MISSING = re.compile(r"^data : (\d+) \(should be \d+\)", re.MULTILINE)  # in libsndfile's words on a WAV file
_WINDOW_S, _HOP_S = 0.025, 0.01  # of a spectrogram, in seconds
_FRAMES = 256  # whose spectra are in memory at a time
_SILENCE = 1e-10  # the smallest power, before the logarithm
_UNKNOWN_LENGTH = 2**31 - 2**16  # bytes, or more: written by programs that cannot go back to the header


class SoundItem(FileItem):
    """A recording, (samples,) with its channels: float32, full scale is 1. `meta` has the "rate" in hertz."""

    def __init__(self, file: bytes | Path, context: Context) -> None:
        self._file = file
        sound = self._handle()
        stated = _MISSING.search(sound.extra_info)
        if stated and int(stated[1]) < _UNKNOWN_LENGTH:
            raise DataError(f"{CUT_SHORT}: the file ends before its samples do")
        meta = {"rate": sound.samplerate, "spacing": (1 / sound.samplerate,)}
        super().__init__((sound.frames,), sound.channels, np.float32, context, form=sound.format, meta=meta)

    def _open(self) -> Any:
        file = os.path.abspath(self._file) if isinstance(self._file, Path) else io.BytesIO(self._file)  # noqa: PTH100
        return require("soundfile", "audio").SoundFile(file)

    def _take(self, region: Region) -> Image:
        ((start, length),) = region
        sound, self._held = self._handle(), None  # used once: after its end, an Ogg file cannot be sought in
        sound.seek(start)
        values: Image = sound.read(length, dtype="float32", always_2d=True)
        return values


class SpectrogramItem(FileItem):
    """The log-mel spectrogram of a recording, (bands, frames) with its channels; `meta` is the recording's.

    Natural logarithm of the power, but 1e-10 at least, in triangular bands (HTK's mel scale, 0 to half the rate) of
    Hann windows of 25 ms every 10 ms, none of them padded unless the recording is shorter than one.
    """

    def __init__(self, sound: Item, bands: int, context: Context) -> None:
        self._sound, rate = sound, sound.meta["rate"]
        self._window, self._hop = np.hanning(max(2, round(_WINDOW_S * rate)) + 1)[:-1], max(1, round(_HOP_S * rate))
        self._length = 2 ** (2 * len(self._window) - 1).bit_length()  # of the transform, filled up with zeros
        self._filters = mel_filters(bands, self._length, rate)
        if not self._filters.any(axis=1).all():
            raise DataError(f"{bands} mel bands are too many for {rate} Hz", "give a smaller data.spectrogram")
        frames = 1 + max(0, sound.size[0] - len(self._window)) // self._hop
        meta = {**sound.meta, "spacing": (1.0, self._hop / rate)}
        super().__init__((bands, frames), sound.channels, np.float32, context, form="spectrogram", meta=meta)

    def _take(self, region: Region) -> Image:
        (low, bands), (first, frames) = region
        length = min((frames - 1) * self._hop + len(self._window), self._sound.size[0])
        samples = self._sound.read(((first * self._hop, length),))
        samples = np.pad(samples, ((0, max(0, len(self._window) - length)), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(samples, len(self._window), axis=0)[:: self._hop]
        values = np.empty((bands, frames, self.channels), np.float32)
        for at in range(0, frames, _FRAMES):
            spectrum = np.fft.rfft(windows[at : at + _FRAMES] * self._window, self._length)
            energy = np.abs(spectrum) ** 2 @ self._filters[low : low + bands].T  # (frames, channels, bands)
            values[:, at : at + _FRAMES] = np.log(np.maximum(energy, _SILENCE)).transpose(2, 0, 1)
        return values


def mel_filters(bands: int, length: int, rate: float) -> Image:
    """(bands, length // 2 + 1) weights of the frequencies of a spectrum: triangles, evenly spaced on the mel scale."""
    hertz = 700 * (10 ** (np.linspace(0, np.log10(1 + rate / 2 / 700), bands + 2)) - 1)
    low, middle, high = (edges[:, None] for edges in np.lib.stride_tricks.sliding_window_view(hertz, bands))
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    return np.maximum(0, np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)))


def open_sound(file: bytes | Path, context: Context) -> Item:
    """A waveform, or with `context.spectrogram` its spectrogram."""
    sound = SoundItem(file, context)
    if context.spectrogram is None:
        return sound
    return SpectrogramItem(at_spacing(sound, replace(context, clip=None)), context.spectrogram, context)
