"""Imports go one way. The tables below are the rule; a new module needs a row in `MAY_IMPORT`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlip_export"

# A name stands for the module or package and all below it, and the longest name that fits decides. A module
# may always import its own package and `errors`. "*" is anything, "-x" takes x away, "lazy:x" is x inside
# functions.
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "spec": set(),
    "extents": {"spec"},
    "files": set(),
    "progress": set(),
    "noise": set(),
    "prompts": set(),
    "checkpoint": {"files"},
    "families": {"spec"},
    "conditioning": {"spec"},
    "pipelines": {"conditioning"},
    "compiled": {"spec", "extents"},
    "manifest": {"spec", "extents", "conditioning", "policy.table", "compiled"},
    "bundle": {"spec", "files", "compiled", "manifest"},
    "sizes": {"extents", "manifest", "bundle"},
    "quant": {"spec", "files"},
    "graph": {"spec", "extents", "quant"},
    "backends": {
        "spec",
        "files",
        "compiled",
        "manifest",
        "extents",
        "progress",
        "lazy:graph.dynamic",
        "lazy:graph.expand",
        "lazy:graph.fuse",
        "lazy:graph.precisions",
        "lazy:graph.store",
    },
    "backends.options": {"spec", "extents"},
    "runtime": {
        "spec",
        "files",
        "compiled",
        "manifest",
        "bundle",
        "sizes",
        "conditioning",
        "backends",
        "progress",
        "noise",
        "policy.table",
        "variants",
    },
    "sampler_probe": {"spec"},
    "capture": {"spec", "checkpoint", "families", "pipelines", "graph"},
    "text_encoders": {"checkpoint", "pipelines", "capture"},
    "reference": {"spec", "bundle", "checkpoint", "capture", "graph", "quant", "torch_pipeline"},
    "diffusers_denoiser": {"spec", "bundle", "runtime"},
    "policy": {"spec", "files"},
    "policy.table": {"spec"},
    "variants": {"spec", "policy.table"},
    "variants.choose": {"spec", "manifest", "policy.table"},
    "build_variants": {"*", "-build", "-cli", "-runtime", "-validate", "-export"},
    "policy.select": {"spec", "files", "manifest", "workspace"},
    "calibrate": {"*", "-build", "-cli", "-runtime", "-validate"},
    "calibrate.latency": {"spec", "files", "lazy:runtime"},
    "plan": {"spec", "checkpoint", "families", "capture", "memory", "random_weights", "text_encoders", "zoo"},
    "random_weights": {"files", "checkpoint", "quant"},
    "lora": {"files", "checkpoint"},
    "torch_pipeline": {"checkpoint", "families", "pipelines", "sampler_probe", "random_weights"},
    "simulate": {
        "spec",
        "conditioning",
        "checkpoint",
        "pipelines",
        "capture",
        "text_encoders",
        "quant",
        "torch_pipeline",
        "cuda_graph",
    },
    "cuda_graph": set(),
    "zoo": {"spec", "files", "manifest", "checkpoint", "lazy:random_weights", "lazy:lora"},
    "features": {"spec", "files", "checkpoint", "torch_pipeline"},
    "metrics": {"spec", "features"},
    "renderers": {"*", "-build", "-cli", "-validate", "-evaluate"},
    "evaluate": {"*", "-build", "-cli", "-validate"},
    "workspace": {"spec", "files", "compiled", "manifest", "bundle"},
    "export": {"*", "-compile", "-build", "-cli", "-runtime", "-validate"},
    "timing": {"spec", "compiled", "manifest", "bundle", "progress", "runtime", "workspace"},
    "profiles": {"spec", "extents", "conditioning", "manifest", "lazy:graph.dynamic", "lazy:graph.store"},
    "compile": {
        "spec",
        "files",
        "compiled",
        "manifest",
        "bundle",
        "backends",
        "profiles",
        "progress",
        "workspace",
    },
    "build": {"*", "-cli", "-runtime"},
    "parity": {"spec", "files"},
    "runners": {"spec", "compiled", "backends", "parity"},
    "validate": {"*", "-cli"},
    "quickstart": {"*", "-cli"},
    "bitmap": {"manifest"},
    "report": {"*", "-cli", "-commands"},
    "demo": {"spec", "manifest", "bitmap", "runtime", "prompts", "zoo", "report.policy"},
    "commands": {"*", "-cli"},
    "memory": {"spec", "manifest"},
    "display": {
        "spec",
        "compiled",
        "manifest",
        "bundle",
        "memory",
        "metrics",
        "evaluate",
        "validate",
        "build",
    },
    "cli": {"*"},
    "__main__": {"cli"},
}

TORCH_MODULES = {
    "capture",
    "text_encoders",
    "sampler_probe",
    "calibrate",
    "build_variants",
    "features",
    "metrics",
    "renderers",
    "evaluate",
    "reference",
    "simulate",
    "cuda_graph",
    "torch_pipeline",
    "random_weights",
    "plan",
    "diffusers_denoiser",
    "policy",
    "quant",
    "-quant.weights",
    "-quant.rounding",
    "-policy.table",
}
ONNX_MODULES = {
    "capture",
    "graph",
    "policy.graph",
    "policy.select",
    "export",
    "build",
    "validate",
    "lazy:compile",
    "lazy:profiles",
    "lazy:renderers",
    "lazy:backends",
}

# Who may import a library. Imports for type checkers alone do not count here. An engine's file in backends/
# is loaded only when its name is chosen, so its library may stand at the top.
LIBRARIES: dict[str, set[str]] = {
    "torch": TORCH_MODULES,
    "diffusers": TORCH_MODULES,
    "transformers": TORCH_MODULES,
    "onnx": ONNX_MODULES,
    "onnx_ir": ONNX_MODULES,
    "onnxscript": ONNX_MODULES,
    "openvino": {"backends.openvino"},
    "onnxruntime": {"backends.onnxruntime", "backends.onnxruntime_cuda", "runners"},
    "cuda": {"backends.cuda", "lazy:backends.tensorrt"},
    "tensorrt": {"backends.tensorrt"},
    "tensorrt_rtx": {"backends.tensorrt_rtx"},
    "polygraphy": {"lazy:parity", "runners"},
    "plotly": {"report"},
    "jinja2": {"report"},
    "gradio": {"demo.page"},
}

# What running a bundle loads, and what it must never load.
TORCH_FREE = (
    "errors",
    "files",
    "spec",
    "conditioning",
    "extents",
    "pipelines",
    "compiled",
    "manifest",
    "bundle",
    "sizes",
    "profiles",
    "memory",
    "backends",
    "policy.table",
    "variants",
    "runtime",
    "validate",
    "compile",
    "timing",
    "workspace",
    "zoo",
    "commands",
    "cli",
)
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "plotly", "jinja2", "gradio")


@dataclass(frozen=True)
class Import:
    """`target` is a dotted name as imported; `lazy` inside a function; `typing` under `if TYPE_CHECKING`."""

    target: str
    line: int
    lazy: bool
    typing: bool


def imports_of(path: Path, module: str, is_package: bool) -> Iterator[Import]:
    """Yield every import of a file; `from a import b` gives `a.b`, relative ones are made absolute."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                yield Import(f"{source}.{name.name}", node.lineno, lazy, typing)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, lazy, True)
            for child in node.orelse:
                yield from visit(child, lazy, typing)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False, False)


