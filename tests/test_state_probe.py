"""What is measured on prefix states, checked on models whose states are known."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from scanlm import ScanLMConfig, ScanLMForCausalLM, trees
from scanlm.errors import ScanLMError
from scanlm.groups import get_group, running_products, word_batch
from scanlm.length_evaluation import evaluate_lengths
from scanlm.representations import components
from scanlm.scan import scan_tree
from scanlm.state_probe import (
    Probe,
    by_depth,
    code_shares,
    depth_at,
    leaf_codes,
    prefix_depth,
    prefix_states,
    probe_metrics,
    product_contrast,
    repair_gain,
)


class Exact(nn.Module):
    """A scan model that multiplies: its state is the one-hot code of the product.

    T1 replaces a state by the code of its greatest entry, so small errors vanish; ``drift`` is
    added to every entry by each T1 node.
    """

    def __init__(self, group: str, drift: float = 0.0) -> None:
        super().__init__()
        self.group, self.drift = get_group(group), drift
        order = self.group.order
        self.config = SimpleNamespace(chunk_size=1, vocab_size=order, position_embedding="chunk")
        self.wte = nn.Embedding(order, order)
        nn.init.eye_(self.wte.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.wte(tokens)

    def aggregate(self, left: Tensor, right: Tensor) -> Tensor:
        product = self.group.table[left.argmax(-1), right.argmax(-1)]
        # the drift of the operands is kept and one more is added
        behind = left.min(-1, keepdim=True).values + right.min(-1, keepdim=True).values
        return self.wte(product) + behind + self.drift

    def prefix_states(self, leaves: Tensor) -> Tensor:
        return scan_tree(lambda pairs: self.aggregate(*pairs.unbind(1)), leaves).prefixes

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.wte(running_products(self.group.table, input_ids)))


def small(**fields: Any) -> ScanLMForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 6, "n_embd": 16, "n_head": 2, "t1_layers": 1, "t2_layers": 1}
    config = ScanLMConfig(**{**shape, "chunk_size": 1, "position_embedding": "chunk"} | fields)
    return ScanLMForCausalLM(config)


def test_depth_is_that_of_the_trace() -> None:
    levels = trees.levels(trees.scan_trace(70))
    for n in range(2, 70):
        # a level is the longest way down to a leaf
        assert prefix_depth(n) == levels[(0, n)], n
    assert prefix_depth(0) == prefix_depth(1) == 0


def test_depth_at_a_position() -> None:
    assert depth_at(1) == depth_at(2) == 0  # no prefix, and one leaf
    assert depth_at(4) == prefix_depth(3) == 2
    assert depth_at(9, chunk_size=4) == prefix_depth(2) == 1


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_states_stand_for_the_products_of_their_tokens(chunk_size: int) -> None:
    group, model = get_group("S3"), small(chunk_size=chunk_size).eval()
    tokens, targets = word_batch(group, 4, 12, seed=0)
    states, products = prefix_states(model, group, tokens)
    m = (12 - 1) // chunk_size
    assert states.shape == (4, m, chunk_size, 16)
    for i in range(m):
        assert torch.equal(products[:, i], targets[:, (i + 1) * chunk_size - 1])
    # the first state is the first chunk's leaf
    assert torch.equal(states[:, 0], model.embed(tokens[:, :chunk_size]))


def test_a_probe_separates_what_is_linearly_separable_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    noise = torch.randn(600, 8, generator=generator)
    readable = noise + 12 * torch.eye(3, 8)[labels]
    probe = Probe(readable[:400], labels[:400], classes=3)
    assert (probe.predict(readable[400:]) == labels[400:]).float().mean() > 0.99
    # the parity of two signs is in the state, but on no side of a plane
    signs = torch.randint(2, (600, 2), generator=generator)
    parity = signs.sum(1) % 2
    hidden = torch.cat([2.0 * signs - 1, noise], dim=1)
    probe = Probe(hidden[:400], parity[:400], classes=2)
    assert (probe.predict(hidden[400:]) == parity[400:]).float().mean() < 0.65


def test_an_exact_model_has_no_errors_and_no_distance() -> None:
    table = by_depth(Exact("S3"), "S3", length=40, trained_length=8, words=20)
    assert list(table["position"]) == list(range(2, 41))
    assert list(table["depth"]) == [prefix_depth(i) for i in range(1, 40)]
    for column in ("error", "probe_error", "nearest_error", "distance", "distance_right"):
        assert (table[column] == 0).all(), column


def test_drift_is_seen_as_distance_that_grows_with_the_nodes() -> None:
    table = by_depth(Exact("S3", drift=0.01), "S3", length=33, trained_length=8, words=10)
    nodes = table["chunks"] - 1  # each adds its drift once
    # 6 entries off by 0.01 a node; two one-hot codes are sqrt(2) apart
    expected = nodes * 0.01 * (6 / 2) ** 0.5
    torch.testing.assert_close(
        torch.tensor(table["distance"].to_numpy()), torch.tensor(expected.to_numpy()), atol=1e-5,
        rtol=0,
    )  # fmt: skip


def test_untrained_models_are_wrong_and_left_as_they_were() -> None:
    model = small().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = by_depth(model, "S3", length=20, trained_length=6, words=40)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(table["position"]) == list(range(2, 21))
    assert table["error"].mean() > 0.5
    again = by_depth(model, "S3", length=20, trained_length=6, words=40)
    assert table.equals(again)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: by_depth(model, "S3", length=8, trained_length=6, words=4),
        lambda model: repair_gain(model, "S3", length=8, words=4),
        lambda model: product_contrast(model, "S3", words=4),
        lambda model: code_shares(model, "S3"),
        lambda model: evaluate_lengths(model, "S3", [4], sequences=4),
    ],
)
def test_an_error_leaves_the_mode(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    model = small().train()
    model.t2.eval()  # every part has its own
    monkeypatch.setattr(model.t1, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(model)
    assert model.training
    assert model.t1.training
    assert not model.t2.training


def test_batches_do_not_change_the_measurement() -> None:
    model = small().eval()
    whole = by_depth(model, "S3", length=8, trained_length=4, words=30)
    parts = by_depth(model, "S3", length=8, trained_length=4, words=30, batch_tokens=80)
    pd.testing.assert_frame_equal(whole, parts)


def test_larger_chunks_have_no_leaf_of_an_element() -> None:
    model = small(chunk_size=3)
    table = by_depth(model, "S3", length=13, trained_length=8, words=10)
    assert list(table["position"]) == [4, 7, 10, 13]
    assert "distance" not in table
    with pytest.raises(ScanLMError, match=r"chunk_size=3: a leaf is the state of several"):
        leaf_codes(model)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_gain_of_a_known_operator(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(chunk_size=chunk_size)
    # the left operand and what is twice as far: relative errors are kept
    monkeypatch.setattr(model, "aggregate", lambda left, right: 2 * left)
    kept = repair_gain(model, "S3", 10, sizes=(0.1, 0.5), words=5)
    torch.testing.assert_close(
        torch.tensor(kept["gain"].to_numpy()), torch.ones(len(kept)).double()
    )
    monkeypatch.setattr(model, "aggregate", lambda left, right: right)
    gone = repair_gain(model, "S3", 10, words=5)
    assert (gone["gain"] == 0).all()


def test_contrast_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(model: Any, group: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Products stand 2 along an axis each; half of the words lie 1 off to either side."""
        products = torch.arange(len(tokens)).div(2, rounding_mode="floor") % 6
        codes = torch.cat([2 * torch.eye(6)[products], torch.ones(len(tokens), 1)], dim=1)
        codes[::2, -1] = -1
        return codes[:, None, None].expand(-1, 64, -1, -1), products[:, None].expand(-1, 64)

    monkeypatch.setattr("scanlm.state_probe.prefix_states", states)
    found = product_contrast(Exact("S3"), "S3", words=10, chunks=(2, 64))
    assert found == pytest.approx({2: 8**0.5, 64: 8**0.5})


