"""Merging on disk streams: what it holds in memory is a few pieces of one layer, whatever the number of layers."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_adapters import CONFIG

from lora import LoRAConfig, add_lora, save_adapter
from model import Transformer
from model.support.init import init_weights

RESET = Path("/proc/self/clear_refs")  # "5" sets a process's peak of resident memory to what it is now
MERGE = """
import sys
from pathlib import Path
from lora.merge import merge_folders

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:"))

small, folder = map(Path, sys.argv[1:])
merge_folders(str(small / "base"), str(small / "adapter"), str(folder / "first"))  # what the first merge alone costs
Path("/proc/self/clear_refs").write_text("5")
before = peak()
merge_folders(str(folder / "base"), str(folder / "adapter"), str(folder / "out"))
print(peak() - before)
"""


def write(layers: int, folder: Path) -> Path:
    """A model of so many layers of 17 MB and an adapter of 4 MB for each."""
    config = replace(
        CONFIG,
        hidden_size=512,
        intermediate_size=2048,
        head_dim=128,
        num_hidden_layers=layers,
        windows=(None,) * layers,
    )
    model = init_weights(Transformer(config), 0)
    model.save_pretrained(folder / "base", max_shard_bytes=30 * 2**20)
    save_adapter(add_lora(model, LoRAConfig(r=128)), folder / "adapter")
    return folder


def peak_of_a_merge(small: Path, folder: Path) -> float:
    """Megabytes that resident memory rises during a merge, in a process of its own: an older one's heap has holes."""
    said = subprocess.run(
        [sys.executable, "-c", MERGE, str(small), str(folder)], capture_output=True, text=True, check=True
    )
    return float(said.stdout)


@pytest.mark.skipif(not RESET.exists(), reason="peaks are read from Linux's /proc")
def test_the_peak_does_not_grow_with_layers(tmp_path):
    small = write(1, tmp_path / "1")
    peaks = {layers: peak_of_a_merge(small, write(layers, tmp_path / str(layers))) for layers in (2, 12)}
    size = sum(file.stat().st_size for file in (tmp_path / "12" / "base").glob("*.safetensors")) / 1e6
    assert size > 150 and len(list((tmp_path / "12" / "base").glob("*.safetensors"))) > 5
    # a layer's pieces are some 15 MB; the adapter of ten more layers is 40, their weights 170
    assert peaks[12] < max(peaks[2], 15) + 20, peaks
