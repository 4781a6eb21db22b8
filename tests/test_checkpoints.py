"""Loading every kind of checkpoint, and refusing what is not whole or not the model's."""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from scanlm import ScanLMConfig, ScanLMError, ScanLMForCausalLM
from scanlm.checkpoints import checkpoints, load_checkpoint
from scanlm.data import load_tokenizer, tokenizer_hash
from scanlm.dcp import converted_folder

VOCAB = 257


def gpt2(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config |= {"bos_token_id": 256, "eos_token_id": 256}
    return GPT2LMHeadModel(GPT2Config(**(config | overrides))).eval()


def scan(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB, "n_embd": 8, "n_head": 2, "t1_layers": 1, "t2_layers": 1}
    config |= {"chunk_size": 4, "n_positions": 16}
    return ScanLMForCausalLM(ScanLMConfig(**(config | overrides))).eval()


def mamba2(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "num_heads": 2}
    special = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    shape |= special
    return Mamba2ForCausalLM(
        Mamba2Config(vocab_size=VOCAB, n_groups=1, expand=2, head_dim=8, **shape)
    ).eval()


def logits(model):
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_same(loaded, model):
    """Weights to the bit; logits nearly, since a loaded Mamba-2 computes them in another order."""
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


def make_run(folder, steps=(5, 10), best=None):
    """A run folder with one model per step, seeded by the step."""
    folder.mkdir()
    record = {"run_id": "m-s3-00000000", "model": "gpt2_tiny", "seed": 3}
    record |= {"experiment": "text", "status": "finished"}
    parameters = {"tokenizer": "bytes", "seq_len": 8}
    (folder / "run.json").write_text(json.dumps({**record, "parameters": parameters}))
    for step in steps:
        gpt2(seed=step).save_pretrained(folder / f"checkpoint-{step}")
        state = {"global_step": step, "best_global_step": best}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def save_dcp(model, folder, prefix="model."):
    """As flame's trainer does: the model's tensors under one name, the optimiser beside."""
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state["optimizer.state.step"] = torch.tensor(3.0)
    state["train_state"] = {"step": 3}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def error_of(*args, **kwargs):
    with pytest.raises(ScanLMError) as caught:
        load_checkpoint(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What can be loaded


@pytest.mark.parametrize("make", [gpt2, scan, mamba2])
def test_a_hugging_face_folder(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m")
    assert_same(loaded.model, model)
    assert not loaded.model.training
    assert (loaded.name, loaded.step, loaded.run, loaded.tokenizer) == ("m", None, None, None)


def test_weights_of_another_dtype(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    assert load_checkpoint(tmp_path / "m", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_shards(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "m", max_shard_size="5KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_checkpoint(tmp_path / "m").model), logits(model))


def test_the_tokenizer_in_the_folder(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m").tokenizer
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_a_run_gives_its_latest_checkpoint(tmp_path):
    loaded = load_checkpoint(make_run(tmp_path / "run", steps=(5, 100, 10)))
    assert loaded.step == 100
    assert torch.equal(logits(loaded.model), logits(gpt2(seed=100)))
    assert (loaded.name, loaded.run["seed"]) == ("gpt2_tiny", 3)
    assert tokenizer_hash(loaded.tokenizer) == tokenizer_hash(load_tokenizer("bytes"))


def test_a_run_gives_the_step_asked_for(tmp_path):
    run = make_run(tmp_path / "run", best=5)
    for step, expected in ((5, 5), (10, 10), ("latest", 10), ("best", 5)):
        loaded = load_checkpoint(run, step)
        assert loaded.step == expected
        assert torch.equal(logits(loaded.model), logits(gpt2(seed=expected)))


def test_the_best_of_the_steps_that_were_saved(tmp_path):
    run = make_run(tmp_path / "run", best=7)  # the best of all, and not saved
    rows = [(5, 2.5, {}), (7, 2.0, {}), (10, 2.2, {}), (5, 0.1, {"position": 3})]
    lines = [
        {"name": "loss", "value": value, "split": "validation", "step": step, **axes}
        for step, value, axes in rows
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_checkpoint(run, "best").step == 10


def test_a_checkpoint_of_a_run_knows_its_run(tmp_path):
    run = make_run(tmp_path / "run")
    loaded = load_checkpoint(run / "checkpoint-5")
    assert (loaded.name, loaded.step, loaded.run_folder) == ("gpt2_tiny", 5, run)


def test_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path):
    run = make_run(tmp_path / "run", steps=(5, 100, 20))
    (run / "checkpoint-7").mkdir()  # begun, not written
    assert list(checkpoints(run)) == [5, 20, 100]


# Distributed checkpoints


@pytest.mark.parametrize("make", [gpt2, scan, mamba2])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_distributed_checkpoint(make, prefix, tmp_path):
    model = make()
    model.config.save_pretrained(tmp_path / "config")
    folder = save_dcp(model, tmp_path / "exp" / "checkpoint" / "step-30", prefix)
    for target in (folder, tmp_path / "exp"):
        loaded = load_checkpoint(target, config=tmp_path / "config" / "config.json")
        assert_same(loaded.model, model)
        assert loaded.step == 30
        assert loaded.path == converted_folder(folder)


def test_it_is_converted_once(tmp_path, monkeypatch):
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    folder = save_dcp(model, tmp_path / "step-30")
    first = load_checkpoint(folder, config=tmp_path / "config.json")
    written = (first.path / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("scanlm.dcp.load", None)  # so that a second conversion would fail
    for config in (tmp_path / "config.json", None):
        again = load_checkpoint(folder, config=config)
        assert torch.equal(logits(again.model), logits(model))
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "step-30", "step-30-hf"}


def test_it_is_converted_again_when_it_changed(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    folder = save_dcp(gpt2(), tmp_path / "step-30")
    load_checkpoint(folder, config=tmp_path / "config.json")
    shutil.rmtree(folder)
    wider = gpt2(seed=1, n_inner=24)
    wider.config.save_pretrained(tmp_path)
    save_dcp(wider, folder)
    loaded = load_checkpoint(folder, config=tmp_path / "config.json")
    assert torch.equal(logits(loaded.model), logits(wider))


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    gpt2().config.save_pretrained(tmp_path)
    folder = save_dcp(gpt2(), tmp_path / "step-30")

    def full(self, target, **kwargs):
        (target / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        load_checkpoint(folder, config=tmp_path / "config.json")
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "step-30"}


def test_a_distributed_checkpoint_without_its_config(tmp_path):
    message = error_of(save_dcp(gpt2(), tmp_path / "step-30"))
    assert "does not hold its model's configuration: give its config.json with config=" in message


def test_a_distributed_checkpoint_with_the_config_of_another_model(tmp_path):
    folder = save_dcp(gpt2(), tmp_path / "step-30")
    scan().config.save_pretrained(tmp_path)
    message = error_of(folder, config=tmp_path / "config.json")
    assert "are not those of its scanlm configuration" in message
    assert "lm_head.weight" not in message.split("unexpected")[0].split("missing")[0]
    gpt2(vocab_size=300).config.save_pretrained(tmp_path)
    message = error_of(folder, config=tmp_path / "config.json")
    assert "lm_head.weight is (257, 8), not (300, 8)" in message
    assert not converted_folder(folder).exists()


def test_a_truncated_distributed_checkpoint(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    folder = save_dcp(gpt2(), tmp_path / "step-30")
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:2000])
    message = error_of(folder, config=tmp_path / "config.json")
    assert message.startswith(f"cannot read the distributed checkpoint {folder}")
    (folder / ".metadata").unlink()
    assert "without its .metadata file" in error_of(folder, config=tmp_path / "config.json")


def test_a_config_that_is_not_there(tmp_path):
    folder = save_dcp(gpt2(), tmp_path / "step-30")
    message = error_of(folder, config=tmp_path / "config.json")
    assert message.endswith("give the config.json of the model that was trained, or its folder")
    (tmp_path / "config.json").write_text("[")
    assert "config.json is not JSON" in error_of(folder, config=tmp_path / "config.json")


def test_a_config_for_a_folder_that_has_one(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    assert "has its own config.json" in error_of(tmp_path / "m", config="gpt2_tiny")


# What is refused


def test_steps_that_are_not_there(tmp_path):
    run = make_run(tmp_path / "run")
    assert f"no checkpoint of step 7 in {run}: it has 5, 10" in error_of(run, 7)
    assert "does not know its best checkpoint" in error_of(run, "best")
    assert "is a single checkpoint" in error_of(run / "checkpoint-5", 10)
    assert load_checkpoint(run / "checkpoint-5", 5).step == 5


def test_a_run_without_checkpoints(tmp_path):
    assert "has no checkpoint yet" in error_of(make_run(tmp_path / "run", steps=()))


def test_a_record_that_is_not_a_training_run(tmp_path):
    run = make_run(tmp_path / "run", steps=())
    record = json.loads((run / "run.json").read_text())
    record["parameters"]["kind"] = "evaluation"
    (run / "run.json").write_text(json.dumps(record))
    assert "is the record of a run of kind 'evaluation', which has no model" in error_of(run)


def test_folders_that_hold_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no model: expected a run folder" in error_of(tmp_path / "empty")
    assert "no folder" in error_of(tmp_path / "emptx" / "deeper")
    assert "Did you mean 'empty'?" in error_of(tmp_path / "emptx")


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error_of("nobody/such-a-model")
    assert message.startswith("'nobody/such-a-model' is neither a folder nor a model")


def test_a_truncated_safetensors_file(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = error_of(tmp_path / "m")
    assert message.startswith(f"{weights} is truncated or damaged")
    weights.write_bytes(b"")
    assert "truncated or damaged (0 bytes" in error_of(tmp_path / "m")
    weights.unlink()
    assert "model.safetensors is missing" in error_of(tmp_path / "m")


def test_a_missing_shard(tmp_path):
    gpt2().save_pretrained(tmp_path / "m", max_shard_size="5KB")
    next((tmp_path / "m").glob("*00001*.safetensors")).unlink()
    assert "model-00001-of" in error_of(tmp_path / "m")


def test_a_damaged_config(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt2",')
    assert "config.json is not JSON" in error_of(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    assert "names no model_type" in error_of(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt2x"}')
    assert "gpt2x" in error_of(tmp_path / "m")


def test_what_only_fused_kernels_have(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gla", "feature_map": "relu"}')
    message = error_of(tmp_path / "m")
    assert "feature_map='relu' of a gla model needs fused kernels" in message
    assert "pip install 'scanlm[gpu]'" in message


def test_weights_of_another_model(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    scan().config.save_pretrained(tmp_path / "m")
    message = error_of(tmp_path / "m")
    assert "are not those of its scanlm configuration" in message
    assert "missing" in message
    assert "unexpected" in message


def test_weights_of_another_vocabulary(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    gpt2(vocab_size=300).config.save_pretrained(tmp_path / "m")
    message = error_of(tmp_path / "m")
    assert "1 of another shape (transformer.wte.weight is (257, 8), not (300, 8))" in message


def test_a_missing_tensor(tmp_path):
    scan().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["t1.ln_f.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "1 missing (t1.ln_f.bias)" in error_of(tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(value, tmp_path):
    model = scan()
    with torch.no_grad():
        model.t1.h[0].ln_1.bias[3:5] = value
    model.save_pretrained(tmp_path / "m")
    message = error_of(tmp_path / "m")
    assert "hold NaN or infinities: 2 of 8 values of t1.h.0.ln_1.bias" in message


def test_loading_is_quiet(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path / "m")
    capsys.readouterr()
    load_checkpoint(tmp_path / "m")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
