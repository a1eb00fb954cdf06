"""What conversations cost at a start, without their volumes: reading, encoding, planning."""

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.measure import figure, measure


def start_texts(work_dir: Path) -> None:
    """Measure a start without volumes, with repeated and with distinct answers, and epochs of shared volumes."""
    from umbrella_jax.demo import make_base

    make_base(work_dir / "demo_base")
    for number, distinct in ((120_000, False), (1_000_000, False), (1_000_000, True)):
        file = work_dir / f"texts_{number}_{distinct}.jsonl"
        if not file.exists():
            write_texts(file, number, distinct)
        result = measure(read_and_plan, file, work_dir / "demo_base")
        *steps, (epoch, _), (parse, _) = result["value"]
        names = ("read", "encode", "digest", "plan")
        more = {name: round(seconds, 1) for name, (seconds, _) in zip(names, steps, strict=True)}
        more |= {"processor": round(sum(busy for _, busy in steps), 1), "next_epoch": round(epoch, 1)}
        more["json_loads"] = round(parse, 1)
        more["peak_gb"] = round(result["peak"], 2)
        seconds = sum(seconds for seconds, _ in steps)
        figure("start_texts_seconds", seconds, "s", conversations=number, distinct=distinct, **more)
    for pool in (40_000, 2_000):
        result = measure(plan_shared, 50_000, 20, pool)
        seconds, processor = result["value"]
        figure("start_epoch_seconds", seconds, "s", volumes_each=20, of=pool, processor=round(processor, 1))


def read_and_plan(file: Path, base: Path) -> list[tuple[float, float]]:
    """Read, encode, digest and plan conversations of a file, and plan another epoch; then only parse the lines as JSON.

    The last step tells how fast the machine is at this moment.

    Returns the seconds and the processor seconds of each step.
    """
    import hashlib

    from umbrella_jax.cli import collect_rarely
    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.cache import Sources
    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.data.loader import Dataset, make_epoch_plan
    from umbrella_jax.data.tokenize import encode_all, load_tokenizer

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    collect_rarely()  # as every command does
    modalities = {"T1": ModalityConfig(size=(90, 90, 90), patch=(10, 10, 10))}
    tokenizer, _ = load_tokenizer(base, None)
    times = [now()]
    conversations = read_conversations(file, modalities)
    times.append(now())
    rows = encode_all(conversations, tokenizer, modalities, 8192)
    times.append(now())
    tokens = hashlib.sha256()
    for ids, supervised in rows.tokens():
        tokens.update(ids.tobytes() + supervised.tobytes())
    times.append(now())
    dataset = Dataset(conversations, rows, (), dict.fromkeys(conversations.images, 1), modalities, Sources())
    plan = make_epoch_plan(dataset, batch_size=8, accumulate_steps=1, seed=0)
    times.append(now())
    plan.epoch(1)
    times.append(now())
    with file.open() as lines:
        for line in lines:
            json.loads(line)
    times.append(now())
    return [(end[0] - begin[0], end[1] - begin[1]) for begin, end in pairwise(times)]


def write_texts(file: Path, number: int, distinct: bool) -> None:
    """Write three conversations about each subject, with one T1 each; answers are distinct if asked for."""
    with file.open("w") as lines:
        for i in range(number):
            subject = f"sub-{i // 3:06d}"
            age = 20 + i % 700 / 10
            task, question, answer = (
                ("sex", "What is the sex of this subject?", "male." if i % 2 else "female."),
                ("age", "How old is this subject, in years?", f"The subject is {age} years old."),
                ("diagnosis", "Does this subject have a diagnosis of depression?", "no." if i % 5 else "yes."),
            )[i % 3]
            image = {"type": "image", "modality": "sMRI", "image_path": f"{subject}/anat/{subject}_T1w.nii.gz"}
            text = f"Answer {i} about {subject}: {answer}" if distinct else answer
            record = {
                "task_id": f"{subject}_{task}",
                "task_type": "T1",
                "conversations": [
                    {"role": "user", "content": [image, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": text}]},
                ],
                "metadata": {"task": task, "subject_id": subject, "age": age, "site": f"site{i // 3 % 20}"},
            }
            lines.write(json.dumps(record) + "\n")


def plan_shared(number: int, each: int, pool: int) -> list[float]:
    """Plan an epoch of conversations that show random volumes of a pool; return its seconds and processor seconds."""
    from umbrella_jax.data.epoch_plan import ConversationSizes, EpochPlan
    from umbrella_jax.data.ragged import Ragged

    rng = np.random.default_rng(0)
    volumes = Ragged.from_rows(rng.choice(pool, each, replace=False).tolist() for _ in range(number))
    sizes = ConversationSizes(np.full(number, 800), np.full(number, 9), volumes, ["T1"] * pool, {"T1": 27})
    plan = EpochPlan(sizes, batch_size=8, seed=0)
    start, busy = time.perf_counter(), time.process_time()
    plan.epoch(1)
    return [time.perf_counter() - start, time.process_time() - busy]