def test_contrast_of_a_model_is_that_of_its_states() -> None:
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=2, n_embd=8, n_head=2, chunk_size=2))
    found = product_contrast(model, "Z2", words=64, chunks=(1, 4))
    assert list(found) == [1, 4]
    assert model.training
    model.eval()
    tokens, _ = word_batch(get_group("Z2"), 64, 9, stream="test")
    states, products = prefix_states(model, get_group("Z2"), tokens)
    first, second = (states[products[:, 3] == k, 3].flatten(1) for k in (0, 1))
    off = [(x - x.mean(0)).norm(dim=1) for x in (first, second)]
    apart = (first.mean(0) - second.mean(0)).norm() / torch.cat(off).mean()
    assert found[4] == pytest.approx(apart.item(), rel=1e-4)


def test_a_record_keeps_the_means_of_a_depth_and_of_a_size() -> None:
    model = Exact("S3", drift=0.01)
    found = probe_metrics(model, "S3", length=33, trained_length=8, words=10)
    table = by_depth(model, "S3", length=33, trained_length=8, words=10)
    kept = {(name, axes.get("depth")): value for name, value, axes in found}
    columns = [name for name in table if name not in ("position", "chunks", "depth")]
    codes = ("leaf_irrep", "state_irrep")
    assert (
        len({k for k in kept if k[0] not in codes}) == len(columns) * table["depth"].nunique() + 1
    )
    for name in columns:
        at = table[table["depth"] == 3][name].mean()
        assert kept[f"state_{name}", 3] == pytest.approx(at), name
    gains = {axes["size"]: value for name, value, axes in found if name == "state_gain"}
    rows = repair_gain(model, "S3", 33, words=10)
    assert gains == pytest.approx(rows.groupby("size")["gain"].mean().to_dict())
    for of in codes:  # codes at right angles use every representation by its number of dimensions
        used = {axes["irrep"]: value for name, value, axes in found if name == of}
        assert used == pytest.approx({"1'": 1 / 5, "2": 4 / 5}, abs=1e-6)


def test_shares_are_of_leaves_and_of_what_t1_makes_of_two() -> None:
    class Signs(Exact):
        def aggregate(self, left: Tensor, right: Tensor) -> Tensor:
            sign = components("S3")[1].character.float()
            return sign[super().aggregate(left, right).argmax(-1)].unsqueeze(-1)

    found = code_shares(Signs("S3"), "S3")
    assert found["leaf"] == pytest.approx({"1'": 1 / 5, "2": 4 / 5})
    assert found["state"] == pytest.approx({"1'": 1, "2": 0})
    with pytest.raises(ScanLMError, match="chunk_size=2"):
        code_shares(small(chunk_size=2), "S3")


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(ScanLMError, match="Linear has no prefix states"):
        prefix_states(nn.Linear(2, 2), "S3", torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ScanLMError, match="words of 3 tokens are one chunk of chunk_size=4"):
        prefix_states(small(chunk_size=4), "S3", torch.zeros(1, 3, dtype=torch.int64))
