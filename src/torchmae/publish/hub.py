"""Uploads exports to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from torchmae.config.export import ExportOptions
from torchmae.errors import CheckpointError, ConfigError, reason_of, require
from torchmae.publish.export import export

_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def push(run: str | Path, repo: str, options: ExportOptions, *, private: bool = False) -> str:
    """Exports a model (see `export`) and uploads it with its model card as one commit, whose address it returns.

    The repository `repo` (user/name) is created if it does not exist, private with `private`. Address and token of the
    hub are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN, or `hf auth login`. ConfigError: `repo` is no user/name.
    CheckpointError: the upload failed.
    """
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"repo is {repo!r}", "give user/name")
    hub = require("huggingface_hub", "hub")
    with TemporaryDirectory(prefix="torchmae-") as scratch:
        made = export(run, Path(scratch) / "model", options)
        api = hub.HfApi()
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            message = f"torchmae export --to {options.to}"
            commit = api.upload_folder(repo_id=repo, folder_path=made.path, commit_message=message)
        except (OSError, ValueError, hub.errors.HTTPError) as error:
            raise CheckpointError(
                f"cannot push to {repo}: {reason_of(error)}",
                "log in with `hf auth login` or set HF_TOKEN, then try again",
            ) from error
    return str(commit.commit_url)
