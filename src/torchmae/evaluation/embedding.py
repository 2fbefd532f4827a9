"""Features of many images in one file, written in blocks so that a killed command can go on.

OUT.partial/ holds manifest.json, a description of the work, and a file for each finished block. At the end they become
OUT, which is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchmae.config.evaluate import ComputeOptions, EmbedOptions
from torchmae.data.items import Progress
from torchmae.data.sources import Source
from torchmae.errors import CheckpointError, ConfigError, DataError, reason_of, require
from torchmae.evaluation.bench import opened
from torchmae.evaluation.images import ImageSet, ModelInput, open_parts, own_data
from torchmae.evaluation.subject import Subject, network
from torchmae.files import locked, replace_file
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.pretrained import load
from torchmae.training.ranks import share_of_cores
from torchmae.training.runtime import Runtime

BLOCK_IMAGES = 2000
BLOCK_BYTES = 2**26
"""Limits of a block, which holds at least one batch."""

_MANIFEST = "manifest.json"
Array = npt.NDArray[Any]


class Features(NamedTuple):
    """The content of a file of features.

    Attributes:
        features: (N, D) float32, or (N, L, D) patch tokens.
        labels: (N,) int64, -1 where unknown.
        paths: (N,) text, the source of each image.
        about: "pool", "weights" (a digest of the model) and "layer" (numbers of blocks, "" for the encoder's output);
            may be empty.
    """

    features: Array
    labels: Array
    paths: Array
    about: Mapping[str, str]

    @property
    def layer(self) -> tuple[int, ...] | None:
        """The blocks whose outputs they are, as `MaskedAutoencoder.encode` takes them."""
        numbers = self.about.get("layer")
        return tuple(map(int, numbers.split(","))) if numbers else None


@dataclass(frozen=True)
class Written:
    """A file that `embed` wrote, and the number of images in it."""

    path: Path
    count: int
    shape: tuple[int, ...]  # of one image's features
    left_out: int  # unreadable images, which are not in the file
    resumed: int  # images that an earlier call had encoded


class Block(NamedTuple):
    """Images `start` to `stop - 1` of the set number `part`."""

    number: int
    part: int
    start: int
    stop: int


def embed_run(
    options: EmbedOptions,
    compute: ComputeOptions,
    *,
    model: MaskedAutoencoder | None = None,
    splits: Mapping[str, Source] | None = None,
) -> Written:
    """Writes the features that a run's encoder gives of a data set, by default the run's own.

    `model` is the caller's own model of the run, `splits` are the caller's own images, by split, for data "own".

    Raises:
        TorchmaeError: a run, options or data that do not fit; and as `embed`.
    """
    with opened(compute, "the same command goes on from what was done") as (runtime, display):

        def open_all() -> tuple[Subject, list[ImageSet]]:
            pretrained = load(options.run, model=model)
            description = pretrained.description
            data = own_data(options.run, options.data)
            taken = ModelInput(
                description.input_size,
                description.arguments["in_chans"],
                description.normalisation,
                runtime.device,
                compute.batch_size,
                display.preparing,
                splits,
                description.window or "none",
            )
            data = replace(data, num_workers=share_of_cores(data.num_workers, runtime.ranks))
            parts, notes = open_parts(data, options.split, taken)
            for note in (*pretrained.notes, *notes):
                display.say(note)
            return network("model", pretrained.model, runtime.device, options.layer), parts

        subject, parts = runtime.ranks.main_first(open_all)
        out = Path(options.out)
        return embed(subject, parts, out, pool=options.pool, runtime=runtime, progress=display.preparing)


def embed(
    subject: Subject,
    parts: Sequence[ImageSet],
    out: Path,
    *,
    pool: str,
    runtime: Runtime,
    progress: Progress | None = None,
    block_images: int = BLOCK_IMAGES,
) -> Written:
    """Writes the features (`Subject.encode`) of all images, in order, and goes on where an earlier call was stopped.

    `out` is .npz (arrays features, labels and paths) or .parquet (columns path, label and features), with a digest of
    the weights and the pool in the archive's comment or the schema's metadata. Each rank computes a share of the
    blocks, on a disk that all ranks see; the first rank puts them together.

    Raises:
        ConfigError: `out` exists or cannot be written; another embedding or process writes it; features that the
            subject does not have; parquet without pyarrow.
        DataError: too many unreadable images.
        CheckpointError: the disk is full; the finished blocks stay.
    """
    if out.suffix == ".parquet":
        require("pyarrow.parquet", "parquet")
    if pool == "tokens" and any(part.images is not None for part in parts):
        raise ConfigError("pool is 'tokens', and images are covered by windows", "use pool mean, or --data.window none")
    first = next(iter(parts[0].batches(np.arange(1), 1)))
    with runtime.autocast():
        shape = tuple(subject.encode(first.images, pool).shape[1:])
    size = parts[0].model.batch_size
    in_bytes = BLOCK_BYTES // (4 * int(np.prod(shape)))
    step = size * max(1, min(block_images, in_bytes) // size)
    blocks = plan_blocks([part.num_images for part in parts], step)
    ranks, lock = runtime.ranks, ExitStack()

    def begin() -> tuple[Path, dict[str, Any], list[Block]]:
        identity = _identity(subject, parts, pool, runtime, step)
        partial = open_partial(out, identity)
        try:
            lock.enter_context(locked(partial / ".lock"))
        except BlockingIOError as error:
            raise ConfigError(f"another process is writing {out}", "wait for it, or choose another --out") from error
        return partial, identity, [block for block in blocks if not _is_whole(_block_path(partial, block))]

    partial, identity, missing = ranks.on_main(begin)
    with lock:
        total, resumed = count_images(blocks), count_images(blocks) - count_images(missing)
        mine = [missing[i] for i in ranks.share(len(missing))]
        done = resumed
        for block in compute(subject, parts, mine, partial, pool, runtime):
            done += count_images([block])
            if progress is not None:
                progress("embedding", done, resumed + count_images(mine))
        ranks.gather(None)  # a barrier: all blocks are on the disk
        about = {name: identity[name] for name in ("weights", "pool", "layer")}
        count = ranks.on_main(lambda: assemble(out, partial, blocks, shape, about))
    return Written(out, count, shape, total - count, resumed)


def plan_blocks(lengths: Sequence[int], step: int) -> list[Block]:
    """Blocks of `step` images; the last block of each part may have fewer."""
    spans = [
        (part, start, min(start + step, length))
        for part, length in enumerate(lengths)
        for start in range(0, length, step)
    ]
    return [Block(number, *span) for number, span in enumerate(spans)]


def count_images(blocks: Sequence[Block]) -> int:
    """Number of images in the blocks."""
    return sum(block.stop - block.start for block in blocks)


def open_partial(out: Path, identity: dict[str, Any]) -> Path:
    """OUT.partial, new or of the same embedding; ConfigError as for `embed`."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists():
        raise ConfigError(f"{out} exists already", "remove it, or choose another --out")
    manifest = partial / _MANIFEST
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            replace_file(manifest, json.dumps(identity).encode())
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot write {partial}: {reason}", "choose another --out") from error
    if json.loads(manifest.read_text(encoding="utf-8")) != identity:
        raise ConfigError(
            f"{partial} holds part of another embedding (another model, data or option)",
            "remove it, or choose another --out",
        )
    return partial


def compute(
    subject: Subject, parts: Sequence[ImageSet], blocks: Sequence[Block], partial: Path, pool: str, runtime: Runtime
) -> Iterator[Block]:
    """Encodes blocks in order and yields each once it is on disk. Leaves out unreadable images.

    The features of an image that is covered by windows are the mean over its windows.
    """
    for number, part in enumerate(parts):
        mine = [block for block in blocks if block.part == number]
        # One pass over all that is left, so that workers start once; windows of a block fill no whole batches.
        for together in [mine] if part.images is None else [[block] for block in mine]:
            if not together:
                continue
            rest = part.only(np.concatenate([part.samples_of(block.start, block.stop) for block in together]))
            batches = rest.batches()
            for block in together:
                samples = len(part.samples_of(block.start, block.stop))
                features: list[Array] = []
                labels: list[Array] = []
                rows: list[Array] = []
                for batch in islice(batches, -(-samples // part.model.batch_size)):
                    with runtime.autocast():
                        features.append(subject.encode(batch.images, pool, batch.valid).float().cpu().numpy())
                    labels.append(batch.labels.cpu().numpy())
                    rows.append(batch.indices)
                chosen = np.concatenate(rows)
                first = np.arange(len(chosen))  # of the rows of each image
                if rest.images is not None:
                    first = np.unique(rest.images[chosen], return_index=True)[1]
                counts = np.diff([*first, len(chosen)]).reshape(-1, *[1] * (features[0].ndim - 1))
                means = np.add.reduceat(np.concatenate(features), first) / counts.astype(np.float32)
                content = BytesIO()
                paths = np.array([rest.source.name(int(row)) for row in chosen[first]], dtype=np.str_)
                np.savez(content, features=means, labels=np.concatenate(labels)[first], paths=paths)
                replace_file(_block_path(partial, block), content.getvalue())
                yield block


def assemble(
    out: Path, partial: Path, blocks: Sequence[Block], shape: tuple[int, ...], about: Mapping[str, str]
) -> int:
    """Makes OUT of the blocks, removes OUT.partial, returns the number of images; CheckpointError as for `embed`."""
    writing = partial / f"whole{out.suffix}"
    write = _write_parquet if out.suffix == ".parquet" else _write_npz
    try:
        count = write(writing, [_block_path(partial, block) for block in blocks], shape, json.dumps(about))
        with writing.open("rb") as file:
            os.fsync(file.fileno())
        writing.replace(out)
    except OSError as error:
        with suppress(OSError):
            writing.unlink()
        raise CheckpointError(
            f"cannot write {out}: {error.strerror or error}", "free space, then give the same command again"
        ) from error
    shutil.rmtree(partial, ignore_errors=True)
    return count


def read_features(path: Path) -> Features:
    """Reads a file of `embed`.

    Raises:
        DataError: the file is missing, half written or damaged.
        ConfigError: parquet without pyarrow.
    """
    if not path.exists():
        if path.with_name(f"{path.name}.partial").exists():
            raise DataError(f"{path} is half written", "give the same `torchmae embed` command again to finish it")
        raise DataError(f"no such file: {path}", "write it with `torchmae embed`")
    try:
        return _read_parquet(path) if path.suffix == ".parquet" else _read_npz(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path} is damaged: {reason_of(error)}", "write it again with `torchmae embed`") from error


def _identity(subject: Subject, parts: Sequence[ImageSet], pool: str, runtime: Runtime, step: int) -> dict[str, Any]:
    """Everything that decides the content of the blocks."""
    return {
        "reading": parts[0].reading,
        "weights": subject.fingerprint(),
        "data": [part.source.fingerprint() for part in parts],
        "labels": [part.source.label_fingerprint() for part in parts],
        "images": [part.num_images for part in parts],
        "pool": pool,
        "layer": "" if subject.blocks is None else ",".join(map(str, subject.blocks)),
        "precision": runtime.precision,
        "block": step,
    }


def _block_path(partial: Path, block: Block) -> Path:
    return partial / f"block-{block.number:06d}.npz"


def _is_whole(path: Path) -> bool:
    """Whether a block exists and can be read to its end."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name].shape for name in arrays.files}.keys() == {"features", "labels", "paths"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False


def _pieces(blocks: Sequence[Path], name: str) -> Iterator[Array]:
    """One array of every block, in order, one block in memory at a time."""
    for path in blocks:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays[name]


def _write_npz(path: Path, blocks: Sequence[Path], shape: tuple[int, ...], about: str) -> int:
    count = sum(map(len, _pieces(blocks, "labels")))
    text = max((names.dtype for names in _pieces(blocks, "paths")), key=lambda dtype: dtype.itemsize)
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "features": (np.dtype(np.float32), (count, *shape)),
        "labels": (np.dtype(np.int64), (count,)),
        "paths": (text, (count,)),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = about.encode()
        for name, (dtype, full) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": dtype.str, "fortran_order": False, "shape": full}
                np.lib.format.write_array_header_2_0(file, header)
                for piece in _pieces(blocks, name):
                    file.write(np.ascontiguousarray(piece, dtype=dtype).tobytes())
    return count


def _write_parquet(path: Path, blocks: Sequence[Path], shape: tuple[int, ...], about: str) -> int:
    """A row group for each block."""
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    kind = arrow.float32()
    for length in reversed(shape):
        kind = arrow.list_(kind, length)
    schema = arrow.schema([("path", arrow.string()), ("label", arrow.int64()), ("features", kind)], {"torchmae": about})
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for names, labels, values in zip(*(_pieces(blocks, n) for n in ("paths", "labels", "features")), strict=True):
            features = arrow.array(values.reshape(-1))
            for length in reversed(shape):
                features = arrow.FixedSizeListArray.from_arrays(features, length)
            columns = [arrow.array(names.tolist()), arrow.array(labels), features]
            writer.write_table(arrow.table(columns, schema=schema))
            count += len(labels)
    return count


def _read_npz(path: Path) -> Features:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays.zip.comment or "{}")
        return Features(arrays["features"], arrays["labels"], arrays["paths"], about)


def _read_parquet(path: Path) -> Features:
    columns = ["path", "label", "features"]
    table = require("pyarrow.parquet", "parquet").read_table(path, columns=columns).combine_chunks()
    column = table.column("features").combine_chunks()
    shape: list[int] = []
    while hasattr(column.type, "list_size"):
        shape.append(column.type.list_size)
        column = column.flatten()
    features = column.to_numpy().reshape(-1, *shape)
    names = np.array(table.column("path").to_pylist(), dtype=np.str_)
    about = json.loads((table.schema.metadata or {}).get(b"torchmae", "{}"))
    return Features(features, table.column("label").to_numpy(), names, about)
