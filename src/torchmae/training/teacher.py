"""A frozen network as a teacher: a run, an exported model, others' weights, or a timm model by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError
from torchmae.interop.timm_networks import TIMM, make_network, normalisation_of
from torchmae.training.pretrained import load

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_RANGE = (("low", 0.0), ("high", 1.0))  # of a `Normalisation` that names none


class Teacher(nn.Module):
    """Computes patch features of a student's images.

    The student's normalisation is replaced by the teacher's, and images are resized so that the teacher has one patch
    for each patch of the student. A grey channel is repeated for a teacher of colour images. `tokens` maps images (B,
    C, *size) to features (B, L, dim) in row-major order; `normalisation` is the teacher's.
    """

    def __init__(
        self,
        network: nn.Module,
        tokens: Callable[[Tensor], Tensor],
        dim: int,
        patch_size: Sequence[int],
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        self.network, self.tokens, self.dim, self.patch_size = network, tokens, dim, tuple(patch_size)
        self.normalisation = normalisation

    def teach(self, patch_size: Sequence[int], normalisation: Normalisation) -> Teacher:
        """Adapts the teacher to a student's patch size and normalisation; returns itself.

        Values are the same to both where both were trained in one unit (`_in_one_unit`). Otherwise what pictures of the
        student's data show black and white is black and white to the teacher.

        Raises:
            ConfigError: the student has another number of axes or channels, or the teacher normalised each sample.
        """
        theirs = self.normalisation
        channels, own = len(normalisation.mean), len(theirs.mean)
        if len(patch_size) != len(self.patch_size) or channels not in (own, 1):
            raise ConfigError(
                f"the teacher takes {len(self.patch_size)} axes and {own} channels, the images have {len(patch_size)} "
                f"and {channels}",
                "choose a teacher of such images",
            )
        self._student_patch = tuple(patch_size)
        if theirs.normalise == "sample":
            problem = "the teacher was trained with data.normalise 'sample'"
            raise ConfigError(problem, "choose a teacher that was trained without it")
        pair = normalisation, theirs
        if _in_one_unit(*pair):
            pair = replace(normalisation, low=None, high=None), replace(theirs, low=None, high=None)
        given, wanted = (item.to_shown for item in pair)
        self.register_buffer("_gain", given[1].expand(own) / wanted[1])
        self.register_buffer("_shift", (given[0].expand(own) - wanted[0]) / wanted[1])
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, L, dim) of images (B, C, *size) in the student's normalisation."""
        axes = (-1, *[1] * len(self.patch_size))
        gain, shift = self.get_buffer("_gain"), self.get_buffer("_shift")
        images = images * gain.view(axes) + shift.view(axes)
        pairs = zip(images.shape[2:], self._student_patch, self.patch_size, strict=True)
        size = [length // theirs * own for length, theirs, own in pairs]
        if size != list(images.shape[2:]):
            images = F.interpolate(images, size, mode=_MODES[len(size)], align_corners=False, antialias=len(size) == 2)
        return self.tokens(images)


def _in_one_unit(student: Normalisation, teacher: Normalisation) -> bool:
    """Whether the values of both were divided by the same numbers, and lie in ranges that overlap."""
    if student.scale is None or teacher.scale is None or not student.scale.items() <= teacher.scale.items():
        return False
    lows, highs = ([np.array(getattr(item, end) or usual) for item in (student, teacher)] for end, usual in _RANGE)
    shared, widest = np.minimum(*highs) - np.maximum(*lows), np.maximum(highs[0] - lows[0], highs[1] - lows[1])
    return bool((shared > 0.1 * widest).all())


def read_teacher(source: str, grid: Sequence[int]) -> Teacher:
    """Loads the teacher of the setting `model.teacher` for a student with `grid` patches along each axis.

    `source` is what `load` takes, or "timm:NAME", a vision transformer of timm with its pre-trained weights.

    Raises:
        ConfigError: the model has no patches, timm does not know the name, or timm is not installed.
        CheckpointError: `source` holds nothing that can be loaded.
    """
    if source.startswith(TIMM):
        network = make_network(source.removeprefix(TIMM), grid)
        prefix, patch_size = network.num_prefix_tokens, network.patch_embed.patch_size
        normalisation = Normalisation(*normalisation_of(network))
        return Teacher(
            network, lambda x: network.forward_features(x)[:, prefix:], network.num_features, patch_size, normalisation
        )
    loaded = load(source)
    model, about = loaded.model, loaded.description
    if not model.patch_size:
        raise ConfigError(f"{source} holds a model without patches", "choose a vision transformer as the teacher")
    width = model.encoder.embed_dim
    return Teacher(model, lambda x: model.encode(x, "tokens"), width, model.patch_size, about.normalisation)
