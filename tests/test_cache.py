"""The streaming state: any split gives the logits of one forward; reset, fork, save and load."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from scanlm import ScanCache, ScanLMError

Make = Callable[..., Any]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
MAX_TOKENS = 70  # 17 chunks of 4: carries up to four digits
SHAPES: list[dict[str, Any]] = [
    {},
    {"position_embedding": "chunk", "leaf_norm": False},
    {"t1_causal": True, "t1_layers": 2, "chunk_size": 3},
    {"chunk_size": 1, "position_embedding": "chunk", "prefix_embedding": True},
]
property_test = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# what may happen between two pieces of a sequence
events = st.lists(st.sampled_from(["", "", "fork", "disk"]), min_size=6, max_size=6)
cuts = st.lists(st.integers(1, MAX_TOKENS - 1), max_size=5, unique=True).map(sorted)


def pieces(ids: Tensor, cuts: list[int]) -> list[Tensor]:
    inner = [c for c in cuts if c < ids.shape[1]]
    return [ids[:, a:b] for a, b in pairwise([0, *inner, ids.shape[1]])]


def survive(event: str, cache: ScanCache, model: Any, folder: Path) -> ScanCache:
    if event == "fork":
        other = cache.fork()
        cache.map(torch.zero_)  # nothing may be shared with the original
        return other
    if event == "disk":
        return ScanCache.load(cache.save(folder / "state.safetensors"), model)
    return cache


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@property_test
@given(tokens=st.integers(1, MAX_TOKENS), cuts=cuts, events=events)
def test_any_split_gives_the_logits_of_one_forward(
    make_model: Make,
    make_ids: Make,
    tmp_path: Path,
    shape: dict[str, Any],
    tokens: int,
    cuts: list[int],
    events: list[str],
) -> None:
    model, ids = make_model(**shape), make_ids(2, tokens)
    cache, logits = model.new_cache(), []
    with torch.no_grad():
        for piece, event in zip(pieces(ids, cuts), events, strict=False):
            out = model(piece, past_key_values=cache)
            logits.append(out.logits)
            cache = survive(event, out.past_key_values, model, tmp_path)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **EXACT)
    assert cache.length == tokens


def test_a_fork_and_its_original_go_different_ways(make_model: Make, make_ids: Make) -> None:
    model, prompt = make_model(), make_ids(1, 11)
    cache = model(prompt, use_cache=True).past_key_values
    fork = cache.fork()
    for seed, state in ((1, cache), (2, fork)):
        more = make_ids(1, 9, seed=seed)
        logits = model(more, past_key_values=state).logits
        whole = model(torch.cat([prompt, more], dim=1)).logits[:, -9:]
        torch.testing.assert_close(logits, whole, **EXACT)


def test_a_fork_needs_no_more_memory(make_model: Make, make_ids: Make) -> None:
    cache = make_model()(make_ids(1, 27), use_cache=True).past_key_values
    assert cache.fork().num_bytes == cache.num_bytes


def test_reset_forgets(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 13)
    cache = model(make_ids(2, 22, seed=1), use_cache=True).past_key_values
    cache.reset()
    assert (cache.length, cache.num_bytes, cache.batch_size) == (0, 0, None)
    out = model(ids, past_key_values=cache)
    torch.testing.assert_close(out.logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("tokens", [3, 4, 16, 27])
def test_saving_keeps_every_tensor(
    make_model: Make, make_ids: Make, tmp_path: Path, tokens: int
) -> None:
    model = make_model(torch.bfloat16)
    cache = model(make_ids(2, tokens), use_cache=True).past_key_values
    loaded = ScanCache.load(cache.save(tmp_path / "a.safetensors"), model, batch_size=2)
    assert len(loaded.tensors) == len(cache.tensors)
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors, cache.tensors, strict=True))
    assert (loaded.length, loaded.fill, loaded.num_bytes) == (tokens, cache.fill, cache.num_bytes)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_memory_grows_with_the_logarithm(make_model: Make, make_ids: Make) -> None:
    model = make_model(position_embedding="chunk", chunk_size=1)
    sizes = []
    for chunks in (2**6 - 1, 2**9 - 1):  # all binary digits set
        cache = model(make_ids(1, chunks), use_cache=True).past_key_values
        sizes.append(cache.num_bytes)
    state = 12 * 8  # one vector of 12 float64
    assert sizes == [(2 * 6 - 1) * state, (2 * 9 - 1) * state]


# Mistakes


def test_saved_state_of_other_weights_is_refused(
    make_model: Make, make_ids: Make, tmp_path: Path
) -> None:
    model = make_model()
    path = model(make_ids(1, 9), use_cache=True).past_key_values.save(tmp_path / "a")
    other = make_model()
    ScanCache.load(path, other)  # the same weights
    with torch.no_grad():
        other.t1.h[0].mlp.c_fc.weight += 0.1
    with pytest.raises(ScanLMError, match="another model or of other weights"):
        ScanCache.load(path, other)
    with pytest.raises(ScanLMError, match="another model or of other weights"):
        ScanCache.load(path, make_model(t1_causal=True))


def test_saved_state_of_another_dtype_or_batch_is_refused(
    make_model: Make, make_ids: Make, tmp_path: Path
) -> None:
    model = make_model()
    path = model(make_ids(3, 9), use_cache=True).past_key_values.save(tmp_path / "a")
    with pytest.raises(ScanLMError, match=r"of a model in torch\.float64.*in torch\.float32"):
        ScanCache.load(path, make_model(torch.float32))
    with pytest.raises(ScanLMError, match="holds 3 sequences, expected 2"):
        ScanCache.load(path, model, batch_size=2)


def test_files_that_are_no_cache_are_refused(
    make_model: Make, make_ids: Make, tmp_path: Path
) -> None:
    model = make_model()
    with pytest.raises(ScanLMError, match="no such file"):
        ScanCache.load(tmp_path / "missing", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ScanLMError, match="no safetensors file, or is damaged"):
        ScanCache.load(tmp_path / "text", model)
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ScanLMError, match="no saved ScanCache"):
        ScanCache.load(tmp_path / "other", model)
    with pytest.raises(ScanLMError, match="empty cache has nothing to save"):
        model.new_cache().save(tmp_path / "empty")
    cache = model(make_ids(1, 9), use_cache=True).past_key_values
    with pytest.raises(ScanLMError, match="cannot write the cache"):
        cache.save(tmp_path / "no folder" / "a")


@pytest.mark.parametrize("tokens", [3, 4, 9])
def test_a_cache_of_another_model_batch_or_dtype_is_refused(
    make_model: Make, make_ids: Make, tokens: int
) -> None:
    model = make_model()

    def cache() -> ScanCache:
        return model(make_ids(2, tokens), use_cache=True).past_key_values

    with pytest.raises(ScanLMError, match="cache of another model"):
        make_model()(make_ids(2, 1), past_key_values=cache())
    with pytest.raises(ScanLMError, match="holds 2 sequences, the input has 3"):
        model(make_ids(3, 1), past_key_values=cache())
    state = cache()
    state.map(lambda t: t.float())
    with pytest.raises(ScanLMError, match=r"is torch\.float32, the model computes in"):
        model(make_ids(2, 1), past_key_values=state)


def test_a_padded_batch_goes_on_with_its_rows_only(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    fork = cache.fork()
    with pytest.raises(ScanLMError, match="holds 2 sequences, the input has 3"):
        model(make_ids(3, 1), past_key_values=cache)
    more = make_ids(2, 5, seed=1)
    logits = model(more, past_key_values=fork).logits
    row = torch.cat([ids[:1, 3:], more[:1]], dim=1)
    torch.testing.assert_close(logits[:1], model(row).logits[:, -5:], **EXACT)


def test_autocast_goes_on_from_its_own_state(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(torch.float32), make_ids(1, 11)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(ids[:, :3], use_cache=True).past_key_values
        logits = [model(t, past_key_values=cache).logits for t in ids[:, 3:].split(1, dim=1)]
        whole = model(ids).logits[:, 3:]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0.05, atol=0.3)