def covers(rule: str, name: str) -> bool:
    return rule == name or name.startswith(rule + ".")


def permits(rules: set[str], name: str, lazy: bool) -> bool:
    """The longest rule that covers `name` decides; without one the answer is no."""
    verdicts = {"*": (0, True)} if "*" in rules else {}
    for rule in rules - {"*"}:
        bare = rule.removeprefix("-").removeprefix("lazy:")
        if covers(bare, name):
            verdicts[rule] = (len(bare), not rule.startswith("-") and (lazy or not rule.startswith("lazy:")))
    return max(verdicts.values())[1] if verdicts else False


def violations(package: Path) -> list[str]:
    """Return one line for every import under `package` that the tables do not allow."""
    found = []
    root = package.name
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for module, path in modules.items():
        rows = [row for row in MAY_IMPORT if row == module or (row and covers(row, module))]
        if not rows:
            found.append(f"{module}: no row in MAY_IMPORT; say what it may import")
            continue
        row = max(rows, key=len)
        full = f"{root}.{module}" if module else root
        for item in imports_of(path, full, path.name == "__init__.py"):
            where = f"{path.relative_to(package)}:{item.line}"
            top = item.target.split(".")[0]
            if top == root:
                name = item.target.removeprefix(root).removeprefix(".")
                own = row.split(".")[0]
                # `from qlip_export import __version__` names no module and is always allowed.
                is_module = any(covers(known, name) for known in modules if known)
                if is_module and not permits(MAY_IMPORT[row] | {"errors", own}, name, item.lazy):
                    found.append(f"{where}: {module or root} must not import {name}")
            elif top in LIBRARIES and not item.typing and not permits(LIBRARIES[top], module, item.lazy):
                found.append(f"{where}: {module or root} must not import {top}")
    return found


