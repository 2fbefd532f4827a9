"""Video: clips by PyAV, which brings FFmpeg along."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import opened
from torchmae.data.items import Context, FileItem, Image, Region, check_pixels
from torchmae.errors import DataError, require

# FFmpeg's reader of each container. It is named, never guessed: playlists, which lead to other files, stay unread.
_CONTAINERS = {
    rb"GIF8": "gif",
    rb"RIFF": "avi",
    rb"\x1a\x45": "matroska",
    rb"\0\0\x01\xba": "mpeg",
    rb"\0\0\x01\xb3": "mpegvideo",
    rb"": "mov",
}
_MAX_FRAMES = 1_000_000


class _Facts(NamedTuple):
    """What is known of a clip once its packets were listed."""

    frames: int
    sides: tuple[int, int]
    times: npt.NDArray[np.int64] | None  # of each frame, rising; None: frames have to be counted
    keys: npt.NDArray[np.int64]  # times of key frames, rising
    pixels: str  # FFmpeg's name of the format that frames are given in
    fps: float
    notes: tuple[str, ...]


@contextmanager
def _video(source: bytes | Path, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The opened container and its first video stream."""
    with opened(source) as file:
        head = file.read(16)
        file.seek(0)
        name = next(name for magic, name in _CONTAINERS.items() if re.match(magic, head))
        with require("av", "video").open(file, format=name, options={"protocol_whitelist": ""}) as container:
            if not container.streams.video:
                raise DataError("it holds no video")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
            yield container, stream


def _look(source: bytes | Path, max_pixels: int) -> _Facts:
    first, packets = None, []
    with _video(source, max_pixels) as (container, stream):
        coded = stream.codec_context.height, stream.codec_context.width
        check_pixels(coded, Context(max_megapixels=max_pixels / 1e6))
        for packet in container.demux(stream):
            if packet.size:
                packets.append((packet.pts, packet.is_keyframe))
            if first is None:
                first = next(iter(packet.decode()), None)
            if len(packets) > _MAX_FRAMES:
                raise DataError(f"it has more than {_MAX_FRAMES:,} frames", "cut it into shorter clips")
        if first is None:
            raise DataError("no frame of it can be decoded")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        notes = [f"video stream 1 of {n}"] if (n := len(container.streams.video)) > 1 else []
    if (bits := max(part.bits for part in first.format.components)) > 8:
        notes.append(f"{bits} bits read as 8")
    times = np.array(sorted({time for time, _ in packets if time is not None}), dtype=np.int64)
    keys = np.array(sorted(time for time, is_key in packets if is_key and time is not None), dtype=np.int64)
    turned = round(first.rotation / 90) % 2
    sides = (first.width, first.height) if turned else (first.height, first.width)
    pixels = "gray" if first.format.name.startswith(("gray", "mono")) else "rgb24"
    return _Facts(len(packets), sides, times if len(times) == len(packets) else None, keys, pixels, fps, tuple(notes))


@lru_cache(maxsize=128)  # windows of one clip follow each other, or come again in the next epoch
def _known(path: Path, mtime_ns: int, size: int, max_pixels: int) -> _Facts:  # noqa: ARG001
    return _look(path, max_pixels)


class ClipItem(FileItem):
    """A clip, (frames, height, width): RGB, or grey where the video is. `meta` has "fps".

    Its packets are listed when it is opened; a region is decoded from the last key frame before it on.
    """

    def __init__(self, file: bytes | Path, context: Context) -> None:
        self._file, self._max_pixels = file, context.max_pixels
        if isinstance(file, Path):
            status = file.stat()
            facts = _known(file, status.st_mtime_ns, status.st_size, self._max_pixels)
        else:
            facts = _look(file, self._max_pixels)
        self._times, self._keys, self._pixels = facts.times, facts.keys, facts.pixels
        check_pixels(facts.sides, context)
        meta = {"fps": facts.fps, "spacing": (1 / facts.fps, 1.0, 1.0)} if facts.fps else {}
        channels = 1 if self._pixels == "gray" else 3
        super().__init__(
            (facts.frames, *facts.sides), channels, np.uint8, context, form="video", notes=facts.notes, meta=meta
        )

    def _upright(self, frame: Any) -> Image:
        """(height, width, channels) of a frame, turned as the file says."""
        image = frame.to_ndarray(format=self._pixels).reshape(frame.height, frame.width, -1)
        return np.rot90(image, round(frame.rotation / 90))

    def _take(self, region: Region) -> Image:
        start, length = region[0]
        keys: list[int] = []
        if self._times is not None:
            keys = self._keys[: bisect_right(self._keys, self._times[start])].tolist()
        for key in (*keys[-1:], None) if len(keys) > 1 else (None,):
            values, seen = self._decode(region, key)  # some containers find a place only roughly, and miss frames
            if seen.all():
                return values
        raise DataError(f"{int((~seen).sum())} of {length} frames cannot be decoded")

    def _decode(self, region: Region, key: int | None) -> tuple[Image, npt.NDArray[np.bool_]]:
        """The values of a region, and which of its frames were found, from the key frame at a time on (None: all)."""
        (start, length), *sides = region
        crop = tuple(slice(first, first + side) for first, side in sides)
        values = np.empty((length, *(side for _, side in sides), self.channels), np.uint8)
        seen = np.zeros(length, dtype=bool)
        with _video(self._file, self._max_pixels) as (container, stream):
            if key is not None:
                container.seek(key, stream=stream)
            for number, frame in enumerate(container.decode(stream)):
                place = number if self._times is None else bisect_right(self._times, frame.pts) - 1
                if place >= start + length:
                    break
                if place >= start:
                    image = self._upright(frame)
                    if image.shape[:2] != self.size[1:]:
                        raise DataError("the size of its frames changes")
                    values[place - start] = image[crop]
                    seen[place - start] = True
                if place == start + length - 1 and seen.all():
                    break
        return values, seen
