"""A device is there, or the message says what to use."""

import pytest
import torch

from scanlm.devices import machine_name, usable_device
from scanlm.errors import ScanLMError


def test_the_device_asked_for_or_the_best() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cudo", "tpu", "cuda:99"])
def test_one_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ScanLMError, match=f"device '{name}' cannot be used: .*use cpu") as error:
        usable_device(name)
    assert "\n" not in str(error.value)
    assert "privateuseone" not in str(error.value)  # torch lists all that it could be built for


def test_a_machine_is_known_by_its_gpu_or_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scanlm.provenance._cpu_model", lambda: "A CPU")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    assert machine_name(torch.device("cpu")) == "cpu A CPU"
    assert machine_name(torch.device("cuda")) == "A GPU"
