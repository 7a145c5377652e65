"""The validation loss of a GLaM model that `volary export --format safetensors` wrote, in PyTorch.

    pip install torch safetensors
    python examples/export/glam.py FOLDER

It must equal the loss in run.json but for rounding. The model drops no tokens here: with another
model.capacity than dropless the losses differ.
"""
import json
import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
run = json.loads((folder / "run.json").read_text())
weights = {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}
heads, dim, length = config["heads"], config["head_dim"], config["sequence_length"]


def norm(x, gain):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


def bucket(distance):
    """T5's bucket of a causal distance: single distances first, then logarithmic ones."""
    exact, count = config["position_buckets"] // 2, config["position_buckets"]
    if distance < exact:
        return distance
    ratio = math.log(distance / exact) / math.log(config["position_distance"] / exact)
    return min(exact + int(ratio * (count - exact)), count - 1)


buckets = torch.tensor([[bucket(max(i - j, 0)) for j in range(length)] for i in range(length)])
future = torch.full((length, length), -math.inf).triu(1)


def attention(x, w):
    q, k, v = (norm(x, w["norm"]) @ w["qkv"]).unflatten(-1, (3, heads, dim)).unbind(-3)
    scores = torch.einsum("bihd,bjhd->bhij", q * dim**-0.5, k) + w["position"][buckets].permute(2, 0, 1) + future
    return x + torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(-2) @ w["output"]


def feed_forward(x, w):
    y = norm(x, w["norm"])
    return x + (F.gelu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def mixture(x, w):
    """The top two of the experts, by their share of the two probabilities."""
    activation = F.relu if config["activation"] == "relu" else F.gelu
    y = norm(x, w["router.norm"])
    top, chosen = (y @ w["router.gate"]).softmax(-1).topk(2)
    gates = torch.zeros(*y.shape[:-1], config["experts"]).scatter(-1, chosen, top / (top.sum(-1, keepdim=True) + 1e-9))
    for expert in range(config["experts"]):
        up, down = w[f"experts.{expert}.up"], w[f"experts.{expert}.down"]
        x = x + gates[..., expert, None] * (activation(y @ up) @ down)
    return x


def part(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


@torch.no_grad()
def losses(tokens):
    """The mean cross-entropy of each sequence, in nats per token; `tokens` are [sequences, length + 1]."""
    table = weights["embedding.tokens"]
    x = table[tokens[:, :-1]] * config["hidden"] ** 0.5
    for layer in range(config["layers"]):
        w = part(f"layers.{layer}.")
        x = attention(x, part(f"layers.{layer}.attention."))
        x = mixture(x, w) if "router.gate" in w else feed_forward(x, part(f"layers.{layer}.feed_forward."))
    logits = norm(x, weights["embedding.norm"]) @ table.T
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(-1)


tokens = load_file(folder / "validation.safetensors")["tokens"].long()
loss = torch.cat([losses(batch) for batch in tokens.split(8)]).double().mean().item()
print(f"validation loss {loss:.6f} here, {run['validation_loss']:.6f} in training")
