"""Memory of a job against its number of notes: infer.extract's peak, each in a process of its own.

The model is tiny and random, so that the job, not the model, is what is measured; notes are all different, and both
tasks are asked. A job holds a batch of notes, whatever their number (a folder's file names are held: some 200 bytes a
note).
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.bench.seven_b import write_tokenizer
from eval.experiments.steps import program
from model.support.init import init_weights

CONFIG = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "sliding_window": None, "max_position_embeddings": 4096,
}  # fmt: skip


def rows(sizes: tuple[int, ...] = (200, 2000, 20000), batch: int = 32) -> list[dict[str, Any]]:
    """The peak of resident memory for each number of notes, against the first one's."""
    from model import ModelConfig, Transformer

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-job-") as scratch:
        weights = Path(scratch) / "model"
        init_weights(Transformer(ModelConfig.from_dict(CONFIG)), 0).save_pretrained(weights)
        write_tokenizer(weights)
        for size in sizes:
            notes = write_notes(Path(scratch) / f"{size}.jsonl", size)
            began = time.perf_counter()
            peak = program(f"{size} notes", [
                "infer.extract", "--weights", str(weights), "--notes", str(notes), "--out", f"{notes}.out", "--form",
                "template", "--batch", str(batch), "--max-new-tokens", "2", "--max-new-diagnosis", "2",
            ])  # fmt: skip
            first = found[0]["ours"] if found else peak
            found.append({
                "name": f"peak memory of {size} notes", "ours": peak, "peer": first, "peer_name": f"{sizes[0]} notes",
                "ratio": first / peak, "limit": None, "share_of_limit": None, "unit": "MB",
                "setting": f"notes of {notes.stat().st_size / size:.0f} bytes, batches of {batch}, "
                f"{time.perf_counter() - began:.0f} s",
            })  # fmt: skip
    return found


def write_notes(path: Path, count: int) -> Path:
    with open(path, "w", encoding="utf-8") as out:
        for n in range(count):
            text = f"Patient {n} of {count}. Tumor of {n % 90 / 10} cm in the breast, grade {n % 3 + 1}, ER positive."
            out.write(json.dumps({"id": f"note-{n}", "text": text}) + "\n")
    return path
