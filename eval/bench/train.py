"""LoRA training against transformers + peft: tokens a second and peak memory, same weights, same rows, same order.

`python -m eval.bench train --json F`. Each side runs in a process of its own, so that peaks are its own; eager
fp32 on a CPU, bf16 on a GPU. "plain": rows of full length, every token a target. "records": notes of 400 tokens with
eight questions of 40; peft trains eight rows a note, ours one row with branches; compared in records a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "tiny": (256, 32, 64, 2, 4, 2, 2, 64),
    "56m": (8192, 512, 1536, 14, 8, 4, 4, 512),
    "smollm2": (49152, 576, 1536, 30, 9, 3, 4, 512),
}  # vocabulary, width, feed-forward, layers, heads, key/value heads, rows, tokens a row
QUESTIONS = 8


def rows(size: str = "56m", steps: int = 3, r: int = 16) -> list[dict[str, Any]]:
    """Speed and memory rows, plain and on phenotype records."""
    from model.command import UserError

    if size not in SHAPES:
        raise UserError(f"--size {size}; it is one of {', '.join(SHAPES)}")
    made = []
    with tempfile.TemporaryDirectory() as folder:
        save_base(size, Path(folder))
        for kind in ("plain", "records"):
            found = {who: measured(who, kind, size, steps, r, folder) for who in ("peft", "ours")}
            ours, peft = found["ours"], found["peft"]
            setting = f"{size}, {kind}, r {r}, {steps} steps after 1, {torch.get_num_threads()} threads"
            for name, unit, better in (("speed", "tok/s" if kind == "plain" else "records/s", "higher"),
                                       ("memory", "MB over the process before the model", "lower")):  # fmt: skip
                a, b = ours[name], peft[name]
                made.append({"name": f"train {kind} {name}", "ours": a, "peer": b, "peer_name": "transformers + peft",
                             "ratio": a / b if better == "higher" else b / a, "limit": None, "share_of_limit": None,
                             "unit": unit, "setting": setting})  # fmt: skip
    return made


def save_base(size: str, folder: Path) -> None:
    from model import ModelConfig, Transformer

    V, D, F, L, H, G, _, _ = SHAPES[size]
    config = ModelConfig(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
                         num_key_value_heads=G, head_dim=D // H, rms_norm_eps=1e-5, rope_theta=1e4, windows=(None,) * L,
                         max_position_embeddings=2048)  # fmt: skip
    Transformer(config).init_weights(0).save_pretrained(folder)


def measured(who: str, kind: str, size: str, steps: int, r: int, folder: str) -> dict[str, float]:
    job = json.dumps({"who": who, "kind": kind, "size": size, "steps": steps, "r": r, "folder": folder,
                      "threads": torch.get_num_threads()})  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "eval.bench.train", job], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def units(kind: str, size: str, share: bool) -> list[Any]:
    """The rows of one step: seeded random tokens."""
    import numpy as np

    from train.rows import Row, note_unit, question_units, text_units

    V, *_, count, length = SHAPES[size]
    draw = np.random.default_rng(0)
    if kind == "plain":
        return [Row((text_units(str(i), draw.integers(0, V, length + 1), length)[0],)) for i in range(count)]
    note = 400 if length >= 400 else length
    pieces = [draw.integers(0, V, note), *(draw.integers(0, V, n) for _ in range(QUESTIONS) for n in (20, 20))]
    return [Row((note_unit("0", pieces),))] if share else [Row((unit,)) for unit in question_units("0", pieces)]


def job(who: str, kind: str, size: str, steps: int, r: int, folder: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    if who == "peft":
        step = peft_step(kind, size, r, folder, device, dtype)
    else:
        step = our_step(kind, size, r, folder, device, dtype)
    prepared, advance = step
    warm = torch.nn.Linear(2, 2)  # an optimizer's first step imports half of torch: not part of training's memory
    warm(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()
    before = resident()
    model = prepared()
    advance(model)
    began = time.perf_counter()
    for _ in range(steps):
        advance(model)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    tokens = sum(len(row) for row in units(kind, size, share=False))
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident(peak=True) - before
    return {"speed": (tokens if kind == "plain" else 1) * steps / seconds, "memory": peak}


def resident(peak: bool = False) -> float:
    """This process's resident memory now, or at its peak, in MB (Linux)."""
    word = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in status if line.startswith(word))


def our_step(kind: str, size: str, r: int, folder: str, device: str, dtype: torch.dtype) -> Any:
    from lora import LoRAConfig, add_lora
    from model import Transformer
    from train.fast import fast_blocks
    from train.loss import batch_loss
    from train.rows import collate, count

    held = units(kind, size, share=True)

    def prepared() -> Any:
        model = Transformer.from_pretrained(folder, dtype=dtype, device=device).use_attention("fast").train()
        fast_blocks(add_lora(model, LoRAConfig(r=r, alpha=2.0 * r)))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def advance(made: Any) -> None:
        model, optimizer = made
        optimizer.zero_grad(set_to_none=True)
        counts = count(held)
        for row in held:  # micro-batches of one row, the loop's default
            batch_loss(model, collate([row]).to(torch.device(device)), counts)[0].backward()
        optimizer.step()

    return prepared, advance


def peft_step(kind: str, size: str, r: int, folder: str, device: str, dtype: torch.dtype) -> Any:
    import peft
    import transformers

    from train.rows import collate

    held = units(kind, size, share=False)

    def prepared() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).train()
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def advance(made: Any) -> None:
        model, optimizer = made
        optimizer.zero_grad(set_to_none=True)
        batch = collate(held)
        labels = torch.cat([torch.full_like(batch.target[:, :1], -100), batch.target[:, :-1]], dim=1)
        model(input_ids=batch.tokens.to(device), labels=labels.to(device)).loss.backward()
        optimizer.step()

    return prepared, advance


if __name__ == "__main__":
    print(json.dumps(job(**json.loads(sys.argv[1]))))
