"""The streaming state: any split gives the logits of one forward; reset, fork, save and load."""

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from scanlm import ScanCache, ScanLMError
from scanlm.cache import RaggedScanCache
from scanlm.decoder import Decoder

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


@pytest.mark.parametrize("position_embedding", ["absolute", "chunk"])
@pytest.mark.parametrize(("chunks", "beside"), list(product(range(1, 9), (-1, 0, 1))))
def test_token_by_token_around_every_chunk_boundary(
    make_model: Make, make_ids: Make, position_embedding: str, chunks: int, beside: int
) -> None:
    model = make_model(position_embedding=position_embedding)
    tokens = chunks * model.config.chunk_size + beside
    ids, cache = make_ids(3, tokens), model.new_cache()
    with torch.no_grad():
        logits = [model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **EXACT)
    assert (cache.length, cache.batch_size) == (tokens, 3)


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
    for wrong in ("x", None, torch.nn.Linear(1, 1)):
        for kind in (ScanCache, RaggedScanCache):
            with pytest.raises(ScanLMError, match="expected the ScanLMForCausalLM that made it"):
                kind.load(tmp_path / "missing", wrong)
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


# Rows of different lengths


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts ``(1, n)`` as a batch and its mask."""
    width = max(p.shape[1] for p in prompts)
    padded = [torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts]
    masks = [torch.arange(width) >= width - p.shape[1] for p in prompts]
    return torch.cat(padded), torch.stack(masks).long()


def ragged(model: Any, make_ids: Make, *lengths: int) -> tuple[list[Tensor], Any]:
    """Prompts of these lengths and the state after them."""
    prompts = [make_ids(1, n, seed=i) for i, n in enumerate(lengths)]
    ids, mask = left_padded(prompts)
    return prompts, model(ids, attention_mask=mask, use_cache=True).past_key_values


def uninterrupted(model: Any, prompts: list[Tensor], more: Tensor) -> Tensor:
    """Logits of ``more (b, s)``, each row behind its prompt alone."""
    rows = [torch.cat([p, m[None]], dim=1) for p, m in zip(prompts, more, strict=True)]
    return torch.cat([model(row).logits[:, -more.shape[1] :] for row in rows])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(property_test, max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    more=st.integers(1, 40),
    cuts=cuts,
    events=st.lists(st.sampled_from(["", "fork", "disk", "decoder"]), min_size=6, max_size=6),
)
def test_a_padded_batch_goes_on_from_any_copy_of_its_state(
    make_model: Make,
    make_ids: Make,
    tmp_path: Path,
    shape: dict[str, Any],
    lengths: list[int],
    more: int,
    cuts: list[int],
    events: list[str],
) -> None:
    model, ids, logits = make_model(**shape), make_ids(4, more, seed=9), []
    with torch.no_grad():
        prompts, cache = ragged(model, make_ids, *lengths)
        assert isinstance(cache, RaggedScanCache) or len(set(lengths)) == 1
        for piece, event in zip(pieces(ids, cuts), events, strict=False):
            if event == "fork":
                original, cache = cache, cache.fork()
                original.map(torch.zero_)  # nothing may be shared with the original
            elif event == "disk":
                path = cache.save(tmp_path / "state.safetensors")
                cache = type(cache).load(path, model, batch_size=4)
            if event == "decoder":
                decoder = Decoder(model, 4, fused=False)
                decoder.load(cache)
                logits.append(torch.stack([decoder.feed(t) for t in piece.unbind(1)], dim=1))
                decoder.store(cache)
            else:
                logits.append(model(piece, past_key_values=cache).logits)
        expected = uninterrupted(model, prompts, ids)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **EXACT)
    assert cache.get_seq_length() == max(lengths) + more


def test_a_streamed_padded_batch_goes_on_from_its_saved_state(
    make_model: Make, make_ids: Make, tmp_path: Path
) -> None:
    model = make_model()
    prompts, cache = ragged(model, make_ids, 5, 11, 5)
    first = make_ids(3, 1, seed=7)
    tokens = torch.stack(list(model.stream(first, past_key_values=cache, max_new_tokens=14)), 1)
    loaded = RaggedScanCache.load(cache.save(tmp_path / "a"), model)
    logits = model(tokens[:, -1:], past_key_values=loaded).logits
    expected = uninterrupted(model, prompts, torch.cat([first, tokens], dim=1))[:, -1:]
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saving_keeps_every_tensor_of_a_padded_batch(
    make_model: Make, make_ids: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    _, cache = ragged(model, make_ids, 8, 3, 17, 3)
    loaded = RaggedScanCache.load(cache.save(tmp_path / "a"), model, batch_size=4)
    assert (loaded.columns, loaded.num_bytes, loaded.batch_size) == (17, cache.num_bytes, 4)
    assert [part.length for _, part in loaded.parts] == [3, 8, 17]
    for (rows, part), (saved_rows, saved) in zip(loaded.parts, cache.parts, strict=True):
        assert torch.equal(rows, saved_rows)
        assert all(torch.equal(a, b) for a, b in zip(part.tensors, saved.tensors, strict=True))


@pytest.mark.parametrize("batch", [2, 5])
def test_a_reset_padded_batch_takes_any_other(
    make_model: Make, make_ids: Make, tmp_path: Path, batch: int
) -> None:
    model = make_model()
    _, cache = ragged(model, make_ids, 8, 3)
    cache.reset()
    assert (cache.get_seq_length(), cache.num_bytes, cache.batch_size) == (0, 0, None)
    with pytest.raises(ScanLMError, match="empty cache has nothing to save"):
        cache.save(tmp_path / "a")
    ids, order = make_ids(batch, 14), torch.arange(batch).flip(0)
    logits = [model(t, past_key_values=cache).logits for t in ids[:, :11].split(6, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids[:, :11]).logits, **EXACT)
    cache = RaggedScanCache.load(cache.fork().save(tmp_path / "a"), model)
    cache.reorder_cache(order)
    logits = model(ids[:, 11:], past_key_values=cache).logits
    expected = model(torch.cat([ids[order, :11], ids[:, 11:]], dim=1)).logits[:, 11:]
    torch.testing.assert_close(logits, expected, **EXACT)
    with pytest.raises(ScanLMError, match=f"holds {batch} sequences, the input has 3"):
        model(make_ids(3, 1), past_key_values=cache)


def test_a_reset_padded_batch_can_be_streamed_and_reordered(
    make_model: Make, make_ids: Make
) -> None:
    model, ids = make_model(), make_ids(2, 9)
    _, cache = ragged(model, make_ids, 8, 3)
    cache.reset()
    tokens = torch.stack(list(model.stream(ids, past_key_values=cache, max_new_tokens=9)), dim=1)
    assert torch.equal(tokens, torch.stack(list(model.stream(ids, max_new_tokens=9)), dim=1))
    cache.reorder_cache(torch.tensor([1, 1]))
    logits = model(tokens[[1, 1], -1:], past_key_values=cache).logits
    whole = torch.cat([ids, tokens], dim=1)[[1, 1]]
    torch.testing.assert_close(logits, model(whole).logits[:, -1:], **EXACT)


def test_the_state_of_a_padded_batch_can_be_converted(make_model: Make, make_ids: Make) -> None:
    model, more = make_model(torch.float32), make_ids(2, 5, seed=9)
    prompts, cache = ragged(model, make_ids, 8, 3)
    model.double()
    with pytest.raises(ScanLMError, match=r"convert the cache with cache\.map"):
        model(more, past_key_values=cache.fork())
    cache.map(lambda t: t.double())
    logits = model(more, past_key_values=cache).logits
    torch.testing.assert_close(logits, uninterrupted(model, prompts, more), rtol=1e-4, atol=1e-4)


def test_saved_padded_batches_that_do_not_fit_are_refused(
    make_model: Make, make_ids: Make, tmp_path: Path
) -> None:
    model, other = make_model(), make_model()
    path = ragged(model, make_ids, 8, 3)[1].save(tmp_path / "ragged")
    even = model(make_ids(2, 9), use_cache=True).past_key_values.save(tmp_path / "even")
    with torch.no_grad():
        other.t1.h[0].mlp.c_fc.weight += 0.1
    for wrong, message in (
        (other, "another model or of other weights"),
        (make_model(torch.float32), r"of a model in torch\.float64.*in torch\.float32"),
    ):
        with pytest.raises(ScanLMError, match=message):
            RaggedScanCache.load(path, wrong)
    with pytest.raises(ScanLMError, match="holds 2 sequences, expected 3"):
        RaggedScanCache.load(path, model, batch_size=3)
    with pytest.raises(
        ScanLMError, match=r"no saved RaggedScanCache.*load it with ScanCache\.load"
    ):
        RaggedScanCache.load(even, model)
    with pytest.raises(ScanLMError, match=r"no saved ScanCache .*with RaggedScanCache\.load"):
        ScanCache.load(path, model)
    with pytest.raises(ScanLMError, match="no such file"):
        RaggedScanCache.load(tmp_path / "missing", model)
    with pytest.raises(ScanLMError, match="cannot write the cache"):
        RaggedScanCache.load(path, model).save(tmp_path / "no folder" / "a")
