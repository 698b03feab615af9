"""Memory stays bounded whatever the size of the corpus."""

import json
import random
import subprocess
import sys

from lost.data.tokenizer import train_tokenizer

_PREPARE = """
import sys
from lost.config.schema import TextFilesDataConfig
from lost.data import prepare
folder, size = sys.argv[1:]
files = [f"{folder}/{size}.txt", f"{folder}/{size}.jsonl"]
data = TextFilesDataConfig(train_files=files, validation_files=[f"{folder}/small.jsonl"],
                           tokenizer=f"{folder}/tokenizer", cache_dir=f"{folder}/cache")
report = prepare(data, vocab_size=2000, seq_len=256).report
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.text_bytes, report.tokens, int(peak) * 1024)
"""


def test_three_times_the_text_needs_no_more_memory(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmno", k=rng.randint(2, 9))) for _ in range(5000)]
    block = "\n".join(" ".join(rng.choices(words, k=20)) for _ in range(5000))
    train_tokenizer(iter([block]), 2000, tmp_path / "tokenizer")
    # Half of the text is one single document, the other half records.
    record = json.dumps({"text": block[:5000]}) + "\n"
    for size, count in (("small", 12), ("large", 36)):
        (tmp_path / f"{size}.txt").write_text(block * count)
        (tmp_path / f"{size}.jsonl").write_text(record * (len(block) * count // 5000))
    found = {}
    for size in ("small", "large"):
        run = subprocess.run(
            [sys.executable, "-c", _PREPARE, str(tmp_path), size], capture_output=True, text=True, check=True
        )
        found[size] = [int(number) for number in run.stdout.split()]
    (small_bytes, _, small_peak), (large_bytes, large_tokens, large_peak) = found["small"], found["large"]
    print(found)
    assert large_bytes - small_bytes > 30e6
    assert large_tokens > 15e6
    # Holding either the text or its tokens would cost 30 MB at least; peaks of equal runs differ by up to 5 MB.
    assert large_peak - small_peak < 10e6
    assert large_peak < 1 << 30
