"""Patches, masks and networks. Nothing here depends on settings or data."""

from torchmae.nn.classifier import Classifier, ViTClassifier
from torchmae.nn.convnext import ConvNeXtClassifier, ConvNeXtEncoder
from torchmae.nn.decoder import DECODERS, CrossDecoder, Decoder, SelfDecoder
from torchmae.nn.encoder import Encoder, EncoderOutput, ViTEncoder
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import STRATEGIES, Mask, Masker, Strategy
from torchmae.nn.targets import HogTarget, PixelTarget, Target
from torchmae.nn.teacher import TeacherTarget

ENCODERS: dict[str, type[Encoder]] = {"vit": ViTEncoder, "convnext": ConvNeXtEncoder}
CLASSIFIERS: dict[str, type[Classifier]] = {"vit": ViTClassifier, "convnext": ConvNeXtClassifier}
TARGETS: dict[str, type[Target]] = {"pixels": PixelTarget, "hog": HogTarget, "teacher": TeacherTarget}

__all__ = [
    "CLASSIFIERS",
    "DECODERS",
    "ENCODERS",
    "STRATEGIES",
    "TARGETS",
    "Classifier",
    "ConvNeXtEncoder",
    "CrossDecoder",
    "Decoder",
    "Encoder",
    "EncoderOutput",
    "HogTarget",
    "Mask",
    "MaskedAutoencoder",
    "Masker",
    "PixelTarget",
    "SelfDecoder",
    "Strategy",
    "Target",
    "TeacherTarget",
    "ViTEncoder",
]
