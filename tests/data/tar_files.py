"""Makes tar files to read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from picture_files import encoded, picture
from PIL import Image


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w", **options: object) -> None:
    with tarfile.open(path, mode, **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def png(seed: int) -> bytes:
    return encoded(Image.fromarray(picture(seed=seed)))


def samples(count: int, start: int = 0) -> dict[str, bytes]:
    """WebDataset samples: pictures of seeds `start` on, labels modulo 3, the label before or after the picture."""
    members: dict[str, bytes] = {}
    for i in range(start, start + count):
        pair = [(f"{i:04d}.png", png(i)), (f"{i:04d}.cls", f"{i % 3}\n".encode())]
        members |= dict(pair if i % 2 else reversed(pair)) | {f"{i:04d}.json": b"{}"}
    return members
