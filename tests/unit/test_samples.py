import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SAMPLES = SCRIPTS.parent / "src" / "rushes" / "catalog" / "samples"
SIZES = {
    "Runcomfy_Example_1290_1.png": (1280, 720),
    "RunComfy_examples_1235_1.png": (1152, 768),
    "Runcomfy_Example_1259_1.png": (960, 960),
    "Runcomfy_Example_1259_2.png": (960, 960),
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_samples_are_plain_pictures_of_modest_size(name: str, size: tuple[int, int]) -> None:
    with Image.open(SAMPLES / name) as image:
        image.load()
        assert ("PNG", "RGB", size) == (image.format, image.mode, image.size)
    assert (SAMPLES / name).stat().st_size < 900_000


@pytest.mark.parametrize("name", SIZES)
def test_the_script_draws_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("draw_samples")
    assert set(SIZES) == set(script.PICTURES)
    drawn = script.PICTURES[name]().astype(int)
    kept = np.asarray(Image.open(SAMPLES / name), int)
    difference = np.abs(drawn - kept)
    # Other builds of OpenCV round a few pixels of an edge the other way.
    assert difference.mean() < 0.2
    assert (difference > 24).mean() < 0.001
    assert "draw_samples" in sys.modules
