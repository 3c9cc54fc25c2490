"""The trace page in a real headless Chromium, from disk: it opens without an error or a request, and what is chosen
changes what is shown. Installed by `make browser` (Debian's chromium and chromium-driver); skipped where it is not."""

import json

import pytest
from answering_models import write_model

from infer import trace

HOSTILE = '<script>document.title="run"</script><img src=x onerror="document.title=1"> \u202e\u2028\x00 שלום 2.5 cm'
NAME = "<img src=x onerror=document.title=1>"  # of a model's folder, whole where a note's text comes in pieces


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two models beside each other on a hostile note, windows of 6; and a model with experts."""
    at = tmp_path_factory.mktemp("pages")
    write_model(at / "model", windows=(6, 6))
    write_model(at / NAME, seed=3, windows=(6, 6))
    write_model(at / "experts", model_type="mixtral", num_local_experts=3, num_experts_per_tok=2)
    (at / "note.txt").write_text(HOSTILE, encoding="utf-8")
    trace.main(
        trace.Options(
            weights=str(at / "model"),
            out=at / "two.html",
            note=at / "note.txt",
            compare=str(at / NAME),
            max_new_tokens=5,
        )
    )
    trace.main(
        trace.Options(weights=str(at / "experts"), out=at / "experts.html", prompt="size 2.5 cm", max_new_tokens=0)
    )
    return at


def opened(driver, page):
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(page.as_uri())
    ready(driver)
    return json.loads(driver.execute_script("return document.getElementById('data').textContent"))


def ready(driver, wanted=None):
    """Wait until the page has drawn what is chosen ("run token layer.head")."""
    from selenium.webdriver.support.ui import WebDriverWait

    said = lambda d: d.execute_script("return document.body.dataset.ready")  # noqa: E731
    WebDriverWait(driver, 20).until(lambda d: said(d) == wanted if wanted else said(d))
    return said(driver)


def one(driver, css):
    return driver.find_element("css selector", css)


def pixels(driver):
    return driver.execute_script("return document.querySelector('#map canvas').toDataURL()")


def test_it_opens_from_disk_without_an_error_or_a_request(driver, pages):
    opened(driver, pages / "two.html")
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url != (pages / "two.html").as_uri()] == []


def test_a_hostile_note_is_shown_and_never_run(driver, pages):
    opened(driver, pages / "two.html")
    assert driver.title.startswith("Trace") and not driver.find_elements("css selector", "main img, main script")
    shown = one(driver, "#tokens").get_attribute("textContent")
    shown = shown.replace("·", "")  # what stands for the other bytes of a letter
    assert all(text in shown for text in ("onerror=", "U+202E", "U+2028", "␀", "שלום"))
    assert NAME in one(driver, "#about").text and NAME in one(driver, "#map").text
    assert "\u202e" not in shown and "\u2028" not in shown


def test_choosing_a_head_changes_map_and_marks(driver, pages):
    data = opened(driver, pages / "two.html")
    before, run = pixels(driver), data["runs"][0]
    _, token, head = ready(driver).split()
    layer, number = (1 - int(head.split(".")[0]), (int(head.split(".")[1]) + 1) % 4)
    one(driver, f'#heads [data-cell="{layer},{number}"]').click()
    ready(driver, f"0 {token} {layer}.{number}")
    assert pixels(driver) != before
    assert one(driver, "#map h2").text.endswith(f"{layer}.{number}")
    # the map holds the packed weights: the keys of the query's row are marked by their share of the largest
    expected = driver.execute_async_script(
        "const done = arguments[1]; shadesOf(runs[0], state.layer, state.head, arguments[0]).then((s) => done([...s]))",
        int(token) - 1,
    )
    assert expected and len(expected) == int(token) and max(expected) <= 15
    strong = [k for k, shade in enumerate(expected) if (shade / max(expected)) ** 2 > 0.02]
    marked = driver.execute_script(
        "return [...document.querySelectorAll('#tokens [data-token]')].map((n) => n.style.background !== '')"
    )
    assert [k for k, mark in enumerate(marked) if mark] == strong
    assert run["windows"][0] == 6


def test_the_windows_edge_is_drawn_where_there_is_one(driver, pages):
    run = opened(driver, pages / "two.html")["runs"][0]
    token = int(ready(driver).split()[1])
    (edge,) = driver.find_elements("css selector", "#tokens .edge")
    assert driver.find_elements("css selector", "#map .window-edge") and run["windows"] == [6, 6]
    assert int(edge.get_attribute("data-token")) == token - 1 - 6 + 1  # the first key that the writing position sees
    clear = "return [...document.querySelectorAll('#tokens [data-token]')].findIndex((n) => !n.matches('.beyond'))"
    assert driver.execute_script(clear) == token - 6
    opened(driver, pages / "experts.html")
    assert not driver.find_elements("css selector", "#tokens .edge, #map .window-edge")


def test_a_tokens_tooltip_shows_its_probability(driver, pages):
    from selenium.webdriver import ActionChains

    run = opened(driver, pages / "two.html")["runs"][0]
    for i in (3, run["start"]):
        node = one(driver, f'[data-token="{i}"]')
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
        ActionChains(driver).move_to_element(one(driver, "h1")).move_to_element(node).perform()
        said, shown = run["predictions"][i - 1], one(driver, "#tip").text
        share = driver.execute_script("return number(arguments[0])", said["p"])
        assert f"{share}, rank {said['rank']}" in shown and str(run["ids"][i]) in shown
        assert float(share) == pytest.approx(said["p"], rel=0.05) and "bytes" in shown


def test_the_keyboard_moves_token_layer_head_and_model(driver, pages):
    from selenium.webdriver import Keys

    opened(driver, pages / "two.html")
    one(driver, '#heads [data-cell="0,1"]').click()
    token = int(ready(driver).split()[1])
    body = one(driver, "body")
    for key, wanted in (
        (Keys.ARROW_DOWN, f"0 {token} 1.1"),
        ("]", f"0 {token} 1.2"),
        (Keys.ARROW_LEFT, f"0 {token - 1} 1.2"),
        ("m", f"1 {token - 1} 1.2"),
        ("a", f"1 {token} 1.2"),
    ):
        body.send_keys(key)
        assert ready(driver, wanted) == wanted


def test_the_card_of_contributions_states_a_sum_that_holds(driver, pages):
    run = opened(driver, pages / "two.html")["runs"][0]
    step = run["steps"].index(int(ready(driver).split()[1]) - 1)
    its = run["attribution"]["margin"]
    text = one(driver, "#heads .check").text
    assert f"together {its['sum'][step]:.4f}" in text and f"is {its['value'][step]:.4f}" in text


def test_experts_are_shown_for_a_model_that_has_some(driver, pages):
    opened(driver, pages / "experts.html")
    assert driver.get_log("browser") == []
    assert one(driver, "#experts").is_displayed() and len(driver.find_elements("css selector", "#experts rect")) == 7
    assert not one(driver, "#lora").is_displayed()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1300, "dark")])
def test_nothing_overflows_on_a_phone_and_dark_is_dark(width, scheme, driver, screen, pages):
    screen(width, scheme)
    opened(driver, pages / "two.html")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.strip("rgb()").split(","))) < 150) == (scheme == "dark")
