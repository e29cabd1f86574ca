"""Put the weights of the shipped model back where training hands them on, to train further.

`python -m tools.emoji.restore`, then for example
`python -m tools.emoji.train unet --minutes 20 --from-weights build/emoji-train/weights`.
"""

import argparse
from pathlib import Path

from tools.emoji import checkpoint
from tools.emoji.export import exported_networks


def restore(model: Path, weights: Path) -> None:
    """Write the networks of the `model` folder to `weights` as training does, at step and second 0."""
    for name, network in vars(exported_networks(model)).items():
        checkpoint.write_weights(
            weights / name, dict(network.named_parameters()), {"step": 0, "seconds": 0.0}
        )


def main() -> None:
    """Read the command line and restore the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("qlip_export/zoo/emoji"))
    parser.add_argument("--weights", type=Path, default=Path("build/emoji-train/weights"))
    arguments = parser.parse_args()
    restore(arguments.model, arguments.weights)


if __name__ == "__main__":
    main()
