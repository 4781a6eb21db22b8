"""Do the fused kernels compute what plain torch computes? ``python -m scanlm.parity`` on a GPU.

GLA and Gated DeltaNet exist twice: flash-linear-attention's fused kernels, and plain torch, which
the CPU tests check against the definitions. Here both get the same weights and tokens. Loss,
logits, gradients and logits of single decoding steps are compared with plain torch in float64. How
far plain torch itself is off in the same precision says what error the precision explains: the
fused model may be ``FACTOR`` times as far off, and ``FLOOR`` more.

Which variant of a kernel runs is chosen by timing, so ``variants`` looks at each of them
(``scanlm.kernel_variants``), in bfloat16.

Errors are relative, ``|x - reference| / |reference|`` over all numbers at once. "tf32" is float32
with products in TF32 in both models, since the fused kernels multiply so whatever torch is told;
"bfloat16" is autocast over float32 weights, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from scanlm.baselines import ModelEntry, load_entry, make_config
from scanlm.errors import ScanLMError
from scanlm.kernel_variants import each_variant, tuned_kernels
from scanlm.records import Run

MODELS = "gla_170M,gla_170M_baseline,gated_deltanet_170M,gated_deltanet_170M_baseline"
PRECISIONS = ("tf32", "bfloat16")
FACTOR = 3.0
FLOOR = {"tf32": 1e-3, "bfloat16": 8e-3}  # a few roundings of a single product
STREAMED = 16  # last tokens that are also fed one by one

# plain configuration -> model; tests put something else in the fused model's place
Build = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Outputs:
    """What one model makes of one batch.

    Attributes:
        loss: nats per token.
        logits: ``(b, t, v)``.
        streamed: ``(b, STREAMED, v)``: logits of the last tokens, fed one by one.
        gradients: of the loss, by parameter.
    """

    loss: float
    logits: Any
    streamed: Any
    gradients: dict[str, Any]


def outputs(model: Any, ids: Any, precision: str = "own") -> Outputs:
    """Loss, logits and gradients of a model in evaluation mode.

    Args:
        model: weights in float32 or float64.
        ids: tokens ``(b, t)``, t > STREAMED.
        precision: one of ``PRECISIONS``, or the weights' own.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return _outputs(model, ids, precision)
    finally:
        torch.set_float32_matmul_precision(before)


def _outputs(model: Any, ids: Any, precision: str) -> Outputs:
    import torch

    model.eval().zero_grad()
    autocast = torch.autocast(
        ids.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"
    )
    with autocast:
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad(), autocast:
        cache = model(input_ids=ids[:, :-STREAMED], use_cache=True).past_key_values
        steps = []
        for token in ids[:, -STREAMED:].split(1, dim=1):
            step = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
    return Outputs(out.loss.item(), out.logits.detach(), torch.cat(steps, 1), gradients)


def compare(reference: Outputs, other: Outputs) -> dict[str, float]:
    """Errors of one model against the reference, by the metric's name.

    Returns:
        ``loss_error`` (nats), ``logits_relative_error``, ``streamed_relative_error`` (against the
        reference's parallel logits), ``gradient_relative_error`` (all parameters as one vector) and
        ``gradient_relative_error_worst`` (of the worst single tensor).

    Raises:
        ScanLMError: the models have different parameters.
    """
    if reference.gradients.keys() != other.gradients.keys():
        odd = sorted(reference.gradients.keys() ^ other.gradients.keys())[0]
        raise ScanLMError(f"the models have different parameters: only one has {odd!r}")
    squares = {
        name: (_square(other.gradients[name], expected), _square(expected))
        for name, expected in reference.gradients.items()
    }
    wrong, right = (sum(pair[i] for pair in squares.values()) for i in (0, 1))
    last = reference.logits[:, -other.streamed.shape[1] :]
    return {
        "loss_error": abs(other.loss - reference.loss),
        "logits_relative_error": _relative(other.logits, reference.logits),
        "streamed_relative_error": _relative(other.streamed, last),
        "gradient_relative_error": math.sqrt(wrong / right),
        "gradient_relative_error_worst": max(math.sqrt(w / r) for w, r in squares.values() if r),
    }


def disagreements(
    fused: Mapping[str, float], plain: Mapping[str, float], precision: str
) -> list[str]:
    """The errors that the precision does not explain, as text; none if the models agree.

    Args:
        fused: ``compare`` of the fused model.
        plain: ``compare`` of plain torch in the same precision.
        precision: one of ``PRECISIONS``.
    """
    found = []
    for name, own in plain.items():
        allowed = FACTOR * own + FLOOR[precision]
        # a NaN is no agreement; single small tensors are recorded, not judged
        if not name.endswith("worst") and not fused[name] <= allowed:
            found.append(f"{precision}: {name} {fused[name]:.2g}, allowed {allowed:.2g}")
    return found


def agrees(fused: Mapping[str, float], plain: Mapping[str, float], precision: str) -> bool:
    """Whether there are errors of the fused model, and the precision explains them all."""
    return plain.keys() <= fused.keys() and not disagreements(fused, plain, precision)


