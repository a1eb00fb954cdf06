"""Time the training step of the PyTorch system; print JSON lines.

Only the patch embedding of transformers' LLaVA trains. Mode `reference` is the original's step: text padded to 2048,
conversations merged row by row, logits at every position, gradient checkpointing. Mode `tuned` is what a user could
improve: no padding, SDPA, logits only at labels. Mode `compiled` adds `torch.compile` of the layers.
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

from bench.workload import ANSWER, HUB_CONFIGS, IMAGE, SCANS, TEXT, VolumeSpec


class OriginalPatchEmbed(nn.Module):
    """The original's patch embedding, with its names: a convolution in 3D, patches and a linear map in 4D."""

    def __init__(self, scan: VolumeSpec, width: int):
        super().__init__()
        self.scan = scan
        voxels = torch.Size(scan.patch).numel()
        self.proj = nn.Conv3d(1, width, scan.patch, scan.patch) if len(scan.patch) == 3 else nn.Linear(voxels, width)
        self.positional_embeddings = nn.Parameter(torch.randn(1, scan.patches, width) * 0.02)

    def forward(self, volumes: torch.Tensor, **_: Any) -> torch.Tensor:
        """Map volumes [B, 1, *size] to features [B, N, E]."""
        if len(self.scan.patch) == 3:
            return self.proj(volumes).flatten(2).transpose(1, 2) + self.positional_embeddings
        x = volumes[:, 0]
        for axis, patch in enumerate(self.scan.patch):  # sizes are multiples of the patch
            x = x.unflatten(1 + 2 * axis, (-1, patch))
        x = x.permute(0, *range(1, x.ndim, 2), *range(2, x.ndim, 2)).reshape(len(x), self.scan.patches, -1)
        return self.proj(x) + self.positional_embeddings


class TorchStep:
    """Model and optimiser; a call makes one update on conversations about one scan each."""

    def __init__(self, size: str, scan: VolumeSpec, device: str, dtype: torch.dtype):
        self.scan, self.mode, self.device, self.dtype = scan, "tuned", torch.device(device), dtype
        config = LlavaConfig(**json.loads(json.dumps(HUB_CONFIGS[size])))
        torch.set_default_dtype(dtype)
        with self.device:
            self.model = LlavaForConditionalGeneration(config)
            self.core = self.model.model
            self.tower = self.core.vision_tower
            self.tower.embeddings = OriginalPatchEmbed(scan, config.vision_config.hidden_size)
        torch.set_default_dtype(torch.float32)
        self.model.to(dtype)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.tower.embeddings.parameters():
            parameter.requires_grad_(True)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.tower.embeddings.parameters(), lr=5e-5, weight_decay=0.01)

    def set_mode(self, mode: str, *, remat: bool) -> None:
        """Set the mode. The layers stay compiled after `compiled`."""
        self.mode = mode
        if remat or mode == "reference":
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        if mode == "compiled":
            for layer in (*self.tower.encoder.layers, *self.core.language_model.layers):
                layer.compile()  # compiles the first layer of each kind; the others reuse its code

    def batch(self, size: int) -> tuple[torch.Tensor, ...]:
        """Return volumes, ids, labels, and the mask of positions that are not padding."""
        volumes = torch.randn(size, 1, *self.scan.size, dtype=self.dtype, device=self.device)
        ids = torch.randint(0, 150000, (size, TEXT), device=self.device)
        ids[:, 4] = IMAGE
        labels = torch.full_like(ids, -100)
        labels[:, -ANSWER:] = ids[:, -ANSWER:]
        used = torch.ones_like(ids)
        if self.mode == "reference":
            ids, labels, used = (
                functional.pad(x, (0, 2048 - TEXT), value=v) for x, v in ((ids, 151643), (labels, -100), (used, 0))
            )
        return volumes, ids, labels, used

    def __call__(self, volumes: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, used: torch.Tensor) -> float:
        """Make one update; return the loss when the device is done."""
        hidden = self.tower.encoder(inputs_embeds=self.tower.embeddings(volumes)).last_hidden_state
        features = self.core.multi_modal_projector(hidden)
        embeds = self.core.get_input_embeddings()(ids)
        ignored = torch.full((features.shape[1],), -100, device=self.device)
        rows, targets, masks = [], [], []
        for row in range(len(ids)):
            rows.append(torch.cat([embeds[row, :4], features[row], embeds[row, 5:]]))
            targets.append(torch.cat([labels[row, :4], ignored, labels[row, 5:]]))
            masks.append(torch.cat([used[row, :4], torch.ones_like(ignored), used[row, 5:]]))
        x, y, mask = (torch.stack(part) for part in (rows, targets, masks))
        if self.mode == "reference":
            out = self.core.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
            logits = self.model.lm_head(out).float()[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        else:
            out = self.core.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
            supervised = y[:, 1:] != -100
            logits = self.model.lm_head(out[:, :-1][supervised]).float()
            loss = functional.cross_entropy(logits, y[:, 1:][supervised])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    """Print a line per step with its time, its loss, and the peak memory of its case and mode.

    A case that does not fit prints an error line.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=HUB_CONFIGS, default="0.5b")
    parser.add_argument("--scan", choices=SCANS, default="t1")
    parser.add_argument("--mode", nargs="+", required=True, metavar="MODE:BATCH", help="modes to measure in turn")
    parser.add_argument("--remat", action="store_true", help="gradient checkpointing in all modes")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    on_gpu = args.device != "cpu"
    step = TorchStep(args.size, SCANS[args.scan], args.device, getattr(torch, args.dtype))
    for name in args.mode:
        mode, _, size = name.partition(":")
        step.set_mode(mode, remat=args.remat)
        batch = step.batch(int(size))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(args.steps):
                start, busy = time.perf_counter(), time.process_time()
                loss = step(*batch)
                seconds, busy = time.perf_counter() - start, time.process_time() - busy
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak
                line = {"case": name, "seconds": seconds, "busy": busy, "peak_gib": peak, "loss": loss}
                print(json.dumps(line), flush=True)
        except torch.OutOfMemoryError:
            print(json.dumps({"case": name, "error": "out of memory"}), flush=True)


if __name__ == "__main__":
    main()
