"""Behind the demo: what may be asked, what is told at every step, failures that stay with their request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlip_export.demo.studio import ADAPTIVE, Limits, Studio, View
from qlip_export.errors import QlipError
from qlip_export.runtime import TextToImage
from tests.conftest import STEPS

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def studio(adaptive_bundle: Path) -> Studio:
    return Studio(TextToImage.load(adaptive_bundle), Limits(prompt=40, images=2), previews=0)


def views(studio: Studio, *request: Any) -> list[View]:
    return list(studio.draw(*request))


def test_image_and_numbers_are_those_of_the_run_time(studio: Studio) -> None:
    seen = views(studio, f"  {PROMPT} ", ADAPTIVE, 5, 1)
    expected = studio.pipeline(PROMPT, seed=5)
    record = expected.records[0]
    assert not seen[-1].failed
    assert (np.asarray(seen[-1].images[0]) == np.asarray(expected.images[0])).all()
    assert f"q **{record['q']:.3f}**, FAB **{record['fab']:.2f}** bits" in seen[-1].status
    assert "seed 5" in seen[-1].status


def test_the_run_is_known_before_its_first_step(studio: Studio) -> None:
    seen = views(studio, PROMPT, ADAPTIVE, 5, 1)
    assert len(seen) == 1 + STEPS + 1
    assert [view.status for view in seen[1:-1]] == [
        f"Drawing: step {i + 1} of {STEPS}." for i in range(STEPS)
    ]
    faint = [view.bits.count('class="ahead"') for view in seen]
    assert faint[0] == faint[1] * STEPS // (STEPS - 1)
    assert faint == sorted(faint, reverse=True) and faint[-1] == 0
    assert seen[0].bits.replace('class="ahead"', 'class=""') == seen[-1].bits


def test_uniform_bits_on_the_same_seed(studio: Studio) -> None:
    last = views(studio, PROMPT, "8 bits", 5, 1)[-1]
    expected = studio.pipeline(PROMPT, seed=5, bits=8).images[0]
    assert (np.asarray(last.images[0]) == np.asarray(expected)).all()
    assert "FAB **8.00**" in last.status and "q **" not in last.status


def test_images_come_one_after_the_other(studio: Studio) -> None:
    seen = views(studio, PROMPT, ADAPTIVE, 5, 2)
    assert [len(view.images) for view in seen] == [0] * (STEPS + 1) + [1] * STEPS + [2]
    assert seen[1].status == f"Drawing: image 1 of 2, step 1 of {STEPS}."
    assert seen[-2].status == f"Drawing: image 2 of 2, step {STEPS} of {STEPS}."


def test_image_is_seen_on_its_way(studio: Studio) -> None:
    previewing = Studio(studio.pipeline, studio.limits, previews=1)
    seen = views(previewing, PROMPT, ADAPTIVE, 5, 2)
    shown = [(len(view.images), view.status) for view in seen]
    middle = round(STEPS / 2)
    first = shown.index((1, f"Drawing: image 1 of 2, step {middle} of {STEPS}."))
    assert [count for count, _ in shown[:first]] == [0] * (1 + middle)
    assert (2, f"Drawing: image 2 of 2, step {middle} of {STEPS}.") in shown
    assert len(seen) == 1 + 2 * (STEPS + 1) + 1
    # What was foreseen gives way to the image, and the image does not depend on it.
    plain = views(studio, PROMPT, ADAPTIVE, 5, 2)[-1].images
    assert (np.asarray(seen[first].images[0]) != np.asarray(plain[0])).any()
    for with_previews, without in zip(seen[-1].images, plain, strict=True):
        assert (np.asarray(with_previews) == np.asarray(without)).all()


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (("x" * 41, ADAPTIVE, 0, 1), "the prompt is too long: 41 characters. At most 40. Shorten it."),
        ((" \n", ADAPTIVE, 0, 1), "the prompt is empty"),
        ((PROMPT, ADAPTIVE, 0, 3), "1 to 2"),
        ((PROMPT, ADAPTIVE, -1, 1), "the seed is no whole number"),
        ((PROMPT, ADAPTIVE, None, 1), "the seed is no whole number"),
        ((PROMPT, "64 bits", 0, 1), "no such bits: 64 bits"),
    ],
)
def test_too_much_is_refused_with_a_message(
    studio: Studio, request_: tuple[str, str, float | None, float], told: str
) -> None:
    (only,) = views(studio, *request_)
    assert only.failed and only.images == ()
    assert told in only.status


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (QlipError("the image is not finite", fix="run validate"), "the image is not finite. Run validate."),
        (RuntimeError("secret path"), "the server had a problem (RuntimeError). Try again."),
    ],
)
def test_failure_is_told_and_the_next_request_works(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    class Broken:
        bundle, chain, qualities = studio.pipeline.bundle, studio.pipeline.chain, studio.pipeline.qualities

        def at(self, **size: int) -> Any:
            return self

        def __call__(self, *arguments: Any, **options: Any) -> None:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(studio, "pipeline", Broken())
        last = views(studio, PROMPT, ADAPTIVE, 5, 1)[-1]
    assert last.failed and told in last.status and "secret" not in last.status
    assert not views(studio, PROMPT, ADAPTIVE, 5, 1)[-1].failed


def test_visitor_who_leaves_frees_the_engines(studio: Studio) -> None:
    request: Iterator[View] = studio.draw(PROMPT, ADAPTIVE, 5, 2)
    next(request), next(request)
    request.close()  # type: ignore[attr-defined]
    assert not views(studio, PROMPT, ADAPTIVE, 5, 1)[-1].failed


def test_bundle_without_policy(bundle: Path) -> None:
    studio = Studio(TextToImage.load(bundle), Limits())
    assert studio.choices == ["8 bits", "16 bits", "32 bits"]
    assert views(studio, PROMPT, "16 bits", 0, 1)[-1].status.startswith("FAB **16.00**")
