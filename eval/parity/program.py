"""Compare a checkpoint in this implementation with transformers' (and an adapter with peft's), stage by stage.

    python -m eval.parity --weights DIR [--adapter DIR] [--prompt TEXT] [--json F]

Both models are loaded from the same files and run on the same tokens. The table has one row per stage; the summary
names the first stage that differs and the largest difference. Exits 0 only if every row passes.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eval.parity import stages
from eval.parity.checks import Row, compare_all, generation_rows, tokenizer_rows
from lora import load_adapter
from model import Tokenizer, Transformer
from model.checkpoints.weights import find_format
from model.support.cli import UserError, one_line
from model.support.files import write_json
from model.support.lock import output

PROMPT = (
    "PATHOLOGY REPORT. Left breast, core biopsy: invasive ductal carcinoma, grade 2, 2.5 cm. ER+ (95 %), PR-, HER2 "
    "equivocal (2+). No lymphovascular invasion. Lymph nodes: 0/3. Stage IIA (pT2 pN0 cM0).\n"
)
LINES = (
    "The patient is a 54-year-old woman.",
    "  two spaces, then a\ttab",
    "2.5 cm × 1.25 cm; Ki-67 ≈ 30 %",
    "naïve façade",
    "Österreich, Ελλάδα, Москва, 東京, 한국어, עברית",
    "🩺👩‍⚕️ e\u0301 ﬁ",
    "a\r\nb\n\n\nc",
    "[INST] x [/INST]",
)
LONGEST = 1024  # prompt tokens, even if two windows are longer (the summary then says so)


@dataclass(frozen=True)
class Options:
    weights: str
    """A model's folder (safetensors or Mistral's native files) or a .gguf file."""
    adapter: str | None = None
    """A PEFT adapter's folder, to compare with peft as well."""
    prompt: str = PROMPT
    """Input text; repeated until it is longer than two windows (and `tokens`), up to 1,024 tokens."""
    tokens: int = 96
    """Smallest number of prompt tokens. A prompt shorter than the window would not test the window."""
    new_tokens: int = 64
    """Number of tokens to generate greedily; 0 for none."""
    gradients: bool = True
    """Compare the gradient of every parameter (needs memory for two more models)."""
    device: str = "cpu"
    """Device of both models. fp32 on the CPU is compared bit for bit; anything else by the ratio of errors."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of both models."""
    json: str | None = None
    """Write the rows and the summary to this file."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class Report:
    """All rows, with the model's family and window and the prompt's length."""

    family: str
    prompt_tokens: int
    window: int | None
    rows: list[Row]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    def summary(self) -> str:
        """One line to paste into an issue."""
        about = f"{self.family}, {self.prompt_tokens} tokens, window {self.window or 'none'}"
        if self.window and self.prompt_tokens <= 2 * self.window:
            about += " (prompt within two windows: the window is not proved)"
        if not self.failed:
            return f"parity holds: {about}, {len(self.rows)} rows"
        first, largest = self.failed[0], max(self.failed, key=lambda row: row.error)
        return (
            f"parity FAILS: {about}, {len(self.failed)} of {len(self.rows)} rows; first {first.section} {first.name!r} "
            f"({first.error:.1e}{'; ' + first.detail if first.detail else ''}), "
            f"largest {largest.section} {largest.name!r} ({largest.error:.1e})"
        )


def main(options: Options) -> int:
    for package in ("transformers", *(("peft",) if options.adapter else ())):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"needs {package}: pip install -c constraints.txt -e '.[parity]'")
    with output(options.json, options.overwrite):
        report = compare(options)
        print_rows(report.rows)
        print(f"\n{report.summary()}")
        if options.json:
            found = {"summary": report.summary(), "holds": not report.failed}
            rows = [dataclasses.asdict(row) for row in report.rows]
            write_json(options.json, found | {"rows": rows})
    return 1 if report.failed else 0


def print_rows(rows: list[Row]) -> None:
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            print(f"\n{section:<44} {'max error':>10} {'ULPs':>8} {'cosine':>12}")
        mark = " " if row.ok else "✗"
        steps = "–" if row.ulps is None else row.ulps
        numbers = f"{row.error:10.2e} {steps:>8} {row.cosine:12.9f}" if section != "tokenizer" else " " * 32
        print(f"{mark} {row.name:<42} {numbers}  {row.detail}".rstrip())


def compare(options: Options) -> Report:
    """Run all comparisons that the options ask for."""
    dtype, on_cpu = getattr(torch, options.dtype), options.device == "cpu"
    ours = Transformer.from_pretrained(options.weights, dtype=dtype, device=options.device)
    threads, experts = torch.get_num_threads(), ours.config.num_local_experts
    if on_cpu and experts:  # threads would split transformers' fused gate-and-up GEMM differently from our two: ULPs
        torch.set_num_threads(1)
    # transformers applies silu to half of each row of a fused product. If the experts' width is not a multiple of the
    # vector size, the scalar tail of each row differs by an ULP: compare errors instead of bits.
    unaligned = bool(experts) and ours.config.intermediate_size % 32 != 0
    wide = torch.float64 if on_cpu and dtype == torch.float32 else torch.float32
    try:
        reference = None if on_cpu and dtype == torch.float32 and not unaligned else wide
        rows, tokens = compare_rows(options, ours, reference, wide)
    finally:
        torch.set_num_threads(threads)
    return Report(ours.config.model_type, tokens.shape[1], ours.config.window, rows)


def compare_rows(
    options: Options, ours: Transformer, reference: torch.dtype | None, wide: torch.dtype
) -> tuple[list[Row], Tensor]:
    """The rows, and the prompt's tokens_1T.

    Stages are compared by their errors against our own model in the dtype `reference`, or bit for bit if it is None;
    gradients always by their errors against our model in `wide`.
    """
    dtype = ours.dtype
    tokenizer = _tokenizer(options.weights)
    tokens = prompt_tokens(options, ours, tokenizer)
    mine = _observed(stages.ours, ours, tokens, options.gradients)
    exact: tuple[stages.Stages, dict[str, Tensor]] = {}, {}
    if options.gradients or reference:
        exact = _observed(stages.ours, ours.to(wide), tokens, options.gradients)
        ours.to("meta")  # frees the wide weights before the peer is loaded
        gc.collect()
        ours = Transformer.from_pretrained(options.weights, dtype=dtype, device=options.device)
    with tempfile.TemporaryDirectory() as scratch:
        peer = load_theirs(options.weights, ours, dtype, options.device, Path(scratch))
        their = _observed(stages.theirs, peer, tokens, options.gradients)
        rows = compare_all("stage", mine[0], their[0], exact[0] if reference else None)
        rows += compare_all("gradient", mine[1], their[1], exact[1])
        if options.new_tokens:
            rows += generation_rows(ours, peer, tokens[:1], options.new_tokens)
        if tokenizer is not None:
            listed = [part.eos_token_id for part in (peer.config, peer.generation_config)]
            ends = [i for ids in listed if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
            lines, theirs = [*LINES, options.prompt], _their_tokenizer(options.weights)
            rows += tokenizer_rows(tokenizer, theirs, lines, ours.config.eos_token_id, ends)
        if options.adapter:
            rows += adapter_rows(options.adapter, ours, peer, tokens, reference)
    return rows, tokens


def adapter_rows(
    adapter: str, ours: Transformer, peer: Any, tokens: Tensor, reference: torch.dtype | None
) -> list[Row]:
    """The stages with the adapter loaded, against peft's, and a check that the adapter changes the logits."""
    from peft import PeftModel

    with torch.no_grad():
        without = ours(tokens).cpu()
        load_adapter(ours, adapter)
        mine, _ = stages.ours(ours, tokens)
        adapted = PeftModel.from_pretrained(peer, adapter).eval()
        their, _ = stages.theirs(adapted, tokens)
        exact = stages.ours(ours.to(reference), tokens)[0] if reference else None
    rows = compare_all("adapter", mine, their, exact)
    effect = float((mine["logits"] - without).abs().max())
    return [*rows, Row("adapter", "effect on the logits", effect > 0, detail=f"moves them by up to {effect:.2e}")]


