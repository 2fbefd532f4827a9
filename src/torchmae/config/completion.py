"""The settings of `torchmae completion`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torchmae.config.base import POSITIONAL, Settings


@dataclass(frozen=True)
class CompletionOptions(Settings):
    """Prints a shell script that completes commands, options and their values on Tab.

    Write it to a file once, and again after an update. It needs shtab: pip install 'torchmae[completion]'.

      bash: torchmae completion bash > ~/.local/share/bash-completion/completions/torchmae
      zsh:  torchmae completion zsh  > ~/.zfunc/_torchmae      (with `fpath+=~/.zfunc` before compinit in ~/.zshrc)
      fish: torchmae completion fish > ~/.config/fish/completions/torchmae.fish

    Attributes:
        shell: the shell that reads the script.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], POSITIONAL]
