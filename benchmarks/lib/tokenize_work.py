"""Tokenises a data file once with the package of one build; the work of `bench_tokenize.py`, a process each time.

    python tokenize_work.py FILE PROCESSES CACHE|-

Prints processor and wall seconds, rows, tokens, a digest of tokens, labels and row hashes, and memory, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from pathlib import Path


def seconds() -> float:
    """Processor seconds of this process and its ended children."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def main() -> None:
    from transformers import AutoTokenizer

    from fedmoe.models.known_bases import SMOLLM2_FOLDER
    from fedmoe.models.prepare_data import prepare_samples
    from fedmoe.runtime.cache import cache_folder

    file, processes, cache = sys.argv[1:]
    folder = cache_folder("tokens")
    assert folder is not None
    tokenizer = AutoTokenizer.from_pretrained(str(folder.parent / SMOLLM2_FOLDER), local_files_only=True)
    before, began = seconds(), time.monotonic()
    kept = None if cache == "-" else Path(cache)
    data = prepare_samples(file, tokenizer, 1024, processes=int(processes), cache=kept)
    taken = {"cpu": seconds() - before, "wall": time.monotonic() - began}
    digest = hashlib.sha256(data.row_hashes.tobytes())
    for sample in data.samples:
        digest.update(sample.input_ids.tobytes() + sample.labels.tobytes())
    tokens = sum(len(sample.input_ids) for sample in data.samples)
    peaks = {
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "child_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    facts = {"rows": data.report.rows, "tokens": tokens, "from_cache": data.from_cache, "digest": digest.hexdigest()}
    print(json.dumps({**taken, **facts, **peaks}))


if __name__ == "__main__":
    main()
