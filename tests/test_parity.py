"""The comparison of two implementations: it agrees with itself, and notices what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from scanlm import parity as module
from scanlm.errors import ScanLMError
from scanlm.fused import plain_classes
from scanlm.parity import compare, disagreements, outputs, parity
from scanlm.records import export, read_metrics


def plain(family: str, config: Any) -> Any:
    """Plain torch in the fused model's place."""
    return plain_classes(family)[1](config)


def wrong(family: str, config: Any) -> Any:
    """A model that takes its weights and then decays a little faster in one layer."""
    model = plain(family, config)
    load = model.load_state_dict

    def load_wrongly(weights: Any) -> None:
        load(weights)
        with torch.no_grad():
            mixer = model.model.layers[1].attn
            (mixer.gk_proj[1].bias if family == "gla" else mixer.A_log).add_(0.5)

    model.load_state_dict = load_wrongly
    return model


def run(tmp_path: Path, build: Any, models: tuple[str, ...] = ("gla_tiny", "gated_deltanet_tiny")):
    return parity(list(models), 2, 80, root=tmp_path, device="cpu", build_fused=build)


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    done = run(tmp_path, plain)
    assert done.summary == {"problems": [], "agree": True}
    metrics = read_metrics(done.folder)
    assert set(metrics["model"]) == {"gla_tiny", "gated_deltanet_tiny"}
    assert set(metrics["dtype"]) == {"tf32", "bfloat16"}
    assert (metrics["n"] == 160).all()
    errors = metrics.set_index(["name", "model", "dtype", "implementation"])["value"].unstack()
    assert (errors["fused"] == errors["torch"]).all()
    exact = errors["torch"].xs("tf32", level="dtype")
    rounded = errors["torch"].xs("bfloat16", level="dtype")
    assert (exact["logits_relative_error"] < 1e-5).all()
    assert (exact["gradient_relative_error"] < 1e-4).all()
    assert (exact["streamed_relative_error"] < 1e-5).all()
    assert (rounded["logits_relative_error"] > 1e-3).all()  # it was bfloat16 that was measured
    assert export(done.folder, tmp_path / "results").is_file()


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    problems = run(tmp_path, wrong).summary["problems"]
    for model in ("gla_tiny", "gated_deltanet_tiny"):
        for name in ("logits", "streamed", "gradient"):
            expected = f"{model}: tf32: {name}_relative_error"
            assert any(line.startswith(expected) for line in problems), (expected, problems)


def test_kernels_that_refuse_are_a_problem_not_an_end(tmp_path: Path) -> None:
    def refusing(family: str, config: Any) -> Any:
        model = plain(family, config)

        def forward(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("gated backward is wrong on this GPU\nand more")

        model.forward = forward
        return model

    done = run(tmp_path, refusing, ("gla_tiny",))
    assert done.summary["problems"] == [
        f"gla_tiny: {precision}: RuntimeError: gated backward is wrong on this GPU"
        for precision in ("tf32", "bfloat16")
    ]
    metrics = read_metrics(done.folder)
    assert set(metrics.loc[metrics["implementation"] == "fused", "name"]) == {"failed"}


def test_a_nan_is_no_agreement() -> None:
    fine = {"logits_relative_error": 0.0}
    assert not disagreements(fine, fine, "tf32")
    assert disagreements({"logits_relative_error": float("nan")}, fine, "tf32")


def test_models_of_different_parameters() -> None:
    ids = torch.randint(257, (1, 20))
    shape = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}
    made = []
    for gated in (True, False):
        config, model = plain_classes("gla")
        made.append(outputs(model(config(**shape, use_output_gate=gated)), ids))
    with pytest.raises(ScanLMError, match=r"only one has 'model.layers.0.attn.g_norm"):
        compare(*made)


