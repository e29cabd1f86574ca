"""Which target runs: the one asked for, or the first whose library and device are here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qlip_export.backends.openvino import OpenVINOBackend
from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.runtime.targets import choose_target


@pytest.fixture
def of_both(bundle: Path, ort_bundle: Path) -> Bundle:
    """A bundle that lists the targets of both; what is in its folder does not matter here."""
    mine, theirs = Bundle.open(bundle), Bundle.open(ort_bundle)
    targets = {**theirs.manifest.targets, **mine.manifest.targets}
    return Bundle(bundle, mine.manifest.model_copy(update={"targets": targets}))


def uninstall(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.delitem(sys.modules, f"qlip_export.backends.{library}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)


def test_preferred_backend_comes_first_whatever_the_order(of_both: Bundle) -> None:
    assert list(of_both.manifest.targets) == ["onnxruntime", "openvino"]
    assert choose_target(of_both).name == "openvino"


def test_the_one_asked_for(of_both: Bundle) -> None:
    target = choose_target(of_both, "onnxruntime")
    assert (target.name, target.backend.name) == ("onnxruntime", "onnxruntime")
    assert target.entry == of_both.manifest.targets["onnxruntime"]


def test_library_that_is_not_installed_is_passed_over(
    of_both: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall(monkeypatch, "openvino")
    assert choose_target(of_both).name == "onnxruntime"
    with pytest.raises(QlipError, match=r"openvino' is not installed(.|\n)*qlip-export\[openvino\]"):
        choose_target(of_both, "openvino")


def test_device_that_is_not_here_is_passed_over(of_both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Any) -> None:
        raise QlipError("no such device")

    monkeypatch.setattr(OpenVINOBackend, "require_device", absent)
    assert choose_target(of_both).name == "onnxruntime"
    with pytest.raises(QlipError, match=r"^no such device$"):
        choose_target(of_both, "openvino")


def test_every_obstacle_is_named(of_both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("openvino", "onnxruntime"):
        uninstall(monkeypatch, library)
    with pytest.raises(QlipError, match=r"no target of .* runs here") as caught:
        choose_target(of_both)
    assert caught.value.found == (
        "the library of backend 'openvino' is not installed; "
        "the library of backend 'onnxruntime' is not installed"
    )


def test_target_that_the_bundle_does_not_have(bundle: Path) -> None:
    with pytest.raises(QlipError) as caught:
        choose_target(Bundle.open(bundle), "onnxruntime")
    error = caught.value
    assert error.problem == f"{bundle} holds no engines of onnxruntime"
    assert (error.expected, error.found) == ("engines of onnxruntime", "engines of openvino")
    assert error.fix == f"qlip-export compile {bundle} --backend onnxruntime"
