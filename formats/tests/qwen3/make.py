"""Makes the folders beside this file with Hugging Face's transformers: two tiny models with random weights, their
logits and loss on random tokens, and the gradient of every parameter.

    pip install torch==2.11.0 transformers==5.24.0 && python make.py
"""
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HERE = Path(__file__).parent
AUX_LOSS = 0.1
SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=64, rope_theta=10000.0, attn_implementation="eager",
)


def make(name, model, has_experts):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # The gains of norms are near 1, other numbers near 0.
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.3 * noise)
    model.save_pretrained(folder)
    rows = torch.randint(SIZES["vocab_size"], (2, 13), generator=generator)
    out = model(rows[:, :-1], output_router_logits=True) if has_experts else model(rows[:, :-1])
    loss = F.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    total = loss
    if has_experts:
        config = model.config
        total = loss + AUX_LOSS * load_balancing_loss_func(out.router_logits, config.num_experts, 2)
    total.backward()
    expected = dict(tokens=rows.int(), logits=out.logits.detach().contiguous(), loss=loss.detach().reshape(1))
    save_file(expected, folder / "expected.safetensors")
    # The gradients as another model, so that they have the names and shapes of a checkpoint's tensors.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder / "gradients")
    for file in folder.rglob("generation_config.json"):
        file.unlink()


torch.manual_seed(0)
moe = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=2, norm_topk_prob=True)
make("moe", Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe)).float(), True)
make("dense", Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)).float(), False)
