"""The registry: what it ships, how a model is added, what it refuses."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scanlm import baselines, fused
from scanlm.baselines import (
    ModelEntry,
    build_model,
    change_config,
    config_differences,
    count_parameters,
    list_entries,
    load_entry,
    make_config,
    register_family,
)
from scanlm.checkpoints import load_checkpoint
from scanlm.config import ScanLMConfig
from scanlm.errors import ScanLMError
from scanlm.flops import training_flops
from scanlm.settings import TrainingSettings, resolve_settings

TINY = ["scanlm_tiny", "gpt2_tiny", "window_gpt2_tiny", "gla_tiny", "gated_deltanet_tiny"]
TINY += ["mamba2_tiny"]


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(baselines, "_FAMILIES", dict(baselines._FAMILIES))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


# What is shipped


def test_every_entry_names_itself_and_says_what_it_is() -> None:
    for entry in list_entries():
        assert load_entry(entry.id) == entry
        assert entry.name
        assert entry.description.endswith(".")
        assert resolve_settings(entry.id).model == entry.id


def test_the_ids_that_users_rely_on() -> None:
    ids = {entry.id for entry in list_entries()}
    assert {f"scanlm_base_c{c}" for c in (32, 64, 128, 256, 512)} <= ids
    assert set(TINY) <= ids
    assert {"gla_170M", "gla_170M_baseline", "gpt2_small_wikitext103_nodrop"} <= ids
    assert {"gated_deltanet_170M", "gated_deltanet_170M_baseline", "mamba2_130M"} <= ids


GLA, GDN = "gla_170M", "gated_deltanet_170M_baseline"


@pytest.mark.parametrize(
    ("model", "changes", "millions"),
    [
        ("gpt2_small_wikitext103_drop01", {}, 124.44),
        ("gpt2_small_untied", {}, 163.04),
        ("window_gpt2_small", {}, 124.44),
        (GLA, {}, 162.38),
        (GLA, {"tie_word_embeddings": True}, 123.78),
        (GLA, {"expand_k": 1.0}, 169.53),
        ("gla_170M_baseline", {}, 130.94),
        ("gated_deltanet_250M", {}, 247.50),
        ("gated_deltanet_250M", {"tie_word_embeddings": True}, 208.90),
        (GDN, {"tie_word_embeddings": False}, 169.45),
        (GDN, {}, 130.85),
        (GDN, {"tie_word_embeddings": False, "head_dim": 256}, 275.62),
    ],
)
def test_parameters(model: str, changes: dict[str, Any], millions: float) -> None:
    entry = load_entry(model)
    changed = entry.model_copy(update={"config": {**entry.config, **changes}})
    assert round(count_parameters(changed) / 1e6, 2) == millions


def test_what_differs_from_the_familys_defaults() -> None:
    assert config_differences(load_entry("scanlm_base_c64")) == {}  # but token ids
    assert config_differences(load_entry("scanlm_base_c128")) == {"chunk_size": 128}
    assert config_differences(load_entry(GDN)) == {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_heads": 12,
        "head_dim": 64,
        "expand_v": 1.0,
        "use_short_conv": False,
        "allow_neg_eigval": True,
        "tie_word_embeddings": True,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
    }
    # GPT-2 calls it n_embd
    entry = ModelEntry(id="mine", family="gpt2", config={"hidden_size": 768, "vocab_size": 9})
    assert config_differences(entry) == {}


def test_all_fields_differ_from_a_family_without_defaults() -> None:
    def build(fields: dict[str, Any], device: torch.device | None) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(n_layer=fields["depth"]))

    register_family("needs_depth", build)
    for family in ("needs_depth", "not registered"):
        entry = ModelEntry(id="mine", family=family, config={"depth": 2, "bos_token_id": 1})
        assert config_differences(entry) == {"depth": 2}


def test_a_changed_configuration() -> None:
    entry = load_entry(GLA)
    assert change_config(GLA, {}) == entry
    changed = change_config(GLA, {"config.expand_k": 1.0})
    assert changed.config == {**entry.config, "expand_k": 1.0}
    with pytest.raises(ScanLMError, match=r"'gla_170M': unknown .*Did you mean 'expand_k'"):
        change_config(GLA, {"config.expandk": 1.0})
    with pytest.raises(ScanLMError, match=r"'steps' is no field of a model: expected config\."):
        change_config(GLA, {"steps": 1})
    with pytest.raises(ScanLMError, match="num_heads=5"):
        change_config(GLA, {"config.num_heads": 5})


def test_tiny_models_are_of_one_size() -> None:
    size = count_parameters("scanlm_tiny")
    for model in TINY:
        assert count_parameters(model) == pytest.approx(size, rel=0.1)
        entry = load_entry(model)
        assert entry.config["vocab_size"] == 257
        assert entry.training == {"corpus": "embedded"}
        assert resolve_settings(model).corpus == "embedded"


def test_matched_models_share_their_window_and_dropout() -> None:
    window = load_entry("window_gpt2_small").config["sliding_window"]
    assert window == 2 * load_entry("scanlm_base_c64").config["chunk_size"]
    window = load_entry("window_gpt2_tiny").config["sliding_window"]
    assert window == 2 * load_entry("scanlm_tiny").config["chunk_size"]
    for model in ("scanlm_base_c64", "gpt2_small_wikitext103_drop01", "gla_170M", GDN):
        config = build_model(model, device="meta").config
        assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.1, 0.1, 0.1)


def test_what_gpt2_is_trained_with() -> None:
    settings = resolve_settings("gpt2_small_wikitext103_drop01")
    assert (settings.lr, settings.beta2, settings.steps) == (1e-4, 0.999, 30518)
    untouched = {"lr", "beta2", "steps", "model"}
    defaults = TrainingSettings().model_dump(exclude=untouched)
    assert settings.model_dump(exclude=untouched) == defaults


@pytest.mark.parametrize("model", [e.id for e in list_entries()])
def test_its_arithmetic_is_known(model: str) -> None:
    parts = training_flops(build_model(model, device="meta"), 512)
    assert parts is not None
    # six operations a parameter, more for attention and T2's windows, less for the embeddings
    assert 0.3 < sum(parts.values()) / (6 * count_parameters(model)) < 3.5


@pytest.mark.parametrize("model", TINY)
def test_it_trains_saves_loads_and_generates(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_model(model)
    ids = torch.randint(257, (2, 1)) + torch.arange(70)  # counting, from two starts
    ids = ids % 256
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = net(input_ids=inputs, labels=targets, shift_labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.55, abs=0.3)  # log 257
    assert losses[-1] < 0.6 * losses[0]
    net.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path).model
    logits = net.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=0, atol=0)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 256}
    beams = loaded.generate(ids[:, :40], num_beams=2, **how)
    assert beams.shape == (2, 45)
    greedy = loaded.generate(ids[:, :40], **how)
    assert torch.equal(greedy, loaded.generate(ids[:, :40], use_cache=False, **how))


def test_another_vocabulary_has_other_special_tokens() -> None:
    assert build_model(GLA, device="meta").config.eos_token_id == 50256
    small = build_model(GLA, vocab_size=120, num_hidden_layers=1, device="meta").config
    assert (small.vocab_size, small.bos_token_id, small.eos_token_id) == (120, None, None)


# Adding a model


def test_a_yaml_file_is_a_model(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "id: mine\nfamily: gpt2\nconfig: {vocab_size: 11, n_layer: 1, n_embd: 8, n_head: 2}\n"
        "training: {lr: 1e-2}\n",
    )
    assert load_entry(str(path)) == load_entry(path)
    assert build_model(path).config.n_embd == 8
    assert count_parameters(path) == sum(p.numel() for p in build_model(path).parameters())
    assert resolve_settings(str(path)).lr == 1e-2


def test_a_new_family_is_one_function(tmp_path: Path) -> None:
    def build(fields: dict[str, Any], device: torch.device | None) -> GPT2LMHeadModel:
        model = GPT2LMHeadModel(make_config(GPT2Config, fields))
        for block in model.transformer.h:
            block.mlp = torch.nn.Identity()
        return model

    path = write(tmp_path, "id: mine\nfamily: no_mlp\nconfig: {n_layer: 1, n_embd: 8, n_head: 2}\n")
    with pytest.raises(ScanLMError, match=r"unknown family 'no_mlp'. Known: gated_deltanet, gla"):
        build_model(path)
    register_family("no_mlp", build)
    assert build_model(path, vocab_size=7)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 7)
    assert count_parameters(path) < 500_000
    assert config_differences(load_entry(path)) == {"n_layer": 1, "n_embd": 8, "n_head": 2}


def test_device_and_overrides_reach_the_family() -> None:
    seen: list[Any] = []

    def build(fields: dict[str, Any], device: torch.device | None) -> Any:
        seen.append((fields, device, torch.empty(0).device.type))
        return torch.nn.Linear(1, 1)

    register_family("spy", build)
    entry = ModelEntry(id="spied", family="spy", config={"a": 1, "b": 2})
    build_model(entry, vocab_size=5, device="meta", b=3)
    build_model(entry)
    assert seen[0] == ({"a": 1, "b": 3, "vocab_size": 5}, torch.device("meta"), "meta")
    assert seen[1] == ({"a": 1, "b": 2}, None, "cpu")
    assert entry.config == {"a": 1, "b": 2}


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: mine\nfamily: [gpt2\n", r"mine.yaml, line 3, is not YAML"),
        ("- gpt2\n", r"mine.yaml must hold one mapping"),
        ("id: mine\n", r"mine.yaml: family is missing: give its value"),
        ("id: my model\nfamily: gpt2\n", r"mine.yaml: id='my model': expected letters, digits"),
        ("id: mine\nfamily: gpt2\nconfg: {}\n", r"unknown field 'confg'. Did you mean 'config'"),
        (
            "id: mine\nfamily: gpt2\nconfig: 3\n",
            r"mine.yaml: config=3: expected names and their values",
        ),
        (
            "id: mine\nfamily: gpt2\ntraining: {learning_rate: 1}\n",
            r"mine.yaml: training: unknown setting 'learning_rate'",
        ),
        ("id: mine\nfamily: gpt2\ntraining: {lr: fast}\n", r"mine.yaml: training: lr='fast'"),
    ],
)
def test_malformed_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match=message) as caught:
        load_entry(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match=r"unknown model 'gla_tny'. Did you mean 'gla_tiny'"):
        build_model("gla_tny")
    with pytest.raises(ScanLMError, match="no file"):
        load_entry(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("gpt2_tiny", {"n_layers": 3}, r"unknown field 'n_layers'.*'n_layer'"),
        ("gla_tiny", {"expandk": 1.0}, r"unknown field 'expandk'.*'expand_k'"),
        ("gated_deltanet_tiny", {"headdim": 1}, r"unknown field 'headdim'.*'head_dim'"),
        ("scanlm_tiny", {"chunksize": 8}, r"unknown field 'chunksize'.*'chunk_size'"),
        ("gpt2_tiny", {"n_layer": "many"}, r"GPT2Config: .*'n_layer' expected int, got str"),
        ("gpt2_tiny", {"n_head": 7}, r"'gpt2_tiny' cannot be built: .*divisible by num_heads"),
        ("gpt2_tiny", {"n_embd": 2**62}, r"cannot be built of .*'n_embd': 461168.*: .*overflowed"),
        ("gpt2_tiny", {"n_layer": -2}, r"n_layer must be an integer >= 1, got -2"),
        ("gpt2_tiny", {"n_head": 0}, r"n_head must be an integer >= 1, got 0"),
        ("gpt2_tiny", {"n_embd": -64}, r"n_embd must be an integer >= 1, got -64"),
        ("gpt2_tiny", {"n_inner": 0}, r"n_inner must be an integer >= 1, got 0"),
        ("gpt2_tiny", {"vocab_size": 0}, r"vocab_size must be an integer >= 1, got 0"),
        ("gpt2_tiny", {"num_hidden_layers": 0}, r"num_hidden_layers must be an integer >= 1, got"),
        ("window_gpt2_tiny", {"n_positions": 0}, r"n_positions must be an integer >= 1, got 0"),
        ("gla_tiny", {"num_hidden_layers": 0}, r"num_hidden_layers must be an integer >= 1, got 0"),
        ("gla_tiny", {"hidden_size": 0}, r"hidden_size must be an integer >= 1, got 0"),
        ("gla_tiny", {"num_heads": 0}, r"num_heads must be an integer >= 1, got 0"),
        ("gla_tiny", {"num_kv_heads": 0}, r"num_kv_heads must be an integer >= 1, got 0"),
        ("gla_tiny", {"expand_k": 0.0}, r"expand_k must be a number > 0, got 0.0"),
        ("gated_deltanet_tiny", {"head_dim": 0}, r"head_dim must be an integer >= 1, got 0"),
        ("mamba2_tiny", {"chunk_size": 0}, r"chunk_size must be an integer >= 1, got 0"),
        ("mamba2_tiny", {"expand": 0}, r"expand must be an integer >= 1, got 0"),
        ("mamba2_tiny", {"num_heads": 5}, r"Mamba2Config: .*hidden_size \* expand"),
        ("scanlm_tiny", {"chunk_size": 0}, r"chunk_size must be an integer >= 1"),
        ("scanlm_tiny", {"activation_function": "nope"}, r"unknown activation_function 'nope'"),
        ("gpt2_tiny", {"activation_function": "nope"}, r"'gpt2_tiny' cannot .*unknown name 'nope'"),
        ("mamba2_tiny", {"hidden_act": "nope"}, r"'mamba2_tiny' cannot .*unknown name 'nope'"),
        ("mamba2_tiny", {"n_groups": 5}, r"num_heads=\d+ is not divisible by n_groups=5"),
        ("mamba2_tiny", {"n_groups": 0}, r"n_groups must be an integer >= 1, got 0"),
        ("mamba2_tiny", {"state_size": 0}, r"state_size must be an integer >= 1, got 0"),
        ("gla_tiny", {"use_short_conv": True, "conv_size": 0}, r"conv_size=0: .*a width >= 1"),
        ("gated_deltanet_tiny", {"conv_size": -1}, r"conv_size=-1: .*use_short_conv=false"),
    ],
)
def test_wrong_fields(model: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ScanLMError, match=message) as caught:
        build_model(model, device="meta", **overrides)
    assert "\n" not in str(caught.value)


def test_a_family_without_its_package(tmp_path: Path) -> None:
    def build(fields: dict[str, Any], device: torch.device | None) -> Any:
        import absent_package  # type: ignore[import-not-found]

        return absent_package

    register_family("absent", build)
    path = write(tmp_path, "id: mine\nfamily: absent\n")
    with pytest.raises(
        ScanLMError, match=r"'mine' needs the package 'absent_package'.*pip install"
    ):
        build_model(path)


def test_on_a_gpu_without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch then, and one line that says so."""
    from scanlm import fused

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla", None)
    for cached in (fused._import_fla, fused._warn_once):
        cached.cache_clear()
    with pytest.warns(UserWarning, match=r"gla runs in plain torch.*'scanlm\[gpu\]'") as caught:
        model = build_model("gla_tiny")
    assert type(model).__module__ == "scanlm.gla"
    assert len(caught) == 1
    build_model("gla_tiny", device="cpu")  # asked for: no warning


