"""The demo as a visitor sees it, served by its command on a port of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qlip_export.runtime import TextToImage
from tests.web.conftest import WIDTHS

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "qlip_export", "demo")
PATIENCE = 120_000
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "qlip-export[demo]"')
pytestmark = [needs_gradio, pytest.mark.slow]  # starting Gradio alone takes its seconds


@pytest.fixture(scope="module")
def address(adaptive_bundle: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COMMAND, str(adaptive_bundle), "--port", str(port), "--max-prompt", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[0]
        server.terminate()


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": WIDTHS["desktop"][0], "height": WIDTHS["desktop"][1]})
    yield opened(context, address)
    context.close()


def opened(context: Any, address: str) -> Any:
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    return page


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.get_by_role("button", name="Draw").click()


def answer(page: Any, contains: str = "seed 0") -> str:
    page.wait_for_function(
        "wanted => document.querySelector('#status').innerText.includes(wanted)", arg=contains
    )
    return str(page.inner_text("#status"))


@pytest.fixture(scope="module")
def different(adaptive_bundle: Path) -> tuple[str, str]:
    """Two prompts that the policy treats differently."""
    pipeline = TextToImage.load(adaptive_bundle)
    prompts = ["a red apple", "the blue boat", "a dog", "a cat on a tree", "the sun", "a green house"]
    found = {prompt: pipeline(prompt, seed=0).records[0]["bits"] for prompt in prompts}
    second = next(prompt for prompt in prompts if found[prompt] != found[prompts[0]])
    return prompts[0], second


def test_prompt_gives_image_and_map(page: Any, different: tuple[str, str]) -> None:
    ask(page, different[0])
    assert "q 0." in answer(page)
    page.wait_for_selector("#images img")
    first = page.get_attribute("#bits table", "aria-label")
    page.reload()
    page.wait_for_selector("#prompt textarea")
    ask(page, different[1])
    answer(page)
    assert first != page.get_attribute("#bits table", "aria-label")


def test_image_is_seen_before_it_is_done(page: Any) -> None:
    """Whatever the page shows while it draws is noted by the page itself: no polling could miss it."""
    page.evaluate(
        """() => {
            window.seen = [];
            const note = () => {
                const status = document.querySelector('#status').innerText;
                const image = document.querySelector('#images img');
                if (status.includes('Drawing') && image) window.seen.push(image.src);
            };
            const all = {subtree: true, childList: true, attributes: true};
            new MutationObserver(note).observe(document.body, all);
        }"""
    )
    ask(page, "a red apple")
    answer(page)
    final = page.get_attribute("#images img", "src")
    assert set(page.evaluate("window.seen")) - {final}


def test_switch_to_uniform_bits(page: Any) -> None:
    page.get_by_label("8 bits", exact=True).check()
    ask(page, "a red apple")
    assert "FAB 8.00 bits" in answer(page)


def test_over_long_prompt_gives_a_readable_message_and_the_page_lives_on(page: Any) -> None:
    ask(page, "a red apple " * 6)
    assert "the prompt is too long: 71 characters. At most 60. Shorten it." in answer(page, "did not work")
    ask(page, "a red apple")
    answer(page)


def test_example_is_one_click_away(page: Any) -> None:
    page.get_by_text("a rainbow", exact=True).click()
    answer(page)
    assert page.input_value("#prompt textarea") == "a rainbow"


def test_phone(chromium: Any, address: str) -> None:
    width, height = WIDTHS["phone"]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme="dark")
    elsewhere: list[str] = []
    page = opened(context, address)
    page.on("request", lambda r: elsewhere.append(r.url) if r.url.startswith("http") else None)
    ask(page, "a red apple")
    answer(page)
    page.wait_for_selector("#images img")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert [url for url in elsewhere if not url.startswith(address)] == []
    context.close()


def test_ten_requests_at_once_are_all_answered(chromium: Any, address: str) -> None:
    context = chromium.new_context()
    pages = [opened(context, address) for _ in range(10)]
    for page in pages:
        page.fill("#prompt textarea", "a red apple")
    for page in pages:
        page.get_by_role("button", name="Draw").click()
    assert all("FAB" in answer(page) for page in pages)
    context.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_only_this_computer_gets_in(address: str) -> None:
    """Linux answers at all of 127.0.0.0/8: whoever listens at every address is heard at 127.0.0.2."""
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_port_that_is_taken(adaptive_bundle: Path, address: str) -> None:
    port = address.rstrip("/").rsplit(":", 1)[1]
    done = subprocess.run(
        [*COMMAND, str(adaptive_bundle), "--port", port],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert f"cannot serve on 127.0.0.1:{port}" in done.stderr
