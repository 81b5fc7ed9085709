"""What `rushes doctor` says of the engine `wan`: torch, cards, weights, and what stands in the way of each."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.nearest import did_you_mean
from rushes.catalog.wan import wan_of
from rushes.engines.wan import hub, layout
from rushes.engines.wan.devices import cards, choose
from rushes.engines.wan.weights import Missing, Weights, served_models, shown_size, weights_of
from rushes.errors import ManifestError, RushesError, SettingsError
from rushes.settings import Settings

Finding = tuple[str, str, str]
"""As in :mod:`rushes.cli.doctor`."""
BUILDS: Final = "https://pytorch.org/get-started/locally"
PACKAGES: Final = (
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
    "huggingface_hub",
    "sentencepiece",
)
_SECONDS: Final = 120.0
"""A cold import of torch from a slow disk can take a minute."""
_PROBE: Final = """
import json, sys
import torch
said = {"torch": torch.__version__, "cuda": torch.version.cuda, "trouble": ""}
if sys.argv[1] == "cuda":
    try:
        assert torch.ones(8, device="cuda").sum().item() == 8
    except Exception as error:
        said["trouble"] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def findings(settings: Settings) -> Iterator[Finding]:
    """Everything that this engine needs, in the order in which it needs it. Nothing is downloaded."""
    yield from _packages()
    yield from _devices(settings)
    yield from _settings(settings)
    yield from _models(settings)


# -- programs and cards ----------------------------------------------------------------------------------
def _packages() -> Iterator[Finding]:
    missing = []
    for name in PACKAGES:
        try:
            yield "ok", name, version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield "bad", "engine wan", f"{', '.join(missing)}: missing; {hub.INSTALL}"


def _devices(settings: Settings) -> Iterator[Finding]:
    found = cards(os.environ) if settings.wan_device != "cpu" else []
    device = "cuda" if found else "cpu"
    for number, card in enumerate(found):
        memory = shown_size(card.memory) if card.memory else "memory shared with the machine"
        capability = "compute capability {}.{}".format(*card.capability) if card.capability else "an old driver"
        yield "ok", f"card {number}", f"{card.name}, {memory}, {capability}"
    if settings.wan_device == "cpu":
        yield "note", "card", "not looked for: RUSHES_WAN_DEVICE is cpu, far too slow for models of full size"
    elif not found and settings.wan_device == "auto":
        text = "nvidia-smi tells of none: the CPU computes, far too slow for models of full size"
        yield "note", "card", text
    if found or settings.wan_device == "cuda":
        try:
            last = max(settings.workers, 1) - 1
            device = choose(settings.wan_device, last, dict(os.environ), settings.wan_cards)
        except SettingsError as error:
            yield "bad", "slots" if found else "card", error.message
        else:
            if device == "cpu":
                yield "note", "card", "CUDA_VISIBLE_DEVICES hides all: the CPU computes"
            elif settings.wan_cards > 1:
                yield "ok", "slots", f"{settings.workers}, each with {settings.wan_cards} cards for one video"
    yield _torch(device)


