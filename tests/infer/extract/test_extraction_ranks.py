"""torchrun's processes: one line for a mistake."""

import os
import subprocess
import sys

import pytest
from jobs import command

from infer.extract.program import Options, main
from model.support.cli import guard, run


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*launch, *arguments], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_mistake_is_said_once_and_not_by_every_rank(tmp_path):
    done = torchrun(*command(tmp_path, tmp_path / "n.jsonl", tmp_path / "o.jsonl")[1:], "--limit=0")
    assert done.returncode == 1 and done.stderr.count("--limit is 0") == 1


def test_a_wrong_option_is_said_by_the_first_of_a_machine(monkeypatch, capsys):
    monkeypatch.setattr("model.support.cli.TORCHRUN_SECONDS", 0.0)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            run(main, Options, ["--weights", "w", "--notes", "n", "--out", "o", "--bach", "2"])
        assert exit_.value.code == 2 and ("--bach" in capsys.readouterr().err) == (rank == "0")


def test_a_rank_outside_its_world_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert guard(lambda: main(Options(weights="w", notes=tmp_path / "n", out=tmp_path / "o")), "infer.extract") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RANK=1, WORLD_SIZE=1" in line
