"""What is measured: a model and a way to decode with it, all with one interface.

scanlm           the decoder of ``model.stream``
scanlm_plain     ``forward`` with a ``ScanCache``, token by token, as ``generate`` does
scanlm_original  the original code's loop: T2 over the whole prefix for every token, which never
                 sees the current chunk (so it is not the model's function), in float32
gpt2_graph       GPT-2 with a static KV buffer, compiled, one CUDA graph a step
gpt2_tuned       the same, its kernels searched for longer
gpt2_static      transformers' StaticCache, compiled in reduce-overhead mode
gpt2_dynamic     transformers' DynamicCache, the flash attention kernel
gpt2_math        the same in float32 with the math kernel alone: the original's handicap
gla, gated_deltanet, mamba2   recurrent decoding, one CUDA graph a step where it can be captured
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scanlm.baselines import build_model
from scanlm.benchmark.static_gpt2 import StaticGPT2
from scanlm.decoder import Decoder, captured
from scanlm.gpt2 import GROWING
from scanlm.scan import lowest_bit

PIECE = 1024  # tokens of a prompt that Mamba-2 reads at once


@dataclass(frozen=True)
class Size:
    """Shapes of the models compared at one size."""

    scan: dict[str, Any]
    gpt2: dict[str, Any]
    recurrent: dict[str, tuple[str, dict[str, Any]]]  # registry id and what differs from it


def _size(vocab: int, d: int, heads: int, t1: int, t2: int, layers: int) -> Size:
    shared = {"vocab_size": vocab, "n_embd": d, "n_head": heads}
    linear = {"vocab_size": vocab, "hidden_size": d, "num_hidden_layers": layers}
    return Size(
        scan={**shared, "t1_layers": t1, "t2_layers": t2, "position_embedding": "chunk"},
        gpt2={**shared, "n_layer": layers},
        recurrent={
            "gla": ("gla_170M", {**linear, "num_heads": 4}),
            "gated_deltanet": (
                "gated_deltanet_170M",
                {**linear, "num_heads": 6 if d == 768 else 2, "head_dim": min(d // 2, 128)},
            ),
            "mamba2": (
                "mamba2_130M",
                {
                    **linear,
                    "num_hidden_layers": 2 * layers,
                    "num_heads": 2 * d // min(d, 64),
                    "head_dim": min(d, 64),
                },
            ),
        },
    )


SIZES = {
    "tiny": _size(257, 64, 2, t1=1, t2=2, layers=3),
    "original": _size(50257, 256, 8, t1=2, t2=2, layers=4),
    "base": _size(50257, 768, 12, t1=1, t2=12, layers=12),
}


@dataclass(frozen=True)
class Setting:
    """What decides a subject beside its name.

    Attributes:
        positions: the longest sequence that will be reached.
    """

    size: str
    chunk_size: int
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    positions: int
    seed: int


class Subject:
    """A model that decodes greedily from random prompts.

    Attributes:
        period: steps after which the work repeats (the chunk size of a scan model).
        room: how many tokens will follow a prompt.
        step: queues one token; there after ``prefill``.
        note: what a reader must know about how it ran.
    """

    period = 1
    note = ""
    model: Any
    step: Callable[[], object]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.room = 0

    @property
    def weight_bytes(self) -> int:
        """Weights read for every token: the blocks and the head, of the embeddings only rows."""
        names = ("wte", "wpe", "embeddings", "t1")
        tied = self.model.lm_head.weight.data_ptr()
        return sum(
            p.nbytes
            for name, p in self.model.named_parameters()
            if p.data_ptr() == tied or not set(name.split(".")) & set(names)
        )

    def read_bytes(self) -> int:
        """State read for a token."""
        return self.state_bytes()

    def prefill(self, prompt: Tensor) -> None:
        """Read prompts ``(b, t)`` and get ready for ``step``."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Memory of the streaming state."""
        raise NotImplementedError

    def _build(self, entry: str, **fields: Any) -> Any:
        torch.manual_seed(self.setting.seed)
        model: Any = build_model(entry, device=self.setting.device, **fields)
        return model.to(self.dtype).eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.setting.dtype


