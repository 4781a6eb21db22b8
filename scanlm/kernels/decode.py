# mypy: disable-error-code="no-untyped-def"
"""The decoding step in Triton: a few kernels that do nothing but stream weights.

At batch 1 a token's cost is the reading of the weights, provided that nothing else takes time.
So a block is five kernels: norm + queries, keys and values; attention over the window, which also
writes the new key and value; output product + residual; norm + MLP + GELU; MLP + residual. Each
program owns a few output features, reads their weights as one tile and recomputes the norm of the
one row by itself. On Hopper a kernel begins while the one before still runs (programmatic
dependent launch): it fetches its weights, which depend on nothing, and only then waits.

Several rows, and the filling of a new prefix, are matrix products instead: tiles of rows times
the same weights, where the sum over the features is split between programs (``parts``) to keep
all of them busy, and the next norm adds the parts up in a fixed order.

Weights are read in ``(out, in)`` order: ``FusedStep`` keeps transposed copies of T2's and renews
them when a stream begins. The residual stream is float32, everything else in the model's dtype.

Shapes: ``m`` rows, ``k`` input and ``n`` output features, ``c`` = chunk_size, ``h`` heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from scanlm.decode_step import Buffers, Rows, TorchStep
from scanlm.sampling import Sampling

VECTOR_TILE = 8192  # weights a program of the vector path reads at once
VECTOR_WARPS = 8
BLOCK_N, BLOCK_K, STAGES = 16, 64, 8  # of the matrix path
HEAD_BLOCK_N = 128  # of products with so many features that every processor has several blocks
PROGRAMS = 144  # how many programs a product should have: a few more than there are processors
FILL_ROWS = 1024  # above so many rows of prefixes plain matrix products are faster
VOCABULARY_BLOCK = 1024  # logits that one program compares
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


def fits(model: Any) -> bool:
    """Whether these kernels compute this model: its device, dtype and activation."""
    weight = model.lm_head.weight
    return (
        weight.is_cuda
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and model.config.activation_function in ACTIVATIONS
    )


@triton.jit
def _gelu(x):
    """GELU's tanh form: (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _normed(x, live, gamma, beta, K: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of one row; features that are not ``live`` stay zero."""
    centred = tl.where(live, x - tl.sum(x, 0) / K, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + EPS)
    return centred * scale * gamma + beta


