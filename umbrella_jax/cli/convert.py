"""Commands for checkpoints: `convert from-hf`, `to-hf`, `stitch`, `verify`, and `push`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from umbrella_jax.cli.options import add_command, add_config, add_group, add_json, add_step, config_of, modalities_of
from umbrella_jax.console import wrapped
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import strict_json


def add(commands: Any) -> None:
    """Add the commands."""
    convert = add_group(
        commands,
        "convert",
        "Convert and compare checkpoints.",
        "umbrella-jax convert to-hf runs/sex exports/sex",
    )
    from_hf = add_command(
        convert,
        "from-hf",
        _from_hf,
        "Convert a Hugging Face model to a native (orbax) checkpoint.",
        "umbrella-jax convert from-hf llava native --config run.yaml",
    )
    from_hf.add_argument("source", metavar="HF_DIR", help="LLaVA directory, or its name on the hub")
    from_hf.add_argument("out", metavar="OUT", help="directory to write")
    add_config(from_hf, ["--adapter"])
    from_hf.add_argument("--patch-embed", metavar="FILE", help="file of `to-hf --trainable-only`, to add to its base")
    from_hf.add_argument("--check-finite", action="store_true", help="reject weights that are NaN or infinite")

    to_hf = add_command(
        convert,
        "to-hf",
        _to_hf,
        "Export a run or checkpoint as a Hugging Face directory.",
        "umbrella-jax convert to-hf runs/sex exports/sex --names sMRI,fMRI",
    )
    to_hf.add_argument("source", metavar="RUN", help="run or native checkpoint")
    to_hf.add_argument("out", metavar="OUT", help="directory to write")
    add_step(to_hf)
    to_hf.add_argument("--names", metavar="NAMES", help="names of the modalities in the export: sMRI,fMRI")
    to_hf.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest file, such as 500MB; default 5GB"
    )
    to_hf.add_argument(
        "--trainable-only", action="store_true", help="write only the trained weights and their base's hash"
    )
    to_hf.add_argument("--adapter", action="store_true", help="write a LoRA run as an adapter for PEFT")
    to_hf.add_argument("--include-untrained", action="store_true", help="export untrained modalities, too")
    to_hf.add_argument(
        "--with-code", action="store_true", help="add code that loads it in PyTorch without this package"
    )

    stitch = add_command(
        convert,
        "stitch",
        _stitch,
        "Make a base of a vision tower and a language model.",
        "umbrella-jax convert stitch --vision siglip2 --language qwen3 base",
    )
    stitch.add_argument("out", metavar="OUT", help="directory to write")
    stitch.add_argument("--vision", metavar="DIR", required=True, help="SigLIP directory, or its name on the hub")
    stitch.add_argument(
        "--language", metavar="DIR", required=True, help="directory of a language model, or its name on the hub"
    )
    stitch.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the projector; default 0")

    verify = add_command(
        convert,
        "verify",
        _verify,
        "Compare two models; exit with 1 if they differ.",
        "umbrella-jax convert verify runs/sex exports/sex",
    )
    verify.add_argument("a", metavar="MODEL", help="Hugging Face directory, native checkpoint or run")
    verify.add_argument("b", metavar="OTHER", help="model to compare with")
    verify.add_argument("--config", metavar="FILE", help="YAML with modalities, for stock LLaVAs")
    verify.add_argument("--no-logits", action="store_true", help="compare only tensors, not PyTorch's and JAX's logits")
    add_json(verify)

    push = add_command(
        commands,
        "push",
        _push,
        "Upload an export to the Hugging Face hub, private by default.",
        "umbrella-jax push exports/sex my-lab/sex-t1 --dry-run",
    )
    push.add_argument("export", metavar="EXPORT", help="directory that `convert to-hf` wrote")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub, created if missing")
    push.add_argument("--public", action="store_true", help="let everyone download it")
    push.add_argument("--revision", metavar="BRANCH", help="branch, created if missing; default main")
    push.add_argument("--message", metavar="TEXT", help="commit message")
    push.add_argument("--dry-run", action="store_true", help="check and list the files, without any request")
    push.add_argument("--allow-untrained", action="store_true", help="upload even if no modality is trained")


def _from_hf(arguments: argparse.Namespace) -> None:
    from umbrella_jax.checkpoints.checkpoint import Checkpoint
    from umbrella_jax.checkpoints.export import write_native

    config = config_of(arguments)
    if arguments.patch_embed and config.model.adapter:
        raise ConfigError(f"patch_embed: {arguments.patch_embed}, and the adapter {config.model.adapter}; give one")
    checkpoint = Checkpoint.open(
        arguments.source,
        config.model.modalities,
        init=config.model.patch_embed_init,
        patch_embed=arguments.patch_embed or config.model.adapter,
        seed=config.seed,
    )
    for line in [*checkpoint.notes, *checkpoint.check(config.model.frozen_dtype)]:
        print(line)
    write_native(
        checkpoint,
        Path(arguments.out),
        dtype=config.model.frozen_dtype,
        finite=arguments.check_finite,
    )
    print(f"{arguments.out}: native checkpoint; train from it with --base {arguments.out}")


def _to_hf(arguments: argparse.Namespace) -> None:
    from umbrella_jax.checkpoints.checkpoint import Checkpoint
    from umbrella_jax.checkpoints.export import untrained_to_leave_out, write_hf, write_peft, write_trained
    from umbrella_jax.models.paths import describe_part

    checkpoint = Checkpoint.open(arguments.source, step=arguments.step)
    if checkpoint.step_message:
        print(checkpoint.step_message)
    names = tuple(arguments.names.split(",")) if arguments.names else None
    out = Path(arguments.out)
    options: dict[str, Any] = {"names": names, "include_untrained": arguments.include_untrained}
    for name, why in checkpoint.untrained.items():
        left_out = name in untrained_to_leave_out(checkpoint) and not arguments.include_untrained
        what = "left out; --include-untrained exports it" if left_out else "exported as it is, recorded as untrained"
        print(f"{describe_part(name)} {why}: {what}")
    if arguments.with_code and (arguments.trainable_only or arguments.adapter):
        raise ConfigError("--with-code: needs the whole model; leave out --trainable-only and --adapter")
    if arguments.adapter:
        if arguments.trainable_only:
            raise ConfigError("adapter: an adapter has only trained weights anyway; leave --trainable-only out")
        needs_own = write_peft(checkpoint, out, records=_records(checkpoint), **options)
        print(f"{out}: PEFT adapter for {checkpoint.origin.name}; in PyTorch:")
        if needs_own:
            print(f"  convert.torch_model.load_umbrella(HF_DIR, adapter={str(out)!r})")
        else:
            print(f"  peft.PeftModel.from_pretrained(load_umbrella(HF_DIR), {str(out)!r})")
    elif arguments.trainable_only:
        file = write_trained(checkpoint, out, **options)
        print(f"{file}: trained weights; add them to their base with")
        print(f"  umbrella-jax convert from-hf HF_DIR OUT --config FILE \\\n    --patch-embed {file}")
    else:
        options |= {"max_shard_size": arguments.max_shard_size, "with_code": arguments.with_code}
        write_hf(checkpoint, out, records=_records(checkpoint), **options)
        print(f"{out}: Hugging Face checkpoint; in PyTorch:\n  convert.torch_model.load_umbrella({str(out)!r})")
        if arguments.with_code:
            print("or, without this package:\n  AutoModelForImageTextToText.from_pretrained(")
            print(f"    {str(out)!r}, trust_remote_code=True\n  )")


def _records(checkpoint: Any) -> Any:
    """Return the training records for a model card, and print why one lacks metrics."""
    from umbrella_jax.run.record import read_training_records

    records = read_training_records(checkpoint)
    for record in records:
        if record.why_no_metrics:
            print(f"the model card will have no metrics: {record.why_no_metrics}", file=sys.stderr)
    return records


def _stitch(arguments: argparse.Namespace) -> None:
    from umbrella_jax.checkpoints.stitch import stitch

    for line in stitch(arguments.vision, arguments.language, arguments.out, seed=arguments.seed):
        print(line)
    print(f"{arguments.out}: base; train its projector first, with --base {arguments.out}")


def _verify(arguments: argparse.Namespace) -> int:
    from umbrella_jax.checkpoints.verify import verify

    comparison = verify(arguments.a, arguments.b, modalities_of(arguments), forward=not arguments.no_logits)
    print(strict_json(comparison.to_json(), indent=2) if arguments.json else "\n".join(comparison.lines()))
    return 0 if comparison.same else 1


def _push(arguments: argparse.Namespace) -> None:
    from convert.foreign import ADAPTER
    from umbrella_jax.checkpoints.push import check_upload, upload

    job = check_upload(
        arguments.export,
        arguments.repo,
        branch=arguments.revision,
        is_private=not arguments.public,
        allow_untrained=arguments.allow_untrained,
    )
    print("\n".join(job.lines()))
    if arguments.dry_run:
        print("dry run: nothing was sent")
        return
    done = upload(job, arguments.message)
    if done.is_new_repo:
        print(f"{job.repo}: created")
    for what, names in (("replaced, if changed", done.replaced), ("deleted", done.deleted)):
        if names and done.is_new_commit:
            print("\n".join(wrapped(f"{what}: {', '.join(names)}")))
    for remark in done.remarks:
        print(remark)
    print(done.url if done.is_new_commit else f"{job.repo}: has these files already")
    name = f"{job.repo}@{done.commit}"
    ours, theirs = (
        f"BASE, {word}={name!r}" if ADAPTER in job.files else repr(name) for word in ("patch_embed", "adapter")
    )
    print(f"load it, in JAX or in PyTorch, with\n  umbrella_jax.load({ours})")
    print(f"  convert.torch_model.load_umbrella({theirs})")
