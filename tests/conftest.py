"""What tests of several packages use: a small SentencePiece model, and a headless Chromium for the pages' tests.

`make browser` installs Chromium (Debian's chromium and chromium-driver); a test that asks for it is skipped where
there is none."""

import shutil

import hypothesis
import pytest

from model import Tokenizer

# The same examples on every machine, and no test fails because the machine was busy.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    """A small SentencePiece model with Mistral's settings: BPE, byte fallback, digits split, identity normaliser."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    words = "the patient has a tumor of the left breast measuring 2.5 cm grade 2 ER+ PR- no lymph node".split()
    (folder / "text.txt").write_text("\n".join(" ".join(words[i % 7 :] + words[: i % 5]) for i in range(60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return Tokenizer.from_pretrained(folder / "tokenizer.model")


@pytest.fixture(scope="session")
def driver():
    pytest.importorskip("selenium", reason="needs selenium (the test extra)")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver on the PATH: make browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--window-size=1300,1600",
    ):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield made
    made.quit()


@pytest.fixture
def screen(driver):
    """screen(width, scheme): show pages as a device of that width does; undone afterwards."""

    def show(width, scheme):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme_is = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme_is})

    yield show
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
