"""Memory stays bounded for corpora far larger than it. Slow: ``pytest -m slow -s``."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from scanlm.data import load_corpus

REAL_DATA = Path(os.environ.get("SCANLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

PREPARE = """
import resource, sys, time
from scanlm.data import prepare
start = time.monotonic()
split = prepare(sys.argv[1], sys.argv[2], sys.argv[3])["train"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(split.num_bytes, split.num_tokens, peak, round(time.monotonic() - start))
"""


@pytest.mark.slow
def test_a_text_of_1_gb_is_prepared_in_less_than_2_gb(tmp_path):
    words = "".join(load_corpus("embedded").texts("train")).split(" ")
    generator = random.Random(0)
    with (tmp_path / "train.txt").open("wb") as file:
        while file.tell() < 1_000_000_000:
            numbered = (f"{word}{generator.randrange(99)}" for word in words[::7])
            generator.shuffle(words)
            file.write(" ".join([*words, *numbered, "\n"]).encode())
    tokenizer = REAL_DATA / "gpt2" if (REAL_DATA / "gpt2").is_dir() else "bytes"
    command = [sys.executable, "-c", PREPARE, tmp_path / "train.txt", tokenizer, tmp_path / "cache"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    num_bytes, num_tokens, peak, seconds = map(int, output.split())
    print(f"{num_bytes} bytes, {num_tokens} tokens, peak {peak / 1e6:.0f} MB, {seconds} s")
    assert num_bytes >= 1_000_000_000
    assert peak < 2_000_000_000
