"""The report says what the run time says, in one file that needs no other."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlip_export.bitmap import bit_map, colour
from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.progress import Silent
from qlip_export.quickstart import quickstart
from qlip_export.report import page as page_module
from qlip_export.report.charts import heatmap
from qlip_export.report.collect import ReportData, ReportOptions, collect
from qlip_export.report.page import render, write_page
from qlip_export.report.policy import ladder_levels, statistics, word_levels
from qlip_export.runtime import TextToImage
from tests.conftest import Cli

HOSTILE = "</script><b>the blue boat & a dog</b>"
QUALITIES = [0.05 * i for i in range(1, 20)]


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data + " "

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def elements(report_page: Path) -> Elements:
    return Elements(report_page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(adaptive_bundle: Path) -> ReportData:
    options = ReportOptions(images=1, reference=False, parity=False)
    return collect(adaptive_bundle, options, Silent())


def test_nothing_is_loaded_from_elsewhere(report_page: Path, elements: Elements) -> None:
    assert report_page.stat().st_size < 10_000_000
    for tag, attributes in elements.tags:
        for name in ("src", "href", "data", "action", "srcset"):
            assert (attributes.get(name) or "").startswith(("data:", "#")) or name not in attributes, (
                tag,
                name,
            )
    assert not [tag for tag, _ in elements.tags if tag in ("iframe", "object", "embed")]


def test_everything_seen_is_said_in_words(elements: Elements) -> None:
    images = [a for tag, a in elements.tags if tag == "img"]
    assert len(images) == 2 * 4  # FP32, 16 bits, 8 bits, QLIP
    assert all(image["alt"] for image in images)
    assert images[3]["alt"] == "a red apple: QLIP"
    charts = [a for tag, a in elements.tags if a.get("role") == "img"]
    assert len(charts) == 2 + 3
    assert "stem: " in (charts[0]["aria-label"] or "")


def test_numbers_are_those_of_the_run_time(adaptive_bundle: Path, elements: Elements) -> None:
    pipeline = TextToImage.load(adaptive_bundle)
    for i, prompt in enumerate(["a red apple", HOSTILE]):
        record = pipeline(prompt, seed=3 + i).records[0]
        assert f"q {record['q']:.3f}, FAB {record['fab']:.2f}" in " ".join(elements.text.split())
        assert f"seed {3 + i}, {record['engine_switches']} engine switches" in elements.text
    assert pipeline.bundle.manifest.model.fingerprint in elements.text
    assert all(entry.sha256 in elements.text for entry in pipeline.bundle.manifest.files.values())
    assert "All engines agree with their graphs." in elements.text


def test_prompt_cannot_end_the_script(elements: Elements) -> None:
    assert HOSTILE in elements.text
    assert not [tag for tag, _ in elements.tags if tag == "b"]


def test_shares_and_fab_tell_the_same(small: ReportData) -> None:
    """Two ways to the mean FAB: prompt by prompt, and block by block."""
    found = statistics(small.bundle.manifest, QUALITIES, "here", (), False)
    layers = sum(share.layers for share in found.shares)
    by_block = sum(s.layers * bits * part for s in found.shares for bits, part in s.shares.items()) / layers
    assert by_block == pytest.approx(sum(found.fab) / len(found.fab))
    assert all(sum(share.shares.values()) == pytest.approx(1) for share in found.shares)
    assert len(set(found.fab)) > 1


def test_larger_batches_ask_for_more_bits(small: ReportData) -> None:
    found = statistics(small.bundle.manifest, QUALITIES, "here", (), False)
    assert [batch.size for batch in found.batches] == [1, 2, 4, 8, 16]
    assert found.batches[0].mean == pytest.approx(sum(found.fab) / len(found.fab))
    means = [batch.mean for batch in found.batches]
    assert means[-1] > means[0]
    assert all(b.least <= b.mean + 1e-9 and b.mean <= b.most + 1e-9 for b in found.batches)


def test_levels_of_richness(small: ReportData) -> None:
    manifest = small.bundle.manifest
    ladder = ladder_levels(manifest, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert [level.q for level in ladder] == [(0.1, 0.6), (0.2, 0.7), (0.3, 0.8), (0.4, 0.9), (0.5, 1.0)]
    words = word_levels(manifest, ["a b", "c", "d e"], [0.1, 0.2, 0.3])
    assert [(level.label, level.q) for level in words] == [("1", (0.2,)), ("2", (0.1, 0.3))]


def test_bit_map_in_words(bundle: Path) -> None:
    record = {"blocks": ["time", "stem", "out"], "bits": [[32, 16, 8], [32, 16, 8], [32, 8, 8]]}
    drawn = bit_map(Bundle.open(bundle).manifest, record)
    assert drawn.words == (
        "Bits by block and step. stem: 16 in steps 1 to 2, 8 in step 3; out: 8 in steps 1 to 3."
    )
    table = heatmap("map", drawn, (8, 16)).table
    assert table == (("block", "1", "2", "3"), ("stem", "16", "16", "8"), ("out", "8", "8", "8"))


def test_mean_bits_of_a_block_whose_layers_differ(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    drawn = bit_map(manifest, {"blocks": ["stem"], "bits": [[10.25], [16]]})
    assert "stem: 10.25 in step 1, 16 in step 2" in drawn.words
    assert heatmap("map", drawn, (8, 16, 32)).table[1] == ("stem", "10.25", "16")
    assert colour(10.25, (8, 16, 32)) == colour(16, (8, 16, 32)) != colour(8, (8, 16, 32))


def test_what_was_not_done_is_said(small: ReportData) -> None:
    text = Elements(render(small)).text
    assert "No FP32 reference was drawn: --no-reference." in text
    assert "Engines were not compared with their graphs: --no-parity." in text
    assert "Not compared." in text
    assert "agree with their graphs." not in text


def test_libraries_that_validation_lacks_are_named(
    adaptive_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report goes without parity; a quickstart is refused before it builds."""
    monkeypatch.setattr("qlip_export.validate.find_spec", lambda name: None if name == "polygraphy" else name)
    data = collect(adaptive_bundle, ReportOptions(images=1, reference=False), Silent())
    assert data.parity is None
    assert any("not installed: polygraphy (pip" in note for note in data.notes)
    with pytest.raises(QlipError, match="needs ONNX Runtime and polygraphy") as raised:
        quickstart(tmp_path / "engines", Silent())
    assert raised.value.found == "no polygraphy"
    assert list(tmp_path.iterdir()) == []


