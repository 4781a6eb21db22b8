"""One training step of the state-tracking task without work on the host.

Everything a step needs lives on the device: the words are made from the step's number, the
learning rate follows from the stage's step count, and loss and accuracy are summed up there. So on
a GPU the whole step (data, forward, backward, clipping, AdamW, counters) is captured once a stage
as a CUDA graph and replayed; the host looks at the sums every ``log_every`` steps. On a CPU the
same functions simply run.

A graph replays the same kernels on the same addresses. The first steps of a stage are therefore
run eagerly on the run's own stream (they are ordinary training steps): kernels get tuned, the
optimiser's state and the scan's index tensors are made, and only then is the step captured.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scanlm import baselines
from scanlm.baselines import ModelEntry, load_entry
from scanlm.clipped_adamw import adamw_step, clipping_factor
from scanlm.compiling import as_compiled, compile_model
from scanlm.curriculum_settings import Stage, StateTrackingSettings
from scanlm.dropout import no_dropout, set_dropout
from scanlm.errors import ScanLMError
from scanlm.groups import get_group, word_batch
from scanlm.length_evaluation import check_lengths, word_logits

EAGER_STEPS = 3


def build_model(settings: StateTrackingSettings, device: torch.device | str = "cpu") -> nn.Module:
    """The run's model with the group's order as vocabulary, initialised from the run's seed.

    Raises:
        ScanLMError: an unknown model or field (with the nearest), a value out of range, stages
            beyond the model's positions, dropout of a model without, or a T1 that cannot begin as
            T2.
    """
    if settings.model == "scan":
        entry = ModelEntry(id="scan", family="scanlm", config=settings.config)
    else:
        own = load_entry(settings.model)
        entry = own.model_copy(update={"config": {**own.config, **settings.config}})
    # made on a CPU, GLA and Gated DeltaNet are plain torch: their fused kernels compute in blocks
    # of 64 tokens, mostly padding in words this short, and not in float32
    place = "meta" if torch.device(device).type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = baselines.build_model(entry, get_group(settings.group).order, place)
    check_lengths(model, [s.length for s in settings.stages])
    rate = max(stage.dropout for stage in settings.stages)
    if rate and not any(isinstance(module, nn.Dropout) for module in model.modules()):
        raise no_dropout(model, rate, "set stages.*.dropout to 0")
    if any(stage.t1_from_t2 for stage in settings.stages):
        layers = [len(model.get_submodule(part).h) for part in ("t1", "t2")]  # type: ignore[arg-type]
        if layers[0] != layers[1]:
            raise ScanLMError(
                f"t1_from_t2 copies T2 to T1, but T1 has {layers[0]} layers and T2 {layers[1]}: "
                "set config.t1_layers and config.t2_layers to one number, or t1_from_t2 to false"
            )
    return model.to(device)  # type: ignore[arg-type]


def check_model(settings: StateTrackingSettings) -> None:
    """Refuse a model that cannot be built; nothing is drawn and no memory is taken.

    Raises:
        ScanLMError: as ``build_model``.
    """
    build_model(settings, "meta")


def learning_rate(stage: Stage, step: Tensor) -> Tensor:
    """The rate of a stage's step (a float64 scalar counting from 0), on the step's device."""
    warm = ((step + 1) / stage.warmup).clamp(max=1.0) if stage.warmup else torch.ones_like(step)
    left = max(stage.max_steps - stage.warmup, 1)
    done = ((step - stage.warmup) / left).clamp(0.0, 1.0)
    if stage.schedule == "linear":
        warm = warm * (1 - done)
    elif stage.schedule == "cosine":
        warm = warm * (0.5 * (1 + torch.cos(math.pi * done)))
    return stage.lr * warm


def folded_logits(model: Any, x: Tensor, rows: int) -> Tensor:
    """A scan model's logits when the first ``rows`` words are folded leaf by leaf.

    ``prefix(i) = T1(prefix(i - 1), x_(i-1))``: the same product under another bracketing. At
    length L such a tree is L - 1 deep, as deep as that of a far longer word under the balanced
    scan, so T1 learns to work on its own outputs without longer words.

    Args:
        model: a ``ScanLMForCausalLM``.
        x: ``(b, t)`` tokens.
        rows: how many words to fold; the others use the scan's tree.

    Returns:
        ``(b, t, order)``.
    """
    c = model.config.chunk_size
    leaves = model.embed(x)
    m = (x.shape[1] - 1) // c  # chunks that some later chunk reads
    if m < 1:
        return model.lm_head(model.predict(leaves, None))
    chunks = leaves[:, : m * c].unflatten(1, (m, c))
    state = chunks[:rows, 0]
    folded = [state]
    for i in range(1, m):
        state = model.aggregate(state, chunks[:rows, i])
        folded.append(state)
    parts = [torch.stack(folded, dim=1)]
    if rows < x.shape[0]:
        parts.append(model.prefix_states(chunks[rows:]))
    dtype = parts[-1].dtype
    prefixes = torch.cat([part.to(dtype) for part in parts])
    return model.lm_head(model.predict(leaves, prefixes))


def noisy(states: Tensor, largest: float) -> Tensor:
    """States ``(..., d)`` with random noise that leaves their norms as they are.

    The noise has ``u * largest`` times a state's norm, u uniform in [0, 1) for each state. Kept
    to its norm, a state is weakened by what the noise takes: as the states of deep trees are.
    """
    norm = states.norm(dim=-1, keepdim=True)
    size = largest * torch.rand_like(norm) * norm / math.sqrt(states.shape[-1])
    disturbed = states + size * torch.randn_like(states)
    return disturbed * (norm / disturbed.norm(dim=-1, keepdim=True))


def step_seed(seed: int, step: int) -> int:
    """What torch's generator is seeded with before a step, of seeds and steps below 2**32.

    It takes 64 bits, but on a CPU uses the lowest 32 alone, so these are the step's with some
    changed by the seed: other seeds have other masks of dropout in a step.
    """
    return seed << 32 | (step ^ seed * 0x9E3779B1 % 2**32)  # odd: a bijection of seeds


class Learner:
    """A model in training: parameters, optimiser and counters, all on one device.

    Args:
        settings: of the run.
        device: where everything is.
        capture: on a GPU, replay a step as one CUDA graph.
    """

    def __init__(
        self, settings: StateTrackingSettings, device: torch.device, capture: bool = True
    ) -> None:
        self.settings, self.device, self.capture = settings, device, capture
        self.group = get_group(settings.group)
        self.model = build_model(settings, device)
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.halved = self._halve_products()
        exact = {id(weight): module.weight for module, weight in self.halved.values()}
        self.computing = [exact.get(id(p), p) for p in self.parameters]  # these get gradients
        self._optimise = adamw_step
        if settings.compile:
            compile_model(self.model, many_shapes=True)
            self._optimise = torch.compile(adamw_step, dynamic=False)
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(  # its settings and state; adamw_step takes the steps
            self.parameters,
            lr=self.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        for p in self.parameters:  # what its own step() makes first
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.ema = [p.detach().clone() for p in self.parameters] if settings.ema else []
        # the device's counters and the host's copies of them
        self.step_on_device = torch.zeros((), dtype=torch.int64, device=device)
        self.stage_step_on_device = torch.zeros((), dtype=torch.float64, device=device)
        self.step = 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, accuracy
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stage: Stage | None = None
        self.used_graph = False

    def _halve_products(self) -> dict[str, tuple[Conv1D, nn.Parameter]]:
        """Cast the matrices of T1 and T2 once a step instead of in each of T1's calls.

        Compiled code casts where it multiplies: T1's weights, and then their gradients, once a
        level of the tree, which reads and writes as much as the states do. Autocast's own cache of
        casts, which compiled code does not use, has the same effect as this one: gradients of the
        levels are summed up in bfloat16.

        Returns:
            By name the modules that hold a bfloat16 copy from now on, and what is optimised.
        """
        if self.settings.precision != "bf16" or self.settings.model != "scan":
            return {}
        halved = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Conv1D):
                exact = module.weight
                module.weight = nn.Parameter(exact.detach().bfloat16())
                halved[f"{name}.weight"] = module, exact
        return halved

    def begin_stage(self, stage: Stage, stage_step: int = 0) -> None:
        """Prepare a stage; nothing is captured before its first steps have run."""
        self.stage = stage
        self.stage_step_on_device.fill_(stage_step)
        self.step_on_device.fill_(self.step)
        if stage.t1_from_t2 and stage_step == 0:
            self._copy_t2_to_t1()
        set_dropout(self.model, stage.dropout, self.settings.dropout_in)
        if self.settings.model == "scan":  # in T1's own kernels
            noise = partial(noisy, largest=stage.state_noise) if stage.state_noise else None
            self.model.get_submodule("t1").disturb = noise  # type: ignore[assignment]
        self.hits = torch.zeros(stage.length + 1, dtype=torch.int64, device=self.device)
        self._eager_left = EAGER_STEPS
        self._step_graph: Any = None
        self._validation_graph: Any = None
        self._logits: Callable[[Tensor], Tensor] = self._plain_logits
        share = self.settings.left_fold if stage.length >= self.settings.fold_from_length else 0
        rows = round(share * stage.batch)
        if rows:
            self._logits = lambda x: folded_logits(self.model, x, rows)
        if self.stream is not None:  # streams do not wait for the default one by themselves
            self.stream.wait_stream(torch.cuda.default_stream(self.device))

    @torch.no_grad()
    def _copy_t2_to_t1(self) -> None:
        """T2's weights, and their averages, in T1; T1's state in the optimiser stays."""
        places = {name: i for i, (name, _) in enumerate(self.model.named_parameters())}
        inside = [name for name, _ in self.model.get_submodule("t1").named_parameters()]
        for tensors in filter(None, (self.parameters, self.computing, self.ema)):
            for name in inside:
                tensors[places[f"t1.{name}"]].copy_(tensors[places[f"t2.{name}"]])

    def _plain_logits(self, x: Tensor) -> Tensor:
        return word_logits(self.model, x)

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def train_step(self) -> None:
        """One step; reads and writes tensors only, so that it can be captured."""
        stage, settings = self.stage, self.settings
        assert stage is not None
        x, y = word_batch(
            self.group,
            stage.batch,
            stage.length,
            settings.seed,
            self.step_on_device,
            self.device,
            stories=settings.stories,
            generators=stage.generators,
        )
        self.lr.copy_(learning_rate(stage, self.stage_step_on_device))
        with self._autocast():
            logits = self._logits(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        self._forget_gradients()
        loss.backward()
        self._update()
        with torch.no_grad():
            if self.ema:
                torch._foreach_lerp_(self.ema, self.parameters, 1 - settings.ema)
            accuracy = (logits.argmax(-1) == y).double().mean()
            self.sums += torch.stack([loss.detach().double(), accuracy])
            self.step_on_device += 1
            self.stage_step_on_device += 1

    def _forget_gradients(self) -> None:
        for computing in self.computing:
            computing.grad = None

    def _update(self) -> None:
        """Clip and optimise, and renew the copies; weights without a gradient stay as they are."""
        pairs = zip(self.parameters, self.computing, strict=True)
        used = [(weight, computing) for weight, computing in pairs if computing.grad is not None]
        gradients = [computing.grad for _, computing in used if computing.grad is not None]
        state = [self.optimizer.state[weight] for weight, _ in used]
        self._optimise(
            [weight for weight, _ in used],
            gradients,
            [None if computing is weight else computing.detach() for weight, computing in used],
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [s["step"] for s in state],
            clipping_factor(gradients, self.settings.clip),
            *(self.optimizer.param_groups[0][k] for k in ("lr", "betas", "weight_decay", "eps")),
        )

    @torch.no_grad()
    def validate_step(self) -> None:
        """Count right answers by position, and whole words, on new words; capturable."""
        assert self.stage is not None
        words, length = self.settings.validation_sequences, self.stage.length
        x, y = word_batch(
            self.group,
            words,
            length,
            self.settings.seed,
            self.step_on_device,
            self.device,
            "validation",
        )
        with self._autocast():
            right = self._plain_logits(x).argmax(-1) == y
        self.hits[:length] = right.sum(0)
        self.hits[length] = right.all(1).sum()

    def advance(self, steps: int) -> None:
        """Train; on a GPU this only queues work on the run's stream."""
        if self.stream is None:
            for _ in range(steps):
                # dropout and noise from the step alone, whatever ran in between
                torch.default_generator.manual_seed(step_seed(self.settings.seed, self.step))
                self._eager(self.train_step)
                self.step += 1
            return
        with torch.cuda.stream(self.stream):
            for _ in range(steps):
                if self._eager_left or not self.capture:
                    self._eager_left = max(self._eager_left - 1, 0)
                    self._eager(self.train_step)
                else:
                    if self._step_graph is None:
                        self._step_graph = self._capture(self.train_step, training=True)
                    self._step_graph()
                self.step += 1

    def validate(self) -> None:
        """Queue one validation; read it with ``read``."""
        if self.stream is None:
            self._eager(self.validate_step, training=False)
            return
        with torch.cuda.stream(self.stream):
            if self._validation_graph is None:
                self._eager(self.validate_step, training=False)
                self._validation_graph = self._capture(self.validate_step, training=False)
            else:
                self._validation_graph()

    def read(self, steps: int) -> tuple[float, float, list[float], float]:
        """Wait for the queued work and take its results.

        Returns:
            Mean loss and accuracy of the last ``steps`` training steps, validation accuracy of
            each position, and of whole words.
        """
        if self.stream is not None:
            self.stream.synchronize()
        loss, accuracy = (self.sums / steps).tolist()
        shares = (self.hits.double() / self.settings.validation_sequences).tolist()
        self.sums.zero_()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).synchronize()
        return loss, accuracy, shares[:-1], shares[-1]

    def _eager(self, function: Callable[[], None], training: bool = True) -> None:
        self.model.train(training)
        with nullcontext() if training else as_compiled():
            function()

    def _capture(self, function: Callable[[], None], training: bool) -> Callable[[], None]:
        """The function as a CUDA graph; where that is not possible, the function itself."""
        self._forget_gradients()
        gc.collect()  # an old graph must not be destroyed while this one is captured
        total = torch.cuda.get_device_properties(self.device).total_memory
        if torch.cuda.memory_reserved(self.device) > total / 2:
            torch.cuda.empty_cache()  # a capture cannot free what old graphs held
        graph = torch.cuda.CUDAGraph()
        try:
            # not torch.cuda.graph, which waits until the device is idle: other runs go on
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._eager(function, training)
            finally:
                graph.capture_end()
        except RuntimeError as error:
            message = str(error).splitlines()[0]
            warnings.warn(
                f"no CUDA graph of this model, steps run eagerly: {message}", stacklevel=2
            )
            return lambda: self._eager(function, training)
        self.used_graph = True
        return graph.replay

    def end(self) -> None:
        """No more steps: free what they held, and take the averaged weights if there are any."""
        self._step_graph = self._validation_graph = None
        self._forget_gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # evaluations cannot use what graphs, also old ones, held
        if self.ema:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.ema)
                for module, exact in self.halved.values():
                    module.weight.copy_(exact)

    def make_exact(self) -> None:
        """After ``end``: the model in float32."""
        for module, exact in self.halved.values():
            module.weight = exact
        self.halved, self.computing = {}, self.parameters

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on, besides its settings."""
        return {
            "step": self.step,
            "model": {
                **self.model.state_dict(),
                **{name: exact.detach() for name, (_, exact) in self.halved.items()},
            },
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for name, (_, exact) in self.halved.items():
                exact.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # loading has replaced the tensor that steps write to
        for average, saved in zip(self.ema, state["ema"], strict=True):
            average.copy_(saved)
