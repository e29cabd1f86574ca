"""Running a bundle needs no torch and no ONNX: an interpreter that refuses to import them makes an image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip_export.runtime import TextToImage

FORBIDDEN = (
    "accelerate",
    "diffusers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "torch",
    "transformers",
)

# Runs before anything else in the new interpreter, `site` apart.
BLOCK = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise AssertionError("the run time imports " + name)
sys.meta_path.insert(0, Refuse())
"""

IN_PYTHON = """
from qlip_export.runtime import TextToImage
bundle, out = sys.argv[1:]
TextToImage.load(bundle)("a red apple", seed=5, bits=8).images[0].save(out)
"""

ON_THE_COMMAND_LINE = """
bundle, out = sys.argv[1:]
sys.argv[1:] = ["generate", bundle, "a red apple", "--seed", "5", "--bits", "8", "-o", out, "--json"]
from qlip_export.cli import main
main()
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_block_works(name: str) -> None:
    done = run(f"import {name}")
    assert done.returncode == 1
    assert f"the run time imports {name}" in done.stderr


@pytest.mark.parametrize("code", [IN_PYTHON, ON_THE_COMMAND_LINE], ids=["python", "command line"])
@pytest.mark.parametrize("backend", ["bundle", "ort_bundle"])
def test_image_without_torch(request: pytest.FixtureRequest, tmp_path: Path, code: str, backend: str) -> None:
    bundle, out = request.getfixturevalue(backend), tmp_path / "apple.png"
    done = run(code, bundle, out)
    assert done.returncode == 0, done.stderr
    here = TextToImage.load(bundle)("a red apple", seed=5, bits=8).images[0]
    with Image.open(out) as there:
        difference = np.asarray(there, dtype=np.int64) - np.asarray(here, dtype=np.int64)
    assert np.abs(difference).max() == 0
    if code is ON_THE_COMMAND_LINE:
        assert json.loads(done.stdout)["images"][0]["seed"] == 5