def test_fused_kernels_without_a_gpu() -> None:
    from scanlm.fused import fused_classes

    with pytest.raises(ScanLMError, match="fused kernels of gla need a GPU"):
        fused_classes("gla")


def run_beside_fla(code: str, folder: Path) -> Any:
    """What a process prints, as JSON, that could import a package ``fla``: an empty one."""
    (folder / "fla").mkdir()
    (folder / "fla" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_reading_the_registry_loads_no_torch(tmp_path: Path) -> None:
    code = """
        import json, sys
        from scanlm.baselines import list_entries
        list_entries()
        print(json.dumps([n for n in ("torch", "transformers", "fla") if n in sys.modules]))
    """
    assert run_beside_fla(code, tmp_path) == []


def test_fla_is_imported_for_a_gpu_only(tmp_path: Path) -> None:
    code = """
        import json, sys, warnings
        import scanlm
        for name in dir(scanlm):
            getattr(scanlm, name)
        from scanlm.baselines import build_model
        for model in ("gla_tiny", "gated_deltanet_tiny"):
            build_model(model)
        seen = {"without": "fla" in sys.modules}
        import torch
        torch.cuda.is_available = lambda: True
        warnings.simplefilter("ignore")  # the package is empty: plain torch after all
        build_model("gla_tiny")
        print(json.dumps(seen | {"with": "fla" in sys.modules}))
    """
    assert run_beside_fla(code, tmp_path) == {"without": False, "with": True}


def test_scan_models_differ_in_their_chunks_alone() -> None:
    configs = [build_model(f"scanlm_base_c{c}", device="meta").config for c in (32, 256)]
    assert all(isinstance(config, ScanLMConfig) for config in configs)
    one, other = (config.to_dict() for config in configs)
    assert {name for name in one if one[name] != other[name]} == {"chunk_size"}


@pytest.mark.parametrize("model", TINY)
def test_a_stream_in_pieces_is_the_whole(model: str) -> None:
    torch.manual_seed(0)
    net = build_model(model).eval()
    ids = torch.randint(256, (1, 90))
    state: dict[str, Any] = {}
    logits = []
    with torch.no_grad():
        for piece in ids.split([30, 45, 1, 14], dim=1):
            out = net(input_ids=piece, use_cache=True, **state)
            name = "cache_params" if "cache_params" in out else "past_key_values"
            state = {name: out[name]}
            logits.append(out.logits)
        whole = net(ids).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("most", "kept"), [("1", [6]), ("3", [2, 6, 10]), ("40", range(12))])
def test_the_search_for_kernel_configurations_can_be_limited(
    monkeypatch: pytest.MonkeyPatch, most: str, kept: list[int]
) -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "__init__", Autotuner.__init__)  # put back afterwards
    fused.limit_search.cache_clear()
    fused.limit_search(most)
    configs = [triton.Config({"SIZE": size}) for size in range(12)]
    kernel = triton.autotune(configs, key=[])(triton.jit(lambda x: None))
    assert [config.kwargs["SIZE"] for config in kernel.configs] == list(kept)
    fused.limit_search.cache_clear()


@pytest.mark.parametrize("most", ["0", "few", ""])
def test_a_wrong_limit_is_refused(most: str) -> None:
    with pytest.raises(ScanLMError, match=f"SCANLM_FLA_CONFIGS='{most}': expected a number >= 1"):
        fused.limit_search(most)
