"""The page of infer.serve in a real headless Chromium (skipped where there is none: make browser)."""

import json

import pytest
from answering_models import write_adapter

pytest.importorskip("fastapi", reason="needs the extra serve")
from serving import NOTE, served  # noqa: E402

from infer import tasks  # noqa: E402

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script> Left breast, 2.5 cm.'


@pytest.fixture(scope="module")
def address(weights, tmp_path_factory):
    with served(weights, write_adapter(tmp_path_factory.mktemp("adapter"), weights)) as (address, _):
        yield address


def one(driver, css):
    return driver.find_element("css selector", css)


def paste(driver, text):
    driver.execute_script("arguments[0].value = arguments[1]", one(driver, "#text"), text)
    one(driver, "#ask").click()


def wait_for(driver, said):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda d: said in one(d, "#status").text)


def test_a_hostile_note_is_pasted_answered_marked_and_one_answer_traced(driver, address):
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(f"{address}/")
    paste(driver, HOSTILE)
    wait_for(driver, "Done")
    rows = driver.find_elements("css selector", "#adapted tr.answer")
    assert (
        len(rows) == 9 and one(driver, "#adapted .note").text and not driver.find_elements("css selector", "main img")
    )
    assert "onerror=" in one(driver, "#adapted .note").text and driver.title == "Answers about a note"
    driver.execute_script("arguments[0].click()", one(driver, "#adapted [data-name=tumor_size] .look"))
    wait_for(driver, "Done")
    driver.switch_to.frame(one(driver, "#trace iframe"))
    try:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(driver, 20).until(lambda d: d.execute_script("return document.body.dataset.ready"))
        assert driver.find_elements("css selector", "#tokens .token")
    finally:
        driver.switch_to.default_content()
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in sent if e["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith((f"{address}/", "about:srcdoc")) for url in asked)


def test_answers_with_and_without_the_adapter_stand_side_by_side(driver, address):
    driver.get(f"{address}/")
    one(driver, "#compare").click()
    paste(driver, NOTE)
    wait_for(driver, "Done")
    tables = {}
    for card, title in (("#adapted", " with its adapter"), ("#base", " without its adapter")):
        assert one(driver, f"{card} h2").text.endswith(title)
        rows = driver.find_elements("css selector", f"{card} tr.answer")
        tables[card] = {row.get_attribute("data-name"): row.text for row in rows}
        assert tables[card].keys() == {*tasks.PHENOTYPES, "diagnosis"}
    assert tables["#adapted"] != tables["#base"]
    left, right = (one(driver, card).rect for card in tables)
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]


def test_a_mistake_is_said_and_the_note_stays(driver, address):
    driver.get(f"{address}/")
    paste(driver, "x" * 100_001)
    wait_for(driver, "divide the note")
    assert len(one(driver, "#text").get_attribute("value")) == 100_001


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1300, "dark")])
def test_nothing_overflows_on_a_phone_and_dark_is_dark(width, scheme, driver, screen, address):
    screen(width, scheme)
    driver.get(f"{address}/")
    paste(driver, HOSTILE)
    wait_for(driver, "Done")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.strip("rgb()").split(","))) < 150) == (scheme == "dark")
