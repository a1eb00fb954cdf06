"""Flags of Hugging Face's Trainer and of the PyTorch system: an error names ours."""

import re
import shlex

import pytest

from umbrella_jax.cli import main


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a refused command prints, in one line."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(shlex.split(words))
    printed = capsys.readouterr().err
    assert printed.startswith("usage: umbrella-jax ")
    return re.sub(r"\s+", " ", printed)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --output_dir out", "write --output-dir out"),
        ("train --per_device_train_batch_size 4", "write --batch-size 4 (train.batch_size is over all devices"),
        ("train --per-device-eval-batch-size=4", "leave it out: evaluation uses train.batch_size"),
        ("train --num_train_epochs 3", "write --epochs 3"),
        (
            "train --max_steps 100",
            "--max_steps 100: 100 has no counterpart: set the length in passes over the data, train.epochs (--epochs",
        ),
        ("train --seeds 1 2", "error: --seeds 1 2: separate seeds by commas: --seeds 1,2"),
        ("train --seeds=1 2 3 --dry-run", "error: --seeds 1 2 3: separate seeds by commas: --seeds 1,2,3"),
        ("train --seeds 1, 2", "error: --seeds 1, 2: separate seeds by commas: --seeds 1,2"),
        ("train --gradient_accumulation_steps 8", "write --accumulate-steps 8"),
        ("train --gradient_checkpointing", "write --set model.remat=full"),
        ("train --bf16", "write --set model.compute_dtype=bfloat16 --set model.frozen_dtype=bfloat16"),
        ("train --seed -1", "write --set seed=-1"),
        ("train --eval_steps 50", "write --set train.eval_steps=50"),
        ("train --save_total_limit 2", "write --set train.keep_latest=2"),
        ("train --load_best_model_at_end", "write --set train.keep_best=1 --set train.best_metric=eval_loss"),
        ("train --load_best_model_at_end true", "write --set train.keep_best=1 --set train.best_metric=eval_loss"),
        ("train --metric_for_best_model accuracy", "write --set train.best_metric=eval_accuracy"),
        ("train --warmup_ratio 0.1", "write --set train.warmup_ratio=0.1"),
        ("train --weight_decay 0.1", "write --set train.groups.patch_embed.weight_decay=0.1"),
        ("train --logging_steps 10", "leave it out: every update is logged"),
        ("train --lr_scheduler_type cosine", "write --set train.schedule=cosine"),
        ("train --lr_scheduler_type polynomial", "expected one of linear, cosine, constant"),
        ("train --max_grad_norm 0", "write --set train.clip_norm=null"),
        ("train --report_to none", "write --set train.tensorboard=false --no-wandb"),
        ("train --resume_from_checkpoint=last", "leave it out: --resume continues a run"),
        ("train --model_name_or_path 'a b'", "write --base 'a b'"),
        ("train --dataloader_num_workers 4", "write --set data.threads=4"),
        ("train --learning_rate -1e-3", "write --learning-rate -1e-3"),
        ("train --no_wandb", "write --no-wandb"),
        ("train --train_json train.json", "write --train-data train.json"),
        ("train --wandb_api_key s3cret", "--wandb_api_key: comes from the environment, such as WANDB_API_KEY"),
        ("predict runs/sex --output-dir a.jsonl", "write --out a.jsonl"),
        ("predict --bf16 runs/sex", "write --compute-dtype bfloat16"),
        ("predict runs/sex --num_train_epochs 3", "no such flag; train.epochs is set when a model is trained"),
        ("convert to-hf runs/sex --output-dir export", "write export as OUT, without a flag"),
        ("generate --model runs/sex", "MODEL has no flag; write runs/sex alone"),
        ("train --outptu-dir out", "no such flag; did you mean --output-dir?"),
    ],
)
def test_names_the_flag_to_write(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = refused(words, capsys)
    assert expected in printed
    assert "s3cret" not in printed


def test_all_unknown_flags_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Required flags that are missing come after them."""
    printed = refused("train --num_train_epochs 3 --seed=1 --batch-size 2 --bf16", capsys)
    for expected in ("3 unknown flags", "write --epochs 3", "write --set seed=1", "--bf16: write --set"):
        assert expected in printed


@pytest.mark.parametrize("flag", ["--learning-rate -1e-3", "--learning-rate=-1e-3", "--epochs -inf", "--set seed=-1"])
def test_a_negative_number_is_a_value(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "tiny", *flag.split()]) == 2
    assert re.search(r"(--learning-rate|--epochs|--set): .*expected .*, got -", capsys.readouterr().err)
