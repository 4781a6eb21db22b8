"""Fast streaming: the same work for every token, captured once and replayed.

A token is one pass through T2 with fixed buffers (``scanlm.decode_step``), followed by the choice
of the next token; on a GPU both are one CUDA graph, and the host never waits. At a chunk border
the counter folds the finished chunk in, and the new prefix goes through T2 into the window. The
host knows from the chunk's number alone how many combines that takes (the carries of a binary
counter, fewer than two on average), so it queues graphs of one combine and of one filling.

``ScanCache`` is the same state in another form: ``load`` and ``store`` convert it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from scanlm.cache import KeyValues, RaggedScanCache, ScanCache
from scanlm.decode_step import Buffers, Rows, TorchStep
from scanlm.errors import ScanLMError
from scanlm.generation import check_new_tokens, check_tokens
from scanlm.sampling import Sampling
from scanlm.scan import OnlineScan

EVERY_ROW = slice(None)
AGREEMENT = 0.1  # relative: bfloat16 rounds to 0.01, a wrong kernel is off by about 1


@dataclass
class _Group:
    """Rows of one length: they cross chunk borders together."""

    rows: Rows
    counter: OnlineScan[Tensor]
    length: int


class Decoder:
    """Streams of one batch size through one model.

    Building one allocates the buffers and, on a GPU, captures the graphs; ``load`` then starts
    streams as often as wanted.

    Args:
        model: a ``ScanLMForCausalLM`` in evaluation mode.
        batch_size: rows.
        sampling: how tokens are chosen.
        graphs: capture CUDA graphs; default on a GPU.
        fused: use the Triton kernels of ``scanlm.kernels.decode``; default where they can run and
            agree with torch, which is tried once.

    Attributes:
        groups: rows of equal length, with their counters and lengths.
        step_module: what computes a step (``TorchStep`` or the fused one).
        key: what another stream must share to use this decoder.

    Raises:
        ScanLMError: a model in training mode, whose dropout has no place in a captured step.
    """

    @torch.inference_mode(False)  # else streams outside of inference mode could not write to it
    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        batch_size: int,
        sampling: Sampling | None = None,
        graphs: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if model.training:
            raise ScanLMError("the model is in training mode: call model.eval() before streaming")
        self.model, self.batch_size = model, batch_size
        self.sampling = sampling or Sampling()
        self.buffers = Buffers.allocate(model, batch_size)
        self.groups: list[_Group] = []
        # capturing and trying out draw random numbers that are not the user's
        devices = [self.buffers.token.device] if self.buffers.token.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            self._choose_step(graphs, fused)
        self.key = (batch_size, self.sampling, _addresses(model))
        self.load(model.new_cache())

    def _choose_step(self, graphs: bool | None, fused: bool | None) -> None:
        wanted = _kernels_fit(self.model) if fused is None else fused
        self.step_module = self._make_step(wanted)
        if fused is not None or not wanted:
            self._prepare(graphs)
            return
        reason = "they do not agree with torch"
        try:
            self._prepare(graphs)
            if self._agrees():
                return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # triton's compiler has many of its own
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        warnings.warn(
            f"the Triton kernels cannot be used here ({reason}): decoding goes on without them, "
            "slower; another version of triton may help",
            stacklevel=3,
        )
        self.step_module = TorchStep(self.model, self.buffers)
        self._prepare(graphs)

    def _prepare(self, graphs: bool | None) -> None:
        """What a step, a filling and a combine are: plain calls, or graphs of them."""
        self._combine: Callable[[Tensor, Tensor], Tensor] = self.model.aggregate
        self._fill_all = lambda: self.step_module.fill(self.buffers.prefix, EVERY_ROW)
        self._step = self._step_and_choose
        if self.buffers.token.is_cuda if graphs is None else graphs:
            self._capture_all()

    def _agrees(self) -> bool:
        """Whether a new prefix and two tokens give the logits of plain torch.

        Kernels are only as good as the compiler that made them; a wrong one would go unnoticed.
        """
        plain = TorchStep(self.model, Buffers.allocate(self.model, self.batch_size))
        prefix = torch.randn_like(self.buffers.prefix)
        for s in (self.buffers, plain.buffers):
            s.prefix.copy_(prefix)
            s.position.fill_(prefix.shape[1])
        self._fill_all()
        plain.fill(prefix, EVERY_ROW)
        for token in (0, 1):
            self.buffers.token.fill_(token)
            plain.buffers.token.fill_(token)
            self._step()
            plain.step()
            plain.buffers.position.add_(1)
        difference = (self.buffers.logits - plain.buffers.logits).norm()
        return bool(difference <= AGREEMENT * plain.buffers.logits.norm())

    def _make_step(self, fused: bool) -> TorchStep:
        if not fused:
            return TorchStep(self.model, self.buffers)
        from scanlm.kernels.decode import FusedStep

        return FusedStep(self.model, self.buffers)

    # State in and out

    @torch.no_grad()
    def load(self, cache: ScanCache | RaggedScanCache, logits: Tensor | None = None) -> None:
        """Continue from a cache, which stays as it is.

        Args:
            cache: state of ``batch_size`` sequences; left padding makes groups of rows.
            logits: ``(b, v)`` after its last token, from which ``sample`` takes the first token.

        Raises:
            ScanLMError: the cache of another model, batch size, dtype or device.
        """
        s = self.buffers
        parts: list[tuple[Rows, ScanCache]] = [(EVERY_ROW, cache)]  # type: ignore[list-item]
        if isinstance(cache, RaggedScanCache):
            cache.check_batch(self.batch_size)
            parts = list(cache.parts)
        self.groups = []
        for rows, part in parts:
            part.check(self.model.aggregate, s.chunk[rows])
            counter = part.counter.copy()
            counter.combine = self._combine if len(parts) == 1 else self.model.aggregate
            self.groups.append(_Group(rows, counter, part.length))
            s.position[rows] = part.length
            if part.chunk is None:
                continue
            c, fill = s.chunk.shape[1], part.fill
            start = 0 if counter.num_chunks else c
            s.chunk[rows, :fill] = part.chunk
            for i, kv in enumerate(part.window):
                assert kv.key is not None
                assert kv.value is not None
                s.keys[i][rows, :, start : c + fill] = kv.key
                s.values[i][rows, :, start : c + fill] = kv.value
        if logits is not None:
            s.logits.copy_(logits)
        self.step_module.refresh()

    @torch.no_grad()
    def store(self, cache: ScanCache | RaggedScanCache) -> None:
        """Write the state into the cache that was loaded, or into an empty one of the model."""
        parts = cache.parts if isinstance(cache, RaggedScanCache) else [(None, cache)]
        if isinstance(cache, RaggedScanCache):
            cache.columns += self.groups[0].length - parts[0][1].length
        s, c = self.buffers, self.buffers.chunk.shape[1]
        for (_, part), group in zip(parts, self.groups, strict=True):
            part.reset()
            part.length, part.counter = group.length, group.counter.copy()
            part.counter.combine = self.model.aggregate
            if not (fill := group.length % c):
                continue
            held = slice(0 if group.counter.num_chunks else c, c + fill)
            part.chunk = s.chunk[group.rows, :fill].clone()
            part.window = [
                KeyValues(keys[group.rows, :, held].clone(), values[group.rows, :, held].clone())
                for keys, values in zip(s.keys, s.values, strict=True)
            ]

    @property
    def num_bytes(self) -> int:
        """Memory of the streaming state: T2's window, the chunk and the counters' states."""
        s = self.buffers
        held = [s.keys, s.values, s.chunk]
        for group in self.groups:
            held += [*group.counter.states, *group.counter.folds]
        return sum(t.nbytes for t in {t.data_ptr(): t for t in held}.values())

    # Tokens

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Choose the first token ``(b,)`` from the logits that were loaded."""
        self.buffers.token.copy_(self.sampling.choose(self.buffers.logits))
        return self.buffers.token

    @torch.no_grad()
    def step(self) -> Tensor:
        """Feed the token last chosen and choose the next.

        Returns:
            The buffer ``(b,)`` that holds it, which the next step overwrites.

        Raises:
            ScanLMError: the sequence would exceed ``n_positions``.
        """
        c = self.model.config.chunk_size
        for group in self.groups:
            self.model._check_length(group.length + 1)
            prefix = group.counter.prefix
            if group.length % c == 0 and prefix is not None:
                self._fill(group.rows, self.model.mark(prefix))
        self._step()
        for group in self.groups:
            group.length += 1
            if group.length % c == 0:
                group.counter.push(self.buffers.chunk[group.rows].clone())
        return self.buffers.token

    def feed(self, tokens: Tensor) -> Tensor:
        """Feed given tokens ``(b,)``; returns the logits ``(b, v)`` after them."""
        self.buffers.token.copy_(tokens)
        self.step()
        return self.buffers.logits.clone()

    def _fill(self, rows: Rows, prefix: Tensor) -> None:
        if isinstance(rows, slice):
            self.buffers.prefix.copy_(prefix)
            self._fill_all()
        else:
            self.step_module.fill(prefix, rows)

    def _step_and_choose(self) -> None:
        self.step_module.step()
        self.step_module.advance(self.sampling)

    # Graphs

    def _capture_all(self) -> None:
        """Capture a step, a filling and a combine; each serves every position."""
        pool, device = torch.cuda.graph_pool_handle(), self.buffers.token.device
        left, right, out = (torch.zeros_like(self.buffers.chunk) for _ in range(3))
        join = captured(lambda: out.copy_(self.model.aggregate(left, right)), pool, device)
        self._fill_all = captured(self._fill_all, pool, device)
        self._step = captured(self._step_and_choose, pool, device)

        def combine(a: Tensor, b: Tensor) -> Tensor:
            left.copy_(a)
            right.copy_(b)
            join()
            return out.clone()

        self._combine = combine


