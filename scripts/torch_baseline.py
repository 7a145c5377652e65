"""The model of a Volary configuration, written plainly in PyTorch: the yardstick of `scripts/gpu-check`.

    python3 scripts/torch_baseline.py --device cuda:0 --hidden 768 --heads 12 --layers 4 --experts 16

f32 weights, bf16 activations by autocast, attention by `scaled_dot_product_attention` with the position bias as
its mask, one grouped product for all experts of a layer (a loop where the device has none), and PyTorch's own
Adafactor. Prints one JSON object: tokens per second, eager and compiled, and peak memory in MiB.
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, hidden, heads, dim, length):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.qkv = nn.Linear(hidden, 3 * heads * dim, bias=False)
        self.output = nn.Linear(heads * dim, hidden, bias=False)
        self.position = nn.Parameter(torch.zeros(32, heads))
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        buckets = torch.where(distance < 16, distance, 16 + (torch.log(distance.clamp(min=1) / 16) / torch.log(torch.tensor(8.0)) * 16).long())
        self.register_buffer("buckets", buckets.clamp(0, 31))
        self.register_buffer("future", torch.zeros(length, length).masked_fill(distance < 0, float("-inf")))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        bias = (self.position[self.buckets].permute(2, 0, 1) + self.future).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in [(hidden, inner), (hidden, inner), (inner, hidden)])

    def forward(self, x):
        normed = self.norm(x)
        return x + self.down(F.gelu(self.gate(normed)) * self.up(normed)), 0.0


class Mixture(nn.Module):
    def __init__(self, hidden, inner, experts):
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, inner) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, hidden) * inner**-0.5)
        self.experts = experts

    def forward(self, x):
        rows = self.norm(x).flatten(0, 1)
        with torch.autocast(rows.device.type, enabled=False):
            logits = rows.float() @ self.gate.weight.t()
            probabilities = logits.softmax(-1)
        top, chosen = probabilities.topk(2)
        weights = top / top.sum(-1, keepdim=True)
        share = F.one_hot(chosen[:, 0], self.experts).float().mean(0)
        penalty = 0.01 * self.experts * (share * probabilities.mean(0)).sum()
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.experts) if not rows.is_cuda else F.one_hot(chosen.flatten(), self.experts).sum(0)
        sent = rows[order // 2].to(torch.bfloat16)
        inner = F.gelu(self.product(sent, self.up, counts))
        out = self.product(inner, self.down, counts) * weights.flatten()[order, None].to(torch.bfloat16)
        y = torch.zeros_like(rows, dtype=out.dtype).index_add(0, order // 2, out)
        return x + y.view_as(x), penalty

    def product(self, rows, matrices, counts):
        if rows.is_cuda:
            return torch._grouped_mm(rows, matrices.to(rows.dtype), offs=counts.cumsum(0).int())
        parts = rows.split(counts.tolist())
        return torch.cat([part @ matrix.to(rows.dtype) for part, matrix in zip(parts, matrices)])


class Model(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(o.vocabulary, o.hidden) * o.hidden**-0.5)
        self.attention = nn.ModuleList(Attention(o.hidden, o.heads, o.head_dim, o.length) for _ in range(o.layers))
        moe = lambda layer: Mixture(o.hidden, o.feed_forward, o.experts) if layer % 2 == 0 else FeedForward(o.hidden, o.feed_forward)
        self.feed_forward = nn.ModuleList(moe(layer) for layer in range(o.layers))
        self.norm = nn.RMSNorm(o.hidden, eps=1e-6)
        self.scale = o.hidden**0.5

    def forward(self, ids, targets):
        x, penalty = self.tokens[ids] * self.scale, 0.0
        for attention, feed_forward in zip(self.attention, self.feed_forward):
            x, more = feed_forward(attention(x))
            penalty = penalty + more
        logits = F.linear(self.norm(x), self.tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) + penalty


def measure(o, compiled):
    torch.manual_seed(0)
    model = Model(o).to(o.device)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(o.vocabulary, (o.lanes, o.sequences, o.length + 1), device=o.device)
    if o.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(o.steps):
        started = time.perf_counter()
        for lane in tokens:
            with torch.autocast(o.device.split(":")[0], dtype=torch.bfloat16):
                loss = forward(lane[:, :-1], lane[:, 1:])
            (loss / o.lanes).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - started)
    later = sorted(times[len(times) // 2:])
    return o.lanes * o.sequences * o.length / later[len(later) // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    sizes = dict(vocabulary=1024, hidden=128, heads=2, head_dim=64, layers=4, feed_forward=512, experts=8,
                 lanes=2, sequences=2, length=256, steps=8)
    for name, value in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--no-compile", action="store_true")
    o = parser.parse_args()
    found = dict(eager=measure(o, False))
    if o.device.startswith("cuda"):
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
    if not o.no_compile:
        found["compiled"] = measure(o, True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
