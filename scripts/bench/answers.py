"""Answers and likelihoods of a data set, beside transformers' `generate` of the same model, batches and prompts."""

import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import figure, resident
from bench.workload import HUB_CONFIGS, VolumeSpec

NEW, CHOICES, TURNS = 8, ("left.", "right."), 1
WORDS = ("side", "lobe", "half", "part", "site", "face", "edge", "pole", "zone", "area")


@dataclass(frozen=True)
class Setting:
    """A model, and data about `scans` volumes with so many questions each."""

    size: str
    layers: int
    vocabulary: int
    scan: VolumeSpec
    dtype: str
    batch_size: int
    scans: int
    questions: int

    @property
    def content(self) -> dict[str, Any]:
        """Return config.json."""
        content: dict[str, Any] = json.loads(json.dumps(HUB_CONFIGS[self.size]))
        for part in ("vision_config", "text_config"):
            content[part]["num_hidden_layers"] = self.layers
        content["text_config"]["vocab_size"] = self.vocabulary
        return content


_SMALL = VolumeSpec("T1", (96, 96, 96), (16, 16, 16), "t1_0.5b")
_LARGE = VolumeSpec("T1", (96, 96, 96), (10, 10, 10), "t1_0.5b")
CPU = {
    "ten": Setting("0.5b", 2, 8000, _SMALL, "float32", 8, 4, 10),
    "one": Setting("0.5b", 2, 8000, _SMALL, "float32", 8, 16, 1),
}
GPU = {
    "ten": Setting("0.5b", 24, 152000, _LARGE, "bfloat16", 64, 128, 10),
    "one": Setting("0.5b", 24, 152000, _LARGE, "bfloat16", 64, 512, 1),
}


def answers(work_dir: Path) -> None:
    """Time `predict`'s answers with likelihoods, and transformers', for ten questions about each scan and for one."""
    import subprocess
    import sys

    code = "import jax; print(jax.default_backend())"
    backend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    for name, setting in (CPU if backend == "cpu" else GPU).items():
        write_data(work_dir / name, setting)
        _compare(name, setting, work_dir / name, backend)


def write_data(folder: Path, setting: Setting) -> None:
    """Write the tokenizer, the model's config.json, and conversations about random scans."""
    import nibabel as nib

    from umbrella_jax.demo import make_base

    make_base(folder / "base")
    tokenizer = load_tokenizer(folder)  # a word for each token, so that different answers have different texts
    tokenizer.add_tokens([f" word{i}" for i in range(len(tokenizer), setting.vocabulary)])
    tokenizer.save_pretrained(folder / "base")
    base = json.loads((folder / "base" / "config.json").read_text())
    content = setting.content | {"image_token_index": base["image_token_index"]}
    (folder / "config.json").write_text(json.dumps(content))
    modality = {"size": setting.scan.size, "patch": setting.scan.patch}
    (folder / "umbrella_config.json").write_text(json.dumps({"modalities": {setting.scan.modality: modality}}))
    rng, records = np.random.default_rng(0), list[dict[str, Any]]()
    for scan in range(setting.scans):
        image = nib.Nifti1Image(rng.uniform(1, 9, setting.scan.size).astype(np.float32), np.eye(4))
        nib.save(image, folder / f"{scan}.nii")
        for word in WORDS[: setting.questions]:
            content = [
                {"type": "image", "modality": "sMRI", "image_path": f"{scan}.nii"},
                {"type": "text", "text": f"On which {word} is the lesion?"},
            ]
            answer = [{"type": "text", "text": CHOICES[scan % 2]}]
            records.append(
                {
                    "task_id": f"{scan}-{word}",
                    "task_type": "T1",
                    "conversations": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
                    "metadata": {"task": "side"},
                }
            )
    (folder / "data.json").write_text(json.dumps(records))