def test_package_keeps_the_rules() -> None:
    assert violations(PACKAGE) == []


def test_the_table_names_what_there_is() -> None:
    """A row that outlives its module, or a ban on something that is elsewhere, says nothing."""
    named = {rule.removeprefix("-").removeprefix("lazy:") for rules in MAY_IMPORT.values() for rule in rules}
    for name in (named | MAY_IMPORT.keys()) - {"*", ""}:
        path = PACKAGE / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("errors.py", "from qlip_export.spec import X", "errors must not import spec"),
        ("runtime/a.py", "import torch", "runtime.a must not import torch"),
        ("runtime/a.py", "def f():\n    import torch.nn", "runtime.a must not import torch"),
        ("runtime/a.py", "from qlip_export import capture", "runtime.a must not import capture"),
        ("runtime/a.py", "from ..capture import X", "runtime.a must not import capture"),
        ("backends/a.py", "import onnx", "backends.a must not import onnx"),
        (
            "backends/a.py",
            "from qlip_export.graph.expand import X",
            "backends.a must not import graph.expand",
        ),
        ("build.py", "def f():\n    from qlip_export.runtime import X", "build must not import runtime"),
        ("quant/weights.py", "import torch", "quant.weights must not import torch"),
        (
            "calibrate/latency.py",
            "from qlip_export.runtime.b import X",
            "calibrate.latency must not import runtime.b",
        ),
        (
            "calibrate/bits.py",
            "def f():\n    from qlip_export.runtime.b import X",
            "calibrate.bits must not import runtime.b",
        ),
        ("unheard_of.py", "", "unheard_of: no row in MAY_IMPORT"),
        (
            "graph/a.py",
            "try:\n    import openvino\nexcept ImportError:\n    pass",
            "must not import openvino",
        ),
    ],
)
def test_breach_is_named(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    package = synthetic_package(tmp_path, {path: source})
    assert any(complaint in line for line in violations(package))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/a.py", "from qlip_export.spec import X\nfrom qlip_export.runtime.b import Y"),
        ("backends/a.py", "def f():\n    from qlip_export.graph.expand import X\n    import onnx"),
        ("quant/ranges.py", "import torch"),
        ("calibrate/latency.py", "def f():\n    from qlip_export.runtime.b import X"),
        ("runtime/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("cli.py", "def f():\n    from qlip_export.runtime import X"),
        ("bundle.py", "from qlip_export import __version__"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    assert violations(synthetic_package(tmp_path, {path: source})) == []


def synthetic_package(tmp_path: Path, files: dict[str, str]) -> Path:
    package = tmp_path / "qlip_export"
    everything = dict.fromkeys(["errors.py", "spec.py", "capture.py", "graph/expand.py", "runtime/b.py"], "")
    for name, source in (everything | files).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    (package / "__init__.py").touch()
    return package


def test_help_loads_what_it_prints_with_and_no_more() -> None:
    """It is asked for often, and answers before anybody waits."""
    heavy = (*HEAVY, "pydantic", "numpy", "PIL", "openvino", "onnxruntime")
    code = f"import sys, qlip_export.cli; print(*sorted(set({heavy!r}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_running_a_bundle_loads_nothing_heavy() -> None:
    """The table cannot see what a third-party library imports; a fresh interpreter can."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if any(covers(f"qlip_export.{part}", name) for part in TORCH_FREE):
            names.append(name)
    for library in ("tensorrt", "tensorrt_rtx"):  # not on every machine; types alone do for this
        if find_spec(library) is None:
            names.remove(f"qlip_export.backends.{library}")
    assert "qlip_export.spec" in names
    code = f"import sys, {', '.join(names)}; print(*sorted(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