class Scan(Subject):
    """The fast decoder."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.period = setting.chunk_size
        fields = {**SIZES[setting.size].scan, "chunk_size": setting.chunk_size}
        self.model = self._build("scanlm_base_c64", **fields)
        self.make()

    def make(self) -> None:
        """Allocate and capture."""
        self.decoder = Decoder(self.model, self.setting.batch_size)
        self.note = f"steps by {type(self.decoder.step_module).__name__}"

    def prefill(self, prompt: Tensor) -> None:
        """Blelloch over the prompt; the counter's states are read from the tree."""
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        self.decoder.load(out.past_key_values, out.logits[:, -1])
        self.decoder.sample()
        self.step = self.decoder.step

    def state_bytes(self) -> int:
        """T2's window, the chunk and the counter's states."""
        return self.decoder.num_bytes

    def read_bytes(self) -> int:
        """T2's window: the counter is read at chunk borders only."""
        return self.decoder.buffers.keys.nbytes + self.decoder.buffers.values.nbytes


class PlainScan(Scan):
    """``forward`` with a ``ScanCache``."""

    def make(self) -> None:
        """Nothing is prepared."""

    def prefill(self, prompt: Tensor) -> None:
        """As the fast decoder's."""
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.step = self._step

    def _step(self) -> None:
        out = self.model(self.token, past_key_values=self.cache, logits_to_keep=1)
        self.token = out.logits.argmax(-1)

    def state_bytes(self) -> int:
        """What the cache holds."""
        return self.cache.num_bytes

    def read_bytes(self) -> int:
        """T2's window."""
        held = [t for kv in self.cache.window for t in (kv.key, kv.value)]
        return sum(t.nbytes for t in held if t is not None)


class OriginalScan(PlainScan):
    """The original's loop, for the speed only."""

    note = "does not compute the model: T2 never sees the current chunk; float32"

    @property
    def dtype(self) -> torch.dtype:
        """The original's."""
        return torch.float32

    def prefill(self, prompt: Tensor) -> None:
        """States of the prompt's whole chunks; what is left over is dropped."""
        super().prefill(prompt)
        self.roots, self.seen = self.cache.counter.states, self.cache.counter.num_chunks
        self.prefix = self._fold()
        self.pending: list[Tensor] = []

    def _fold(self) -> Tensor:
        """The prefix, folded anew from all roots each time."""
        if not self.roots:
            return self.model.embed(self.token)
        state = self.roots[0]
        for root in self.roots[1:]:
            state = self.model.aggregate(state, root)
        return state

    def _step(self) -> None:
        """T2 over the whole prefix, its last output chooses the token."""
        (hidden,) = self.model.t2([self.prefix], [1])
        self.token = self.model.lm_head(hidden).argmax(-1)
        self.pending.append(self.token)
        if len(self.pending) < self.period:
            return
        state, self.pending = self.model.embed(torch.cat(self.pending, dim=1)), []
        self.seen += 1
        for _ in range(lowest_bit(self.seen).bit_length() - 1):
            state = self.model.aggregate(self.roots.pop(), state)
        self.roots.append(state)
        self.prefix = self._fold()