def _compare(name: str, setting: Setting, folder: Path, backend: str) -> None:
    """Let the contestants, each in its own process, answer in turn; print speed and memory of each."""
    context = multiprocessing.get_context("spawn")
    contestants: dict[str, tuple[Any, Any]] = {}
    for contestant in ("umbrella", "cached", "plain"):
        pipe, end = context.Pipe()
        process = context.Process(target=_answer_in_turn, args=(end, contestant, setting, folder, backend))
        process.start()
        end.close()  # so that `recv` raises EOFError if the process fails
        pipe.recv()  # until its model is loaded
        contestants[contestant] = pipe, process
    passes: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
    for turn in range(1 + TURNS):
        for contestant, (pipe, _) in contestants.items():
            if turn or contestant == "umbrella":  # whose first pass compiles
                pipe.send("answer")
                passes[contestant].append(pipe.recv())
    for pipe, process in contestants.values():
        pipe.send("end")
        process.join()
    best = {contestant: min(own[-TURNS:], key=lambda one: one["seconds"]) for contestant, own in passes.items()}
    for contestant, own in best.items():
        same = np.mean([own["texts"][key] == text for key, text in best["umbrella"]["texts"].items()])
        difference = max(abs(own["scores"][key] - score) for key, score in best["umbrella"]["scores"].items())
        figure(
            f"answers_{name}_{contestant}_tokens_per_second",
            own["tokens"] / own["seconds"],
            "tokens/s",
            questions_per_second=round(len(own["texts"]) / own["seconds"], 3),
            processor_seconds=round(own["processor"], 2),
            first_pass_seconds=round(passes[contestant][0]["seconds"], 2),
            peak_gb=round(own["peak"], 2),
            same_answers=float(same),
            likelihoods_differ_by=float(f"{difference:.1e}"),
            **own["more"],
        )
    for contestant in ("cached", "plain"):
        times = {key: best[contestant][key] / best["umbrella"][key] for key in ("seconds", "processor")}
        figure(
            f"answers_{name}_times_{contestant}", times["seconds"], "", of_processor_time=round(times["processor"], 3)
        )


def _answer_in_turn(end: Any, contestant: str, setting: Setting, folder: Path, backend: str) -> None:
    import threading

    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if contestant != "umbrella" or backend == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    from umbrella_jax.inference.processor import Processor

    processor = Processor(load_tokenizer(folder), load_config(folder, setting).modalities)
    dataset = processor.dataset(folder / "data.json", evaluation=True, threads=4)
    make = _Umbrella if contestant == "umbrella" else _Transformers
    work = make(setting, folder, processor, dataset, contestant, backend)
    end.send("ready")
    while end.recv() == "answer":
        peak, done = 0.0, threading.Event()

        def watch(done: Any = done) -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, resident())
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, busy = time.perf_counter(), time.process_time()
        texts, scores, tokens = work()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        done.set()
        watcher.join()
        peak = work.device_peak() or peak
        result = {"texts": texts, "scores": scores, "tokens": tokens, "seconds": seconds, "processor": busy}
        end.send(result | {"peak": peak, "more": work.more})


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "base")


def load_config(folder: Path, setting: Setting) -> Any:
    from convert.config_json import read_config

    return read_config(folder, compute_dtype=setting.dtype)


def random_parameters(folder: Path, setting: Setting) -> Any:
    """Return the same random parameters for each contestant, as NumPy arrays."""
    from umbrella_jax.models import abstract_params

    rng = np.random.default_rng(0)
    params = {}
    for path, leaf in abstract_params(load_config(folder, setting))[1].items():
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        params[path] = values + np.float32("norm" in path)
    return params


