"""Vision transformers of timm by name, with their pre-trained weights, as they are: teachers, and models to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchmae.errors import ConfigError, reason_of, require
from torchmae.interop.weights import AbsentDecoder
from torchmae.nn.encoder import Encoder, EncoderOutput
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Strategy
from torchmae.nn.patches import grid_size

TIMM = "timm:"
"""What stands before the name of a network."""


def make_network(name: str, grid: Sequence[int] | None = None, *, pretrained: bool = True) -> Any:
    """Makes a network of timm, whose `forward_features` gives the tokens of an image.

    `grid` is the number of patches along each axis of the images; None: as many as the network was trained with.

    Raises:
        ConfigError: timm is not installed or does not know the name, the network has no patches, or its weights cannot
            be downloaded.
    """
    timm = require("timm", "timm")
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0)
        patch = network.patch_embed.patch_size
        size = network.patch_embed.img_size if grid is None else [n * p for n, p in zip(grid, patch, strict=True)]
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
        network.forward_features, network.num_prefix_tokens  # noqa: B018 - only transformers have both
    except Exception as error:  # an unknown name, an architecture without patches, no connection
        raise ConfigError(f"timm cannot make {name!r}: {reason_of(error)}", "name a ViT of timm") from error
    return network


def normalisation_of(network: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images that a network of timm takes."""
    config: dict[str, Any] = require("timm", "timm").data.resolve_model_data_config(network)
    return tuple(config["mean"]), tuple(config["std"])


class TimmEncoder(Encoder):
    """A network of timm as an encoder. It encodes whole images alone: it cannot be masked."""

    label = "network of timm"
    strategies: Mapping[str, Strategy] = {}

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        embedding = network.patch_embed
        self.input_size, self.patch_size = tuple(embedding.img_size), tuple(embedding.patch_size)
        self.grid = grid_size(self.input_size, self.patch_size)
        self.in_chans, self.embed_dim = embedding.proj.in_channels, network.num_features
        self.num_prefix_tokens = network.num_prefix_tokens
        self.has_class_token = getattr(network, "cls_token", None) is not None

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        """Encodes all patches of images, (B, C, *size). ConfigError: `ids_keep` is given."""
        if ids_keep is not None:
            raise ConfigError("a network of timm takes whole images", "use it for features, not for reconstructions")
        grid = self.grid_of(images)
        tokens: Tensor = self.network.forward_features(images)
        prefix, patches = tokens.tensor_split((self.num_prefix_tokens,), dim=1)
        return EncoderOutput(prefix, patches, grid)

    def flops(self, kept: int) -> tuple[int, int]:  # noqa: ARG002
        """Zeros: they are not known."""
        return 0, 0


def timm_model(name: str, *, pretrained: bool = True) -> MaskedAutoencoder:
    """Makes a model from a network of timm. It gives features and cannot reconstruct. Errors: as in `make_network`."""
    encoder = TimmEncoder(make_network(name, pretrained=pretrained))
    decoder = AbsentDecoder(f"{name} of timm has no decoder", "use it for features")
    return MaskedAutoencoder(encoder, decoder, []).eval()
