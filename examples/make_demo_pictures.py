"""Make examples/demo/pictures: the part of Fashion-MNIST that the demo model is trained and tested on.

    apt-get install dataset-fashion-mnist   # Debian and Ubuntu; or the four .gz files from its repository
    python -m examples.make_demo_pictures [FOLDER]

The first 3,000 training and the first 200 test photos of each garment, in the official order. Training sheets are lossy
(a third of the bytes, 35 dB), so that more of them fit; test sheets are identical to the official pixels.
"""

import gzip
import pathlib
import sys
from typing import Any

import numpy as np
from PIL import Image

from examples.demo.photos import ACROSS, GARMENTS, PIXELS, Split, sheet_path

FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
FILES: dict[Split, str] = {"train": "train", "test": "t10k"}
COUNT: dict[Split, int] = {"train": 3000, "test": 200}  # of each garment
WEBP: dict[Split, dict[str, Any]] = {
    "train": {"quality": 60, "method": 6},
    "test": {"lossless": True},
}


def main(folder: pathlib.Path) -> None:
    for split, file in FILES.items():
        images = read(folder / f"{file}-images-idx3-ubyte.gz", 16).reshape(-1, PIXELS, PIXELS)
        labels = read(folder / f"{file}-labels-idx1-ubyte.gz", 8)
        for label, garment in enumerate(GARMENTS):
            chosen = images[labels == label][: COUNT[split]]
            rows = chosen.reshape(-1, ACROSS, PIXELS, PIXELS).swapaxes(1, 2)
            path = sheet_path(split, garment)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rows.reshape(-1, ACROSS * PIXELS)).save(path, **WEBP[split])
            print(f"{path}: {len(chosen)} photos, {path.stat().st_size / len(chosen):.0f} bytes each")


def read(path: pathlib.Path, header: int) -> np.ndarray:
    """Contents of an IDX file after its header, (n,) uint8."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
