"""How fast one core turns JPEG files into random crops, by every library that is installed.

    python benchmarks/decode.py --data FOLDER_OF_JPEGS [--rounds 3] [--size 224]

Bytes in memory -> RandomResizedCrop(224, area 0.2 to 1, bicubic) and flip. The candidates take turns, 32 images at a
time, and are timed in processor seconds, so other work on the machine hurts all alike. The difference is that of the
crops from torchvision's on Pillow with the same boxes, as a share of full scale. torchvision's own pipeline ends in
normalised floats, as its users write it; the others end in bytes, and what follows is done for a whole batch on the
device. The last line is a worker of the real loader, over its whole life but its start.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from torchmae.data import jpeg
from torchmae.data import loader as ours_module
from torchmae.data.items import Context
from torchmae.data.loader import ImageLoader, Plan, Reader, Request, View, boxes_of, crop_numbers, cut, draw_flips
from torchmae.data.reading import BadFiles
from torchmae.data.sources import EncodedSource
from torchmae.data.transforms import Boxes, Normalisation, mirror

BASELINE = "torchvision on Pillow, to normalised floats"
TURN = 32  # images


class InMemory(EncodedSource):
    """Image files that were read before."""

    def __init__(self, files: list[bytes]) -> None:
        super().__init__(len(files), None, None, Context(num_channels=3))
        self.files = files

    def encoded(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [path for path in sorted(args.data.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    files = [path.read_bytes() for path in paths]
    source = InMemory([file for file in files if is_plain(file)])
    view = View((args.size, args.size), (0.2, 1.0), (3 / 4, 4 / 3), True)
    candidates = build(source, view)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    differences: dict[str, list[float]] = {name: [] for name in candidates}
    for epoch in range(args.rounds):
        spent = dict.fromkeys(candidates, 0.0)
        for request in requests(len(source), epoch):
            expected = reference(source, view, request)
            for name, make in candidates.items():
                start = time.process_time()
                images = make(request)
                spent[name] += time.process_time() - start
                if images.dtype == torch.uint8 and epoch == 0:
                    apart = (images.int() - expected.int()).abs().float().mean(dim=(1, 2, 3)) / 255
                    differences[name] += apart.tolist()
        for name, value in spent.items():
            seconds[name].append(value)
    print(f"{processor()}, one core; {versions()}")
    print(
        f"{len(source)} of {len(files)} files (upright, grey or RGB) to {args.size} px, median of {args.rounds} rounds"
    )
    base = statistics.median(seconds[BASELINE])
    for name, values in seconds.items():
        report(name, len(source) / statistics.median(values), base / statistics.median(values), differences[name])
    in_loader = statistics.median(worker_seconds(source, view, args.rounds) for _ in range(args.rounds))
    report("a worker of the loader", 1 / in_loader, base / len(source) / in_loader, [])
    ours = statistics.median(seconds["torchmae"]) / len(source)
    print(f"the loader's worker runs at {ours / in_loader:.0%} of torchmae's rate outside of it")


def is_plain(file: bytes) -> bool:
    """Whether every library means the same by a file: upright, and neither CMYK nor anything rarer."""
    with Image.open(io.BytesIO(file)) as image:
        return image.mode in ("L", "RGB") and image.getexif().get(0x0112, 1) == 1


def requests(count: int, epoch: int) -> Iterator[Request]:
    for start in range(0, count, TURN):
        yield Request(np.arange(start, min(start + TURN, count)), 0, epoch)


def drawn(source: InMemory, view: View, request: Request) -> Iterator[tuple[bytes, Boxes, bool]]:
    """The file, the box and the flip of each image of a request."""
    numbers, flips = crop_numbers(request, view), draw_flips(request, view)
    for i, index in enumerate(request.indices):
        file = source.files[index]
        width, height = Image.open(io.BytesIO(file)).size
        yield file, boxes_of(numbers[i : i + 1], (height, width), view)[0], bool(flips[i])


def reference(source: InMemory, view: View, request: Request) -> Tensor:
    """(B, C, *size) uint8: torchvision's crop of Pillow's picture."""
    crops = []
    for file, ((top, height), (left, width)), flip in drawn(source, view, request):
        with Image.open(io.BytesIO(file)) as image:
            crop = functional.resized_crop(
                image.convert("RGB"),
                top,
                left,
                height,
                width,
                list(view.input_size),
                transforms.InterpolationMode.BICUBIC,
            )
        crops.append(functional.pil_to_tensor(functional.hflip(crop) if flip else crop))
    return torch.stack(crops)


def build(source: InMemory, view: View) -> dict[str, Callable[[Request], Tensor]]:
    """Name to a function that makes the (B, C, *size) images of a request."""
    crop = [
        transforms.RandomResizedCrop(
            view.input_size, view.crop_scale, view.crop_ratio, transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(),
    ]
    normalised = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)])

    def whole(decode: Callable[[bytes], Any]) -> Callable[[Request], Tensor]:
        """Decodes whole pictures, (height, width, C), and crops and resizes them as tensors."""

        def make(request: Request) -> Tensor:
            crops = []
            for file, box, flip in drawn(source, view, request):
                crops.append(cut(decode(file), box, view.input_size).movedim(-1, 0))
                if flip:
                    crops[-1] = crops[-1].flip(-1)
            return torch.stack(crops)

        return make

    reader = Reader(source, 3, view)

    def ours(request: Request) -> Tensor:
        images = reader[request].images
        return mirror(images, torch.from_numpy(np.flatnonzero(draw_flips(request, view)))).movedim(-1, 1)

    def without_regions(request: Request) -> Tensor:
        with mock.patch.object(jpeg, "read_region", return_value=None):
            return ours(request)

    def one_by_one(request: Request) -> Tensor:
        with mock.patch.object(ours_module, "_GROUP", 1):
            return ours(request)

    candidates: dict[str, Callable[[Request], Tensor]] = {
        BASELINE: lambda request: torch.stack([normalised(pillow(source.files[i])) for i in request.indices]),
        "torchvision on Pillow, to bytes": lambda request: reference(source, view, request),
        "Pillow, tensor resize": whole(lambda file: np.array(pillow(file))),
    }
    for name, decode in installed():
        candidates[f"{name}, tensor resize"] = whole(decode)
    candidates["torchmae without nvImageCodec"] = without_regions
    candidates["torchmae, image by image"] = one_by_one
    return {**candidates, "torchmae": ours}


def pillow(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def installed() -> Iterator[tuple[str, Callable[[bytes], Any]]]:
    """The optional decoders, each from bytes to (height, width, C)."""
    try:
        torchcodec = import_module("torchcodec.decoders")
        yield "torchcodec", lambda file: torchcodec.decode_jpeg(file, mode="RGB").permute(1, 2, 0).numpy()
    except (ImportError, RuntimeError, OSError):
        print("torchcodec is not installed, or finds no FFmpeg")
    try:
        cv2 = import_module("cv2")
        cv2.setNumThreads(1)
        yield "OpenCV", lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    except ImportError:
        print("opencv-python-headless is not installed")
    try:
        simplejpeg = import_module("simplejpeg")
        yield "simplejpeg", lambda file: simplejpeg.decode_jpeg(file, "RGB")
    except ImportError:
        print("simplejpeg is not installed")


def worker_seconds(source: InMemory, view: View, rounds: int) -> float:
    """Processor seconds for an image in a worker process of the loader, rounds epochs long."""
    loader = ImageLoader(
        source,
        None,
        view=view,
        normalisation=Normalisation((0.5,) * 3, (0.25,) * 3),
        device=torch.device("cpu"),
        num_workers=1,
        bad=BadFiles(len(source), 0),
    )
    plan = Plan(len(source), 64, 0)

    def cpu_of(epochs: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in loader.train_batches(plan, 0, epochs * plan.steps_per_epoch):
            pass
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    start_up = cpu_of(1)
    return (cpu_of(1 + rounds) - start_up) / (rounds * len(source))


def report(name: str, rate: float, ratio: float, differences: list[float]) -> None:
    apart = f"  differs by {np.mean(differences):.2%}, at most {np.max(differences):.2%}" if differences else ""
    print(f"{name:45s} {rate:6.0f} images/s  x{ratio:.2f}{apart}")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")


def versions() -> str:
    found = []
    for name in ("torch", "torchvision", "pillow", "torchcodec", "opencv-python-headless"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, jpeg.jpeg_decoder()])


if __name__ == "__main__":
    main()
