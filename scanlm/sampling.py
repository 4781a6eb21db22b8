"""How the next token is drawn from logits, on their device and without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scanlm.errors import ScanLMError
from scanlm.values import is_number


@dataclass(frozen=True)
class Sampling:
    """Greedy, or drawn from the softmax of ``logits / temperature`` cut down to likely tokens.

    Args:
        temperature: 0 takes the likeliest token; else the logits are divided by it.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together have at least this probability, after
            ``top_k`` (nucleus sampling, arXiv 1904.09751).

    Raises:
        ScanLMError: a value of another type or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ScanLMError(
                f"temperature={self.temperature!r}: expected a number >= 0, where 0 is greedy"
            )
        k, p = self.top_k, self.top_p
        if k is not None and (not is_number(k) or not isinstance(k, int) or k < 1):
            raise ScanLMError(f"top_k={k!r}: expected an integer >= 1, or None for all")
        if p is not None and (not is_number(p) or not 0 < p <= 1):
            raise ScanLMError(f"top_p={p!r}: expected a probability in (0, 1], or None")

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``(b, k)`` of the tokens that may be drawn, the others at -inf, and their ids.

        Returns:
            Scaled logits, and the token ids ``(b, k)`` or ``None`` if they are 0 ... v - 1.
        """
        values, tokens = logits / self.temperature, None
        if self.top_k is not None and self.top_k < values.shape[-1]:
            values, tokens = values.topk(self.top_k)
        elif self.top_p is not None:
            values, tokens = values.sort(descending=True)
        if self.top_p is not None:
            probabilities = values.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            values = values.masked_fill(before >= self.top_p, -torch.inf)
        return values, tokens

    def choose(self, logits: Tensor) -> Tensor:
        """Draw one token a row: logits ``(b, v)`` to ids ``(b,)``.

        Random numbers come from the device's default generator (``torch.manual_seed``).
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        values, tokens = self.candidates(logits)
        # argmax of p / Exp(1) is distributed as p; unlike multinomial it never looks at the values
        noise = torch.empty_like(values).exponential_()
        best = (values.softmax(-1) / noise).argmax(-1, keepdim=True)
        return (best if tokens is None else tokens.gather(-1, best)).squeeze(-1)
