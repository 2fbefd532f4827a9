"""Data sets of the Hugging Face `datasets` library: names on the hub, and folders that it can load."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.formats import Context
from torchmae.data.parquet import label_values
from torchmae.data.sources import EncodedSource, FileSource, Source, check_size, digest
from torchmae.errors import ConfigError, DataError

HUB_PREFIX = "hf:"
"""What a data source of this kind begins with: hf:user/name, hf:user/name:configuration, hf:./folder."""

_LABEL_COLUMNS = ("label", "labels", "fine_label")
_LABEL_TYPES = r"u?int\d+|float\d+|(large_)?string"


class HubSource(EncodedSource):
    """Images of one split, in its order; mapped into memory from the library's own cache.

    Args:
        rows: a `datasets.Dataset` whose column `image` is not decoded.
        image: the column of images.
        label: the column of labels, if there is one.
        title: what to call the images in messages.
        folders: the only folders, beside that of the table, that a table may name files in; links in them are followed.
        context: how the images are read.
    """

    def __init__(
        self, rows: Any, image: str, label: str | None, title: str, folders: Sequence[Path], context: Context
    ) -> None:
        labels = None
        if label is not None:
            column = label_values(rows.data.column(label))
            indices = getattr(rows, "_indices", None)
            labels = column if indices is None else column[indices.column(0).to_numpy()]
        names = getattr(rows.features[label], "names", None) if label is not None else None
        super().__init__(len(rows), labels, names, context)
        self._rows = rows.select_columns([image])
        self._image = image
        self._title = title
        tables = [Path(file["filename"]).parent for file in rows.cache_files[:1]]
        self._folders = {place for path in (*folders, *tables) for place in (_normal(path), path.resolve())}

    def encoded(self, index: int) -> bytes:
        """The bytes in the table, or those of the file that it names."""
        cell: dict[str, Any] = self._rows[index][self._image] or {}
        if cell.get("bytes"):
            return check_size(bytes(cell["bytes"]))
        if not cell.get("path"):
            raise DataError("the table holds no bytes for it")
        path = _normal(cell["path"])
        if not any(path.is_relative_to(folder) for folder in self._folders):
            raise DataError(f"the table names {path}, which lies outside of its folder")
        return FileSource(path.parent, [path.name]).encoded(0)

    def name(self, index: int) -> str:
        """The data set, the split and the row."""
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """The library's own, of the data and of all that was done to it; and how many images there are."""
        return digest([self._title, self._rows.info.version, len(self), *self._sample()])

    def _sample(self) -> list[object]:
        """What 64 rows hold: the library's own fingerprint differs between two loads of one folder."""
        cells = [self._rows[int(i)][self._image] or {} for i in np.linspace(0, len(self) - 1, 64).astype(int)]
        return [cell.get("bytes") or Path(cell.get("path") or "").name for cell in cells]


def _normal(path: str | Path) -> Path:
    """An absolute path without "..", and with the links that are in it."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve() follows links)


def _download_folders(library: Any, name: str) -> list[Path]:
    """Where the library keeps the files of a data set of the hub, and what it unpacks."""
    hub = importlib.import_module("huggingface_hub.constants")
    return [
        Path(library.config.DOWNLOADED_DATASETS_PATH),
        Path(hub.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}",
    ]


def hub_splits(spec: str, split_names: Mapping[str, str], context: Context = Context()) -> dict[str, Source]:
    """The splits of a data set that the `datasets` library loads; it downloads what it does not have.

    Args:
        spec: what follows the prefix: user/name, user/name:configuration, or the path of a folder.
        split_names: what the names of its splits mean; others are left out, unless nothing else is there to train on.
        context: how the images are read.

    Raises:
        ConfigError: the library is not installed.
        DataError: it cannot be loaded, or has no column of images.
    """
    library = _import_datasets()
    name, _, configuration = spec.partition(":")
    local = Path(name).expanduser()
    folder = local if local.is_dir() else None
    try:
        loaded = library.load_dataset(str(folder or name), configuration or None)
    except Exception as error:  # network, parsers, builders: each has errors of its own
        raise DataError(
            f"{HUB_PREFIX}{spec} cannot be loaded: {' '.join(str(error.__cause__ or error).split())[:200]}",
            "check the name, the network and HF_HOME",
        ) from error
    groups = {split_names[key.lower()]: rows for key, rows in loaded.items() if key.lower() in split_names}
    if "train" not in groups:
        first = next(iter(loaded))
        groups["train"] = loaded[first]
    folders = [*_download_folders(library, name), *([] if folder is None else [folder])]
    return {split: _source(library, rows, f"{name}/{split}", folders, context) for split, rows in groups.items()}


def _source(library: Any, rows: Any, title: str, folders: Sequence[Path], context: Context) -> HubSource:
    images = [name for name, feature in rows.features.items() if isinstance(feature, library.Image)]
    if not images:
        raise DataError(f"none of the columns {', '.join(rows.features)} of {title} holds images")
    given = [name for name in _LABEL_COLUMNS if name in rows.features]
    label = next((name for name in given if re.match(_LABEL_TYPES, getattr(rows.features[name], "dtype", ""))), None)
    encoded = rows.cast_column(images[0], library.Image(decode=False))
    source = HubSource(encoded, images[0], label, title, folders, context)
    if given and label is None:
        source.remarks += (f"column {given[0]} not used: one number or name an image is needed",)
    return source


def _import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError("hf: needs the datasets library", "pip install 'torchmae[datasets]'") from error
