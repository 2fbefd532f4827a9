"""What images come from: arrays and encoded files behind one small protocol."""

from __future__ import annotations

import copy
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from torchmae.data.decode import check_channels, decode
from torchmae.data.strings import Strings, pack_strings
from torchmae.errors import ConfigError, DataError

Image = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]

MAX_BYTES = 512 * 2**20
"""Largest image file that is read: as many bytes as a hundred million pixels seldom take."""

_SIZES_ASKED = 10_000


class Source(Protocol):
    """Images in a fixed order, with labels where there are any.

    Attributes:
        labels: (N,), -1 where unknown; None where nothing has a label.
        classes: the name of each label, where known.
    """

    labels: Labels | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: int) -> Image:
        """(*size, C) uint8, uint16 or float32, an array of the caller's own; DataError, naming it, if unreadable."""

    def name(self, index: int) -> str:
        """Where an image is from, for messages: a path, or "digits/17"."""

    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when images are added, removed, renamed or replaced."""

    def with_channels(self, channels: int) -> Source:
        """The same images read with so many channels; ConfigError where that cannot be."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that is faster when it knows what will be wanted next."""

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        """Starts to bring these images near; returns at once, and fails for none of them."""


def read_ahead(source: Source, indices: npt.NDArray[np.int64]) -> None:
    """Tells a source which images will be read next; of no effect where they are at hand."""
    while isinstance(source, Subset):
        indices = source.indices[indices]
        source = source.source
    if isinstance(source, ReadsAhead):
        source.read_ahead(indices)


def resolve(source: Source, index: int) -> tuple[Source, int]:
    """The source that an image of subsets of subsets is in the end read from, and its index there."""
    while isinstance(source, Subset):
        index = int(source.indices[index])
        source = source.source
    return source, index


def digest(parts: Iterable[object]) -> str:
    """32 hexadecimal digits of the texts (or bytes, or contiguous arrays) of `parts`, the same on every machine."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        is_plain = isinstance(part, (bytes, bytearray, np.ndarray))
        state.update(part if is_plain else str(part).encode("utf-8", "backslashreplace"))  # type: ignore[arg-type]
        state.update(b"\0")
    return state.hexdigest()


def spread(length: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` different indices below `length`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


class ArraySource:
    """Images in one array.

    Args:
        images: (N, *size, C) or, without a channel axis, (N, *size); bool, uint8, uint16 or floats.
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        title: what to call the images in messages.
        spatial_dims: how many axes are spatial, 1 to 3; None: (N, L), (N, H, W), (N, H, W, C), (N, D, H, W, C).
        file: a .npy file that `images` is mapped from: worker processes map it again instead of copying it.

    Raises:
        DataError: an array that is no set of images, with the way to make it one.
        ConfigError: its shape does not have `spatial_dims` spatial axes.
    """

    def __init__(
        self,
        images: Image,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        *,
        title: str = "array",
        spatial_dims: int | None = None,
        file: Path | None = None,
    ) -> None:
        check_type(images.dtype, title)
        dims = spatial_axes(images.shape, spatial_dims, title)
        self.images = images if images.ndim == dims + 2 else images[..., None]
        self.labels = None if labels is None else checked_labels(labels, len(images), title)
        self.classes = None if classes is None else tuple(classes)
        self._title = title
        self._file = file

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image:
        """(*size, C): bool becomes uint8 0 and 255, any float float32."""
        return plain_type(self.images[index])

    def name(self, index: int) -> str:
        """The title and the index."""
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """Of shape, type and the content of 64 images."""
        sample = self.images[spread(len(self), 64)]
        return digest([self.images.shape, self.images.dtype, np.ascontiguousarray(sample).tobytes()])

    def with_channels(self, channels: int) -> ArraySource:
        """The source itself; ConfigError where `channels` is not what the array has."""
        have = self.images.shape[-1]
        if channels != have:
            raise ConfigError(
                f"{self._title} has {have} channels and the model takes {channels}",
                f"set model.in_chans to {have}, or leave it out",
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._file is not None:
            state["images"] = self.images.shape
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file is not None:
            self.images = map_array(self._file).reshape(state["images"])


def check_type(dtype: np.dtype[Any], title: str) -> None:
    """DataError unless images can be of this type."""
    if dtype.kind not in "bf" and dtype not in (np.uint8, np.uint16):
        raise DataError(f"{title} holds {dtype}", "save uint8 (0 to 255), uint16 (0 to 65535) or floats (0 to 1)")


def plain_type(image: Image) -> Image:
    """A copy of an image in a type that a source may give: bool becomes uint8 0 and 255, any float float32."""
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite, and found to be so later
        return image.astype(np.float32 if image.dtype.kind == "f" else image.dtype.newbyteorder("="))


def map_array(path: Path) -> Image:
    """Maps a .npy file into memory; nothing is read before it is used, and writing does not reach the file."""
    try:
        array: Image = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # a damaged header fails as NumPy's parser, or the memory it asks for, sees fit
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError) and (" at 0x" in reason or not isinstance(error, (ValueError, EOFError))):
            reason = "its header is damaged"
        raise DataError(f"cannot read {path}: {reason}", "save one numeric array with numpy.save") from error
    return array


def unpacked_bytes(arrays: Any, names: Iterable[str] | None = None) -> int:
    """Bytes that arrays of an opened .npz file take in memory, as it says itself; no more are ever read from it.

    Args:
        arrays: as numpy.load gives them.
        names: which of them; None: all.
    """
    wanted = set(arrays.files if names is None else names)
    return sum(item.file_size for item in arrays.zip.infolist() if item.filename.removesuffix(".npy") in wanted)


def spatial_axes(shape: tuple[int, ...], given: int | None, title: str) -> int:
    """How many axes of an array of images are spatial, as `ArraySource` says; DataError when it looks like none."""
    dims = given if given is not None else {2: 1, 3: 2, 4: 2, 5: 3}.get(len(shape), 0)
    if dims == 0 or len(shape) not in (dims + 1, dims + 2):
        form = "it should be (images, *size) or (images, *size, channels)"
        if given is None:
            raise DataError(f"{title} has shape {shape}", f"{form} with 1 to 3 numbers in size")
        raise ConfigError(
            f"{title} has shape {shape}, which does not fit the {given} numbers of model.input_size",
            f"{form} with as many numbers in size as model.input_size has",
        )
    if 0 in shape:
        raise DataError(f"{title} has shape {shape}: it is empty", "save at least one image")
    if len(shape) == dims + 2 and shape[1] <= 16 < shape[-1] and shape[1] < shape[2]:
        raise DataError(
            f"{title} has shape {shape}, which looks like channels first", "save numpy.moveaxis(images, 1, -1) instead"
        )
    return dims


def checked_labels(labels: npt.ArrayLike, count: int, title: str) -> Labels:
    """Labels as (N,) int64, a second axis of length 1 taken off; DataError unless they are `count` integers."""
    array = np.asarray(labels)
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise DataError(
            f"the labels of {title} have shape {array.shape} and type {array.dtype}",
            f"they should be {count} integers, one an image, -1 where unknown",
        )
    return array.astype(np.int64, copy=False)


class EncodedSource(ABC):
    """Images that are stored as the bytes of image files and decoded when they are read.

    Args:
        channels: 1 or 3; None: what each image has.
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        title: what to call the images in messages.
    """

    def __init__(
        self,
        length: int,
        labels: npt.ArrayLike | None,
        classes: Sequence[str] | None,
        channels: int | None,
        title: str,
    ) -> None:
        self.channels = check_channels(channels)
        self.labels = None if labels is None else checked_labels(labels, length, title)
        self.classes = None if classes is None else tuple(classes)
        self._length = length

    def __len__(self) -> int:
        return self._length

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of an image file; DataError with the reason, without the name, where they cannot be had."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where an image is from."""

    @abstractmethod
    def fingerprint(self) -> str:
        """As in `Source`."""

    def read(self, index: int) -> Image:
        """(H, W, C), as `decode` gives it."""
        try:
            return decode(self.encoded(index), self.channels)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    def with_channels(self, channels: int) -> Self:
        """The same images, all decoded to 1 or 3 channels."""
        same = copy.copy(self)
        same.channels = check_channels(channels)
        return same


