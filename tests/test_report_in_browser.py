"""The report in a real headless Chromium: it opens, has nothing to complain of, and answers to mouse and keyboard.

Needs chromium and chromedriver (Debian: chromium, chromium-driver) and selenium; skipped, loudly, where one is missing.
"""

import shutil
from collections.abc import Iterator

import pytest
import tiny_run
import torch

import dit_fast as dit
from dit_fast import report
from dit_fast.trajectory import Window

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "chromedriver": ("chromedriver",)}
# without these a headless browser looks for its maker's servers, and root may not start it
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    found = {name: next(filter(None, map(shutil.which, names)), None) for name, names in PROGRAMS.items()}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"BROWSER NOT TESTED: no {', '.join(missing)}; apt-get install chromium chromium-driver")
    selenium = pytest.importorskip("selenium", reason="BROWSER NOT TESTED: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    options = selenium.webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.webdriver.Chrome(options=options, service=Service(found["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    tiny_run.record(folder / "log")
    run, problem, query = dit.Trajectory.open(folder / "log"), tiny_run.make_problem(), tiny_run.make_query()
    result = tiny_run.scored(folder / "log")
    truth = dit.leave_one_out(run, problem, query, "epochs", sample_ids=range(8))
    more = {"trajectory": run, "problem": problem, "asked": query, "corrupted": [1, 5, 9], "retrained": truth}
    return report.write(result, folder / "report.html", **more).as_uri()


@pytest.fixture(params=[390, 1280])
def opened(browser, page, request):
    """The page at a phone's and at a desktop's width; nothing may have been complained of when the test is over."""
    metrics = {"width": request.param, "height": 900, "deviceScaleFactor": 2, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page)
    yield browser
    assert browser.get_log("browser") == []


def rows(browser, table: str = "#sample-table") -> list[list[str]]:
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    return browser.execute_script(script, table)


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def test_every_section_is_there_and_the_page_is_no_wider_than_the_screen(opened):
    shown = [e.get_attribute("id") for e in opened.find_elements("css selector", "main section") if e.is_displayed()]
    assert shown == ["run", "heat", "samples", "patterns", "stages", "detection", "agreement", "costs"]
    assert opened.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert len(opened.find_elements("css selector", "#helps img")) == 6
    assert opened.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth === 4 && i.alt)")
    assert opened.execute_script(
        "return [...document.querySelectorAll('svg, canvas')].every(e => e.getAttribute('aria-label'))"
    )


def test_picking_a_window_changes_table_cards_and_headings(opened):
    before, cards = rows(opened), find(opened, "#helps").text
    assert find(opened, ".picked").text == "whole run"
    find(opened, "#windows label:nth-child(2)").click()
    assert find(opened, ".picked").text == "epoch 2"
    assert rows(opened) != before and find(opened, "#helps").text != cards
    assert find(opened, "#sample-table caption").text == "epoch 2 (steps 3–6)"
    bold = [
        r
        for r in opened.find_elements("css selector", "#detection-table td")
        if r.value_of_css_property("font-weight") == "600"
    ]
    assert bold[0].text == "epoch 2"


def test_the_table_shows_the_scores_of_the_window(opened, page):
    scores = {int(row[0]): row[3] for row in rows(opened)}
    table = opened.execute_script("return data.table")
    assert len(scores) == sum(map(len, table["listed"][-1]))
    for j, text in scores.items():
        assert float(text.replace("−", "-")) == pytest.approx(table["scores"][-1][j], rel=5e-3)


def test_a_heading_sorts_up_and_down(opened):
    for column, key in ((0, int), (3, lambda text: float(text.replace("−", "-")))):
        button = opened.find_elements("css selector", "#sample-table th")[column].find_element("css selector", "button")
        opened.execute_script("arguments[0].click()", button)
        values = [key(row[column]) for row in rows(opened)]
        opened.execute_script("arguments[0].click()", opened.switch_to.active_element)
        turned = [key(row[column]) for row in rows(opened)]
        assert values in (sorted(values), sorted(values, reverse=True)) and turned == values[::-1] != values
        state = opened.find_elements("css selector", "#sample-table th")[column].get_attribute("aria-sort")
        assert state == ("ascending" if turned == sorted(turned) else "descending")


def test_keys_move_through_the_heat_map_and_choose_a_window(opened):
    from selenium.webdriver.common.keys import Keys

    heat = find(opened, "#heat-map")
    heat.send_keys(Keys.ARROW_RIGHT)
    first = find(opened, "#heat-readout").text
    assert "whole run (steps 0–12)" in first and first.startswith("sample ")
    heat.send_keys(Keys.ARROW_RIGHT)
    assert find(opened, "#heat-readout").text != first
    heat.send_keys(Keys.ARROW_UP, Keys.ENTER)
    assert find(opened, ".picked").text == "epoch 4"


