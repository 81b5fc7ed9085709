"""Draw the sample pictures that the default inputs name. They are ours, under the project's licence.

python scripts/draw_samples.py [FOLDER]
"""

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sample_art.canvas import Array
from sample_art.corridor import corridor
from sample_art.puppy import puppy_barking, puppy_sitting
from sample_art.wasteland import wasteland

SAMPLES = Path(__file__).resolve().parent.parent / "src" / "rushes" / "catalog" / "samples"

PICTURES: dict[str, Callable[[], Array]] = {
    "Runcomfy_Example_1290_1.png": wasteland,
    "RunComfy_examples_1235_1.png": corridor,
    "Runcomfy_Example_1259_1.png": puppy_sitting,
    "Runcomfy_Example_1259_2.png": puppy_barking,
}


def main(folder: Path = SAMPLES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        Image.fromarray(draw()).save(folder / name, optimize=True)
        print(folder / name)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