@triton.jit
def embed_kernel(
    token_ptr,
    position_ptr,
    wte_ptr,
    wpe_ptr,
    gamma_ptr,
    beta_ptr,
    chunk_ptr,
    x_ptr,
    C: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK_POSITIONS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """T0 of one row's token, into the residual stream and the chunk."""
    row = tl.program_id(0)
    cols = tl.arange(0, D_TILE)
    live = cols < D
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(token_ptr + row)
    position = tl.load(position_ptr + row)
    fill = position % C
    place = fill if CHUNK_POSITIONS else position
    x = tl.load(wte_ptr + token * D + cols, live, 0.0).to(tl.float32)
    x += tl.load(wpe_ptr + place * D + cols, live, 0.0).to(tl.float32)
    if NORM:
        x = x.to(chunk_ptr.dtype.element_ty).to(tl.float32)  # rounded where torch rounds
        gamma = tl.load(gamma_ptr + cols, live, 0.0).to(tl.float32)
        beta = tl.load(beta_ptr + cols, live, 0.0).to(tl.float32)
        x = _normed(x, live, gamma, beta, D, EPS)
    leaf = x.to(chunk_ptr.dtype.element_ty)
    tl.store(chunk_ptr + (row * C + fill) * D + cols, leaf, live)
    tl.store(x_ptr + row * D + cols, leaf.to(tl.float32), live)


@triton.jit
def vector_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    K_TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some output features of ``act(norm(x) W^T + bias)`` for one row x, added to out if ADD."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, K_TILE)
    inside, live = rows < N, cols < K
    if PDL:
        gdc_launch_dependents()
    w = tl.load(
        w_ptr + rows[:, None].to(tl.int64) * K + cols[None, :],
        inside[:, None] & live[None, :],
        0.0,
    )
    if BIAS:
        bias = tl.load(bias_ptr + rows, inside, 0.0).to(tl.float32)
    if NORM:
        gamma = tl.load(gamma_ptr + cols, live, 0.0).to(tl.float32)
        beta = tl.load(beta_ptr + cols, live, 0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + cols, live, 0.0).to(tl.float32)
    if NORM:
        x = _normed(x, live, gamma, beta, K, EPS)
    out = tl.sum(w.to(tl.float32) * x[None, :], 1)
    if BIAS:
        out += bias
    if GELU:
        out = _gelu(out)
    if ADD:
        out += tl.load(out_ptr + rows, inside, 0.0)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def window_kernel(
    qkv_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    out_ptr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one row: attention of the new token, whose key and value join the window.

    EARLY fetches the first slots before it is known which of them count.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // H
    dims, slots = tl.arange(0, D_TILE), tl.arange(0, BLOCK)
    live = dims < D
    window = head * (2 * C * D)
    offsets = window + slots[:, None] * D + dims[None, :]
    if PDL:
        gdc_launch_dependents()
    if EARLY:
        inside = (slots < 2 * C)[:, None] & live[None, :]
        keys = tl.load(key_ptr + offsets, inside, 0.0)
        values = tl.load(value_ptr + offsets, inside, 0.0)
    if PDL:
        gdc_wait()
    position = tl.load(position_ptr + row)
    slot = C + position % C
    new = qkv_ptr + row * (3 * H * D) + (head % H) * D + dims
    q = tl.load(new, live, 0.0).to(tl.float32) * SCALE
    key, value = tl.load(new + H * D, live, 0.0), tl.load(new + 2 * H * D, live, 0.0)
    tl.store(key_ptr + window + slot * D + dims, key, live)
    tl.store(value_ptr + window + slot * D + dims, value, live)
    # softmax with a running maximum, beginning with the token itself
    top = tl.sum(q * key.to(tl.float32), 0)
    total = top * 0.0 + 1.0
    out = value.to(tl.float32)
    for start in tl.static_range(0, 2 * C, BLOCK):
        place = start + slots
        seen = ((place < C) & (position >= C)) | ((place >= C) & (place < slot))
        if start > 0 or not EARLY:
            asked = seen[:, None] & live[None, :]
            keys = tl.load(key_ptr + offsets + start * D, asked, 0.0)
            values = tl.load(value_ptr + offsets + start * D, asked, 0.0)
        score = tl.sum(keys.to(tl.float32) * q[None, :], 1)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        shrink = tl.exp(top - higher)
        p = tl.exp(score - higher)
        total = total * shrink + tl.sum(p, 0)
        out = out * shrink + tl.sum(p[:, None] * values.to(tl.float32), 0)
        top = higher
    out = out / total
    place_out = out_ptr + row * (H * D) + (head % H) * D + dims
    tl.store(place_out, out.to(out_ptr.dtype.element_ty), live)


@triton.jit
def norm_kernel(
    x_ptr,
    part_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    M,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: add the parts of a product and its bias to x, then norm it."""
    row = tl.program_id(0)
    cols = tl.arange(0, K_TILE)
    live = cols < K
    if PDL:
        gdc_launch_dependents()
    gamma = tl.load(gamma_ptr + cols, live, 0.0).to(tl.float32)
    beta = tl.load(beta_ptr + cols, live, 0.0).to(tl.float32)
    if PARTS:
        bias = tl.load(bias_ptr + cols, live, 0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * K + cols, live, 0.0)
    if PARTS:
        added = bias
        for part in tl.static_range(PARTS):
            added += tl.load(part_ptr + (part * M + row) * K + cols, live, 0.0)
        x += added
        tl.store(x_ptr + row * K + cols, x, live)
    x = _normed(x, live, gamma, beta, K, EPS)
    tl.store(out_ptr + row * K + cols, x.to(out_ptr.dtype.element_ty), live)


@triton.jit
def matrix_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    B_M: tl.constexpr,
    B_N: tl.constexpr,
    B_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ``act(x W^T + bias)``, or of one part of the sum over the features."""
    rows = tl.program_id(1) * B_M + tl.arange(0, B_M)
    features = tl.program_id(0) * B_N + tl.arange(0, B_N)
    part = tl.program_id(2)
    cols = tl.arange(0, B_K)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_rows = x_ptr + rows[:, None].to(tl.int64) * K
    w_rows = w_ptr + features[:, None].to(tl.int64) * K
    sums = tl.zeros((B_M, B_N), dtype=tl.float32)
    for start in range(0, K_PART, B_K):
        at = part * K_PART + start + cols
        live = (start + cols < K_PART) & (at < K)
        x = tl.load(x_rows + at[None, :], (rows < M)[:, None] & live[None, :], 0.0)
        w = tl.load(w_rows + at[None, :], (features < N)[:, None] & live[None, :], 0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + features, features < N, 0.0).to(tl.float32)[None, :]
    if GELU:
        sums = _gelu(sums)
    out = out_ptr + (part.to(tl.int64) * M + rows[:, None]) * N + features[None, :]
    inside = (rows < M)[:, None] & (features < N)[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def prefix_kernel(
    qkv_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Causal attention within the prefix, for some queries of one head; fills the window."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, lanes = tl.arange(0, D_TILE), tl.arange(0, BLOCK)
    places = block * BLOCK + lanes
    live = dims < D
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = qkv_ptr + (head // H) * (C * 3 * H * D) + (head % H) * D + dims[None, :]
    asked = (places < C)[:, None] & live[None, :]
    at = places[:, None] * (3 * H * D)
    q = tl.load(source + at, asked, 0.0)
    window = head * (2 * C * D) + places[:, None] * D + dims[None, :]
    tl.store(key_ptr + window, tl.load(source + at + H * D, asked, 0.0), asked)
    tl.store(value_ptr + window, tl.load(source + at + 2 * H * D, asked, 0.0), asked)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, D_TILE), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        others = start + lanes
        present = (others < C)[:, None] & live[None, :]
        there = source + others[:, None] * (3 * H * D)
        keys = tl.load(there + H * D, present, 0.0)
        values = tl.load(there + 2 * H * D, present, 0.0)
        score = tl.dot(q, tl.trans(keys), input_precision="ieee") * SCALE
        score = tl.where(others[None, :] <= places[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - higher)
        p = tl.exp(score - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        out = tl.dot(p.to(values.dtype), values, out, input_precision="ieee")
        top = higher
    out = out / total[:, None]
    target = out_ptr + ((head // H) * C + places[:, None]) * (H * D) + (head % H) * D
    tl.store(target + dims[None, :], out.to(out_ptr.dtype.element_ty), asked)


@triton.jit
def best_part_kernel(
    logits_ptr,
    value_ptr,
    token_ptr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The greatest logit of one row among some tokens."""
    part, row = tl.program_id(0), tl.program_id(1)
    tokens = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(logits_ptr + row * V + tokens, tokens < V, float("-inf"))
    value, place = tl.max(logits, 0, return_indices=True)
    tl.store(value_ptr + row * PARTS + part, value)
    tl.store(token_ptr + row * PARTS + part, part * BLOCK + place)


@triton.jit
def best_kernel(
    value_ptr,
    part_token_ptr,
    token_ptr,
    position_ptr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token of one row's greatest logit, the first of equals; counts the token fed."""
    row = tl.program_id(0)
    parts = tl.arange(0, TILE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(value_ptr + row * PARTS + parts, parts < PARTS, float("-inf"))
    _, place = tl.max(values, 0, return_indices=True)
    tl.store(token_ptr + row, tl.load(part_token_ptr + row * PARTS + place).to(tl.int64))
    tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)


class FusedStep(TorchStep):
    """``TorchStep`` with the kernels above, for models that ``fits`` accepts."""

    def __init__(self, model: Any, buffers: Buffers) -> None:
        super().__init__(model, buffers)
        config = model.config
        self.width, self.heads = config.n_embd, config.n_head
        self.head_width = config.n_embd // config.n_head
        self.batch = len(buffers.token)
        self.pdl = buffers.token.is_cuda and torch.cuda.get_device_capability(
            buffers.token.device
        ) >= (9, 0)
        self.transposed = [
            [torch.empty_like(w.t(), memory_format=torch.contiguous_format) for w in self._read(b)]
            for b in model.t2.h
        ]
        self.refresh()
        self.work = self._workspace(self.batch)
        self.parts = triton.cdiv(config.vocab_size, VOCABULARY_BLOCK)
        self.best = buffers.logits.new_empty(self.batch, self.parts)
        self.best_token = buffers.token.new_empty(self.batch, self.parts)
        filled = self.batch * config.chunk_size
        self.fill_work = self._workspace(filled) if filled <= FILL_ROWS else None

    @staticmethod
    def _read(block: Any) -> list[Tensor]:
        """The products of a block, in the order of use, ``(in, out)``."""
        attn, mlp = block.attn, block.mlp
        return [attn.c_attn.weight, attn.c_proj.weight, mlp.c_fc.weight, mlp.c_proj.weight]

    def refresh(self) -> None:
        """Renew the transposed weights."""
        for block, copies in zip(self.model.t2.h, self.transposed, strict=True):
            for weight, transposed in zip(self._read(block), copies, strict=True):
                transposed.copy_(weight.t())

    def _workspace(self, rows: int) -> dict[str, Tensor]:
        """Intermediate results of so many rows."""
        weight, d = self.model.lm_head.weight, self.width
        inner = self.transposed[0][2].shape[0]
        parts = max(self._parts(rows, d, d), self._parts(rows, d, inner))
        return {
            "x": weight.new_empty(rows, d, dtype=torch.float32),
            "normed": weight.new_empty(rows, d),
            "qkv": weight.new_empty(rows, 3 * d),
            "attended": weight.new_empty(rows, d),
            "inner": weight.new_empty(rows, inner),
            "parts": weight.new_empty(parts, rows, d, dtype=torch.float32),
        }

    def step(self) -> None:
        """See ``TorchStep.step``."""
        s, work, config = self.buffers, self.work, self.model.config
        norm = self.model.leaf_norm if isinstance(self.model.leaf_norm, nn.LayerNorm) else None
        embed_kernel[(self.batch,)](
            s.token,
            s.position,
            self.model.wte.weight,
            self.model.wpe.weight,
            norm.weight if norm is not None else work["x"],
            norm.bias if norm is not None else work["x"],
            s.chunk,
            work["x"],
            C=config.chunk_size,
            D=self.width,
            D_TILE=triton.next_power_of_2(self.width),
            EPS=config.layer_norm_epsilon,
            CHUNK_POSITIONS=config.position_embedding == "chunk",
            NORM=norm is not None,
            **self._launch(),
        )
        if self.batch == 1:
            self._one_row()
        else:
            parts = self._blocks(work, self._window)
            self._norm(work, parts, self.model.t2.h[-1].mlp.c_proj.bias, self.model.t2.ln_f)
            self._matrix(work["normed"], self.model.lm_head.weight, None, s.logits)

    def advance(self, sampling: Sampling) -> None:
        """See ``TorchStep.advance``."""
        if sampling.temperature > 0:
            super().advance(sampling)
            return
        s = self.buffers
        best_part_kernel[(self.parts, self.batch)](
            s.logits,
            self.best,
            self.best_token,
            V=s.logits.shape[1],
            PARTS=self.parts,
            BLOCK=VOCABULARY_BLOCK,
            num_warps=4,
            **self._launch(),
        )
        best_kernel[(self.batch,)](
            self.best,
            self.best_token,
            s.token,
            s.position,
            PARTS=self.parts,
            TILE=triton.next_power_of_2(self.parts),
            num_warps=1,
            **self._launch(),
        )

    def fill(self, prefix: Tensor, rows: Rows) -> None:
        """See ``TorchStep.fill``."""
        if self.fill_work is None or not isinstance(rows, slice):
            super().fill(prefix, rows)
            return
        self.fill_work["x"].copy_(prefix.flatten(0, 1))
        self._blocks(self.fill_work, self._prefix, only_window=True)

    def _one_row(self) -> None:
        work, t2 = self.work, self.model.t2
        for i, (block, weights) in enumerate(zip(t2.h, self.transposed, strict=True)):
            qkv, proj, fc, out = weights
            attn, mlp = block.attn, block.mlp
            self._vector(work["x"], qkv, attn.c_attn.bias, work["qkv"], norm=block.ln_1)
            self._window(i, work)
            self._vector(work["attended"], proj, attn.c_proj.bias, work["x"], add=True)
            self._vector(work["x"], fc, mlp.c_fc.bias, work["inner"], norm=block.ln_2, gelu=True)
            self._vector(work["inner"], out, mlp.c_proj.bias, work["x"], add=True)
        self._vector(work["x"], self.model.lm_head.weight, None, self.buffers.logits, norm=t2.ln_f)

    def _blocks(self, work: dict[str, Tensor], attend: Any, only_window: bool = False) -> int:
        """All blocks over many rows; returns in how many parts the last product lies."""
        parts, bias, last = 0, None, len(self.transposed) - 1
        for i, (block, weights) in enumerate(zip(self.model.t2.h, self.transposed, strict=True)):
            qkv, proj, fc, out = weights
            attn, mlp = block.attn, block.mlp
            self._norm(work, parts, bias, block.ln_1)
            self._matrix(work["normed"], qkv, attn.c_attn.bias, work["qkv"])
            attend(i, work)
            if only_window and i == last:
                break
            parts = self._matrix(work["attended"], proj, None, work["parts"], split=True)
            self._norm(work, parts, attn.c_proj.bias, block.ln_2)
            self._matrix(work["normed"], fc, mlp.c_fc.bias, work["inner"], gelu=True)
            parts = self._matrix(work["inner"], out, None, work["parts"], split=True)
            bias = mlp.c_proj.bias
        return parts

    # Launches

    def _launch(self) -> dict[str, Any]:
        return {"PDL": True, "launch_pdl": True} if self.pdl else {"PDL": False}

    def _vector(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        norm: Any = None,
        gelu: bool = False,
        add: bool = False,
    ) -> None:
        n, k = weight.shape
        tile = triton.next_power_of_2(k)
        rows = max(VECTOR_TILE // tile, 1)
        while rows > 1 and triton.cdiv(n, rows) < PROGRAMS:
            rows //= 2
        vector_kernel[(triton.cdiv(n, rows),)](
            x,
            weight,
            bias if bias is not None else x,
            norm.weight if norm is not None else x,
            norm.bias if norm is not None else x,
            out,
            N=n,
            K=k,
            EPS=self.model.config.layer_norm_epsilon,
            NORM=norm is not None,
            BIAS=bias is not None,
            GELU=gelu,
            ADD=add,
            ROWS=rows,
            K_TILE=tile,
            num_warps=VECTOR_WARPS,
            **self._launch(),
        )

    def _window(self, i: int, work: dict[str, Tensor]) -> None:
        s, c = self.buffers, self.model.config.chunk_size
        window_kernel[(self.batch * self.heads,)](
            work["qkv"],
            s.keys[i],
            s.values[i],
            s.position,
            work["attended"],
            SCALE=self.head_width**-0.5,
            C=c,
            H=self.heads,
            D=self.head_width,
            D_TILE=triton.next_power_of_2(self.head_width),
            BLOCK=min(triton.next_power_of_2(2 * c), 128),
            EARLY=self.batch == 1,
            num_warps=4,
            **self._launch(),
        )

    def _prefix(self, i: int, work: dict[str, Tensor]) -> None:
        s, c = self.buffers, self.model.config.chunk_size
        block = max(min(triton.next_power_of_2(c), 64), 16)
        prefix_kernel[(self.batch * self.heads, triton.cdiv(c, block))](
            work["qkv"],
            s.keys[i],
            s.values[i],
            work["attended"],
            SCALE=self.head_width**-0.5,
            C=c,
            H=self.heads,
            D=self.head_width,
            D_TILE=max(triton.next_power_of_2(self.head_width), 16),
            BLOCK=block,
            num_warps=4,
            **self._launch(),
        )

    def _norm(self, work: dict[str, Tensor], parts: int, bias: Any, norm: Any) -> None:
        rows = work["x"].shape[0]
        norm_kernel[(rows,)](
            work["x"],
            work["parts"],
            bias if bias is not None else norm.bias,
            norm.weight,
            norm.bias,
            work["normed"],
            rows,
            K=self.width,
            K_TILE=triton.next_power_of_2(self.width),
            EPS=self.model.config.layer_norm_epsilon,
            PARTS=parts,
            num_warps=4,
            **self._launch(),
        )

    def _parts(self, rows: int, n: int, k: int) -> int:
        """Into how many parts a product's sum is split to have about ``PROGRAMS`` programs."""
        programs = triton.cdiv(rows, self._block_m(rows)) * triton.cdiv(n, BLOCK_N)
        return max(min(PROGRAMS // programs, triton.cdiv(k, BLOCK_K)), 1)

    @staticmethod
    def _block_m(rows: int) -> int:
        return min(max(triton.next_power_of_2(rows), 16), 64)

    def _matrix(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        gelu: bool = False,
        split: bool = False,
    ) -> int:
        rows, (n, k) = x.shape[0], weight.shape
        wanted = self._parts(rows, n, k) if split else 1
        part = triton.cdiv(triton.cdiv(k, wanted), BLOCK_K) * BLOCK_K
        parts = triton.cdiv(k, part)
        block = self._block_m(rows)
        block_n = BLOCK_N if n < PROGRAMS * HEAD_BLOCK_N else HEAD_BLOCK_N
        matrix_kernel[(triton.cdiv(n, block_n), triton.cdiv(rows, block), parts)](
            x,
            weight,
            bias if bias is not None else x,
            out,
            rows,
            N=n,
            K=k,
            K_PART=part,
            BIAS=bias is not None,
            GELU=gelu,
            B_M=block,
            B_N=block_n,
            B_K=BLOCK_K,
            num_warps=4,
            num_stages=STAGES,
            **self._launch(),
        )
        return parts