@pytest.mark.parametrize(
    ("models", "tokens", "message"),
    [
        (["gpt2_tiny"], 80, r"'gpt2_tiny' is of family 'gpt2', which has one implementation"),
        (["gla_tinny"], 80, r"unknown model 'gla_tinny'. Did you mean 'gla_tiny'"),
        (["gla_tiny"], 16, r"tokens=16: expected .* more than 16 tokens"),
        (["gla_tiny"], 80, r"fused kernels of gla need a GPU"),
    ],
)
def test_mistakes(models: list[str], tokens: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match=message):
        parity(models, tokens=tokens, root=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Typer()
    app.command()(module.main)
    arguments = ["--models", "gla_tiny", "--tokens", "40", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "need a GPU" in result.output

    def on_cpu(*args: Any) -> Any:
        return parity(*args, device="cpu", build_fused=wrong)

    monkeypatch.setattr(module, "parity", on_cpu)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "disagree: gla_tiny: tf32: logits_relative_error" in result.output


def tuned_scale(factors: list[float]) -> Any:
    """A kernel for CPU tests that multiplies by its configuration's factor, tuned by Triton."""
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    def scale_kernel(x: Any, factor: float) -> Any:
        return x * factor

    class Function:
        fn = staticmethod(scale_kernel)

        @staticmethod
        def run(x: Any, **config: Any) -> Any:
            return scale_kernel(x, config["factor"])

    configs = [Config({"factor": factor}) for factor in factors]
    kernel = Autotuner(Function, ["x"], configs, [], None, None)
    # the first is always the fastest; factors of 0 cannot be launched
    kernel._bench = lambda *_, config, **__: (
        float("inf") if config.kwargs["factor"] == 0 else float(configs.index(config))
    )
    return kernel


def test_every_variant_of_a_tuned_kernel_is_looked_at(tmp_path: Path) -> None:
    kernel = tuned_scale([1.0, 0.0, 1.5])

    def build(family: str, config: Any) -> Any:
        model = plain(family, config)
        model.lm_head.register_forward_hook(lambda module, inputs, logits: kernel.run(logits))
        return model

    kernel.run(torch.ones(1))  # tuned before
    done = parity(["gla_tiny"], 2, 40, 0, tmp_path, variants=True, device="cpu", build_fused=build)
    metrics = read_metrics(done.folder)
    variants = metrics[metrics["variant"].notna()]
    assert set(variants["kernel"]) == {"scale_kernel"}
    assert {text.partition(",")[0] for text in variants["variant"]} == {
        "factor: 1.0",
        "factor: 1.5",
    }
    problems = done.summary["problems"]
    assert problems
    for line in problems:
        assert line.startswith("gla_tiny: scale_kernel: factor: 1.5")
    assert kernel.run(torch.ones(1)) == 1.0  # as it was tuned


def test_a_variant_runs_for_the_arguments_that_it_is_possible_for() -> None:
    from triton.runtime.autotuner import Autotuner

    kernel = tuned_scale([2.0, 3.0, 5.0])
    kernel.keys = ["x"]  # tuned for each x
    first, second, third = kernel.configs
    possible = {1.0: {first: 2.0, second: 1.0}, 10.0: {first: 1.0, third: 3.0}}
    kernel.prune_configs = lambda kwargs: list(possible[kernel.nargs["x"]])
    kernel._bench = lambda x, config, **_: possible[x][config]
    with module.tuned_kernels() as found:
        assert (kernel.run(1.0), kernel.run(10.0)) == (3.0, 20.0)
    assert Autotuner.run.__name__ == "run"
    seen = [
        (variant.partition(",")[0], kernel.run(1.0), kernel.run(10.0))
        for _, variant in module.each_variant(found)
    ]
    assert sorted(seen) == [
        ("factor: 2.0", 2.0, 20.0),
        ("factor: 3.0", 3.0, 20.0),  # impossible for the second: as it was tuned
        ("factor: 5.0", 3.0, 50.0),
    ]
    assert (kernel.run(1.0), kernel.run(10.0)) == (3.0, 20.0)