def test_failed_parity_is_shown(adaptive_bundle: Path) -> None:
    data = collect(adaptive_bundle, ReportOptions(images=1, reference=False), Silent())
    assert data.parity is not None
    off = data.parity.rows[0].model_copy(update={"passed": False})
    failed = data.parity.model_copy(update={"passed": False, "rows": (off, *data.parity.rows[1:])})
    text = Elements(render(ReportData(**{**vars(data), "parity": failed}))).text
    assert "Some comparisons are off." in text


def test_bundle_without_policy(bundle: Path) -> None:
    data = collect(bundle, ReportOptions(images=1, reference=False, parity=False), Silent())
    elements = Elements(render(data))
    assert "The bundle has no policy" in elements.text
    assert [a["alt"] for tag, a in elements.tags if tag == "img"] == ["a cat: 16 bits", "a cat: 8 bits"]
    assert not [a for _, a in elements.tags if a.get("role") == "img"]


def test_page_that_is_too_large_is_refused(
    small: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "MOST", 1_000_000)
    with pytest.raises(QlipError, match="too large") as raised:
        write_page(small, tmp_path / "report.html")
    assert raised.value.fix == "fewer --images"
    assert list(tmp_path.iterdir()) == []


def test_command(cli: Cli, adaptive_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = cli("report", adaptive_bundle, "--images", 1, "--no-reference", "--no-parity", "-o", out, "--json")
    assert done.code == 0, done.err
    told: dict[str, Any] = json.loads(done.out)
    assert (told["file"], told["bytes"], told["parity"]) == (str(out), out.stat().st_size, None)
    assert list(told["seconds"]) == ["16 bits", "8 bits", "QLIP"]
    assert f"draw ({3 * 2})" in done.err


def test_missing_library_is_named(
    cli: Cli, adaptive_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith(("plotly", "qlip_export.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    done = cli("report", adaptive_bundle, "-o", tmp_path / "r.html", "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["fix"] == 'pip install "qlip-export[report]"'


def test_prompts_that_are_not_there(cli: Cli, adaptive_bundle: Path, tmp_path: Path) -> None:
    done = cli("report", adaptive_bundle, "--prompts", tmp_path / "none.txt", "-o", tmp_path / "r.html")
    assert done.code == 2
    assert "cannot read prompts" in done.err
    assert not (tmp_path / "r.html").exists()
