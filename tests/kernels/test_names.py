"""transformers looks for a library called `kernels`: it and our package must both import, in either order.

Also: without Triton's interpreter a CPU tensor uses the definition.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__file__).parent.parent


def run_python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers: make test installs it")
@pytest.mark.parametrize("order", ["import kernels, transformers", "import transformers, kernels"])
def test_transformers_imports_beside_our_package(order):
    said = run_python(
        f"{order}\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "import torch\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,\n"
        "                     num_attention_heads=2, num_key_value_heads=1)\n"
        "print(LlamaForCausalLM(config)(torch.arange(5)[None]).logits.shape[-1], kernels.__file__)\n"
    )
    words, file = said.split()
    assert words == "32" and Path(file) == ROOT / "kernels" / "__init__.py"


def test_every_public_name_is_a_function_and_another_name_is_an_error():
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    with pytest.raises(AttributeError, match="fused_dream"):
        kernels.fused_dream  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_triton():
    code = "import sys, kernels; print([m for m in ('torch', 'triton') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_a_cpu_tensor_gets_the_definition():
    said = run_python(
        "import torch, kernels\n"
        "from kernels.norm import rms_norm_definition\n"
        "from kernels.activation import swiglu_definition\n"
        "x, g = torch.randn(3, 50), torch.randn(50)\n"
        "print(torch.equal(kernels.rms_norm(x, g, 1e-5), rms_norm_definition(x, g, 1e-5)))\n"
        "print(torch.equal(kernels.swiglu(x, x + 1), swiglu_definition(x, x + 1)))\n"
    )
    assert said.split() == ["True", "True"]
