"""What the scan model's prefix state knows of the running product, and whether it drifts.

The state before chunk i is the root of a tree of T1 nodes over all tokens before it. T1 was trained
on shallow trees; a longer word needs deeper ones, whose nodes read T1's own outputs ever more
often. Four measurements follow a state into such depths:

- a *linear probe*, fitted on states as shallow as training knew, read at every depth;
- the *distance to the nearest leaf*: with one token a chunk a leaf is the embedding of a group
  element, so a state can be compared with the leaf of the product it stands for;
- the *gain* of T1: how much of a small error in its left operand is left in its result. Above 1
  errors grow from node to node (drift), below 1 they are repaired;
- the *contrast* of products: how far apart their mean states are, against the spread around them.

``probe_metrics`` is what a run's record keeps of the first three, and of the representations that
the codes use (``scanlm.representations``).

Shapes: ``b`` words, ``t`` tokens, ``m`` chunks that have a prefix, ``c`` = chunk_size, ``d`` =
n_embd, ``g`` = order of the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlm.errors import ScanLMError
from scanlm.groups import Group, get_group, word_batch
from scanlm.length_evaluation import check_lengths, word_logits
from scanlm.representations import shares
from scanlm.scoring import in_mode

if TYPE_CHECKING:
    import pandas as pd

WORDS_SEED = 1  # of the test stream: not the words of ``evaluate_lengths``


def prefix_depth(chunks: int) -> int:
    """T1 nodes on the longest way from a chunk to the prefix of so many chunks.

    The first and largest subtree of 2**h chunks has h levels, and each further one of the binary
    digits adds a fold: ``floor(log2 n) + popcount(n) - 1``. 0 for one chunk, which is a leaf, and
    for none.
    """
    return max(chunks.bit_length() + chunks.bit_count() - 2, 0)


def depth_at(position: int, chunk_size: int = 1) -> int:
    """Depth of the tree that the prediction at a position of the word reads.

    Args:
        position: from 1, as records count them.
        chunk_size: of the model.
    """
    return prefix_depth((position - 1) // chunk_size)


def _check_scan(model: nn.Module) -> Any:
    if not hasattr(model, "prefix_states"):
        raise ScanLMError(
            f"{type(model).__name__} has no prefix states: only a scan model can be probed"
        )
    return model


@torch.no_grad()
def prefix_states(model: nn.Module, group: Group | str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The states that T2 reads, and the products they stand for.

    Args:
        model: a ``ScanLMForCausalLM`` whose vocabulary is the group's.
        group: the group or its name.
        tokens: words ``(b, t)``.

    Returns:
        States ``(b, m, c, d)`` of the first 1, 2, ... m chunks, and the products ``(b, m)`` of
        their tokens.

    Raises:
        ScanLMError: another kind of model, or words of a single chunk, which has no prefix.
    """
    scan = _check_scan(model)
    from scanlm.groups import running_products, table_on

    c = scan.config.chunk_size
    m = (tokens.shape[1] - 1) // c
    if m < 1:
        raise ScanLMError(
            f"words of {tokens.shape[1]} tokens are one chunk of chunk_size={c}: there is no "
            "prefix state; use longer words"
        )
    read = tokens[:, : m * c]
    products = running_products(table_on(get_group(group), tokens.device), read)[:, c - 1 :: c]
    return scan.prefix_states(scan.embed(read).unflatten(1, (m, c))), products


class Probe:
    """Multinomial logistic regression from standardised states ``(n, features)`` to products.

    Args:
        states: ``(n, features)``.
        products: ``(n,)``.
        classes: order of the group.
        penalty: weight of the squared coefficients.
        iterations: of L-BFGS; the problem is convex.
    """

    def __init__(
        self,
        states: Tensor,
        products: Tensor,
        classes: int,
        penalty: float = 1e-4,
        iterations: int = 60,
    ) -> None:
        states = states.float()
        self.mean, self.std = states.mean(0), states.std(0).clamp(min=1e-6)
        x = (states - self.mean) / self.std
        self.weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros(classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, self.weight, self.bias), products)
            loss = loss + penalty * self.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)

    def predict(self, states: Tensor) -> Tensor:
        """Products ``(...)`` of states ``(..., features)``."""
        x = (states.float() - self.mean) / self.std
        return F.linear(x, self.weight, self.bias).argmax(-1)


@torch.no_grad()
def leaf_codes(model: nn.Module) -> Tensor:
    """The leaf of every group element ``(g, d)``.

    Raises:
        ScanLMError: a model whose chunks hold several tokens, so that no leaf is an element.
    """
    scan = _check_scan(model)
    if scan.config.chunk_size != 1:
        raise ScanLMError(
            f"chunk_size={scan.config.chunk_size}: a leaf is the state of several tokens, so no "
            "group element has a leaf of its own; this needs chunk_size=1"
        )
    every = torch.arange(scan.config.vocab_size, device=scan.wte.weight.device)
    leaves: Tensor = scan.embed(every.unsqueeze(1))
    return leaves[:, 0]


