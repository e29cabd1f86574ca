"""Mend the installed type stubs of TensorRT 10: mypy reads no file with a syntax error in it."""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

STUBS = Path("tensorrt_bindings/tensorrt.pyi")
REPAIRS = {
    r"\bin: list\[": "inputs: list[",  # `in` is a keyword
    r"channel_axis: int\)": "channel_axis: int = 0)",  # follows parameters with defaults
    r"def get_error\(self, index: int\) -> \.\.\.:": "def get_error(self, index: int) -> ParserError:",
}


def mend(text: str) -> str:
    """Return the stubs as valid Python.

    Raises:
        SyntaxError: They are of another version, which has other faults.
    """
    for fault, repair in REPAIRS.items():
        text = re.sub(fault, repair, text)
    ast.parse(text)
    return text


if __name__ == "__main__":
    path = Path(sysconfig.get_paths()["purelib"]) / STUBS
    path.write_text(mend(path.read_text(encoding="utf-8")), encoding="utf-8")
