"""Data sets of the Hugging Face `datasets` library: names on the hub, and folders that it can load."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.formats import Context
from torchmae.data.parquet import label_column, label_values
from torchmae.data.sources import EncodedSource, FileSource, Source, check_size, digest
from torchmae.errors import DataError, reason_of, require

HUB_PREFIX = "hf:"  # begins hf:user/name, hf:user/name:configuration, hf:./folder


def _absolute(path: str | Path) -> Path:
    """Without ".."; unlike resolve() it follows no links."""
    return Path(os.path.abspath(path))  # noqa: PTH100


class HubSource(EncodedSource):
    """Images of one split (a `datasets.Dataset`), in its order; mapped into memory from the library's own cache.

    Files that the table names are read if they lie in its own folder or one of `folders`; links in those are followed.
    DataError where no column holds images.
    """

    def __init__(self, rows: Any, title: str, folders: Iterable[Path], context: Context) -> None:
        library = require("datasets", "datasets")
        images = [name for name, feature in rows.features.items() if isinstance(feature, library.Image)]
        if not images:
            raise DataError(f"none of the columns {', '.join(rows.features)} of {title} holds images")
        self._image, self._title = images[0], title
        label, note = label_column(rows.features.arrow_schema)
        labels = names = None
        if label is not None:
            labels, names = label_values(rows.data.column(label)), getattr(rows.features[label], "names", None)
            if (indices := getattr(rows, "_indices", None)) is not None:
                labels = labels[indices.column(0).to_numpy()]
        self.remarks = (note,) if note else ()
        super().__init__(len(rows), labels, names, context)
        self._rows = rows.select_columns([self._image]).cast_column(self._image, library.Image(decode=False))
        tables = [Path(file["filename"]).parent for file in rows.cache_files[:1]]
        self._folders = {place for path in (*folders, *tables) for place in (_absolute(path), path.resolve())}

    def encoded(self, index: int) -> bytes:
        """The bytes in the table, or those of the file that it names."""
        cell: dict[str, Any] = self._rows[index][self._image] or {}
        if cell.get("bytes"):
            return check_size(bytes(cell["bytes"]))
        if not cell.get("path"):
            raise DataError("the table holds no bytes for it")
        path = _absolute(cell["path"])
        if not any(path.is_relative_to(folder) for folder in self._folders):
            raise DataError(f"the table names {path}, which lies outside of its folder")
        return FileSource(path.parent, [path.name]).encoded(0)

    def name(self, index: int) -> str:
        """The data set, the split and the row."""
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """Of the length, the version and 64 rows: the library's own differs between two loads of one folder."""
        cells = [self._rows[int(i)][self._image] or {} for i in np.linspace(0, len(self) - 1, 64).astype(int)]
        sample = [cell.get("bytes") or Path(cell.get("path") or "").name for cell in cells]
        return digest([self._title, self._rows.info.version, len(self), *sample])


def hub_splits(spec: str, split_names: Mapping[str, str], context: Context = Context()) -> dict[str, Source]:
    """The splits of a data set that the `datasets` library loads; it downloads what it does not have.

    `spec` is what follows the prefix: user/name, user/name:configuration, or the path of a folder. Splits whose names
    are not in `split_names` are left out, unless nothing else is there to train on.

    Raises:
        ConfigError: the library is not installed.
        DataError: it cannot be loaded, or has no column of images.
    """
    library = require("datasets", "datasets")
    name, _, configuration = spec.partition(":")
    local = Path(name).expanduser()
    try:
        loaded = library.load_dataset(str(local) if local.is_dir() else name, configuration or None)
    except Exception as error:  # network, parsers, builders: each has errors of its own
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(
            f"{HUB_PREFIX}{spec} cannot be loaded: {reason_of(cause)}", "check the name, the network and HF_HOME"
        ) from error
    groups = {split_names[key.lower()]: rows for key, rows in loaded.items() if key.lower() in split_names}
    if "train" not in groups:
        groups["train"] = next(iter(loaded.values()))
    cache = require("huggingface_hub.constants", "datasets").HF_HUB_CACHE
    folders = [Path(library.config.DOWNLOADED_DATASETS_PATH), Path(cache) / f"datasets--{name.replace('/', '--')}"]
    if local.is_dir():
        folders.append(local)
    return {split: HubSource(rows, f"{name}/{split}", folders, context) for split, rows in groups.items()}