@torch.no_grad()
def by_depth(
    model: nn.Module,
    group: Group | str,
    length: int,
    trained_length: int,
    words: int = 256,
    batch_tokens: int = 2**15,
) -> pd.DataFrame:
    """Follow the prefix states of words down to the depths that their length needs.

    Args:
        model: a ``ScanLMForCausalLM``.
        group: the group or its name.
        length: of the words.
        trained_length: the probe is fitted on the states of words this long, other words than
            those it is read on.
        words: how many to read.
        batch_tokens: tokens a batch.

    Returns:
        One row a prefix: ``position`` of the first token that reads it (from 1), ``chunks`` in
        it, ``depth``, ``error`` of the model's answers there, ``probe_error``, and with one token
        a chunk ``nearest_error`` (how often the nearest leaf is not the product's), ``distance``
        to the nearest leaf and ``distance_right`` to the product's leaf, both as shares of the
        mean distance between two leaves.

    Raises:
        ScanLMError: another kind of model, or lengths that leave no prefix.
    """
    scan, group = _check_scan(model), get_group(group)
    c = scan.config.chunk_size
    device = next(model.parameters()).device
    check_lengths(model, [length, trained_length])
    with in_mode(model):
        fit_words = max(words, 20 * group.order)
        fit, _ = word_batch(group, fit_words, trained_length, WORDS_SEED, 0, device, "validation")
        states, products = prefix_states(model, group, fit)
        probe = Probe(states.flatten(0, 1).flatten(1), products.flatten(), group.order)

        codes = leaf_codes(model).float() if c == 1 else None
        rows = max(batch_tokens // length, 1)
        sums: dict[str, Tensor] = {}
        for first in range(0, words, rows):
            count = min(rows, words - first)
            tokens, targets = word_batch(
                group, count, length, WORDS_SEED, 0, device, "test", first=first
            )
            states, products = prefix_states(model, group, tokens)
            wrong = word_logits(model, tokens).argmax(-1) != targets
            m = states.shape[1]
            readers = torch.arange(1, m + 1, device=device) * c  # from 0
            found = {
                "error": wrong[:, readers],
                "probe_error": probe.predict(states.flatten(2)) != products,
            }
            if codes is not None:
                distances = torch.cdist(states[:, :, 0].float(), codes)
                right = distances.gather(-1, products.unsqueeze(-1)).squeeze(-1)
                nearest = distances.min(-1)
                found |= {
                    "nearest_error": nearest.indices != products,
                    "distance": nearest.values,
                    "distance_right": right,
                }
            for name, values in found.items():
                sums[name] = sums.get(name, 0) + values.double().sum(0)

    import pandas as pd

    n = len(sums["error"])
    table = pd.DataFrame({name: (total / words).tolist() for name, total in sums.items()})
    if codes is not None:
        between = torch.pdist(codes).mean().item()
        table[["distance", "distance_right"]] /= between
    chunks = range(1, n + 1)
    table.insert(0, "position", [i * c + 1 for i in chunks])
    table.insert(1, "chunks", list(chunks))
    table.insert(2, "depth", [prefix_depth(i) for i in chunks])
    return table


@torch.no_grad()
def repair_gain(
    model: nn.Module,
    group: Group | str,
    length: int,
    sizes: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0),
    words: int = 64,
) -> pd.DataFrame:
    """How much of an error in T1's left operand is left in its result.

    Noise of a given size is added to the prefix states of words, and each is combined with the
    next leaf, as the tree does.

    Args:
        model: a ``ScanLMForCausalLM``.
        group: the group or its name.
        length: of the words; their states at every position are used.
        sizes: norms of the noise, as shares of the state's norm.
        words: how many.

    Returns:
        One row a size and position: ``size``, ``chunks``, ``depth``, and ``gain``: the relative
        change of the result over the relative size of the noise, averaged over the words.
    """
    import pandas as pd

    scan = _check_scan(model)
    c = scan.config.chunk_size
    device = next(model.parameters()).device
    with in_mode(model):
        tokens, _ = word_batch(group, words, length, WORDS_SEED, 0, device, "test")
        states, _ = prefix_states(model, group, tokens)
        m = states.shape[1]
        # the leaf after each prefix; the last one may be partial and has no node
        leaves = scan.embed(tokens[:, : (length // c) * c]).unflatten(1, (-1, c))[:, 1 : m + 1]
        left, right = states[:, : leaves.shape[1]].flatten(0, 1), leaves.flatten(0, 1)
        clean = scan.aggregate(left, right).flatten(1)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(left.flatten(1).shape, generator=generator).to(left)
        direction /= direction.norm(dim=1, keepdim=True)
        norms = left.flatten(1).norm(dim=1, keepdim=True)
        rows = []
        for size in sizes:
            noisy = left + (size * norms * direction).view_as(left)
            change = scan.aggregate(noisy, right).flatten(1) - clean
            gain = (change.norm(dim=1) / clean.norm(dim=1) / size).unflatten(0, (words, -1)).mean(0)
            rows += [
                {"size": size, "chunks": i, "depth": prefix_depth(i), "gain": value}
                for i, value in enumerate(gain.tolist(), start=1)
            ]
    return pd.DataFrame(rows)


def product_contrast(
    model: nn.Module,
    group: Group | str,
    words: int,
    chunks: tuple[int, ...] = (2, 4, 8, 16, 32, 64),
    seed: int = 0,
) -> dict[int, float]:
    """Distance between the mean states of two products, over the spread of states around them.

    A T1 that shrinks all differences also shrinks those between products: below about 1 no reader
    can tell them apart.

    Args:
        model: a ``ScanLMForCausalLM``.
        group: the group or its name.
        words: how many to read; at least 20 for each element of the group are.
        chunks: of the prefixes that are compared.
        seed: of the words, of the test stream.

    Returns:
        The ratio for each number of chunks: the mean distance of all pairs of products' means over
        the mean distance of a state to the mean of its product.

    Raises:
        ScanLMError: another kind of model, or more chunks than it has positions for.
    """
    scan, group = _check_scan(model), get_group(group)
    device = next(model.parameters()).device
    length = max(chunks) * scan.config.chunk_size + 1
    check_lengths(model, [length])
    words = max(words, 20 * group.order)
    tokens, _ = word_batch(group, words, length, seed, 0, device, "test")
    with in_mode(model):
        found, products = prefix_states(model, group, tokens)
    ratios = {}
    for i in chunks:
        states, product = found[:, i - 1].flatten(1), products[:, i - 1]
        seen, index = product.unique(return_inverse=True)
        means = torch.stack([states[product == k].mean(0) for k in seen])
        spread = (states - means[index]).norm(dim=1).mean()
        ratios[i] = (torch.pdist(means).mean() / spread).item()
    return ratios


@torch.no_grad()
def code_shares(model: nn.Module, group: Group | str) -> dict[str, dict[str, float]]:
    """Which irreducible representations the codes of group elements use.

    Args:
        model: a ``ScanLMForCausalLM`` with one token a chunk.
        group: the group or its name.

    Returns:
        Of "leaf", the elements' leaves, and of "state", T1's mean output of two leaves by their
        product (from 50 random words for each element), the ``representations.shares``.

    Raises:
        ScanLMError: another kind of model, or chunks of several tokens.
    """
    scan, group, leaves = _check_scan(model), get_group(group), leaf_codes(model)
    with in_mode(model):
        words = 50 * group.order
        tokens, products = word_batch(group, words, 2, WORDS_SEED, 0, leaves.device, "test")
        left, right = scan.embed(tokens).unsqueeze(2).unbind(1)
        states = scan.aggregate(left, right)[:, 0].double()
    sums = states.new_zeros(group.order, states.shape[1]).index_add_(0, products[:, 1], states)
    counts = products[:, 1].bincount(minlength=group.order).clamp(min=1)
    return {
        "leaf": shares(group, leaves),
        "state": shares(group, sums / counts.unsqueeze(1)),
    }


def probe_metrics(
    model: nn.Module, group: Group | str, length: int, trained_length: int, words: int
) -> list[tuple[str, float, dict[str, float | str]]]:
    """The measurements as metrics of a record: name, value, axes.

    Args:
        model: a ``ScanLMForCausalLM``.
        group, length, trained_length, words: as of ``by_depth``.

    Returns:
        ``state_<column>`` by ``depth`` for the columns of ``by_depth``, means over the prefixes of
        that depth; ``state_gain`` by ``size`` of the noise, the mean over all prefixes; with one
        token a chunk the ``code_shares`` as ``leaf_irrep`` and ``state_irrep`` by ``irrep``.
    """
    states = by_depth(model, group, length, trained_length, words)
    means = states.drop(columns=["position", "chunks"]).groupby("depth").mean()
    found: list[tuple[str, float, dict[str, float | str]]] = [
        (f"state_{name}", value, {"depth": float(depth)})
        for name in means
        for depth, value in zip(means.index, means[name].tolist(), strict=True)
    ]
    gains = repair_gain(model, group, length, words=words).groupby("size")["gain"].mean()
    for size, value in zip(gains.index, gains.tolist(), strict=True):
        found.append(("state_gain", value, {"size": float(size)}))
    if _check_scan(model).config.chunk_size == 1:
        for of, used in code_shares(model, group).items():
            for name, share in used.items():  # further digits depend on the order of sums
                found.append((f"{of}_irrep", round(share, 6), {"irrep": name}))
    return found