class _Umbrella:
    """Answers as `umbrella-jax predict` makes them."""

    def __init__(self, setting: Setting, folder: Path, processor: Any, dataset: Any, contestant: str, backend: str):
        import jax

        from umbrella_jax.config.schema import MeshConfig
        from umbrella_jax.inference.answers import Choices
        from umbrella_jax.inference.question_batches import QuestionBatches
        from umbrella_jax.models import abstract_params, native_backend
        from umbrella_jax.scoring.metrics import tasks_of
        from umbrella_jax.scoring.rows import blank_rows
        from umbrella_jax.sharding import make_mesh

        config = load_config(folder, setting).with_attention("auto", native_backend(jax.devices()[0]))
        self._setting, self._processor, self._dataset = setting, processor, dataset
        self._graphdef = abstract_params(config)[0]
        self._params = {
            k: jax.device_put(v).astype(setting.dtype) for k, v in random_parameters(folder, setting).items()
        }
        self._mesh, self._rows = make_mesh(MeshConfig()), blank_rows(dataset.conversations)
        self._tasks = tasks_of(self._rows, {})
        self._choices = Choices.for_tasks(dataset, processor, self._rows, self._tasks, closed_sets=True)
        batches = QuestionBatches(dataset, batch_size=setting.batch_size, max_new_tokens=NEW, bytes_per_patch=4096)
        features = batches.features
        encoded = sum(features.rows[load.modality] for loads in features.loads for load in loads)
        positions = sum(setting.batch_size * batch.positions for batch in batches.plan.batches)
        rounds = [round for batch in batches.plan.batches for round in batch.rounds()]
        self.more = {
            "tower_runs_per_volume": round(encoded / setting.scans, 3),
            "context_positions_per_question": round(positions / len(dataset), 1),
            "rows_asked": round(len(dataset) / (len(rounds) * setting.batch_size), 3),
        }

    def __call__(self) -> tuple[dict[str, str], dict[str, float], int]:
        """Return {conversation: answer}, {conversation and choice: likelihood}, and the number of tokens."""
        import jax

        from umbrella_jax.inference.answers import generate_answers
        from umbrella_jax.inference.windows import expand

        answered: dict[int, Any] = {}
        with jax.set_mesh(self._mesh):
            for rows in generate_answers(
                self._params,
                self._graphdef,
                expand(self._dataset, "first"),
                dict(enumerate(self._rows)),
                self._tasks,
                self._processor,
                self._mesh,
                batch_size=self._setting.batch_size,
                threads=4,
                max_new_tokens=NEW,
                choices=self._choices,
            ):
                answered |= rows
        rows = {row["task_id"]: row for row in answered.values()}
        scores = {f"{key} {text}": value for key, row in rows.items() for text, value in row["likelihoods"].items()}
        return {key: row["prediction"] for key, row in rows.items()}, scores, NEW * len(rows)

    def device_peak(self) -> float | None:
        import jax

        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 1e9 if stats else None


