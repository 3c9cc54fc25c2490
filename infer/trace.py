"""Shows one forward pass as a self-contained HTML page: attention, logit lens, attribution, adapter, experts.

    python -m infer.trace --weights DIR [--adapter DIR] --prompt TEXT --out trace.html
    python -m infer.trace --weights DIR --adapter DIR --note note.txt --ask tumor_size --out trace.html

The answer is generated greedily; then one pass over prompt and answer is recorded (infer/inspect/recording.py). With an
adapter, the page also shows the model without it on the same tokens; `--compare` shows another model or adapter
instead. The file holds the prompt's text, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from infer import tasks
from infer.engine.generate import Generator, Settings
from infer.engine.load import check_adapters, load
from infer.engine.options import WeightOptions
from infer.extract.ask import Asker, Limits
from infer.extract.grounded import Grounded, Grounding
from infer.extract.notes import Note, read_notes
from infer.inspect import page as trace_page
from lora import load_adapter, merge_lora, no_adapter, set_adapter
from lora.adapter import adapted
from model import Tokenizer, Transformer
from model.support.cli import UserError, nearest, run
from model.support.files import write_text
from model.support.lock import output

MAX_ROWS = 640  # longer texts keep the attention of the answer's positions only
MAX_BYTES = 8_000_000  # size of a page


@dataclass(frozen=True, kw_only=True)
class Options(WeightOptions):
    """Write a page about one forward pass of a model; with an adapter, compare it with the model without it."""

    out: Path
    """The page (HTML); it holds the prompt's text and is readable by its owner only."""
    overwrite: bool = False
    """Replace an existing page."""
    prompt: str | None = None
    """The prompt's text."""
    note: Path | None = None
    """Instead of a prompt, a note (a .txt file, or JSON lines with `id` and `text`), asked as infer.extract does."""
    id: str | None = None
    """Id of the note to take (default: the first)."""
    ask: str = "tumor_size"
    """What to ask about the note: a phenotype's name, "diagnosis", or a question in words."""
    form: Literal["template", "chat"] = "template"
    """The template of tuned models, or the model's chat template (for --prompt: the text itself, or a user's turn)."""
    grounded: bool = False
    """Constrain a note's answer as infer.extract --grounded does."""
    compare: str | None = None
    """Another model, or another adapter on the same weights, to compare with."""
    max_new_tokens: int = 50
    """Maximum number of tokens of the answer; 0: the prompt only."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # type: ignore[assignment]
    """Dtype of the computation."""


@dataclass(frozen=True)
class Side:
    """One model of the page. `activated` is a context in which its adapter is active, or inactive."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    activated: Callable[[], Any]


def main(options: Options) -> int:
    check(options)
    read = [options.weights, *options.adapter, *([] if options.note is None else [str(options.note)])]
    with output(options.out, options.overwrite, *read):
        text, data = traced(options, None if options.note is None else selected_note(options))
        write_text(options.out, text, mode=0o600)
    for line in data["notices"]:
        print(line)
    for one in data["runs"]:
        error = one["attribution"]["logit"]["sum_error"]
        print(f"{one['name']}: contributions sum to the logit within {error:.1e}")
    size = len(text) / 1e6
    print(f"{options.out}: {size:.1f} MB; it holds the prompt's text, readable by its owner only (0600)")
    return 0


def traced(
    options: Options, note: Note | None, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES
) -> tuple[str, dict[str, Any]]:
    """The page about the options' prompt, or about a note, and its data. Attention maps are left out where they exceed
    the limits. Raises UserError if the page exceeds `max_bytes` even so."""
    data: dict[str, Any] = {
        "title": f"Trace: {Path(options.weights).name}",
        "runs": [],
        "notices": [],
        "code": trace_page.code(),
    }
    ids: list[int] = []
    start, first = 0, None
    for side in sides(options):
        with side.activated(), torch.no_grad():
            side.tokenizer.put_begin(options.bos)
            generator = Generator(side.model, side.tokenizer, lookup=False, max_length=options.max_length)
            prompt = prompt_ids(options, generator, note)
            answer = answer_ids(options, generator, prompt, note)
            same = first is None or (prompt == ids[:start] and same_tokens(first, side, ids))
            if first is None or not same:  # else the second model is run on the first one's tokens
                ids, start = [*prompt, *answer], len(prompt)
            if not same:
                data["notices"].append("The two models tokenize the text differently: each is shown on its own tokens.")
            data["runs"].append(run_data(side, ids, start, answer, data["notices"], max_rows))
        first = first or side
    return page_within(data, max_bytes), data


def check(options: Options) -> None:
    """Checks options before a model is loaded. Raises UserError."""
    if (options.prompt is None) == (options.note is None):
        raise UserError("give either --prompt TEXT or --note FILE")
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 0")
    if options.out.is_dir():
        raise UserError(f"{options.out} is a folder; give --out a file, for example trace.html")
    check_adapters(options.weights, options.adapter)
    if options.compare is not None and not Path(options.compare).exists():
        raise UserError(f"{options.compare}: no such file or folder; --compare takes a model or an adapter")


