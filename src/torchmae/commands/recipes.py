"""`torchmae recipes`: lists the named sets of settings."""

from __future__ import annotations

from torchmae import settings
from torchmae.config.pretrain import RecipesOptions


def run(_: RecipesOptions) -> int:
    """Prints one recipe per line; returns the exit status."""
    names = settings.recipe_names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {settings.recipe_summary(name)}")
    return 0
