"""The page of a sheet, in Chromium."""

from __future__ import annotations

import json

import pytest
from test_sheets import table


@pytest.fixture
def page(browser, tmp_path):
    table(tmp_path, ["euler", "heun", "lms"], ["steps 4", "steps 8"], failed=[("lms", "steps 8")])
    browser.get_log("performance")
    browser.get((tmp_path / "sheet.html").as_uri())
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def shown(page):
    return page.find_element("id", "caption").text.splitlines()[0]


def test_arrow_keys_and_hovering_put_another_picture_in_the_same_place(page, tmp_path):
    """No error, and nothing is asked of the network."""
    from selenium.webdriver import ActionChains, Keys

    def picture():
        return page.find_element("id", "stage").get_attribute("src")

    assert shown(page) == "euler, steps 4" and "4 evaluations, 1.0 s" in page.find_element("id", "caption").text
    seen, place = [picture()], page.find_element("id", "stage").rect
    assert (place["width"], place["height"]) == (64, 48)  # the picture's own size
    for key, name in (
        (Keys.ARROW_LEFT, "euler, steps 4"),  # there is no neighbour
        (Keys.ARROW_RIGHT, "euler, steps 8"),
        (Keys.ARROW_RIGHT, "euler, steps 8"),
        (Keys.ARROW_DOWN, "heun, steps 8"),
        (Keys.ARROW_DOWN, "lms, steps 8"),  # which failed
        (Keys.ARROW_DOWN, "lms, steps 8"),
        (Keys.ARROW_LEFT, "lms, steps 4"),
    ):
        ActionChains(page).send_keys(key).perform()
        assert shown(page) == name
        assert page.find_element("id", "stage").is_displayed() == (name != "lms, steps 8")
        seen.append(picture())
    assert len(set(seen)) == 4 and page.find_element("id", "stage").rect == place
    ActionChains(page).move_to_element(page.find_elements("class name", "cell")[2]).perform()
    assert shown(page) == "heun, steps 4"
    widths = page.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert widths == [64] * 6 and page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith(("data:", "chrome:"))] == [(tmp_path / "sheet.html").as_uri()]


def test_a_click_opens_the_settings_to_copy(page):
    from selenium.webdriver import ActionChains, Keys

    settings = page.find_element("id", "settings")
    for i, text in ((3, "sampler: heun\nprompt: <b>$cat"), (5, "FAILED: out of memory <b>")):
        page.find_elements("class name", "cell")[i].click()
        assert settings.is_displayed() and settings.get_attribute("value") == text
        page.find_element("id", "copy").click()
        assert page.find_element("id", "copy").text == "Copied"
        ActionChains(page).send_keys(Keys.ESCAPE).perform()
    ActionChains(page).send_keys(Keys.ARROW_UP, Keys.ENTER).perform()  # by keys alone
    assert settings.get_attribute("value").startswith("sampler: heun")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_narrow_screen(page, scheme):
    """At 400 pixels it does not scroll sideways; its colours follow the system's."""
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    cells = page.find_elements("class name", "cell")
    assert all(cell.rect["x"] >= 0 and cell.rect["x"] + cell.rect["width"] <= 400 for cell in cells)
    ground, ink = (
        page.find_element("tag name", "body").value_of_css_property(name) for name in ("background-color", "color")
    )
    assert ("255, 255, 255" in ground, "(0, 0, 0" in ink) == (scheme == "light",) * 2