def sides(options: Options) -> Iterator[Side]:
    """Loads the models of the page: that of the options, then the one to compare it with."""
    model, tokenizer = load(options.weights, options.adapter[:-1], options.dtype)
    if adapted(model):  # below fp32, `load` leaves the last adapter unmerged
        merge_lora(model, keep=False)
    base, other = Path(options.weights).name, options.compare
    if options.adapter:
        load_adapter(model, options.adapter[-1])
        name = f"{base} + {short_path(options.adapter[-1])}"
        yield Side(name, model, tokenizer, lambda: active_adapter(model, "default"))
    else:
        yield Side(base, model, tokenizer, contextlib.nullcontext)
    if other is None and options.adapter:
        yield Side(f"{base} without it", model, tokenizer, lambda: no_adapter(model))
    elif other is not None and (Path(other) / "adapter_config.json").is_file():
        load_adapter(model, other, "compared")
        yield Side(f"{base} + {short_path(other)}", model, tokenizer, lambda: active_adapter(model, "compared"))
    elif other is not None:
        other_model, other_tokenizer = load(other, (), options.dtype)
        yield Side(Path(other).name, other_model, other_tokenizer, contextlib.nullcontext)


def short_path(adapter: str) -> str:
    """The last two parts of a path: runs/demo/tuned/adapter → tuned/adapter."""
    return "/".join(Path(adapter).resolve().parts[-2:])


@contextlib.contextmanager
def active_adapter(model: Transformer, name: str) -> Iterator[None]:
    set_adapter(model, name)
    yield


def same_tokens(one: Side, other: Side, ids: list[int]) -> bool:
    """True if the ids are the same pieces in both tokenizers, and within the other model's vocabulary."""
    if max(ids) >= other.model.config.vocab_size:
        return False
    wanted = set(ids)
    return trace_page.vocabulary(one.tokenizer, wanted) == trace_page.vocabulary(other.tokenizer, wanted)


def prompt_ids(options: Options, generator: Generator, note: Note | None) -> list[int]:
    tokenizer = generator.tokenizer
    if note is None:
        assert options.prompt is not None
        if options.form == "chat":
            return tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
        return tokenizer.encode(options.prompt, bos=True)
    names = [*tasks.PHENOTYPES, "diagnosis"]
    if options.ask not in names and " " not in options.ask:
        raise UserError(f"--ask {options.ask}: not a question{nearest(options.ask, names)}; known: {', '.join(names)}")
    known = tasks.PHENOTYPES.get(options.ask)
    question = known.question if known else tasks.DIAGNOSIS_QUESTION if options.ask == "diagnosis" else options.ask
    new = max(1, options.max_new_tokens)  # an Asker generates; with 0 the page shows the prompt alone
    asker = Asker(generator, "both", options.form, Limits(phenotype=new, diagnosis=new))
    return asker.prompt(note.text, options.ask if options.ask in names else "", question)


def selected_note(options: Options) -> Note:
    """The note of `--note` and `--id`. Raises UserError if there is none, or if it cannot be read."""
    assert options.note is not None
    note = next((n for n in read_notes(options.note) if options.id is None or n.id == options.id), None)
    if note is None:
        raise UserError(f"{options.note}: no record has the id {options.id!r}")
    if note.error:
        raise UserError(f"{options.note}, {note.id}: {note.error}")
    return note


def answer_ids(options: Options, generator: Generator, prompt: list[int], note: Note | None) -> list[int]:
    """The greedy answer's tokens, including the end token. Raises UserError for an empty or too long prompt."""
    limit = generator.max_length
    if not prompt:
        raise UserError("the prompt is empty: it has no token; give a text")
    if len(prompt) + options.max_new_tokens > limit:
        raise UserError(
            f"the prompt has {len(prompt)} tokens; with {options.max_new_tokens} new ones that exceeds the "
            f"model's {limit}: give a shorter one"
        )
    if not options.max_new_tokens:
        return []
    stop = ("\n",) if note is not None and options.form == "template" else ()
    constraint = None
    if options.grounded and note is not None:
        grammars = Grounding(generator.tokenizer, generator.stop_ids, generator.engine.device).of_note(note.text)
        constraint = Grounded(grammars[options.ask if options.ask in grammars else ""])
    settings = Settings(options.max_new_tokens, stop=stop, stop_cycles=True, constraint=constraint)
    (out,) = generator.generate([prompt], settings)
    return out.tokens


def run_data(
    side: Side, ids: list[int], start: int, own: list[int], notices: list[str], max_rows: int
) -> dict[str, Any]:
    """The page's data of one model. Above `max_rows` tokens, only the positions that predicted the answer's tokens keep
    their attention and experts, and a notice says so."""
    rows = list(range(len(ids)))
    if len(ids) > max_rows:
        rows = rows[start - 1 : -1] if start < len(ids) else rows[-1:]
        line = (
            f"The text has {len(ids)} tokens. Attention and experts are kept for the {len(rows)} positions that "
            f"predicted the answer's tokens; those of the others are left out (texts up to {max_rows} tokens keep all)."
        )
        notices += [line] if line not in notices else []
    return trace_page.run_values(side.name, side.model, side.tokenizer, ids, start, own, rows)


def page_within(data: dict[str, Any], max_bytes: int) -> str:
    """The page, without attention maps (the last run's first) as far as needed for at most `max_bytes`. Raises
    UserError if that is not enough."""
    text = trace_page.page(data)
    for one in reversed(data["runs"]):
        if len(text) > max_bytes:
            one["attention"] = None
            data["notices"].append(
                f"The attention maps of {one['name']} are left out: the page would exceed {max_bytes / 1e6:.0f} MB."
            )
            text = trace_page.page(data)
    if len(text) > max_bytes:
        raise UserError(
            f"the page would take {len(text) / 1e6:.1f} MB (maximum {max_bytes / 1e6:.0f}): give a shorter text, or "
            "fewer --max-new-tokens"
        )
    return text


if __name__ == "__main__":
    run(main, Options)
