"""The training step of the PyTorch system, as JSON lines: transformers' LLaVA, whose patch embedding alone trains.

`reference` is the original's way: text padded to 2048, conversations merged row by row, logits at every position,
gradient checkpointing. `tuned` is what its user could make of it: no padding, SDPA, logits where a label stands.
"""

import argparse
import json
import resource
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration

IMAGE = 151646


class PatchEmbed(nn.Module):
    """T1 96³ in patches of 10, the original's names."""

    def __init__(self, width: int):
        super().__init__()
        self.T1_proj = nn.Conv3d(1, width, 10, 10)
        self.T1_positional_embeddings = nn.Parameter(torch.randn(1, 9**3, width) * 0.02)

    def forward(self, volumes: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.T1_proj(volumes).flatten(2).transpose(1, 2) + self.T1_positional_embeddings


def main() -> None:
    """Prints a line per step: seconds, loss, and the peak of memory so far."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", help="config.json, as JSON")
    parser.add_argument("--mode", choices=["reference", "tuned"], required=True)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = LlavaConfig(**json.loads(args.config))
    with device:
        model = LlavaForConditionalGeneration(config).to(dtype)
    core, tower = model.model, model.model.vision_tower
    tower.embeddings = PatchEmbed(config.vision_config.hidden_size).to(device, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tower.embeddings.parameters():
        parameter.requires_grad_(True)
    if args.remat:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(tower.embeddings.parameters(), lr=5e-5, weight_decay=0.01)
    text, answer = 64, 8
    volumes = torch.randn(args.batch, 1, 96, 96, 96, dtype=dtype, device=device)
    ids = torch.randint(0, 150000, (args.batch, text), device=device)
    ids[:, 4] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, -answer:] = ids[:, -answer:]
    used = torch.ones_like(ids)
    if args.mode == "reference":
        ids, labels, used = (
            functional.pad(x, (0, 2048 - text), value=v) for x, v in ((ids, 151643), (labels, -100), (used, 0))
        )

    def step() -> torch.Tensor:
        hidden = tower.encoder(inputs_embeds=tower.embeddings(volumes)).last_hidden_state
        features = core.multi_modal_projector(hidden)
        embeds = core.get_input_embeddings()(ids)
        ignored = torch.full((features.shape[1],), -100, device=device)
        rows, targets, masks = [], [], []
        for row in range(args.batch):
            rows.append(torch.cat([embeds[row, :4], features[row], embeds[row, 5:]]))
            targets.append(torch.cat([labels[row, :4], ignored, labels[row, 5:]]))
            masks.append(torch.cat([used[row, :4], torch.ones_like(ignored), used[row, 5:]]))
        x, y, mask = (torch.stack(part) for part in (rows, targets, masks))
        if args.mode == "reference":
            out = core.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
            logits = model.lm_head(out).float()[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        else:
            out = core.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
            supervised = y[:, 1:] != -100
            logits = model.lm_head(out[:, :-1][supervised]).float()
            loss = functional.cross_entropy(logits, y[:, 1:][supervised])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(args.steps):
        start, busy = time.perf_counter(), time.process_time()
        loss = step().item()  # waits for the device
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak
        print(json.dumps({"seconds": seconds, "busy": busy, "peak_gib": peak, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
