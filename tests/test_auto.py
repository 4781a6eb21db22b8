"""After ``import scanlm``, whatever of transformers is imported next finds the model registered."""

import subprocess
import sys

import pytest

REGISTERED = (
    "from transformers import AutoConfig, AutoModelForCausalLM; "
    "config = AutoConfig.for_model('scanlm', n_embd=8, n_head=2, t2_layers=1, vocab_size=7); "
    "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
)


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import GPT2LMHeadModel",  # loads modeling_layers first
        "from transformers import GenerationMixin",  # loads generation.utils first
        "import scanlm.gpt2",
    ],
)
def test_whatever_is_imported_first(first: str) -> None:
    code = "; ".join(["import scanlm", first, REGISTERED])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "ScanLMForCausalLM", run.stderr[-2000:]
