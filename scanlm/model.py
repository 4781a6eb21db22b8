"""TransformerScanModel: a GPT-2 whose long-range memory is a prefix scan over chunks.

The Transformer instance of Prefix-Scannable Models (Yau et al., arXiv 2506.10918, section 4). A
sequence is cut into chunks of c tokens, and three parts do the work:

    T0  embeds tokens: the c embeddings of chunk i are its leaf state x_i
    T1  aggregates two states: blocks without causal mask over [left ; right], the last c outputs
    T2  predicts: causal blocks over [prefix(i) ; x_i], the outputs at x_i go to the head

    prefix(1) = x_0,   prefix(2) = T1(x_0, x_1),   prefix(3) = T1(T1(x_0, x_1), x_2),   ...

with the tree of ``scanlm.scan``. So a token reads its own chunk and the state of everything before
it. A whole sequence is evaluated level by level of the tree (training, prefill), a stream with the
binary counter (generation); both compute the same function.

Shapes: ``b`` sequences, ``t`` tokens, ``c`` = chunk_size, ``d`` = n_embd, ``v`` = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from scanlm.cache import RaggedScanCache, ScanCache
from scanlm.config import ScanLMConfig
from scanlm.errors import ScanLMError
from scanlm.generation import (
    NO_SKIPPING,
    StateGenerationMixin,
    begins_state,
    check_continuation,
    check_input_shape,
    check_logits_to_keep,
    check_mask_shape,
    check_tokens,
    mask_edges,
    readable,
    recomputes,
)
from scanlm.gpt2 import PrefixEmbedding, Stack, init_weights
from scanlm.loss import linear_cross_entropy, next_tokens
from scanlm.scan import lowest_bit, scan_tree, sequential_scan

__all__ = ["ScanLMConfig", "ScanLMForCausalLM"]

AnyCache = ScanCache | RaggedScanCache


class ScanLMForCausalLM(PreTrainedModel, StateGenerationMixin):
    """A causal language model of transformers, trained and generated from as any other.

    Example:
        >>> model = ScanLMForCausalLM(ScanLMConfig.preset("tiny", vocab_size=257))
        >>> out = model(input_ids, labels=input_ids)      # out.loss, out.logits (b, t, v)
        >>> model.generate(input_ids, max_new_tokens=100)
    """

    config: ScanLMConfig
    config_class = ScanLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # the counter cannot be rolled back, so no assisted decoding
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # noqa: RUF012

    def __init__(self, config: ScanLMConfig) -> None:
        super().__init__(config)
        c = config
        positions = c.n_positions if c.position_embedding == "absolute" else c.chunk_size
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(positions, c.n_embd)
        self.leaf_norm = (
            nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon) if c.leaf_norm else nn.Identity()
        )
        self.wse = PrefixEmbedding(c) if c.prefix_embedding else None
        self.drop = nn.Dropout(c.embd_pdrop)
        self.t1 = Stack(c, c.t1_layers, causal=c.t1_causal)
        self.t2 = Stack(c, c.t2_layers, causal=True)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.linear_cross_entropy = linear_cross_entropy  # compiled on its own: scanlm.compiling
        self.half_residual = False  # under autocast: the residual stream in its precision too
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value  # type: ignore[assignment]

    @classmethod
    def from_gpt2(cls, gpt2: Any, chunk_size: int = 64, **overrides: Any) -> ScanLMForCausalLM:
        """T0, T2 and the head from a GPT-2; T1 is new and must be trained.

        Args:
            gpt2: a ``GPT2LMHeadModel``, or the name or folder of one.
            chunk_size: tokens per chunk.
            overrides: other fields of the configuration, e.g. ``t1_layers=2``.

        Returns:
            A model that equals the GPT-2 on sequences of at most ``2 * chunk_size`` tokens (with
            ``position_embedding="chunk"``: ``chunk_size``), since the prefix of the second chunk
            is the first one's embeddings. It has no ``leaf_norm``, which GPT-2 has not, unless
            asked for.

        Raises:
            ScanLMError: a GPT-2 whose attention scores are scaled in another way; an override
                that is no field, out of range, or of a size that the GPT-2's weights do not have.
        """
        ScanLMConfig.check_names(overrides)
        if isinstance(gpt2, str):
            from transformers import GPT2LMHeadModel

            gpt2 = GPT2LMHeadModel.from_pretrained(gpt2)
        for name, usual in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
        ):
            if getattr(gpt2.config, name) is not usual:
                raise ScanLMError(
                    f"this GPT-2 has {name}={getattr(gpt2.config, name)}, which T2's attention "
                    f"does not do: use one with {name}={usual}"
                )
        names = (
            "vocab_size n_positions n_embd n_head n_inner activation_function resid_pdrop "
            "embd_pdrop attn_pdrop layer_norm_epsilon initializer_range tie_word_embeddings "
            "bos_token_id eos_token_id pad_token_id"
        )
        fields = {name: getattr(gpt2.config, name) for name in names.split()}
        fields |= {"t2_layers": gpt2.config.n_layer, "leaf_norm": False, "chunk_size": chunk_size}
        config = ScanLMConfig(**{**fields, **overrides})
        cls._check_gpt2_sizes(config, gpt2.config)
        model = cls(config).to(gpt2.dtype)
        model.wte.load_state_dict(gpt2.transformer.wte.state_dict())
        positions = gpt2.transformer.wpe.weight[: model.wpe.num_embeddings]
        model.wpe.load_state_dict({"weight": positions})
        model.t2.h.load_state_dict(gpt2.transformer.h.state_dict())
        model.t2.ln_f.load_state_dict(gpt2.transformer.ln_f.state_dict())
        model.lm_head.load_state_dict(gpt2.lm_head.state_dict())
        return model.eval()

    @staticmethod
    def _check_gpt2_sizes(config: ScanLMConfig, gpt2: Any) -> None:
        def inner(c: Any) -> int:
            return 4 * c.n_embd if c.n_inner is None else c.n_inner

        for name, mine, its in (
            ("vocab_size", config.vocab_size, gpt2.vocab_size),
            ("n_embd", config.n_embd, gpt2.n_embd),
            ("n_head", config.n_head, gpt2.n_head),
            ("n_inner", inner(config), inner(gpt2)),
            ("t2_layers", config.t2_layers, gpt2.n_layer),
        ):
            if mine != its:
                raise ScanLMError(
                    f"{name}={mine} does not fit the GPT-2, whose weights are of {name}={its}: "
                    "leave it out"
                )
        absolute = config.position_embedding == "absolute"
        name = "n_positions" if absolute else "chunk_size"
        if (positions := getattr(config, name)) > gpt2.n_positions:
            raise ScanLMError(
                f"{name}={positions} needs more positions than the GPT-2's {gpt2.n_positions}: "
                "choose at most as many"
            )

    # T0, T1 and the tree

    def embed(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """T0: tokens ``(b, t)``, the first at position ``start``, to embeddings ``(b, t, d)``."""
        stop = start + input_ids.shape[1]
        positions = torch.arange(start, stop, device=input_ids.device)
        if self.config.position_embedding == "chunk":
            positions = positions % self.config.chunk_size
        return self.leaves(self.wte(input_ids), self.wpe(positions))

    def leaves(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings ``(b, t, d)`` and ``(t, d)`` to leaves, in the residual stream's precision."""
        x = self.drop(self.leaf_norm(tokens + positions))
        if self.half_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def aggregate(self, left: Tensor, right: Tensor) -> Tensor:
        """T1: two states ``(n, c, d)`` to the state of their concatenated chunks."""
        return self.aggregate_pairs(torch.stack([left, right], dim=1))

    def aggregate_pairs(self, pairs: Tensor) -> Tensor:
        """T1 of states that lie side by side: ``(n, 2, c, d)`` to ``(n, c, d)``."""
        return self.t1([pairs.flatten(1, 2)], [pairs.shape[2]])[0]

    def prefix_states(self, leaves: Tensor) -> Tensor:
        """States of the first 1, 2, ... m chunks: leaves ``(b, m, c, d)`` to ``(b, m, c, d)``."""
        if self.config.train_mode == "sequential":
            chunks = [*leaves.unbind(1), leaves[:, 0]]  # the last leaf enters no exclusive prefix
            prefixes = sequential_scan(self.aggregate, chunks)[1:]
            return torch.stack([p for p in prefixes if p is not None], dim=1)
        return scan_tree(self.aggregate_pairs, leaves).prefixes

    # T2

    def mark(self, prefixes: Tensor) -> Tensor:
        """Prefix states as T2 reads them: with the prefix embedding, if there is one."""
        if self.wse is None:
            return prefixes
        return prefixes + self.wse.weight.to(prefixes.dtype)

    def predict(self, x: Tensor, prefixes: Tensor | None, skip: int = 0) -> Tensor:
        """T2 over all chunks at once.

        Args:
            x: embeddings ``(b, t, d)`` of whole chunks, the last of which may be partial.
            prefixes: ``(b, m, c, d)``: the states before the last m chunks of x. Either all
                chunks have one or all but the first (which then has no past).
            skip: leave out this many chunks at the start.

        Returns:
            Hidden states ``(b, t - skip * c, d)``.
        """
        b, _, d = x.shape
        hidden = [h.reshape(b, -1, d) for h in self.t2(*self.windows(x, prefixes, skip))]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)

    def windows(
        self, x: Tensor, prefixes: Tensor | None, skip: int
    ) -> tuple[list[Tensor], list[int]]:
        """What T2 reads, by length, and how many positions of each are wanted; see ``predict``."""
        _, t, _ = x.shape
        c = self.config.chunk_size
        full, rest = divmod(t, c)
        prefixes = None if prefixes is None else self.mark(prefixes)
        bare = 1 if prefixes is None or prefixes.shape[1] < full + (rest > 0) else 0
        windows, keep = [], []
        first = max(skip, bare)
        before = min(first * c, t)
        body = max(full - first, 0) * c
        alone, chunks, partial = x.split([before, body, t - before - body], dim=1)
        if bare and not skip:
            windows.append(alone)
            keep.append(before)
        if prefixes is not None and body:
            chunks = chunks.unflatten(1, (-1, c))
            pairs = torch.cat([prefixes[:, first - bare : full - bare], chunks], dim=2)
            windows.append(pairs.flatten(0, 1))
            keep.append(c)
        if prefixes is not None and rest:
            windows.append(torch.cat([prefixes[:, full - bare], partial], dim=1))
            keep.append(rest)
        return windows, keep

    # Whole sequences and streams

    def _whole(self, input_ids: Tensor) -> Tensor:
        """Hidden states ``(b, t, d)`` of sequences that are complete: the training path."""
        c = self.config.chunk_size
        x = self.embed(input_ids)
        m = (x.shape[1] - 1) // c  # chunks that some later chunk reads
        if m == 0:
            return self.predict(x, None)
        return self.predict(x, self.prefix_states(x[:, : m * c].unflatten(1, (m, c))))

    def _stream(self, input_ids: Tensor, cache: ScanCache, wanted: int) -> Tensor:
        """Hidden states of new tokens ``(b, t)``; the last ``wanted`` of them at least."""
        c = self.config.chunk_size
        x = self.embed(input_ids, cache.length)
        cache.check(self.aggregate, x)
        if (cache.fill or x.shape[1] % c) and recomputes(self):
            raise ScanLMError(
                f"past_key_values holds {cache.fill} tokens of a chunk and the input is "
                f"{x.shape[1]} tokens: gradient checkpointing needs whole chunks of {c}, since "
                "the backward pass would add a chunk's keys to the state again"
            )
        cache.length += x.shape[1]
        hidden = []
        if cache.fill:
            begun, x = x[:, : c - cache.fill], x[:, c - cache.fill :]
            hidden.append(self._advance(begun, cache))
        while full := x.shape[1] // c:
            # the scan of a run of chunks continues the tree only up to the next larger subtree
            seen = cache.counter.num_chunks
            n = min(full, lowest_bit(seen)) if seen else full
            run, x = x[:, : n * c], x[:, n * c :]
            hidden.append(self._extend(run, cache, max(wanted - x.shape[1], 0)))
        if x.shape[1]:
            hidden.append(self._advance(x, cache))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)

    def _advance(self, x: Tensor, cache: ScanCache) -> Tensor:
        """Some tokens ``(b, s, d)`` of one chunk through T2, keeping its keys and values."""
        begins = cache.chunk is None
        prefix = cache.counter.prefix if begins else None
        window = x if prefix is None else torch.cat([self.mark(prefix), x], dim=1)
        (hidden,) = self.t2([window], [x.shape[1]], cache.window)
        cache.chunk = x if cache.chunk is None else torch.cat([cache.chunk, x], dim=1)
        if cache.fill == self.config.chunk_size:
            cache.counter.push(cache.chunk)
            cache.start_chunk()
        return hidden

    def _extend(self, x: Tensor, cache: ScanCache, wanted: int) -> Tensor:
        """Several whole chunks ``(b, n c, d)`` in parallel, read into the counter."""
        c = self.config.chunk_size
        counter, initial = cache.counter, cache.counter.prefix
        tree = scan_tree(self.aggregate_pairs, x.unflatten(1, (-1, c)), initial)
        n = tree.prefixes.shape[1]
        if counter.num_chunks and lowest_bit(counter.num_chunks) == n:
            counter.push(tree.trees[-1][:, 0].clone(), height=n.bit_length() - 1)
        else:
            counter.extend(tree)
        prefixes = tree.prefixes[:, :-1]
        if initial is not None:
            prefixes = torch.cat([initial.unsqueeze(1), prefixes], dim=1)
        skip = min((n * c - wanted) // c, n)
        if skip == n:
            return x[:, :0]
        return self.predict(x, prefixes if prefixes.shape[1] else None, skip)

    def _hidden(self, input_ids: Tensor, cache: AnyCache | None, wanted: int) -> Tensor:
        """Hidden states ``(b, >= wanted, d)`` that end at the last token."""
        if cache is None:
            return self._whole(input_ids)
        if isinstance(cache, ScanCache):
            return self._stream(input_ids, cache, wanted)
        cache.check_batch(input_ids.shape[0])
        cache.columns += input_ids.shape[1]
        hidden = input_ids.new_zeros((*input_ids.shape, self.config.n_embd), dtype=self.dtype)
        for rows, part in cache.parts:
            hidden[rows] = self._stream(input_ids[rows], part, input_ids.shape[1]).to(hidden.dtype)
        return hidden

    def _ragged(
        self, input_ids: Tensor, lengths: Tensor, cached: bool
    ) -> tuple[Tensor, RaggedScanCache | None]:
        """A left-padded batch ``(b, t)``: hidden states (zeros at padding) and, if asked for, its
        cache."""
        t = input_ids.shape[1]
        hidden = input_ids.new_zeros((*input_ids.shape, self.config.n_embd), dtype=self.dtype)
        parts = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            part = self.new_cache() if cached else None
            states = self._hidden(input_ids[rows, t - length :], part, length)
            hidden[rows, t - length :] = states.to(hidden.dtype)
            if part is not None:
                parts.append((rows, part))
        return hidden, RaggedScanCache(parts, columns=t) if cached else None

    def new_cache(self) -> ScanCache:
        """An empty streaming state of this model."""
        return ScanCache(self.aggregate, self.config.t2_layers)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: AnyCache | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[Tensor]:
        """Generate token after token, each in the same time (``scanlm.decoder``).

        The prompt is read in parallel. On a GPU the tokens come from captured graphs and the
        host does not wait for them: it waits where a token is looked at. Stop by leaving the loop.

        Example:
            >>> for token in model.stream(prompt, temperature=0.8, top_p=0.95):
            ...     print(tokenizer.decode(token), end="", flush=True)

        Args:
            input_ids: the prompt ``(b, t)``, or what follows ``past_key_values``.
            attention_mask: ``(b, t)``, zeros where rows are padded at the left.
            past_key_values: state to continue from. It is advanced in place when the generator
                ends or is closed, and then holds all tokens but the last one yielded.
            max_new_tokens: ``None`` goes on until the positions end, and with
                ``position_embedding="chunk"`` forever.
            temperature, top_k, top_p: see ``scanlm.sampling.Sampling``; the default is greedy.

        Returns:
            A generator of tokens ``(b,)`` on the model's device.

        Raises:
            ScanLMError: as ``forward``, a token outside the vocabulary on any device; more tokens
                than positions; a model in training mode; a sampling parameter out of range. All of
                it before anything is generated.
        """
        from scanlm.decoder import stream

        return stream(
            self,
            input_ids,
            attention_mask,
            past_key_values,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: AnyCache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, and the loss.

        Args:
            input_ids: ``(b, t)`` with any t >= 1; the tokens after those in ``past_key_values``.
            attention_mask: ``(b, past + t)``, zeros for padding. Padding at the left starts a
                sequence later; padding at the right needs no mask, since no past token sees it,
                and is refused where a state is kept, which would go on after it. With a cache that
                has seen tokens the mask of those is ignored: the cache knows.
            past_key_values: state to continue from; it is advanced in place. Feeding a sequence
                in pieces of any sizes gives the logits of feeding it at once. Under gradient
                checkpointing in training the pieces must be whole chunks.
            labels: ``(b, t)``; position i is scored against ``labels[:, i + 1]``, -100 is not
                scored. If nothing is scored the loss is NaN, as in transformers.
            shift_labels: ``(b, t)``, already shifted: position i is scored against entry i. Takes
                precedence over ``labels``.
            use_cache: return a state; by default only if one was passed. Under gradient
                checkpointing in training it is ignored, with a warning, as in transformers.
            logits_to_keep: only the last so many positions' logits (0: all), or their indices.
            return_logits: if False, only the loss is computed, without ever holding all logits
                (training: they would take more memory than the model).
            kwargs: ``num_items_in_batch`` divides the summed loss (gradient accumulation). Others
                may be ``None`` or False, as some callers pass all they know.

        Raises:
            ScanLMError: empty input, a token or label outside the vocabulary (on a GPU, where
                looking at tokens would make every step wait, only ``generate`` and ``stream``
                check their prompts), labels of another shape, a sequence beyond ``n_positions``, a
                mask with holes or (on the CPU) values other than 0 and 1, a cache that does not
                fit, or an empty one with a mask that pads some rows, a negative
                ``logits_to_keep``, an input that it does not know, such as ``position_ids``.
        """
        cache = past_key_values
        self._check_no_others(kwargs)
        self._check_input(input_ids, cache)
        check_logits_to_keep(logits_to_keep)
        t = input_ids.shape[1]
        targets = next_tokens(input_ids, labels, shift_labels, self.config.vocab_size)
        wanted = logits_to_keep if isinstance(logits_to_keep, int) else 0
        asked = t if targets is not None else min(wanted or t, t)
        cached = cache is not None or begins_state(self, use_cache)
        lengths = self._check_mask(input_ids, attention_mask, cache, cached)
        if lengths is not None:
            hidden, cache = self._ragged(input_ids, lengths, cached)
        else:
            cache = self.new_cache() if cached and cache is None else cache
            hidden = self._hidden(input_ids, cache, asked)
        loss, logits = None, None
        if targets is not None:
            loss = self.linear_cross_entropy(
                hidden.flatten(0, 1),
                self.lm_head.weight,
                targets.flatten(),
                kwargs.get("num_items_in_batch"),
            )
        if return_logits:
            kept = slice(-wanted, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    # Checks

    def _check_no_others(self, inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            if value is not None and value is not False and name != "num_items_in_batch":
                known = sorted({*signature(self.forward).parameters} - {"kwargs"})
                raise ScanLMError(
                    f"forward() does not know {name!r} and would do nothing with it: leave it out. "
                    f"Known: {', '.join(known)}."
                )

    def _check_input(self, input_ids: Tensor, cache: AnyCache | None) -> None:
        check_input_shape(input_ids)
        if cache is not None and not isinstance(cache, AnyCache):
            raise ScanLMError(
                f"past_key_values must be a ScanCache of this model, got {type(cache).__name__}"
            )
        past = 0 if cache is None else cache.get_seq_length()
        self._check_length(past + input_ids.shape[1])
        # On a GPU the check would stall every training and decoding step: generate() and stream()
        # check their prompts once.
        if readable(input_ids):
            check_tokens(input_ids, self.config.vocab_size)

    def _check_length(self, length: int) -> None:
        limit = self.config.n_positions
        if self.config.position_embedding == "absolute" and length > limit:
            raise ScanLMError(
                f"a sequence of {length} tokens is longer than n_positions={limit}: shorten it, or "
                'build the model with position_embedding="chunk", which has no limit'
            )

    def _check_mask(
        self, input_ids: Tensor, mask: Tensor | None, cache: AnyCache | None, cached: bool
    ) -> Tensor | None:
        """``_left_padded_lengths`` of sequences that begin; those that go on are not padded.

        Args:
            cached: whether a state is kept, in ``cache`` or in a new one.
        """
        if cache is None or (isinstance(cache, ScanCache) and cache.length == 0):
            lengths = self._left_padded_lengths(input_ids, mask, cached)
            if cache is not None and lengths is not None:
                raise ScanLMError(
                    "past_key_values is an empty ScanCache, whose rows have one length, and "
                    "attention_mask pads some: leave past_key_values out"
                )
            return lengths
        if cache.get_seq_length():
            check_continuation(mask, input_ids)
        return None

    @staticmethod
    def _left_padded_lengths(input_ids: Tensor, mask: Tensor | None, cached: bool) -> Tensor | None:
        """Each row's number of tokens ``(b,)`` if any row is padded at the left.

        Args:
            cached: whether a state is kept: it would go on after padding at the right.
        """
        if mask is None:
            return None
        check_mask_shape(mask, input_ids)
        lengths = mask.sum(1).long()
        if bool((lengths == 0).any()):
            raise ScanLMError("attention_mask hides a whole row: every row needs at least a token")
        falls, rises = mask_edges(mask)
        if cached and bool(falls):
            raise ScanLMError(NO_SKIPPING)
        if not bool(rises):
            return None
        if bool(falls):
            raise ScanLMError(
                "attention_mask must have its zeros at the left of a row (or of every row at the "
                "right): a sequence has no holes"
            )
        return lengths

    # What generate() asks for

    def _validate_generated_length(self, generation_config: Any, *args: Any) -> None:
        super()._validate_generated_length(generation_config, *args)  # type: ignore[misc]
        self._check_length(generation_config.max_length)


AutoModelForCausalLM.register(ScanLMConfig, ScanLMForCausalLM, exist_ok=True)