def test_pointing_at_the_heat_map_reads_it(opened):
    from selenium.webdriver import ActionChains

    heat = find(opened, "#heat-map")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", heat)
    width, height = heat.size["width"], heat.size["height"]
    ActionChains(opened).move_to_element_with_offset(heat, width // 2 - 4, 3 - height // 2).perform()
    expected = opened.execute_script(
        "const p = data.table.heat.order[numColumns() - 1];"
        "return `sample ${data.table.ids[p]}` + '|' + signed(data.table.scores[0][p])"
    )
    assert all(part in find(opened, "#heat-readout").text for part in (*expected.split("|"), "epoch 1 (steps 0–3)"))


def test_the_heat_map_has_both_colours(opened):
    script = """const map = document.getElementById('heat-map'), copy = new OffscreenCanvas(map.width, map.height);
    const g = copy.getContext('2d', { willReadFrequently: true });
    g.drawImage(map, 0, 0);
    const of = (c) => { const x = heat.left + (c + .5) / numColumns() * heat.width, r = window.devicePixelRatio;
      return [...g.getImageData(Math.round(x * r), Math.round((4.4 * ROW) * r), 1, 1).data]; };
    const values = data.table.heat.order.map((p) => data.table.scores[4][p]);
    return [of(values.indexOf(Math.max(...values))), of(values.indexOf(Math.min(...values)))]"""
    high, low = opened.execute_script(script)
    assert high[0] > high[2] + 40 and low[2] > low[0] + 40


def test_another_measure_changes_the_matrix(opened):
    from selenium.webdriver.support.select import Select

    before = rows(opened, "#stage-table")
    Select(find(opened, "#stage-kind")).select_by_value("pearson")
    after = rows(opened, "#stage-table")
    assert after != before and [row[0] for row in after] == [row[0] for row in before]
    assert all(row[i + 1] == "1.00" for i, row in enumerate(after))


def test_dark_is_dark(opened):
    def brightness() -> int:
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))

    assert brightness() == 3 * 255
    try:
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
        assert brightness() < 120
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_picking_a_query_value_changes_all_that_belongs_to_it(browser, tmp_path):
    from selenium.webdriver.support.select import Select

    scores = torch.randn(3, 2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    windows = [Window(f"part {i}", 5 * i, 5 * i + 5) for i in range(3)]
    result = dit.Influence(scores, windows, ["loss", "logit 1"], torch.arange(30))
    browser.get(report.write(result, tmp_path / "r.html", query=1, corrupted=[3, 4]).as_uri())

    def seen() -> list:
        heads = [find(browser, place).text for place in ("h1", "#helps-title", "#legend", "#heat-scale", "#helps")]
        pixels = browser.execute_script("return document.getElementById('heat-map').toDataURL()")
        return [*heads, rows(browser), rows(browser, "#stage-table"), rows(browser, "#detection-table"), pixels]

    def best() -> int:
        return int(rows(browser)[0][0])

    find(browser, "#windows label:nth-child(2)").click()
    logit = seen()
    assert logit[:2] == ["Influence on logit 1", "Raised by removal, most first"] and best() == int(scores[1, 1].argmax())
    Select(find(browser, "#value")).select_by_visible_text("loss")
    loss = seen()
    assert loss[:2] == ["Influence on loss", "Helpful, most first"] and best() == int(scores[1, 0].argmax())
    assert all(a != b for a, b in zip(logit, loss, strict=True)) and find(browser, ".picked").text == "part 1"
    Select(find(browser, "#value")).select_by_visible_text("logit 1")
    assert seen() == logit and browser.get_log("browser") == []


def test_a_page_of_many_samples_without_anything_else(browser, tmp_path):
    scores = torch.randn(3, 2, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[0, 1, 5] = float("nan")
    windows = [Window(f"<b>part {i}</b>", 5 * i, 5 * i + 5) for i in range(3)]
    result = dit.Influence(scores, windows, ["logit <i>", "logit 1"], torch.arange(3000))
    browser.get(report.write(result, tmp_path / "r.html", query=1).as_uri())
    shown = [e.get_attribute("id") for e in browser.find_elements("css selector", "main section") if e.is_displayed()]
    assert shown == ["run", "heat", "samples", "patterns", "stages", "costs"]
    assert len(rows(browser)) == 40 and find(browser, ".picked").text == "<b>part 2</b>"
    find(browser, "#heat-map").click()
    assert "largest: sample" in find(browser, "#heat-readout").text
    assert browser.get_log("browser") == []
