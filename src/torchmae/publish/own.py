"""torchmae's own format: model.json describes the model, model.safetensors holds its weights."""

from __future__ import annotations

from pathlib import Path

from torchmae.nn.classifier import Classifier
from torchmae.publish.exports import Check, Exported, compare, worst
from torchmae.training.saved_classifier import ClassifierDescription, load_classifier, save_classifier
from torchmae.training.saved_model import load_model, write_description, write_weights


def write(folder: Path, exported: Exported) -> None:
    """Writes model.json and model.safetensors."""
    if isinstance(exported.model, Classifier):
        assert isinstance(exported.description, ClassifierDescription)
        save_classifier(folder, exported.model, exported.description)
    else:
        assert not isinstance(exported.description, ClassifierDescription)
        write_description(folder / "model.json", exported.description)
        write_weights(folder / "model.safetensors", exported.model.state_dict())


def check(folder: Path, exported: Exported) -> Check:
    """Reads the folder back and compares every weight."""
    again = load_classifier(folder)[0] if isinstance(exported.model, Classifier) else load_model(folder)[0]
    ours, theirs = exported.model.state_dict(), again.state_dict()
    checks = [compare("read back", "weights", theirs[name], ours[name]) for name in ours]
    return worst(checks)._replace(largest=max(check.largest for check in checks))


def usage(exported: Exported) -> str:
    """Python code that loads the folder."""
    if isinstance(exported.model, Classifier):
        return (
            "from pathlib import Path\n\nfrom torchmae.training.saved_classifier import load_classifier\n\n"
            'model, description = load_classifier(Path("FOLDER"))\n'
            f"logits = model(images)  # images: {exported.shape}\n"
        )
    file = {"signal": "record.wav", "volume": "scan.nii.gz", "clip": "clip.mp4"}.get(exported.samples, "photo.jpg")
    return f'import torchmae\n\nmodel = torchmae.load("FOLDER")\nfeatures = model.encode(model.preprocess("{file}"))\n'