class FileSource(EncodedSource):
    """Image files.

    Args:
        root: the folder that `names` are relative to.
        names: paths of the files, with "/".
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        channels: 1 or 3; None: what each file has.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str] | Strings,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__(len(names), labels, classes, channels, str(root))
        self._root = root
        self._names = names if isinstance(names, Strings) else pack_strings(os.fsencode(name) for name in names)

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._names[index])

    def encoded(self, index: int) -> bytes:
        """The content of the file."""
        try:
            path = self._path(index)
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would block, a device never end
                raise DataError("no regular file")
            with path.open("rb") as file:
                return check_size(file.read(MAX_BYTES + 1))
        except (OSError, ValueError) as error:  # ValueError: a null byte in a path
            raise DataError(getattr(error, "strerror", None) or str(error)) from None

    def name(self, index: int) -> str:
        """The path of the file."""
        return printable(os.fsencode(self._path(index)))

    def fingerprint(self) -> str:
        """Of the names of all files, and the sizes of 10,000 at most: on a network, a million take minutes."""
        sizes = (file_size(self._path(int(i))) for i in spread(len(self), _SIZES_ASKED))
        return digest([*self._names.parts, *sizes])


def printable(name: bytes) -> str:
    """A name as one line of text: what is not printable (line ends, a terminal's escape codes) is escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_size(raw: bytes) -> bytes:
    """Returns the bytes of an image file; DataError when there are more than MAX_BYTES."""
    if len(raw) > MAX_BYTES:
        raise DataError(f"the file has more than {MAX_BYTES // 2**20:,} MiB")
    return raw


def file_size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


class Subset:
    """Some of a source's images.

    Args:
        source: the images.
        indices: (M,) which of them, in this order.
        labels: (M,) labels to put in place of the source's own.
        classes: the names of `labels`; only with them.
    """

    def __init__(
        self,
        source: Source,
        indices: npt.NDArray[np.int64],
        labels: Labels | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        own = None if source.labels is None else source.labels[indices]
        self.labels = own if labels is None else labels
        self.classes = source.classes if labels is None else classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image:
        """The source's."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """The source's."""
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Of the source's and the indices."""
        return digest([self.source.fingerprint(), np.ascontiguousarray(self.indices)])

    def with_channels(self, channels: int) -> Subset:
        """The same subset of the source with `channels`."""
        same = copy.copy(self)
        same.source = self.source.with_channels(channels)
        return same
