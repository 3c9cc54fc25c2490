"""The page of infer.view in a real headless Chromium, from disk (skipped where there is none: make browser)."""

import json

import pytest
from test_view import TEXT, answer, diagnosis, value

from infer import view

HOSTILE = '<img src=x onerror="document.title=1"> \U0001f600 \u202e 2.5 cm'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Twenty-five notes: the third wrong, the fifth unsure and hostile, the seventh with a value that is not in it."""
    at = tmp_path_factory.mktemp("view")
    notes, records = [], []
    for n in range(25):
        text = HOSTILE if n == 4 else TEXT
        start = text.index("2.5 cm")
        size = value("2.5 cm", start, start + 6) | ({} if n == 4 else {"ambiguous": [[25, 31]]})
        size = value("7 cm") if n == 6 else size
        gold = "3 cm" if n == 2 else size["text"]
        notes.append({"id": f"n{n}", "text": text, "phenotypes": {"tumor_size": [{"text": gold}]}})
        asked = answer(size, logprob=-4.0 if n == 4 else -0.1)
        records.append({"id": f"n{n}", "phenotypes": {"tumor_size": asked}, "diagnosis": {**diagnosis(), "logprob": 0}})
    for name, lines in (("a", records), ("n", notes)):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    view.main(view.Options(at / "a.jsonl", at / "n.jsonl", at / "page.html"))
    return at / "page.html"


def one(driver, css):
    return driver.find_element("css selector", css)


def opened(driver, page):
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(page.as_uri())


def choose(driver, css, chosen):
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    driver.execute_script(script, one(driver, css), chosen)


def test_it_opens_without_an_error_or_a_request_and_keys_go_through_the_notes(driver, page):
    opened(driver, page)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert driver.get_log("browser") == [] and set(asked) == {page.as_uri()}
    assert one(driver, "#id").text == "n0" and one(driver, "#count").text == "of 25"
    for keys, wanted in (("nn", "n2"), ("p", "n1"), ("ppp", "n0"), ("n" * 30, "n24")):
        one(driver, "body").send_keys(keys)
        assert one(driver, "#id").text == wanted


@pytest.mark.parametrize(("name", "wanted"), [("wrong", "n2"), ("unsure", "n4"), ("ungrounded", "n6")])
def test_filters_show_the_notes_that_they_name(driver, page, name, wanted):
    opened(driver, page)
    choose(driver, "#filter", name)
    assert one(driver, "#id").text == wanted and one(driver, "#count").text == "of 1 (25 in all)"


def test_the_least_sure_come_first_where_that_is_asked(driver, page):
    opened(driver, page)
    choose(driver, "#order", "least")
    assert one(driver, "#id").text == "n4"


def test_a_value_is_marked_at_its_place_with_its_letter_and_shown_when_chosen(driver, page):
    opened(driver, page)
    marks = driver.find_elements("css selector", "#note .marked")
    assert [mark.text for mark in marks] == ["Z2.5 cm", "Z2.5 cm"] and "maybe" in marks[1].get_attribute("class")
    assert one(driver, "#note").get_attribute("textContent").replace("Z", "") == TEXT
    one(driver, "#answers button").click()
    assert "chosen" in marks[0].get_attribute("class") and "chosen" not in marks[1].get_attribute("class")


def test_a_hostile_note_is_shown_and_never_run(driver, page):
    opened(driver, page)
    choose(driver, "#filter", "unsure")
    assert driver.title.startswith("Answers") and not driver.find_elements("css selector", "main img")
    shown = one(driver, "#note").get_attribute("textContent")
    assert "onerror=" in shown and "U+202E" in shown and "\u202e" not in shown
    assert one(driver, "#note .marked").text == "Z2.5 cm"  # places count characters, also after an emoji


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1300, "dark")])
def test_nothing_overflows_on_a_phone_and_dark_is_dark(width, scheme, driver, screen, page):
    screen(width, scheme)
    opened(driver, page)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.strip("rgb()").split(","))) < 150) == (scheme == "dark")
