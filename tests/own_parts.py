"""Parts that the tests hand over from outside the package."""

from __future__ import annotations

from torch import Tensor, nn

from torchmae.nn import Encoder, EncoderOutput
from torchmae.nn.patches import gather, patchify


class Averages(Encoder):
    """A linear layer on each patch of 8 x 8 grey pixels: no class token, no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size, self.in_chans, self.grid, self.patch_size, self.embed_dim = (8, 8), 1, (4, 4), (2, 2), 12
        self.linear = nn.Linear(4, 12)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        patches = patchify(images, self.patch_size)
        x = self.linear(patches if ids_keep is None else gather(patches, ids_keep))
        return EncoderOutput(x[:, :0], x, self.grid_of(images))

    def flops(self, kept: int) -> tuple[int, int]:
        return 2 * kept * 4 * 12, 0
