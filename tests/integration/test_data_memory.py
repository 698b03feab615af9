"""Memory stays bounded whatever the size of the corpus: every kind of file, the tokenizer trained on the spot."""

import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq

_PROGRAM = """
import resource, sys
from lost.config.data import TextFilesDataConfig
from lost.data import prepare
folder, size, attempt = sys.argv[1:]
files = [f"{folder}/{size}.{kind}" for kind in ("txt", "jsonl", "parquet")]
data = TextFilesDataConfig(train_files=files, validation_files=[f"{folder}/validation.txt"], num_processes=2,
                           cache_dir=f"{folder}/cache_{attempt}")
report = prepare(data, vocab_size=1000, seq_len=256).report
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(report.text_bytes, report.tokenizer_sample_bytes, int(peak) * 1024, child * 1024)
"""


def _write_corpus(folder, size, block, count):
    """The same text three times: one document of many lines, records, one row group of records."""
    records = [block[:5000]] * (len(block) * count // 5000)
    (folder / f"{size}.txt").write_text(block * count)
    (folder / f"{size}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    table = pa.table({"text": records})
    # Without a dictionary, which would store the text once.
    pq.write_table(table, folder / f"{size}.parquet", use_dictionary=False, compression="none", row_group_size=1 << 30)


def _prepare(folder, size, attempt):
    """Bytes of text and of the tokenizer's sample, peak of the process that reads and of one that tokenises."""
    arguments = [sys.executable, "-c", _PROGRAM, str(folder), size, str(attempt)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return [int(number) for number in run.stdout.split()]


def test_more_text_needs_no_more_memory(tmp_path):
    rng = random.Random(0)
    # Long words: fewer tokens a byte, so that many bytes take little time.
    words = ["".join(rng.choices("abcdefghijklmno", k=rng.randint(20, 60))) for _ in range(200)]
    block = "\n".join(" ".join(rng.choices(words, k=20)) for _ in range(600))
    (tmp_path / "validation.txt").write_text(block)
    for size, count in (("small", 8), ("large", 20)):
        _write_corpus(tmp_path, size, block, count)
    # A peak is now and then 20 MB off, whatever the text; one that grows with the text is too high every time.
    for attempt in range(3):
        small_bytes, _, *small_peaks = _prepare(tmp_path, "small", attempt)
        large_bytes, sample_bytes, *large_peaks = _prepare(tmp_path, "large", attempt)
        assert large_bytes - small_bytes > 17e6
        # A part of the text is enough for the tokenizer.
        assert 0 < sample_bytes < large_bytes / 4
        assert sum(large_peaks) < 1 << 30
        growth = [large - small for small, large in zip(small_peaks, large_peaks, strict=True)]
        if max(growth) < 8e6:
            return
    raise AssertionError(
        f"17 MB more text took {growth} bytes more memory (the process that reads, one that tokenises)"
    )
