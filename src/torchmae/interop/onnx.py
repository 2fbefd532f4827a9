"""ONNX, by torch's dynamo exporter: the encoder, a classifier, or the whole reconstruction; any batch size."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from torchmae.errors import CheckpointError, ConfigError, require
from torchmae.interop.exports import Check, Exported, compare, worst
from torchmae.nn.classifier import Classifier
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Mask, num_keep

FILE = "model.onnx"
_LARGEST = 2**31 - 2**24  # a protobuf ends at 2 GiB; what is larger keeps its weights in a second file


class _Encoder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features (B, D), the mean of the patch tokens, and all tokens (B, prefix + L, D)."""
        encoded = self.encoder(images)
        return encoded.patches.mean(1), torch.cat([encoded.prefix, encoded.patches], dim=1)


class _Classes(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, classes)."""
        return (self.classifier(images),)


class _Reconstruction(nn.Module):
    def __init__(self, model: MaskedAutoencoder, ratio: float) -> None:
        super().__init__()
        self.model = model
        self.keep = num_keep(model.encoder.num_patches, ratio)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Images filled in, (B, C, *size), and what was hidden, (B, 1, *size) bool."""
        order = noise.topk(noise.shape[1], dim=1, largest=False).indices  # as random_mask's sort, which ONNX has not
        result = self.model.reconstruct(images, Mask(order[:, : self.keep], order[:, self.keep :]))
        return result.images, result.removed


def write(folder: Path, exported: Exported, part: str) -> None:
    """Writes model.onnx.

    Inputs: images (batch, C, *size), normalised as in training; for the reconstruction also noise (batch, L): the
    patches with the smallest numbers stay, as many as in training. Outputs: features and tokens; logits of a
    classifier; or reconstruction and removed.

    Raises:
        ConfigError: a reconstruction by a model without decoder, or a library that is missing.
    """
    graph, inputs, input_names, output_names = _graph(exported, part)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    batch = torch.export.Dim("batch")
    with _quiet():
        # strict: read as Python, len(images) stays the batch, whatever it is; run, it would be the example's.
        traced = torch.export.export(graph, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=True)
        program = torch.onnx.export(
            traced, dynamo=True, input_names=input_names, output_names=output_names, verbose=False
        )
        assert program is not None
        program.save(str(folder / FILE), external_data=size > _LARGEST)


@torch.no_grad()
def check(folder: Path, exported: Exported, part: str) -> Check:
    """Runs the file under onnxruntime with two batch sizes and compares every output."""
    onnxruntime = require("onnxruntime", "onnx")
    graph, inputs, input_names, output_names = _graph(exported, part)
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    checks = []
    for count in (1, len(inputs[0])):
        some = tuple(value[:count] for value in inputs)
        fed = {name: value.numpy() for name, value in zip(input_names, some, strict=True)}
        for name, got, wanted in zip(output_names, session.run(output_names, fed), graph(*some), strict=True):
            checks.append(
                compare(f"onnxruntime {onnxruntime.__version__}", name, torch.from_numpy(got).float(), wanted.float())
            )
    return worst(checks)


def _graph(exported: Exported, part: str) -> tuple[nn.Module, tuple[Tensor, ...], list[str], list[str]]:
    """The module to trace, example inputs, and the names of inputs and outputs."""
    model, images = exported.model, exported.probe()
    if part == "encoder":
        if isinstance(model, Classifier):
            return _Classes(model), (images,), ["images"], ["logits"]
        return _Encoder(exported.encoder), (images,), ["images"], ["features", "tokens"]
    if isinstance(model, Classifier):
        raise ConfigError("a classifier reconstructs nothing", "leave --part out")
    if model.decoder.absent:
        reason, fix = model.decoder.absent
        raise CheckpointError(f"this model cannot reconstruct: {reason}", fix)
    graph = _Reconstruction(model, exported.mask_ratio)
    return graph, (images, exported.noise()), ["images", "noise"], ["reconstruction", "removed"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks on its own progress and on versions from the user."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
