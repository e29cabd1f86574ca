"""Write the statistics of the images that the emoji model was trained on: what its FID is measured to.

`python -m tools.emoji.reference` reads `build/emoji-data` and writes `reference.safetensors` and
`reference.json` to `calibration/emoji/`.
"""

import argparse
from pathlib import Path

import torch

from qlip_export.features import FeatureExtractor, ReferenceStatistics
from tools.emoji.data import DEFAULT_FOLDER, load

DEFAULT_OUT = Path("calibration/emoji/reference.safetensors")
BATCH = 64


def main() -> None:
    """Read the command line, compute the statistics and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--model", type=Path, default=Path("qlip_export/zoo/emoji"))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    dataset = load(arguments.data)
    trained = [number for number, record in enumerate(dataset.records) if not record.held_out]
    images = torch.from_numpy(dataset.pixels[trained])
    source = f"the {len(trained)} images that the emoji model was trained on (python -m tools.emoji.data)"
    statistics = ReferenceStatistics.of_images(images.split(BATCH), FeatureExtractor(arguments.model), source)
    statistics.save(arguments.out)
    print(f"{arguments.out}: {len(trained)} images, {arguments.out.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
