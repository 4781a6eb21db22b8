"""Which earlier tokens a prediction depends on, measured by gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scanlm.errors import ScanLMError
from scanlm.scoring import in_mode

if TYPE_CHECKING:
    from torch import Tensor, nn


def influence(
    model: nn.Module, input_ids: Tensor, seed: int = 0, batch_size: int = 32
) -> np.ndarray:
    """Sensitivity of each position's logits to each token's embedding.

    Entry ``[i, j]`` is ``||J.T v||`` where ``J = d logits[i] / d embedding[j]`` and ``v`` is one
    fixed random direction with ``E ||J.T v||**2 = ||J||_F**2``. An entry is exactly zero where no
    path leads from token j to position i.

    Args:
        model: any causal language model of transformers; it is evaluated without dropout.
        input_ids: ``(T,)`` or ``(1, T)``.
        seed: of the random direction.
        batch_size: positions per backward pass.

    Returns:
        ``(T, T)`` float64; rows are positions that predict, columns are tokens read.

    Raises:
        ScanLMError: more than one sequence, or an empty one.
    """
    ids = input_ids.reshape(1, -1) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ScanLMError(
            f"input_ids must be one sequence, (T,) or (1, T), got shape {tuple(input_ids.shape)}"
        )
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    rows = []
    direction: Tensor | None = None
    with in_mode(model), embedding.register_forward_hook(keep):  # removed in the end
        # row k of a batch asks for position start + k: one backward pass for many positions
        for positions in torch.arange(ids.shape[1], device=ids.device).split(batch_size):
            embedded.clear()
            with torch.enable_grad():
                logits = model(input_ids=ids.expand(len(positions), -1)).logits
                if direction is None:
                    noise = torch.Generator().manual_seed(seed)
                    direction = torch.randn(logits.shape[-1], generator=noise).to(logits)
                asked = logits[torch.arange(len(positions), device=ids.device), positions]
                (gradient,) = torch.autograd.grad((asked @ direction).sum(), embedded[0])
            rows.append(gradient.double().norm(dim=-1).cpu())
    return torch.cat(rows).numpy()


def by_chunk(matrix: np.ndarray, chunk_size: int) -> np.ndarray:
    """Geometric means over the blocks of an influence map, below its diagonal blocks.

    Args:
        matrix: ``(T, T)`` with T a multiple of ``chunk_size``.
        chunk_size: tokens per chunk, c.

    Returns:
        ``(T / c, T / c)``, NaN on and above the diagonal, where a block holds exact zeros.

    Raises:
        ScanLMError: T is not a multiple of ``chunk_size``.
    """
    tokens = len(matrix)
    if tokens % chunk_size:
        raise ScanLMError(
            f"the map has {tokens} tokens, which is not a multiple of chunk_size={chunk_size}: "
            "compute it for whole chunks"
        )
    n = tokens // chunk_size
    blocks = matrix.reshape(n, chunk_size, n, chunk_size)
    below = np.tril(np.ones((n, n), dtype=bool), -1)
    means = np.full((n, n), np.nan)
    means[below] = np.exp(np.log(blocks.transpose(0, 2, 1, 3)[below]).mean((1, 2)))
    return means
