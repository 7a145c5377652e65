"""Tokens per second of transformers' `generate` on an exported model: the yardstick of `serving.rs`.

For each line on standard input, a batch size and a number of requests, it answers them in such batches and prints
tokens per second.
"""
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
torch.manual_seed(0)
print("ready", flush=True)
for line in sys.stdin:
    batch, requests = map(int, line.split())
    began = time.perf_counter()
    for _ in range(requests // batch):
        model.generate(
            ids.expand(batch, -1), attention_mask=torch.ones(batch, ids.shape[1], dtype=torch.long), do_sample=True,
            temperature=1.0, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        )
    print(requests // batch * batch * tokens / (time.perf_counter() - began), flush=True)