def prompt_tokens(options: Options, model: Transformer, tokenizer: Tokenizer | None) -> Tensor:
    """tokens_1T of the prompt, repeated beyond twice the narrowest layer's window; random if there is no tokenizer."""
    windows = [window for window in model.config.windows if window is not None]
    count = min(max(options.tokens, 2 * min(windows) + 1 if windows else 0), LONGEST)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (1, count), generator=generator).to(options.device)
    ids = tokenizer.encode(options.prompt)
    if not ids:
        raise UserError("--prompt is empty; give a text")
    ids = (ids * -(-count // len(ids)))[: max(count, min(len(ids), LONGEST))]
    return torch.tensor([ids], device=options.device)


def load_theirs(weights: str, ours: Transformer, dtype: torch.dtype, device: str, scratch: Path) -> Any:
    """transformers' model from the same files, with eager attention. Mistral's native files, which transformers cannot
    read, are converted by us first."""
    from transformers import AutoModelForCausalLM

    kind, where = find_format(weights)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "local_files_only": True}
    if ours.config.num_local_experts:
        options["experts_implementation"] = "eager"
    if kind == "gguf":
        options["gguf_file"] = where.name
        where = where.parent
    elif kind == "native":
        ours.save_pretrained(scratch / "converted")
        where = scratch / "converted"
    theirs: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    return theirs.to(device).eval()


def _observed(watch: Any, model: Any, tokens: Tensor, backward: bool) -> tuple[stages.Stages, dict[str, Tensor]]:
    with torch.set_grad_enabled(backward):
        found, loss = watch(model, tokens)
    return found, stages.gradients(model, loss) if backward else {}


def _tokenizer(weights: str) -> Tokenizer | None:
    try:
        return Tokenizer.from_pretrained(weights)
    except UserError as error:
        print(f"no tokenizer compared: {one_line(error)}", file=sys.stderr)
        return None


def _their_tokenizer(weights: str) -> Any | None:
    """transformers' tokenizer; None if the folder has no tokenizer.json and tokenizer_config.json."""
    from transformers import AutoTokenizer

    folder = Path(weights)
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
