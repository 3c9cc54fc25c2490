"""infer.serve: its answers are the Extractor's; other hosts, origins, tokens, sizes and queues are refused."""

import asyncio
import contextlib
import json
import logging
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from answering_models import write_adapter, write_model

from infer import Extractor, tasks
from infer.serve.__main__ import Options, main
from model.support.cli import UserError

pytest.importorskip("fastapi", reason="needs the extra serve")
from fastapi.testclient import TestClient  # noqa: E402
from serving import NOTE, served  # noqa: E402

from infer.serve.app import MAX_BYTES, Models, make_app  # noqa: E402

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, weights):
    return write_adapter(tmp_path_factory.mktemp("adapter"), weights)


@pytest.fixture(scope="module")
def models(weights, adapter):
    return Models(weights, adapter)


def client(models, token=None, host="127.0.0.1", **options):
    made = make_app(models, host, 80, token, **options)
    return TestClient(made, base_url=f"http://{host}:80", headers={"Host": f"{host}:80"})


def test_a_record_is_the_extractors_with_and_without_the_adapter(models, weights, adapter):
    ask = client(models)
    for adapted in (True, False):
        expected = Extractor(weights, adapter if adapted else None).answers(NOTE)
        assert ask.post("/api/answers", json={"text": NOTE, "adapter": adapted}).json() == expected


def events(text):
    blocks = [block.split("\ndata: ") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(value)) for name, value in blocks]


def test_the_stream_tells_answers_as_they_end_and_the_record_last(models):
    ask = client(models)
    told = events(ask.post("/api/stream", json={"text": NOTE}).text)
    *rows, (last, record) = told
    assert {name for name, _ in rows} == {"rows"} and last == "record"
    assert record == ask.post("/api/answers", json={"text": NOTE}).json()
    assert {row["name"] for _, each in rows for row in each} == {*tasks.PHENOTYPES, "diagnosis"}


def test_a_trace_is_the_page_of_the_same_answer(models):
    page = client(models).post("/api/trace", json={"text": NOTE, "ask": "tumor_size"}).text
    runs = json.loads(page.split('id="data">')[1].split("</script>")[0])["runs"]
    assert len(runs) == 2 and runs[1]["name"].endswith("without it")
    refused = client(models).post("/api/trace", json={"text": NOTE, "ask": "tumour_size"})
    assert refused.status_code == 400 and "not a known question" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"text": " "}, 400, "the note is empty"),
        ({"note": NOTE}, 422, "a missing or wrong field (text)"),
        ({"text": "x" * MAX_BYTES}, 413, "more than 100,000 bytes"),
    ],
)
def test_a_note_that_cannot_be_answered_is_one_line_without_its_text(models, body, status, said):
    refused = client(models).post("/api/answers", json=body)
    assert refused.status_code == status and said in refused.json()["error"] and NOTE not in refused.text


def test_a_stream_that_fails_ends_in_an_error_and_a_job_beyond_its_time_too(models):
    assert events(client(models).post("/api/stream", json={"text": " "}).text) == [("error", "the note is empty")]
    late = events(client(models, seconds=-1).post("/api/stream", json={"text": NOTE}).text)
    assert late[-1][0] == "error" and "seconds; give a shorter one" in late[-1][1]


def test_a_body_without_a_length_is_bounded_too(models):
    parts = (b"a" * 10_000 for _ in range(20))
    assert client(models).post("/api/answers", content=parts).status_code == 413


def test_a_body_that_does_not_come_is_given_up(models):
    sent = []

    async def never():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/answers", "headers": [(b"host", b"127.0.0.1:80")]}
    asyncio.run(make_app(models, "127.0.0.1", 80, None, body_seconds=0)(scope, never, send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:80"}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "evil.example:80"}, 421),
        ({"Host": "127.0.0.1:81"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_hosts_and_origins_are_refused(models, headers, status):
    answer = client(models).get("/", headers=headers)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"] and "set-cookie" not in answer.headers


def test_beyond_this_machine_a_token_is_asked_for(models):
    ask = client(models, token="secret", host="192.0.2.1")
    assert ask.get("/").status_code == 200  # the page itself holds nothing
    for given in ({}, {"Authorization": "Bearer other"}):
        assert ask.post("/api/answers", json={"text": NOTE}, headers=given).status_code == 401
    assert ask.get("/openapi.json").status_code == 401
    assert ask.get("/openapi.json", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert ask.get("/", headers={"Host": "localhost:80"}).status_code == 421


def test_the_api_page_describes_every_request_and_loads_nothing(models):
    ask = client(models)
    page, api = ask.get("/docs").text, ask.get("/openapi.json").json()
    assert set(api["paths"]) == {"/api/answers", "/api/stream", "/api/trace"}
    assert all(path in page for path in api["paths"])
    assert not any(loads in page for loads in ("<script", "src=", "href=", "url("))


def test_a_hundred_requests_at_once_are_answered_or_told_to_come_again(weights):
    import httpx2

    async def ask(address):
        async with httpx2.AsyncClient(timeout=120) as asking:
            posts = (asking.post(f"{address}/api/answers", json={"text": NOTE}) for _ in range(100))
            return await asyncio.gather(*posts)

    with served(weights, waiting=4) as (address, app):
        answers = asyncio.run(ask(address))
        ended = time.monotonic() + 20  # a job is counted until its answer is sent, which its client may see first
        while app.jobs and time.monotonic() < ended:
            time.sleep(0.01)
        assert app.jobs == 0
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 4
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"5"}
    assert len({answer.text for answer in answers if answer.status_code == 200}) == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_curl_line_answers(weights):
    (line,) = re.findall(r"^    (curl .*)$", (ROOT / "infer/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert "http://127.0.0.1:8017/" in line and Options().port == 8017
    with served(weights) as (address, _):
        command = line.replace("http://127.0.0.1:8017", address)
        done = subprocess.run(["bash", "-c", f"{command} --silent --noproxy '*'"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == Extractor(weights).answers("Sigmoid colon adenocarcinoma, 4.2 cm, grade 2.")


def test_a_client_that_hangs_up_leaves_its_turn_and_no_text_in_the_log(weights, caplog):
    import httpx2

    with caplog.at_level(logging.DEBUG), served(weights, seconds=600) as (address, app):
        with httpx2.stream("POST", f"{address}/api/stream", json={"text": NOTE * 30}, timeout=120) as answer:
            assert answer.status_code == 200  # its answer has begun, and is not read
        after = httpx2.post(f"{address}/api/answers", json={"text": NOTE}, timeout=120)
        assert after.status_code == 200
    assert app.jobs == 0  # once the server has ended: a turn is given back after its last byte is sent
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert not any("breast" in message for message in ours)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "not an address that clients can use"),
        ({"waiting": 0}, "at least 1"),
        ({"port": 99999}, "cannot listen there"),
        ({"adapter": "none"}, "no adapter_config.json there"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        main(Options(write_model(tmp_path / "m"), **({"port": 0} | options)))


def test_connections_without_a_request_are_closed_and_make_room(weights):
    with served(weights, idle=1, connections=4) as (address, _), contextlib.ExitStack() as stack:
        host, _, port = address.removeprefix("http://").partition(":")
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(4)]
        idle[0].sendall(b"GET / HTTP/1.1\r\nHo")  # a request that never ends
        assert [one.recv(1) for one in idle] == [b""] * 4
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.status == 200
