"""ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) whose convolutions see only visible patches; timm's names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError, within
from torchmae.nn.classifier import Classifier
from torchmae.nn.encoder import CONVOLUTIONS, Encoder, EncoderOutput
from torchmae.nn.layers import LAYER_NORM_EPS, DropPath, Mlp
from torchmae.nn.patches import gather, grid_size, patchify, unpatchify

KERNEL = 7
_GRN_EPS = 1e-6


class Cells(NamedTuple):
    """The positions of features (B, K * prod(size), C): one cell after the other, its pixels in row-major order."""

    ids_keep: Tensor | None  # (B, K), indices in the grid; None: all cells, in order
    grid: tuple[int, ...]  # cells along each axis; without a mask, the whole image is one cell
    size: tuple[int, ...]  # pixels of a cell along each axis, at the present resolution

    def collect(self, images: Tensor) -> Tensor:
        """The features of these cells in images (B, C, *size)."""
        cells = patchify(images, self.size)
        if self.ids_keep is not None:
            cells = gather(cells, self.ids_keep)
        return cells.reshape(len(images), -1, images.shape[1])

    def spread(self, x: Tensor) -> Tensor:
        """Images (B, C, *size) with the features `x` in these cells and zeros everywhere else."""
        cells = x.reshape(len(x), -1, prod(self.size) * x.shape[2])
        if self.ids_keep is not None:
            zeros = cells.new_zeros(len(x), prod(self.grid), cells.shape[2])
            cells = zeros.scatter(1, self.ids_keep.unsqueeze(-1).expand_as(cells), cells)
        return unpatchify(cells, self.size, self.grid)

    def reduce(self, x: Tensor, convolution: nn.Module) -> tuple[Tensor, Cells]:
        """Applies a convolution whose stride equals its kernel, so that cells do not mix."""
        y = convolution(x.reshape(-1, *self.size, x.shape[2]).movedim(-1, 1))  # (B * K, C, *size)
        return y.movedim(1, -1).reshape(len(x), -1, y.shape[1]), self._replace(size=tuple(y.shape[2:]))


class _GlobalResponseNorm(nn.Module):
    """Scales each channel by its norm over the visible pixels, divided by the mean norm of all channels (section 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(dim=1, keepdim=True)
        scale = norms / (norms.mean(-1, keepdim=True) + _GRN_EPS)
        return x + (self.bias + self.weight * (x * scale))


class _ResponseMlp(Mlp):
    """An MLP with a global response norm after its GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        self.grn = _GlobalResponseNorm(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(F.gelu(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    """A residual block of a depthwise convolution, a norm and an MLP with a response norm, for images of 1 to 3 axes.

    The MLP's width is `mlp_ratio` times `dim`, rounded down as in timm; `drop_path` is the stochastic depth rate.
    """

    def __init__(self, dim: int, axes: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = CONVOLUTIONS[axes](dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = _ResponseMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """Features (B, N, C) of the cells to (B, N, C); the convolution reads zeros in all other cells."""
        return x + self.drop_path(self.mlp(self.norm(cells.collect(self.conv_dw(cells.spread(x))))))

    def flops(self, pixels: int, visible: int) -> int:
        """Operations for an image of `pixels` pixels, of which `visible` are visible."""
        return 2 * pixels * self.conv_dw.weight.numel() + self.mlp.flops(visible)


class _Stage(nn.Module):
    """Blocks of one resolution, after a downsampling from `in_dim` channels (None, the first stage: without)."""

    def __init__(self, in_dim: int | None, dim: int, blocks: Sequence[ConvNeXtBlock]) -> None:
        super().__init__()
        self.downsample = nn.ModuleList()
        if in_dim is not None:
            convolution = type(blocks[0].conv_dw)(in_dim, dim, 2, 2)
            self.downsample.extend([nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS), convolution])
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, cells: Cells) -> tuple[Tensor, Cells]:
        """Features (B, N, C) of the cells; the stage's output, and the cells at its resolution."""
        if len(self.downsample):
            x, cells = cells.reduce(self.downsample[0](x), self.downsample[1])
        for block in self.blocks:
            x = block(x, cells)
        return x, cells

    def flops(self, pixels: int, visible: int) -> int:
        convolutions = [cast(nn.Conv2d, module) for module in self.downsample[1:]]
        total = sum(2 * visible * convolution.weight.numel() for convolution in convolutions)
        return total + sum(cast(ConvNeXtBlock, block).flops(pixels, visible) for block in self.blocks)


class ConvNeXtEncoder(Encoder):
    """A ConvNeXt V2 that encodes any subset of an image's patches; a token is a pixel of its last stage.

    As in FCMAE (section 3), no layer sees a masked patch: a depthwise convolution reads zeros there, and all other
    layers compute on visible pixels only. Departure: the tokens are normalised before they are decoded.

    Sizes have 1, 2 or 3 axes. `patch_size`, the stride of the whole network, divides `input_size`. Each stage but the
    first halves the image; the stem's stride is the rest of the patch size. `depths` and `dims` are the number of
    blocks and of channels of each stage; the last of `dims` is the width of a token. `drop_path`, in [0, 1), is the
    stochastic depth rate of the last block; it rises linearly from 0 at the first. ConfigError: sizes that do not fit
    together.
    """

    embedding = "stem.0"
    head_name = "head.fc"
    label = "ConvNeXt V2"

    def __init__(
        self,
        *,
        input_size: Sequence[int],
        patch_size: Sequence[int],
        in_chans: int,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        within("drop_path", drop_path, 0, 1, open_high=True)
        if len(depths) != len(dims) or not depths or min(*depths, *dims) < 1:
            raise ConfigError(f"depths are {list(depths)} and dims {list(dims)}", "give both one number for each stage")
        shrink = 2 ** (len(depths) - 1)
        if any(size % shrink for size in patch_size):
            shown = "x".join(map(str, patch_size))
            raise ConfigError(
                f"patch size is {shown}, and {len(depths)} stages halve an image {len(depths) - 1} times",
                f"use multiples of {shrink}, or fewer stages",
            )
        self.grid = grid_size(input_size, patch_size)
        self.input_size = tuple(input_size)
        self.patch_size = tuple(patch_size)
        self.in_chans = in_chans
        self.embed_dim = dims[-1]
        self.arguments = {
            "encoder": "convnext",
            "input_size": self.input_size,
            "patch_size": self.patch_size,
            "in_chans": in_chans,
            "depths": tuple(depths),
            "dims": tuple(dims),
            "mlp_ratio": mlp_ratio,
        }
        axes, stem = len(self.patch_size), tuple(size // shrink for size in patch_size)
        self.stem = nn.ModuleList(
            [CONVOLUTIONS[axes](in_chans, dims[0], stem, stem), nn.LayerNorm(dims[0], eps=LAYER_NORM_EPS)]
        )
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        blocks = [
            [ConvNeXtBlock(dim, axes, mlp_ratio, rates.pop(0)) for _ in range(depth)]
            for depth, dim in zip(depths, dims, strict=True)
        ]
        self.stages = nn.ModuleList(map(_Stage, (None, *dims), dims, blocks))
        self.norm_pre = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS)
        self.apply(_initialise)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        """Encodes images (B, C, *size): the patches at indices `ids_keep`, (B, K) int64; None: all."""
        grid = self.grid_of(images)
        whole = Cells(None, (1,) * len(grid), tuple(images.shape[2:]))
        cells = whole if ids_keep is None else Cells(ids_keep, grid, self.patch_size)
        x, cells = cells.reduce(cells.collect(images), self.stem[0])
        x = self.stem[1](x)
        for stage in self.stages:
            x, cells = stage(x, cells)
        patches = self.norm_pre(x)
        return EncoderOutput(patches[:, :0], patches, grid)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # timm's names put them into stages
        """The blocks of all stages."""
        return nn.ModuleList(block for stage in self.stages for block in cast(_Stage, stage).blocks)

    def layer_of(self, name: str) -> int:
        """As `Encoder.layer_of`; a downsampling belongs to the block after it."""
        depths = self.arguments["depths"]
        part, *rest = name.split(".")
        if part != "stages":
            return 0 if part == "stem" else sum(depths) + 1
        return sum(depths[: int(rest[0])]) + (int(rest[2]) if rest[1] == "blocks" else 0) + 1

    def timm_model(self) -> tuple[str, dict[str, Any]]:
        """As `Encoder.timm_model`; timm has four stages and a stem with a stride of 1 or 4."""
        stem = tuple(cast(nn.Conv2d, self.stem[0]).stride)
        ratio = self.arguments["mlp_ratio"]
        if len(self.stages) != 4 or stem not in ((1, 1), (4, 4)) or ratio != 4:
            raise ConfigError(
                f"the model has {len(self.stages)} stages, a stem of stride {stem} and mlp_ratio {ratio:g}",
                "use --to safetensors or onnx: timm takes 4 stages, a stride of 1 or 4 (patches of 8 or 32) and 4",
            )
        sizes = {name: self.arguments[name] for name in ("in_chans", "depths", "dims")}
        fixed = {"use_grn": True, "ls_init_value": None, "conv_mlp": False}
        normed = isinstance(self.norm_pre, nn.LayerNorm)
        return "convnextv2_atto", {**sizes, "patch_size": stem[0], **fixed, "head_norm_first": normed}

    def flops(self, kept: int) -> tuple[int, int]:
        """As `Encoder.flops`: the stem, and the stages."""
        stem = cast(nn.Conv2d, self.stem[0])
        sizes = [prod(self.patch_size) // prod(stem.stride)]  # pixels of a patch in each stage
        sizes += [sizes[0] // 2 ** (len(self.patch_size) * i) for i in range(1, len(self.stages))]
        stages = zip(sizes, self.stages, strict=True)
        total = sum(cast(_Stage, stage).flops(self.num_patches * size, kept * size) for size, stage in stages)
        return 2 * kept * sizes[0] * stem.weight.numel(), total


class ConvNeXtClassifier(Classifier, ConvNeXtEncoder):  # type: ignore[misc]  # logits, in place of tokens
    """A ConvNeXt V2 that classifies images."""

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__(num_classes, **encoder)
        self.norm_pre = nn.Identity()  # type: ignore[assignment]
        norm, linear = self.build_head()
        self.head = nn.Sequential(OrderedDict(norm=norm, fc=linear))

    def classify(self, features: Tensor) -> Tensor:
        """As `Classifier.classify`."""
        return self.head(features)


def _initialise(module: nn.Module) -> None:
    """Truncated normal weights (standard deviation 0.02) and zero biases, as in the paper."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