def captured(function: Callable[[], Any], pool: Any, device: torch.device) -> Callable[[], None]:
    """A function without arguments as a CUDA graph; running it first tunes its kernels.

    Args:
        function: what is captured.
        pool: the memory that graphs share, of ``torch.cuda.graph_pool_handle``.
        device: where it runs, which need not be the current device.
    """
    side = _capture_stream(device)
    with torch.cuda.device(device):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            function()
    return graph.replay  # on the device that it was captured on


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device, so that they share memory. Torch's own is of one device."""
    return torch.cuda.Stream(device)


def _kernels_fit(model: Any) -> bool:
    """Whether the Triton kernels can run this model."""
    try:
        from scanlm.kernels.decode import fits
    except ImportError:
        return False
    return fits(model)


def stream(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: ScanCache | RaggedScanCache | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[Tensor]:
    """See ``ScanLMForCausalLM.stream``; everything is checked before anything is computed."""
    check_new_tokens(max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p)
    model._check_input(input_ids, past_key_values)
    check_tokens(input_ids, model.config.vocab_size)  # the former looks at them on the CPU only
    if model.training:
        raise ScanLMError("the model is in training mode: call model.eval() before streaming")
    model._check_mask(input_ids, attention_mask, past_key_values, cached=True)
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    length = seen + input_ids.shape[1]
    model._check_length(length + (max_new_tokens or 1))
    if max_new_tokens is None and model.config.position_embedding == "absolute":
        max_new_tokens = model.config.n_positions - length
    return _stream(model, input_ids, attention_mask, past_key_values, max_new_tokens, sampling)


@torch.no_grad()
def _stream(
    model: Any,
    input_ids: Tensor,
    mask: Tensor | None,
    cache: ScanCache | RaggedScanCache | None,
    wanted: int | None,
    sampling: Sampling,
) -> Iterator[Tensor]:
    out = model(
        input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    decoder = _borrow(model, input_ids.shape[0], sampling)
    try:
        decoder.load(out.past_key_values, out.logits[:, -1])
        yield decoder.sample().clone()
        for _ in count() if wanted is None else range(wanted - 1):
            yield decoder.step().clone()
    finally:
        if cache is not None:
            decoder.store(cache)
        _idle(model).decoder = decoder


class _Idle:
    """The decoder that a model used last, kept with its graphs for the next stream."""

    decoder: Decoder | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Idle:
        return _Idle()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Idle, ()


def _idle(model: Any) -> _Idle:
    return model.__dict__.setdefault("_idle_decoder", _Idle())


def _borrow(model: Any, batch_size: int, sampling: Sampling) -> Decoder:
    """The idle decoder if it fits, else a new one; streams at the same time get one each."""
    idle = _idle(model)
    decoder, idle.decoder = idle.decoder, None
    wanted = (batch_size, sampling, _addresses(model))
    if decoder is not None and decoder.key == wanted:
        return decoder
    return Decoder(model, batch_size, sampling)


def _addresses(model: Any) -> tuple[int, ...]:
    """Where the weights lie: graphs are captured for them."""
    return tuple(p.data_ptr() for p in model.parameters())
