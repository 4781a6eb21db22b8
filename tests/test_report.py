"""The README's numbers are those of the records."""

from pathlib import Path

import pytest

from scanlm.errors import ScanLMError
from scanlm.records import Run, export
from scanlm.report import BEGIN, END, NOTHING, results_section, update_document

ROOT = Path(__file__).parent.parent


def record(folder: Path, kind: str, loss: float) -> None:
    parameters = {
        "kind": kind,
        "corpus": "wikitext-2",
        "split": "test",
        "context": "sliding",
        "stride": 64,
        "seq_len": 128,
        "config": {"model_type": "scanlm", "chunk_size": 16},
    }
    run = Run.create("wikitext2", "scanlm_tiny", parameters, 3, root=folder / "runs")
    run.finish(
        {
            "loss": loss,
            "perplexity": 7.5,
            "num_tokens": 12345,
            "steps": 600,
            "tokens": 1_200_000,
            "num_parameters": 2_500_000,
            "unigram_entropy": 6.25,
        }
    )
    export(run.folder, folder / "data" / "results")


def test_tables_hold_what_the_records_say(tmp_path: Path) -> None:
    assert results_section(tmp_path / "data" / "results") == NOTHING
    record(tmp_path, "training", 2.0151)
    record(tmp_path, "evaluation", 2.5)
    training, evaluation = results_section(tmp_path / "data" / "results", tmp_path).split(
        "### Evaluations"
    )
    row = [cell.strip() for cell in training.strip().splitlines()[-1].split("|")]
    assert row[1:9] == [
        "scanlm_tiny", "16", "2.5 M", "`wikitext-2`", "600", "1.2 M", "2.015", "6.250",
    ]  # fmt: skip
    assert "(data/results/wikitext2/scanlm_tiny-s3-" in training
    assert "seed 3" in training
    assert "| sliding, stride 64, 128 tokens | 2.500 | 7.50 |" in evaluation
    assert "12,345" in evaluation


def test_a_document_is_updated_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    record(tmp_path, "training", 2.0)
    assert update_document(document, tmp_path / "data" / "results")
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n### Training runs")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert not update_document(document, tmp_path / "data" / "results")


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("text")
    with pytest.raises(ScanLMError, match=r"README\.md has no lines"):
        update_document(document, tmp_path)
    assert document.read_text() == "text"


def test_the_readme_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    section = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert section == results_section(ROOT / "data" / "results", ROOT)
