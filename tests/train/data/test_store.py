"""Token stores: bad records are set aside and named, other sources are noticed, workers and shards change nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_runs import RECIPE

import train.data.store as stores
from model.support.cli import UserError
from train.data.dataset import Rows
from train.data.store import Encoding, TokenStore, build_store


def test_data_of_the_other_stage_and_broken_lines_are_named(data, tmp_path):
    notes, tok = data / "notes.jsonl", str(data / "tok")
    with pytest.raises(UserError, match="notes.jsonl:1: an annotated note: train.instruct"):
        build_store([str(notes)], Encoding("pretrain", tok), tmp_path / "a")
    with pytest.raises(UserError, match="documents.jsonl:1: lacks 'phenotypes'"):
        build_store([str(data / "documents.jsonl")], Encoding("instruct", tok), tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    rejects = [json.loads(line) for line in (tmp_path / "b-rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejects] == list(range(1, 24)) and "phenotypes" in rejects[0]["reason"]


def test_data_of_the_other_stage_is_refused_after_its_first_shard(data, tmp_path):
    documents, notes = (str(data / f"{name}.jsonl") for name in ("documents", "notes"))
    encoding = Encoding("instruct", str(data / "tok"))
    with pytest.raises(UserError, match="documents.jsonl:1: lacks 'phenotypes'.*; 4 of 4 records read cannot be used"):
        build_store([documents], encoding, tmp_path / "a", workers=1, shard_records=4)
    with pytest.raises(UserError, match="; 14 of 24 records read cannot be used"):  # ten notes come before them
        build_store([notes, documents], encoding, tmp_path / "a", workers=1, shard_records=4)


def test_some_unanswered_questions_are_left_out_and_never_an_answered_one(data, tmp_path):
    made = {}
    for kept in (0.0, 0.5, 1.0):
        encoding = Encoding("instruct", str(data / "tok"), empty_kept=kept)
        store = build_store([str(data / "notes.jsonl")], encoding, tmp_path / str(kept))
        made[kept] = {store[n][0]: [piece.tolist() for piece in store[n][1]] for n in range(len(store))}
    empty = encoding.encoder()  # of a note that leaves its one question unanswered: something must be asked
    only = {"id": "x", "text": "a b", "phenotypes": {"tumor_size": []}}
    assert len(empty(only)) == 3

    def asked(pieces):
        return list(zip(pieces[1::2], pieces[2::2], strict=True))

    counts = {kept: sum(len(asked(pieces)) for pieces in notes.values()) for kept, notes in made.items()}
    assert counts[0.0] < counts[0.5] < counts[1.0]
    unanswered = empty(only)[2].tolist()
    for name, pieces in made[1.0].items():
        answered = [one for one in asked(pieces) if one[1] != unanswered]
        assert asked(made[0.0][name]) == answered and all(one in asked(made[0.5][name]) for one in answered)


def test_few_bad_records_go_to_the_rejects_file_and_a_changed_source_is_noticed(tmp_path, data):
    file, encoding = tmp_path / "d.jsonl", Encoding("pretrain", str(data / "tok"))
    lines = [json.dumps({"id": str(i), "text": "some words"}) for i in range(200)]
    file.write_text("\n".join([*lines[:7], '{"id": "bad"}', *lines[7:]]) + "\n")
    store = build_store([str(file)], encoding, tmp_path / "s")
    rejects = [json.loads(line) for line in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert len(store) == 200 and [(r["line"], r["file"]) for r in rejects] == [(8, str(file))]
    file.write_text("\n".join([*lines, *['{"id": "bad"}'] * 3]) + "\n")  # 1.5 %
    with pytest.raises(UserError, match="d.jsonl:201: lacks 'text', or it is empty; 3 of 203 records"):
        build_store([str(file)], encoding, tmp_path / "more")
    assert not (tmp_path / "more").exists()
    file.write_text("\n".join([*lines[:7], '{"id": "bad"}', *lines[7:]]) + "\n")
    assert store[5][0] == "5" and bytes(store[5][1][0][1:-1].astype("uint8")) != b""
    made = (tmp_path / "s" / "manifest.json").stat().st_mtime_ns
    build_store([str(file)], encoding, tmp_path / "s")
    assert (tmp_path / "s" / "manifest.json").stat().st_mtime_ns == made, "nothing changed, nothing is made again"
    file.write_text("\n".join([*lines, json.dumps({"id": "new", "text": "more"})]) + "\n")
    assert len(build_store([str(file)], encoding, tmp_path / "s")) == 201
    for name in ("0.tokens.npy", "0.names.npy"):
        held = (tmp_path / "s" / name).read_bytes()
        (tmp_path / "s" / name).write_bytes(held[:90])
        with pytest.raises(UserError, match="s: shard 0 is corrupt; remove this folder"):
            TokenStore(tmp_path / "s")[0]
        (tmp_path / "s" / name).write_bytes(held)


def test_an_empty_file_and_one_too_short_for_a_row_are_named(tmp_path, data):
    (tmp_path / "none.jsonl").write_text("\n \n")
    (tmp_path / "short.jsonl").write_text('{"id": "a", "text": "some words"}\n')
    encoding = Encoding("pretrain", str(data / "tok"))
    with pytest.raises(UserError, match="none.jsonl: empty: it holds no record"):
        build_store([str(data / "documents.jsonl"), str(tmp_path / "none.jsonl")], encoding, tmp_path / "s")
    store = build_store([str(tmp_path / "short.jsonl")], encoding, tmp_path / "s")
    with pytest.raises(UserError, match="short.jsonl: not one whole row of block = 400 tokens"):
        Rows(store, replace(RECIPE, packing="concatenate"), "pretrain")


def test_two_workers_and_many_shards_hold_what_one_process_writes(data, tmp_path):
    """Twenty-three documents in shards of four, two of them open at a time."""
    encoding, files = Encoding("pretrain", str(data / "tok")), [str(data / "documents.jsonl")]
    one = build_store(files, encoding, tmp_path / "one")
    for workers in (1, 2):
        build_store(files, encoding, tmp_path / str(workers), workers=workers, shard_records=4)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 6 * 5 + 2 and names == sorted(path.name for path in (tmp_path / "2").iterdir())
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)
    for workers in (1, 2):
        store = TokenStore(tmp_path / str(workers), open_shards=2)
        assert len(store) == len(one) == 23 and list(store.text_lengths()) == list(one.text_lengths())
        for index in np.random.default_rng(1).permutation(23):
            (name, pieces), (same, others) = store[index], one[index]
            assert name == same and all(np.array_equal(a, b) for a, b in zip(pieces, others, strict=True))
        assert store.shard.cache_info().currsize == 2


MEASURE = """
import sys
from pathlib import Path
from train.data.dataset import Rows
from train.data.rows import order
from train.data.store import TokenStore
from train.recipe import Recipe

