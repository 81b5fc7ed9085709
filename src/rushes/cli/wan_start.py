"""Whether the engine `wan` can start with these settings at all: asked before anything is started or said."""

import os
from importlib.util import find_spec

from rushes.catalog.nearest import did_you_mean
from rushes.errors import SettingsError
from rushes.settings import Settings


def check_wan(settings: Settings) -> None:
    """Refuse settings with which no slot could ever have its engine. Nothing is loaded, and nobody asked.

    Raises SettingsError.
    """
    if settings.engine != "wan" or not settings.workers:
        return
    from rushes.catalog.load import Catalog
    from rushes.cli.wan import PACKAGES
    from rushes.engines.wan.devices import choose
    from rushes.engines.wan.weights import ANY, served_models, wanted_weights

    if missing := next((name for name in ("torch", *PACKAGES) if find_spec(name) is None), ""):
        raise SettingsError(f"engine wan needs more packages ({missing} is missing): pip install 'rushes[wan]'")
    choose(settings.wan_device, settings.workers - 1, dict(os.environ), settings.wan_cards)
    catalog = Catalog.load(settings.models_dir)
    known = [entry.model.id for entry in catalog.entries()]
    for text in settings.wan_weights:
        name = text.partition("=")[0].strip()
        if name not in known:
            raise SettingsError(f"RUSHES_WAN_WEIGHTS: there is no model {name!r}; {did_you_mean(name, known)}")
    if not served_models(settings, catalog):
        raise SettingsError(
            f"engine wan has no model to serve: none that fits RUSHES_MODELS, {settings.models!r}, has a table "
            "[engines.wan]"
        )
    if settings.models.strip() == ANY:
        wanted_weights(settings, catalog, lambda _: None)  # fetches nothing, but some must be there
