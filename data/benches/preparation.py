"""The stages of the preparation in datatrove and tokenizers: `preparation.py DOCUMENTS TOKENIZER`."""

import json
import sys
import tempfile
import time

from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

ROUNDS = 3


def read(path):
    with open(path) as lines:
        return [json.loads(line)["text"] for line in lines]


def median_s(work):
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return sorted(times)[ROUNDS // 2]


def main():
    path, tokenizer = sys.argv[1], Tokenizer.from_file(sys.argv[2])
    texts = read(path)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    # As many hashes as the other side has; an eighth of the text, which takes long enough.
    config = MinhashConfig(n_grams=5, num_buckets=18, hashes_per_bucket=7)
    signer = MinhashDedupSignature(tempfile.mkdtemp(), config)

    def sign():
        for text in texts[: len(texts) // 8]:
            shingles = signer.get_shingles(text)
            if shingles.size:
                signer.get_signature(shingles)

    part = sum(len(text.encode()) for text in texts[: len(texts) // 8]) / 1e6
    print(f"tokenizers {tokenizers_version}:")
    print(f"reading (json): {megabytes / median_s(lambda: read(path)):.1f}")
    print(f"near-duplicates (signatures only): {part / median_s(sign):.1f}")
    print(f"tokenizing: {megabytes / median_s(lambda: tokenizer.encode_batch(texts)):.1f}")


main()
