"""Merging on disk streams: what it holds in memory is a few pieces of one layer, whatever the number of layers."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_adapters import CONFIG

from lora import LoRAConfig, add_lora, save_adapter
from lora.merge import merge_folders
from model import Transformer

RESET = Path("/proc/self/clear_refs")  # "5" sets this process's peak of resident memory to what it is now


def peak_of_a_merge(layers: int, folder: Path) -> float:
    """Megabytes that resident memory rises while a model of so many layers of 20 MB is merged."""
    config = replace(CONFIG, hidden_size=512, intermediate_size=2048, head_dim=128, num_hidden_layers=layers,
                     windows=(None,) * layers)  # fmt: skip
    model = Transformer(config).init_weights(0)
    model.save_pretrained(folder / "base", max_shard_bytes=30 * 2**20)
    save_adapter(add_lora(model, LoRAConfig(r=128)), folder / "adapter")
    del model
    RESET.write_text("5")
    before = resident("VmHWM:")
    merge_folders(str(folder / "base"), str(folder / "adapter"), str(folder / "out"))
    return resident("VmHWM:") - before


def resident(word: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(word))


@pytest.mark.skipif(not RESET.exists(), reason="peaks are read from Linux's /proc")
def test_the_peak_does_not_grow_with_layers(tmp_path):
    peaks = {layers: peak_of_a_merge(layers, tmp_path / str(layers)) for layers in (1, 2, 12)}
    size = sum(file.stat().st_size for file in (tmp_path / "12" / "base").glob("*.safetensors")) / 1e6
    assert size > 150 and len(list((tmp_path / "12" / "base").glob("*.safetensors"))) > 5
    # the adapter of ten more layers is 40 MB, their weights 170
    assert peaks[12] < max(peaks[1], peaks[2]) + 12, peaks
