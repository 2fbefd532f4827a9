"""Windows a second of the formats of the fields, beside the same loop in each format's own library.

    python benchmarks/fields.py [--rounds 5] [--windows 40] [--only scene volume sound clip]

Files are made in a temporary folder: a GeoTIFF scene of 4,000 x 4,000 pixels with 12 bands (tiles of 256, deflate), a
NIfTI volume of 256 x 256 x 128 (.nii), a WAV file of ten minutes, a clip of 300 frames of 320 x 240 (MPEG-4). Both
loops open the file anew for each window, as a loader does that reads samples in random order, and take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from torchmae.data.items import Context, Region
from torchmae.data.sources import FileSource

Window = Callable[[Region], np.ndarray]


def scene(folder: Path) -> tuple[Path, tuple[int, ...], tuple[int, ...], Window]:
    import rasterio

    file, size = folder / "scene.tif", (4000, 4000)
    kind = {"driver": "GTiff", "height": size[0], "width": size[1], "count": 12, "dtype": "uint16"}
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    where = rasterio.transform.from_origin(500_000, 5_000_000, 10, 10)
    rng = np.random.default_rng(0)
    with rasterio.open(file, "w", **kind, **tiles, crs="EPSG:32633", transform=where) as out:
        for band in range(1, 13):
            out.write(rng.integers(200, 3000, size, dtype=np.uint16), band)

    def read(region: Region) -> np.ndarray:
        (top, height), (left, width) = region
        with rasterio.open(file) as opened:
            return np.moveaxis(opened.read(window=((top, top + height), (left, left + width))), 0, -1)

    return file, size, (256, 256), read


def volume(folder: Path) -> tuple[Path, tuple[int, ...], tuple[int, ...], Window]:
    import nibabel

    file, size = folder / "volume.nii", (256, 256, 128)
    values = np.random.default_rng(0).integers(0, 1000, size, dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)

    def read(region: Region) -> np.ndarray:
        part = tuple(slice(start, start + length) for start, length in region)
        return np.asarray(nibabel.load(file).dataobj[part], dtype=np.float32)[..., None]

    return file, size, (64, 64, 64), read


def sound(folder: Path) -> tuple[Path, tuple[int, ...], tuple[int, ...], Window]:
    import soundfile

    file, rate = folder / "sound.wav", 16_000
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 600 * rate), rate)

    def read(region: Region) -> np.ndarray:
        ((start, length),) = region
        return soundfile.read(file, length, start, dtype="float32", always_2d=True)[0]

    return file, (600 * rate,), (5 * rate,), read


def clip(folder: Path) -> tuple[Path, tuple[int, ...], tuple[int, ...], Window]:
    import av

    file, size = folder / "clip.mp4", (300, 240, 320)
    frames = np.random.default_rng(0).integers(0, 256, (10, *size[1:], 3), dtype=np.uint8)
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = size[2], size[1], "yuv420p"
        for i in range(size[0]):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i % 10], format="rgb24")))
        out.mux(stream.encode())

    def read(region: Region) -> np.ndarray:
        (start, length), (top, height), (left, width) = region
        found: list[np.ndarray] = []
        with av.open(str(file)) as opened:
            video = opened.streams.video[0]
            first = round(start / video.average_rate / video.time_base)
            opened.seek(first, stream=video)
            for frame in opened.decode(video):
                if frame.pts >= first:
                    picture = frame.to_ndarray(format="rgb24")
                    found.append(picture[top : top + height, left : left + width])
                if len(found) == length:
                    break
        return np.stack(found)

    return file, size, (8, 224, 224), read


KINDS = {"scene": scene, "volume": volume, "sound": sound, "clip": clip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=40, help="of a turn")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    print(f"{'':8} {'torchmae':>10} {'library':>10} {'ratio':>6}  windows a second")
    for name in args.only:
        with tempfile.TemporaryDirectory() as place:
            file, size, window, theirs = KINDS[name](Path(place))
            source = FileSource(Path(), [str(file)], context=Context(spatial_dims=len(size)))
            rng = np.random.default_rng(1)
            starts = rng.integers(0, np.subtract(size, window) + 1, (args.windows, len(size)))
            regions = [tuple(zip(row, window, strict=True)) for row in starts.tolist()]

            def ours(region: Region, source: FileSource = source) -> np.ndarray:
                return source.open(0).read(region)

            assert np.array_equal(ours(regions[0]), theirs(regions[0])), f"{name}: other values than the library's"
            speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for i in range(args.rounds):
                for who, read in list({"ours": ours, "theirs": theirs}.items())[:: 1 if i % 2 else -1]:
                    start = time.perf_counter()
                    for region in regions:
                        read(region)
                    speeds[who].append(len(regions) / (time.perf_counter() - start))
            one, other = median(speeds["ours"]), median(speeds["theirs"])
            print(f"{name:8} {one:10.1f} {other:10.1f} {one / other:6.2f}", flush=True)


if __name__ == "__main__":
    main()
