"""The report in a real browser: nothing overflows or is missing, in light and in dark, on a phone and a desk."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.common.pictures import DARK, LIGHT
from engine.runs.reporting import html_report
from tests.runs.made_runs import entry, made_run, result, write_report

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDTHS = (390, 800, 1400)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: `make setup-chromium`"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeds, a long run with a teacher, long names, evaluations and their pictures, and a folder of benchmarks."""
    root = tmp_path_factory.mktemp("report") / ("a-very-long-name-of-a-folder-without-a-space-" * 3)
    accuracies = {"natural": result(0.8, 10_000), "pgd20": result(0.5, 10_000, "a description " * 20)}
    for seed in (0, 1):
        made_run(root / "group" / f"seed-{seed}", seed=seed, shift=seed / 50, tested=accuracies)
    command = ("engine", "train", "--config", "recipe:table2-cifar10-at-iad1")
    long = made_run(root / "long", epochs=200, model="resnet18", tested=accuracies, command=command)
    made_run(long / "teacher", method="at", epochs=1, tested=accuracies)
    entries = [
        entry(attack, 0.4, 1000, images={"samples": [0], "correct": "1"}) for attack in ("fgsm", "cw", "aa")
    ]
    write_report(long / "best.pt.eval.json", *entries)
    (long / "best.pt.eval.pictures").mkdir()
    Image.new("RGB", (1600, 200), "red").save(long / "best.pt.eval.pictures" / "pgd20.png")
    bench = root / "bench"
    bench.mkdir()
    names = [f"a_long_name_of_a_column_{number}" for number in range(12)]
    (bench / "speed.csv").write_text(",".join(names) + "\n" + ",".join("x" * 30 for _ in names) + "\n")
    out = root / "report.html"
    html_report.write([root / "group", long, write_report(root / "other.eval.json", *entries), bench], out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()


def rgb(colour: str) -> str:
    """A colour as a browser tells it."""
    return f"rgb({', '.join(str(int(colour[start : start + 2], 16)) for start in (1, 3, 5))})"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_the_page(width: int, scheme: str, palette: Any, report: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(palette.background)

    def overflows() -> bool:
        root = "document.documentElement"
        return bool(page.evaluate(f"{root}.scrollWidth > {root}.clientWidth"))

    assert not overflows()
    folded = page.locator("details")
    assert folded.count() > 5
    first = folded.first
    inside = first.locator("table").first
    assert not inside.is_visible()
    first.locator("summary").first.click()
    assert inside.is_visible()
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert not overflows()
    page.wait_for_function("[...document.images].every(each => each.complete)")
    sizes = page.evaluate("[...document.images].map(each => [each.naturalWidth, each.alt.length])")
    assert len(sizes) > 12
    assert all(wide > 0 and alt > 10 for wide, alt in sizes)
    # A wide table scrolls in its own container.
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(each => each.scrollWidth > each.clientWidth)"
    )
    assert any(wide)
    # Pictures that are drawn are those of the scheme.
    sources = page.evaluate(
        "[...document.querySelectorAll('picture img')].map(each => each.currentSrc == each.src)"
    )
    assert sources
    assert all(is_light == (scheme == "light") for is_light in sources)
    page.close()


def test_a_table_is_downloaded(report: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    with page.expect_download() as waiting:
        page.locator("a[download]").first.click()
    assert waiting.value.suggested_filename == "runs-compared.csv"
    assert "PGD-20" in Path(waiting.value.path()).read_text()
    page.close()
