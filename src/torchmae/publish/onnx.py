"""The ONNX format, by torch's dynamo exporter: an encoder, a classifier or the reconstruction, for any batch size."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from torchmae.errors import require
from torchmae.nn.classifier import Classifier
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Mask, num_keep
from torchmae.publish.exports import Check, Exported, compare, worst

FILE = "model.onnx"
_LARGEST = 2**31 - 2**24  # a protobuf file ends at 2 GiB; larger models keep their weights in a second file


class _Encoder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features (B, D), the mean of the patch tokens; all tokens (B, prefix + L, D)."""
        encoded = self.encoder(images)
        return encoded.patches.mean(1), torch.cat([encoded.prefix, encoded.patches], dim=1)


class _Reconstruction(nn.Module):
    def __init__(self, model: MaskedAutoencoder, ratio: float) -> None:
        super().__init__()
        self.model = model
        self.keep = num_keep(model.encoder.num_patches, ratio)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Filled images (B, C, *size), and the masked pixels (B, 1, *size) bool."""
        order = noise.topk(noise.shape[1], dim=1, largest=False).indices  # random_mask's sort, which ONNX lacks
        result = self.model.reconstruct(images, Mask(order[:, : self.keep], order[:, self.keep :]))
        return result.images, result.removed


def write(folder: Path, exported: Exported) -> None:
    """Writes model.onnx.

    Inputs: images (batch, C, *size), normalised as in training; for the reconstruction also noise (batch, L), whose
    smallest numbers mark the visible patches, as many as in training. Outputs: features and tokens; a classifier's
    logits; or reconstruction and removed.
    """
    graph, inputs, input_names, output_names = _graph(exported)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    batch = torch.export.Dim("batch")
    with _quiet():
        # strict: analyses the code, so that len(images) is any batch size and not the example's.
        traced = torch.export.export(graph, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=True)
        program = torch.onnx.export(
            traced, dynamo=True, input_names=input_names, output_names=output_names, verbose=False
        )
        assert program is not None
        program.save(str(folder / FILE), external_data=size > _LARGEST)


@torch.no_grad()
def check(folder: Path, exported: Exported) -> Check:
    """Runs the file in onnxruntime with two batch sizes and compares every output."""
    onnxruntime = require("onnxruntime", "onnx")
    graph, inputs, input_names, output_names = _graph(exported)
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    checks, by = [], f"onnxruntime {onnxruntime.__version__}"
    for count in (1, len(inputs[0])):
        some = tuple(value[:count] for value in inputs)
        fed = {name: value.numpy() for name, value in zip(input_names, some, strict=True)}
        ours = graph(*some)
        ours = ours if isinstance(ours, tuple) else (ours,)
        for name, got, wanted in zip(output_names, session.run(output_names, fed), ours, strict=True):
            checks.append(compare(by, name, torch.from_numpy(got).float(), wanted.float()))
    return worst(checks)


def usage(exported: Exported) -> str:
    """Python code that runs the file."""
    session = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/{FILE}")\n'
    if exported.part == "encoder":
        outputs = "(logits,)" if isinstance(exported.model, Classifier) else "features, tokens"
        return f'{session}{outputs} = session.run(None, {{"images": images}})  # images: {exported.shape} float32\n'
    count = exported.encoder.num_patches
    return (
        f"{session}# noise: (batch, {count}) float32; the patches with the smallest numbers stay visible\n"
        'filled, hidden = session.run(None, {"images": images, "noise": noise})\n'
    )


def _graph(exported: Exported) -> tuple[nn.Module, tuple[Tensor, ...], list[str], list[str]]:
    """The module to trace, example inputs, and the names of inputs and outputs."""
    images = exported.probe()
    if exported.part != "encoder":
        graph = _Reconstruction(exported.autoencoder, exported.mask_ratio)
        return graph, (images, exported.noise()), ["images", "noise"], ["reconstruction", "removed"]
    if isinstance(exported.model, Classifier):
        return exported.model, (images,), ["images"], ["logits"]
    return _Encoder(exported.encoder), (images,), ["images"], ["features", "tokens"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's messages about its progress and about versions."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
