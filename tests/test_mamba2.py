"""Mamba-2's mixer in matrix form, against transformers' own."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from scanlm.baselines import build_model
from scanlm.checkpoints import load_checkpoint
from scanlm.mamba2 import MatrixFormMixer, use_matrix_form


def pair(**changes: Any) -> tuple[Mamba2ForCausalLM, Mamba2ForCausalLM]:
    """transformers' model, and the same one in matrix form; every parameter matters."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8}
    shape |= {"vocab_size": 31, "n_groups": 1, "state_size": 6, "chunk_size": 4}
    config = Mamba2Config(**{**shape, **changes})
    torch.manual_seed(0)
    original = Mamba2ForCausalLM(config).double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = Mamba2ForCausalLM(config).double()
    ours.load_state_dict(original.state_dict())
    use_matrix_form(ours)
    return original, ours


def step(model: Any, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Logits and all gradients of a weighted sum of them."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("t", [1, 5, 8, 70])  # less than a chunk, several, with a rest
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"n_groups": 2}, {"use_conv_bias": False, "time_step_limit": (0.1, 0.5)}]
)
def test_the_matrix_form_is_the_same_function(
    t: int, padded: bool, changes: dict[str, Any]
) -> None:
    ids = torch.randint(0, 31, (3, t), generator=torch.Generator().manual_seed(t))
    mask = torch.ones_like(ids)
    mask[0, : t // 3] = 0
    results = [step(model, ids, mask if padded else None) for model in pair(**changes)]
    # transformers' own computes in float32 inside
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-4)


def test_decoding_goes_on_where_the_matrix_form_ends() -> None:
    _, model = pair()
    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    start = model(ids[:, :9], use_cache=True)
    cache, pieces = start.cache_params, [start.logits]
    for i in range(9, 12):
        out = model(ids[:, i : i + 1], cache_params=cache, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


def test_built_and_loaded_models_have_it(tmp_path: Any) -> None:
    built = build_model("mamba2_tiny", vocab_size=31)
    built.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path).model
    for model in (built, loaded):
        mixers = [block.mixer for block in model.backbone.layers]
        assert all(type(mixer) is MatrixFormMixer for mixer in mixers)


def test_kernels_that_cannot_be_imported_are_none(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a build of ``mamba_ssm`` for another torch, which a search for the package finds."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    for package in (folder, *folder.parents[:2]):
        (package / "__init__.py").touch()
    kernel = folder / "ssd_combined.py"
    monkeypatch.syspath_prepend(tmp_path)
    for text, kind in (
        ("raise OSError('undefined symbol')", MatrixFormMixer),
        ("", MatrixFormMixer),
        ("def mamba_chunk_scan_combined(): ...", Mamba2Mixer),
    ):
        kernel.write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        _, model = pair(num_hidden_layers=1)
        assert type(model.backbone.layers[0].mixer) is kind, text
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
