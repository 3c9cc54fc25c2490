"""The options of every program that asks a model about notes, and what follows from them for the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from infer.engine.options import ModelOptions
from infer.extract.ranks import of_first
from infer.tasks import QUESTION
from model.support.checks import whole
from model.support.cli import UserError, nearest

if TYPE_CHECKING:  # they need torch, which --help and a mistake in the options do not
    from infer.engine.memory import Plan
    from infer.extract.ask import Limits

ASKED = {"phenotype": 8, "diagnosis": 1, "both": 9}  # questions a note
MOST = {"cpu": 8, "cuda": 64}  # notes at once, where --batch names no number
NOTE, STEPS = 400, 16  # tokens of a usual note, and steps of a usual answer: what dtype "auto" is measured for


LEAST = {"batch": 0, "alternatives": 0, "max_input_tokens": 1, "max_new_tokens": 1, "max_new_diagnosis": 1, "limit": 1}
LEAST |= {"neighbours": 1, "neighbour_tokens": 1}  # of infer.extract alone
LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class AskOptions(ModelOptions):
    form: str = "auto"
    """How it is asked: template, ours (tuned models); chat, the model's own form (untuned), or a form of
    model/text/chat.py by its name; auto: the template where an adapter is given or the model has no chat form."""
    grounded: bool = False
    """Allow only "not relevant", closed values, spans of the note, and existing ICD-10-CM codes."""
    long: Literal["error", "truncate", "windows"] = "error"
    """A note beyond the limit: record an error, read its beginning, or read overlapping windows and merge."""
    max_input_tokens: int = 1500
    """Tokens of a prompt, note and question together (the paper's limit)."""
    max_new_tokens: int = 50
    """Tokens of a phenotype's answer (the paper's limit)."""
    max_new_diagnosis: int = 500
    """Tokens of a diagnosis (the paper's limit)."""
    batch: int = 0
    """Notes at once; 0: as many as memory is free for when the job begins, at most 8 on a CPU and 64 on a GPU."""
    limit: int | None = None
    """Only the first notes."""
    alternatives: int = 0
    """Also the likeliest other answers to each question, so many (of notes that are read whole)."""

    def check(self) -> None:
        """Raise UserError for an unknown form, and for a number that is too small or too large."""
        for name, least in LEAST.items():
            if (value := getattr(self, name, None)) is not None:
                whole(f"--{name.replace('_', '-')}", value, least, LARGEST)
        from model.text.chat import FORMS

        known = ("auto", "template", "chat", *FORMS)
        if self.form not in known:
            raise UserError(f"--form {self.form}: not known{nearest(self.form, known)}; there are {', '.join(known)}")

    @property
    def limits(self) -> Limits:
        from infer.extract.ask import Limits

        return Limits(self.max_input_tokens, self.max_new_tokens, self.max_new_diagnosis)


Asked = TypeVar("Asked", bound=AskOptions)


def planned(options: Asked, task: str, known: Mapping[str, Any], rank: int = 0, world: int = 1) -> tuple[Asked, Plan]:
    """The options with the dtype, format and number of notes that the machine and its memory allow, or that are `known`
    of a job that is resumed; and the plan. The first rank chooses for all."""
    if options.memory and options.long == "windows":
        raise UserError(
            "--memory cannot bound --long windows (a note has as many as it is long); give --long error or truncate"
        )
    from infer.engine.load import DTYPES, device_here, dtype_for, plan_for
    from infer.engine.memory import notes_at_once
    from lora.memory import Requests
    from model.support.hardware import free_memory

    asked, device = ASKED[task], device_here()
    batch = options.batch or known.get("batch") or MOST[device]
    names, dtype = list(DTYPES), 0
    if rank == 0:
        prompts = 1 + batch * (NOTE + asked * QUESTION) // 512
        calls = [(512, prompts), (batch * asked, STEPS), (4, STEPS)]  # most answers end early, a few go on
        dtype = names.index(dtype_for(options, calls, known.get("dtype")))
    options = replace(options, dtype=names[of_first(dtype, world)])  # type: ignore[arg-type]
    new = (asked - (task != "phenotype")) * options.max_new_tokens
    new += QUESTION * asked + (options.max_new_diagnosis if task != "phenotype" else 0)
    load = Requests(options.max_input_tokens, new, asked, batch, options.grounded)
    plan = plan_for(options, load)
    if rank == 0 and not (options.batch or known or options.memory):
        batch = notes_at_once(
            options.weights, options.adapter, free_memory(device), load, plan.form, DTYPES[options.dtype], device
        )
    batch = plan.batch if options.memory else of_first(batch, world)
    options = replace(options, format=plan.form, batch=batch)  # type: ignore[arg-type]
    return options, plan