def own() -> int:  # bytes of this process that are no file's
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

before = own()
recipe = Recipe(data=("x",), out="x", weights="x", block=3000, packing=sys.argv[2])
rows = Rows(TokenStore(sys.argv[1]), recipe, "pretrain")
taken = [len(rows[i]) for step in range(0, 5000, 100) for i in order(0, step, len(rows), 80)]
print(len(rows), max(taken), own() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["documents", "none", "concatenate"])
def test_the_papers_millions_of_documents_take_little_memory_of_a_rank(tmp_path, packing):
    """160 shards, each the same 20,000 documents of 600 tokens on average, of which no file has a byte on the disk."""
    rng = np.random.default_rng(0)
    ends = np.concatenate([[0], np.cumsum(rng.integers(20, 1180, stores.SHARD_RECORDS))])
    names = [f"document-{n}".encode() for n in range(stores.SHARD_RECORDS)]
    tokens = np.lib.format.open_memmap(tmp_path / "0.tokens.npy", "w+", np.uint16, (int(ends[-1]),))
    del tokens
    name_ends = np.cumsum([0, *map(len, names)])
    arrays = (ends, np.arange(stores.SHARD_RECORDS + 1), bytearray(b"".join(names)), name_ends)
    for name, array in zip(stores.ARRAYS[1:], arrays, strict=True):
        np.save(tmp_path / f"0.{name}.npy", array)
    for number in range(1, 160):
        for name in stores.ARRAYS:
            (tmp_path / f"{number}.{name}.npy").hardlink_to(tmp_path / f"0.{name}.npy")
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"records": stores.SHARD_RECORDS}] * 160}))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), packing]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."})
    rows, longest, grown = map(int, done.stdout.split())
    print(f"{packing}: {rows:,} rows, {grown / 1e6:.0f} MB")
    assert rows > 600_000 and longest <= 3000
    assert grown <= 64e6


@pytest.mark.parametrize(
    "record",
    [
        '{"id": "x", "text": "t", "phenotypes": {"tumor_size": [{"text": 3}]}}',
        '{"id": "x", "text": "t"}',
        '{"id": "x", "text": "t", "phenotypes": 4}',
        '{"id": "x", "text": "t", "phenotypes": {"tumor_size": "3 cm"}}',
        '{"id": "x", "text": 7, "phenotypes": {}}',
        '{"id": "x", "text": "t", "phenotypes": {"tumor_sice": []}}',
        "[1]",
        '{"text": "t"}',
        "{",
        "\udc80",
    ],
)
def test_no_record_of_whatever_shape_is_a_traceback(data, tmp_path, record):
    lines = (data / "notes.jsonl").read_bytes() * 20
    (tmp_path / "notes.jsonl").write_bytes(lines + record.encode("utf-8", "surrogateescape") + b"\n")
    store = build_store([str(tmp_path / "notes.jsonl")], Encoding("instruct", str(data / "tok")), tmp_path / "store")
    rejects = [json.loads(line) for line in (tmp_path / "store" / "rejects.jsonl").read_text().splitlines()]
    assert len(store) == 200 and [row["line"] for row in rejects] == [201] and rejects[0]["reason"]