def measure(
    entry: ModelEntry,
    ids: Any,
    build_plain: Build,
    build_fused: Build,
    log: Callable[..., None],
    variants: bool = False,
) -> list[str]:
    """Compare one model's two implementations; metrics go to ``log(name, value, **axes)``.

    Args:
        entry: the model.
        ids: tokens ``(b, t)``.
        build_plain, build_fused: make the two.
        log: takes the metrics.
        variants: also look at every variant of every tuned kernel, one at a time.

    Returns:
        What disagrees or could not run, as text.
    """
    import torch

    from scanlm.fused import plain_classes

    config = make_config(plain_classes(entry.family)[0], entry.config)
    plain = build_plain(entry.family, config).to(ids.device)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:  # norms begin as ones: a misplaced one would not be noticed
                parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in plain.modules():
            if hasattr(layer, "k_proj"):
                # The first output is (q k) v, and a norm divides by its length: where random keys
                # are nearly orthogonal to the query, rounding decides most of the gradient
                key, query = layer.k_proj.weight, layer.q_proj.weight
                key.copy_((key + query) / math.sqrt(2))
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    reference = outputs(plain.double(), ids)
    plain.float()
    fused = build_fused(entry.family, config).to(ids.device)
    fused.load_state_dict(weights)
    problems = []
    for precision in PRECISIONS:
        own = compare(reference, outputs(plain, ids, precision))
        for name, value in own.items():
            log(name, value, model=entry.id, dtype=precision, implementation="torch")
        judge = partial(_judge, entry.id, fused, ids, reference, precision, own, log)
        if not (variants and precision == "bfloat16"):
            problems += judge()
            continue
        with tuned_kernels() as found:
            problems += judge()
        for kernel, variant in each_variant(found):
            problems += judge(kernel=kernel, variant=variant)
    return problems


def _judge(
    name: str,
    fused: Any,
    ids: Any,
    reference: Outputs,
    precision: str,
    own: Mapping[str, float],
    log: Callable[..., None],
    **axes: str,
) -> list[str]:
    """Log the fused model's errors, as it is set up now; what they say, as text."""
    from scanlm.dcp import one_line

    who = ": ".join([name, *axes.values()])
    try:
        errors = compare(reference, outputs(fused, ids, precision))
    except ScanLMError:
        raise
    # kernels refuse types and devices, and fail to compile, in many ways
    except Exception as error:
        log("failed", 1, model=name, dtype=precision, implementation="fused", **axes)
        return [f"{who}: {precision}: {one_line(error)}"]
    for metric, value in errors.items():
        log(metric, value, model=name, dtype=precision, implementation="fused", **axes)
    return [f"{who}: {line}" for line in disagreements(errors, own, precision)]


def parity(
    models: list[str],
    batch_size: int = 2,
    tokens: int = 512,
    seed: int = 0,
    root: str | Path = "data/runs",
    variants: bool = False,
    device: str = "cuda",
    build_fused: Build | None = None,
) -> Run:
    """Compare the two implementations of some registry models and record the errors.

    Args:
        models: registry ids of GLA and Gated DeltaNet models.
        batch_size, tokens: of the random batch.
        seed: of weights and tokens.
        root: folder of all runs.
        variants: also look at every variant of every tuned kernel, which takes minutes.
        device: where both run.
        build_fused: makes the model in the fused model's place.

    Returns:
        The finished run; ``run.summary["problems"]`` is empty if all agree.

    Raises:
        ScanLMError: no GPU or no flash-linear-attention, a model of another family, too few tokens.
    """
    import torch

    from scanlm import fused

    entries = [load_entry(model) for model in models]
    for entry in entries:
        if entry.family not in fused.PLAIN:
            raise ScanLMError(
                f"{entry.id!r} is of family {entry.family!r}, which has one implementation only: "
                f"choose models of {' or '.join(fused.PLAIN)}"
            )
    if tokens <= STREAMED or batch_size < 1:
        raise ScanLMError(
            f"batch={batch_size}, tokens={tokens}: expected a batch of 1 or more, and more than "
            f"{STREAMED} tokens"
        )
    if build_fused is None:
        for family in sorted({entry.family for entry in entries}):
            fused.fused_classes(family)
    build_fused = build_fused or _build_fused
    parameters: dict[str, Any] = {"models": models, "batch_size": batch_size, "tokens": tokens}
    if variants:
        parameters["variants"] = True
    run = Run.create("parity", "linear_attention", parameters, seed, root, resume=False)
    problems: list[str] = []

    def log(name: str, value: float, **axes: Any) -> None:
        run.log(name, value, n=batch_size * tokens, **axes)

    with run.failures_recorded():
        for entry in entries:
            torch.manual_seed(seed)
            size = entry.config["vocab_size"]
            ids = torch.randint(size, (batch_size, tokens), device=device)
            problems += measure(entry, ids, _build_plain, build_fused, log, variants)
        run.finish({"problems": problems, "agree": not problems})
    return run


def _build_plain(family: str, config: Any) -> Any:
    from scanlm.fused import plain_classes

    return plain_classes(family)[1](config)


def _build_fused(family: str, config: Any) -> Any:
    import torch

    from scanlm.fused import build

    return build(family, config, torch.device("cuda"))


def _square(x: Any, y: Any = 0) -> float:
    return float((x.double() - y).square().sum())


def _relative(x: Any, reference: Any) -> float:
    return math.sqrt(_square(x, reference) / _square(reference))


def main(
    models: Annotated[str, typer.Option(help="registry ids, with commas")] = MODELS,
    batch: Annotated[int, typer.Option(help="sequences")] = 2,
    tokens: Annotated[int, typer.Option(help="tokens a sequence")] = 512,
    seed: Annotated[int, typer.Option(help="of weights and tokens")] = 0,
    variants: Annotated[
        bool, typer.Option("--variants", help="every variant of every tuned kernel, too")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of the records")] = Path("data/runs"),
) -> None:
    """Compare fused kernels with plain torch on a GPU: the same logits and gradients?

    \b
    Example:
      python -m scanlm.parity --models gla_170M --tokens 512
    """
    try:
        run = parity(models.replace(",", " ").split(), batch, tokens, seed, out, variants)
    except ScanLMError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    typer.echo(f"record: {run.folder}")
    for line in run.summary["problems"]:
        typer.echo(f"disagree: {line}", err=True)
    if run.summary["problems"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