def _torch(device: str) -> Finding:
    """Whether torch can be imported and, for ``cuda``, computes on the card: asked in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, device],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (
            "bad",
            "torch",
            f"importing it does not end within {_SECONDS:g} s: look at the disk and the driver",
        )
    lines = (done.stderr or "").strip().splitlines()
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return "bad", "torch", f"importing it crashes ({name}): install it anew, for your card: {BUILDS}"
    if done.returncode:
        last = lines[-1] if lines else f"exit status {done.returncode}"
        if "No module named 'torch'" in last:
            return "bad", "torch", f"missing: choose the build for your card ({BUILDS}), then {hub.INSTALL}"
        return "bad", "torch", f"cannot be imported ({last[:300]}): install it anew: {BUILDS}"
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if device == "cpu":
        return "ok", "torch", str(said["torch"])
    if said["cuda"] is None:
        return (
            "bad",
            "torch",
            f"{said['torch']} is a build without CUDA: install the one for your card: {BUILDS}",
        )
    if said["trouble"]:
        trouble = " ".join(str(said["trouble"]).split())[:300]
        step = f"compare the driver with CUDA {said['cuda']}, or take another build: {BUILDS}"
        return "bad", "torch", f"{said['torch']} does not compute on the card ({trouble}): {step}"
    return "ok", "torch", f"{said['torch']}, computes with CUDA {said['cuda']}"


# -- settings --------------------------------------------------------------------------------------------
def _settings(settings: Settings) -> Iterator[Finding]:
    folder = settings.wan_loras_dir
    if folder is not None:
        there = folder.expanduser().is_dir()
        text = "requests may name the LoRA files in it" if there else "is not there: mend RUSHES_WAN_LORAS_DIR"
        yield "ok" if there else "bad", "LoRAs", f"{folder}: {text}"
    yield "ok", "profile", settings.wan_profile


# -- weights ---------------------------------------------------------------------------------------------
def _models(settings: Settings) -> Iterator[Finding]:
    catalog = Catalog.load(settings.models_dir)
    known = [entry.model.id for entry in catalog.entries()]
    for text in settings.wan_weights:
        if (name := text.partition("=")[0].strip()) not in known:
            yield "bad", "RUSHES_WAN_WEIGHTS", f"there is no model {name!r}; {did_you_mean(name, known)}"
    models = served_models(settings, catalog)
    if not models:
        yield "bad", "engine wan", "no model that fits RUSHES_MODELS has a table [engines.wan] (docs/wan.md)"
    weights = weights_of(settings)
    lost: list[Missing] = []
    for model in models:
        yield from _model(settings, weights, model, lost)
    yield from _room([one for one in lost if one.fetchable])


def _model(settings: Settings, weights: Weights, model: Model, lost: list[Missing]) -> Iterator[Finding]:
    what = f"weights of {model.id}"
    try:
        wan = wan_of(model)
        found = weights.find(model)
    except (ManifestError, SettingsError) as error:
        yield "bad", what, error.message
        return
    if wan.stand_in:
        yield "note", model.id, f"{wan.stand_in} stands in for it"
    if settings.wan_profile == "turbo" and wan.turbo is None:
        step = "set another RUSHES_WAN_PROFILE, or leave the model out of RUSHES_MODELS"
        yield "bad", model.id, f"its manifest has no turbo, so that with this profile its requests fail: {step}"
    if isinstance(found, Missing):
        lost.append(found)
        yield "note" if found.fetchable else "bad", what, found.text
    else:
        yield "ok", what, f"{shown_size(found.bytes)} in {found.folder}"
        if settings.wan_cards > 1 and (why := layout.not_spread(found.folder)):
            yield "note", model.id, f"uses one of its slot's {settings.wan_cards} cards: {why}"
    parts = [part for repository in weights.repositories(model) for part in hub.left_overs(repository)]
    if parts:
        size = shown_size(sum(part.stat().st_size for part in parts))
        text = f"{len(parts)} part(s) of broken-off downloads, {size}, can be removed: {parts[0].parent}/*.incomplete"
        yield "note", what, text


def _room(lost: list[Missing]) -> Iterator[Finding]:
    """What stands in the way of fetching what is not here."""
    if not lost:
        return
    try:
        place, offline, token = hub.cache_folder(), hub.is_offline(), hub.has_token()
    except RushesError:
        return  # told with the packages
    free = shutil.disk_usage(_there(place)).free
    known = sum(one.bytes or 0 for one in lost)
    unknown = sum(one.bytes is None for one in lost)
    more = f", and {unknown} model(s) of which the hub has not told the size yet" if unknown else ""
    text = f"{shown_size(known)} are missing{more}; {shown_size(free)} free in {place}"
    if known > free:
        yield "bad", "disk for weights", f"{text}: make room, or set HF_HOME to a larger disk"
    else:
        yield "ok", "disk for weights", text
    if offline:
        yield "bad", "hub", "HF_HUB_OFFLINE is set: what is missing cannot be fetched"
    elif token:
        yield "ok", "hub", "a token is set; gated weights need its account to have accepted their terms"
    else:
        yield (
            "note",
            "hub",
            "no HF_TOKEN: it is needed for gated weights only, and lets the hub answer more often",
        )


def _there(place: Path) -> Path:
    return next(one for one in (place, *place.parents) if one.exists())