class _Transformers:
    """Answers of `generate` on batches of prompts sorted by length, and likelihoods of the choices.

    Contestant `plain` computes the likelihoods by a forward pass over prompt and choice; `cached` continues the cache
    that `generate` leaves, cut back to the prompt and repeated for each choice.
    """

    def __init__(self, setting: Setting, folder: Path, processor: Any, dataset: Any, contestant: str, backend: str):
        import torch

        from convert.export_config import hf_dict
        from convert.lazy_tensor import Tensor
        from convert.torch_model import umbrella_model

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = "cpu" if backend == "cpu" else "cuda"
        params = {k: Tensor.from_array(v) for k, v in random_parameters(folder, setting).items()}
        config = load_config(folder, setting)
        model = umbrella_model(
            hf_dict(setting.content | {"image_token_index": config.image_token_id}, config), config, params
        )
        self._model = model.to(self._device, getattr(torch, setting.dtype))
        self._setting, self._processor, self._dataset = setting, processor, dataset
        self._is_cached, self.more = contestant == "cached", dict[str, Any]()
        self._choices = [[int(t) for t in row if t >= 0] for row in processor.answers(CHOICES)]

    def __call__(self) -> tuple[dict[str, str], dict[str, float], int]:
        """Return {conversation: answer}, {conversation and choice: likelihood}, and the number of tokens."""
        import torch

        prompts, size = self._dataset.prompts, self._setting.batch_size
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts, scores = dict[str, str](), dict[str, float]()
        with torch.inference_mode():
            for start in range(0, len(order), size):
                own = order[start : start + size]
                tokens, likelihoods = self._batch([prompts[i] for i in own])
                for row, (i, text) in enumerate(zip(own, self._processor.decode(tokens), strict=True)):
                    key = self._dataset.conversations[i].task_id
                    texts[key] = text
                    scores |= {f"{key} {c}": float(v) for c, v in zip(CHOICES, likelihoods[row], strict=True)}
        return texts, scores, NEW * len(texts)

    def _batch(self, prompts: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [B, N] and the likelihoods [B, A] of some prompts."""
        import torch

        longest = max(map(len, prompts))
        ids, used = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], used[row, longest - len(prompt) :] = torch.tensor(prompt.input_ids), 1
        volumes = np.stack([self._dataset.volume(prompt.images[0]) for prompt in prompts])[:, None]
        pixels = torch.from_numpy(volumes).to(self._device, self._model.dtype)
        ids, used = ids.to(self._device), used.to(self._device)
        ends = self._processor.stop_ids
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
        out = self._model.generate(
            input_ids=ids,
            attention_mask=used,
            pixel_values=pixels,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        score = self._from_cache if self._is_cached else self._from_whole_passes
        tokens = out.sequences[:, longest:].cpu().numpy()
        ended = np.cumsum(np.isin(tokens, ends), axis=1) - np.isin(tokens, ends) > 0
        return np.where(ended, -1, tokens), score(ids, used, pixels, out)

    def _from_whole_passes(self, ids: Any, used: Any, pixels: Any, out: Any) -> np.ndarray:
        import torch

        scores = []
        for choice in self._choices:
            tail = torch.tensor(choice, device=ids.device).expand(len(ids), -1)
            whole, mask = torch.cat([ids, tail], 1), torch.cat([used, torch.ones_like(tail)], 1)
            logits = self._model(
                input_ids=whole,
                attention_mask=mask,
                pixel_values=pixels,
                logits_to_keep=len(choice) + 1,
                use_cache=False,
            ).logits[:, :-1]
            scores.append(logits.float().log_softmax(-1).gather(-1, tail[..., None])[..., 0].sum(1))
        return torch.stack(scores, 1).cpu().numpy()

    def _from_cache(self, ids: Any, used: Any, pixels: Any, out: Any) -> np.ndarray:
        import torch

        cache, count, longest = out.past_key_values, len(self._choices), max(map(len, self._choices))
        cache.crop(ids.shape[1] - cache.get_seq_length())
        cache.batch_repeat_interleave(count)
        tails = torch.zeros(count, longest, dtype=torch.long, device=ids.device)
        is_used = torch.zeros_like(tails)
        for row, choice in enumerate(self._choices):
            tails[row, : len(choice)], is_used[row, : len(choice)] = torch.tensor(choice), 1
        tails, is_used = tails.repeat(len(ids), 1), is_used.repeat(len(ids), 1)
        used = used.repeat_interleave(count, 0)
        positions = used.sum(1, keepdim=True) + torch.arange(longest - 1, device=ids.device)
        later = self._model(
            input_ids=tails[:, :-1],
            attention_mask=torch.cat([used, is_used[:, :-1]], 1),
            position_ids=positions,
            past_key_values=cache,
        ).logits
        first = out.logits[0].repeat_interleave(count, 0)[:, None]
        logits = torch.cat([first.to(later.dtype), later], 1).float().log_softmax(-1)
        scores = (logits.gather(-1, tails[..., None])[..., 0] * is_used).sum(1)
        return scores.reshape(len(ids), count).cpu().numpy()

    def device_peak(self) -> float | None:
        import torch

        return torch.cuda.max_memory_allocated() / 1e9 if self._device == "cuda" else None