class GPT2(Subject):
    """transformers' GPT-2 with a growing cache."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        fields = {**SIZES[setting.size].gpt2, "n_positions": setting.positions}
        tokens = {"bos_token_id": None, "eos_token_id": None, "use_cache": True}
        self.model = self._build("gpt2_small_wikitext103_nodrop", **fields, **tokens)

    def prefill(self, prompt: Tensor) -> None:
        """With the kernel that torch prefers."""
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.step = self._step

    def _step(self) -> None:
        with sdpa_kernel(GROWING):
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits.argmax(-1)

    def state_bytes(self) -> int:
        """Keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class MathGPT2(GPT2):
    """The original's handicap."""

    note = "handicapped as in the original: float32 and the math attention kernel only"

    @property
    def dtype(self) -> torch.dtype:
        """The original's."""
        return torch.float32

    def prefill(self, prompt: Tensor) -> None:
        """With the math kernel."""
        with sdpa_kernel(SDPBackend.MATH):
            super().prefill(prompt)

    def _step(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits.argmax(-1)


class GraphGPT2(GPT2):
    """GPT-2 treated as the scan model is: see ``scanlm.benchmark.static_gpt2``."""

    note = "the buffer is as long as the positions measured, so it is captured anew for each"
    static: StaticGPT2 | None = None
    tuned = False

    def prefill(self, prompt: Tensor) -> None:
        """Into a buffer that has room for the tokens to come."""
        b, t = prompt.shape
        capacity = -(-min(self.setting.positions, t + self.room) // 128) * 128
        if self.static is None or self.static.capacity != capacity:
            self.static = None  # freed before the next is allocated
            self.static = StaticGPT2(self.model, b, capacity, tuned=self.tuned)
        self.static.prefill(prompt)
        self.step = self.static.step

    def state_bytes(self) -> int:
        """Keys and values up to the position."""
        return 0 if self.static is None else self.static.num_bytes


class TunedGPT2(GraphGPT2):
    """The same, with the compiler's search for the best kernels."""

    tuned = True


class StaticCacheGPT2(GPT2):
    """transformers' own static cache."""

    note = "StaticCache, torch.compile in reduce-overhead mode"

    def prefill(self, prompt: Tensor) -> None:
        """Into a buffer that has room for the tokens to come."""
        from transformers import StaticCache

        self.cache = StaticCache(
            config=self.model.config,
            max_cache_len=min(self.setting.positions, prompt.shape[1] + self.room),
        )
        out = self.model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)
        if self.setting.device.type == "cuda":
            self.forward = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)
        else:
            self.forward = self.model
        self.step = self._step

    def _step(self) -> None:
        out = self.forward(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits.argmax(-1).clone()


class Recurrent(Subject):
    """GLA, Gated DeltaNet, Mamba-2: a state of constant size.

    Attributes:
        piece: tokens of a prompt that are read at once. Mamba-2 in plain torch makes tensors of
            several hundred times the size of its input; the others read all of it.
    """

    def __init__(self, setting: Setting, family: str) -> None:
        super().__init__(setting)
        entry, fields = SIZES[setting.size].recurrent[family]
        tokens = {"bos_token_id": None, "eos_token_id": None}
        self.model = self._build(entry, **fields, **tokens)
        self.cache_name = "cache_params" if family == "mamba2" else "past_key_values"
        self.piece = PIECE if family == "mamba2" else setting.positions
        self.token = torch.zeros(setting.batch_size, 1, dtype=torch.long, device=setting.device)

    def prefill(self, prompt: Tensor) -> None:
        """In parallel, as the family does it; then the step is captured."""
        state: dict[str, Any] = {}
        for piece in prompt.split(self.piece, dim=1):
            out = self.model(piece, use_cache=True, logits_to_keep=1, **state)
            state = {self.cache_name: getattr(out, self.cache_name)}
        cache = state[self.cache_name]
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.held: list[Tensor] = []

        def hold(tensor: Tensor) -> Tensor:
            self.held.append(tensor)
            return tensor

        map_tensors(cache, hold)

        def step() -> None:
            given = {self.cache_name: cache, "use_cache": True}
            out = self.model(self.token, **given)
            self.token.copy_(out.logits[:, -1:].argmax(-1))
            old = iter(self.held)
            map_tensors(cache, lambda new: _into(next(old), new))

        self.step = step
        if self.setting.device.type == "cuda":
            try:
                pool = torch.cuda.graph_pool_handle()
                self.step = captured(step, pool, self.token.device)
            except RuntimeError as error:
                self.note = f"not captured as a CUDA graph: {str(error).splitlines()[0][:120]}"

    def state_bytes(self) -> int:
        """All tensors of the cache."""
        return sum(t.nbytes for t in self.held)


def _into(old: Tensor, new: Tensor) -> Tensor:
    """The new values at the old address."""
    if new is not old:
        old.copy_(new)
    return old


def map_tensors(held: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Replace, in place where possible, every tensor in the nested containers of a cache."""
    if isinstance(held, Tensor):
        return function(held)
    if isinstance(held, tuple):
        return tuple(map_tensors(x, function) for x in held)
    if isinstance(held, list):
        held[:] = [map_tensors(x, function) for x in held]
    elif isinstance(held, dict):
        for key in held:
            held[key] = map_tensors(held[key], function)
    elif any(word in type(held).__name__ for word in ("Cache", "Layer", "State")):
        for name, value in vars(held).items():
            setattr(held, name, map_tensors(value, function))
    return held


SUBJECTS: dict[str, Callable[[Setting], Subject]] = {
    "scanlm": Scan,
    "scanlm_plain": PlainScan,
    "scanlm_original": OriginalScan,
    "gpt2_graph": GraphGPT2,
    "gpt2_tuned": TunedGPT2,
    "gpt2_static": StaticCacheGPT2,
    "gpt2_dynamic": GPT2,
    "gpt2_math": MathGPT2,
    "gla": lambda setting: Recurrent(setting, "gla"),
    "gated_deltanet": lambda setting: Recurrent(setting, "gated_deltanet"),
    "mamba2": lambda setting: Recurrent(setting, "mamba2"),
}


@contextlib.contextmanager
def no_leftovers(device: torch.device) -> Iterator[None]:
    """Free what the body allocated on a GPU, compiled code included, also when it failed."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
