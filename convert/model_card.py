"""Write the README.md of an export: model, expected volumes, and how to load it."""

from collections.abc import Collection, Mapping
from importlib.metadata import version

from umbrella_jax.config.schema import ModalityConfig, Template
from umbrella_jax.models.llava import LlavaConfig

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, mri, neuroimaging]{base_model}
---
# Vision-language model for brain MRI

A LLaVA, SigLIP ({vision_layers} layers, {vision_width} wide), projector and Qwen2 ({text_layers} layers, {text_width}
wide, {vocab} words), whose 2D patch embedding is replaced by one for volumes. Written by umbrella-jax {version}.

## Volumes
{volumes}

umbrella-jax reads these values from `umbrella_config.json`: the weights only work for volumes that were prepared like
this. Orientation names the directions of the axes, such as NIfTI's canonical `RAS`; `as_stored` keeps the axes of the
file. Mode `resize` resizes the whole field of view to that many voxels, whatever their shape. Mode `pad` pads and crops
around the middle; if it names mm, voxels are first resampled to cubes of that size.

## Text
{text}

## Base
{base}

## How to load it
In PyTorch, with transformers 4.46 or later and `pip install 'umbrella-jax[torch]'`:

```python
from convert.torch_model import load_umbrella

model = load_umbrella("{folder}")  # the stock LlavaForConditionalGeneration with the volume patch embedding
```

`LlavaForConditionalGeneration.from_pretrained` does **not** load it: it leaves out the volume patch embedding and
initialises one for images at random.

In JAX:

```python
import umbrella_jax

model = umbrella_jax.load("{folder}")
processor = umbrella_jax.Processor.load("{folder}")
```
"""

_CHATML = (
    "ChatML: `<|im_start|>user`, a newline, the turn, `<|im_end|>`, a newline; then `<|im_start|>assistant`, a newline"
)
_TEXTS: dict[Template, str] = {
    "umbrella": f"{_CHATML}. An image is placed where the turn shows it.",
    "original": f"{_CHATML}. The images of a turn come before its text.",
    "chat": "The tokenizer's own chat template.",
}


def model_card(
    config: LlavaConfig,
    modalities: Mapping[str, ModalityConfig],
    folder: str,
    base: str | None = None,
    base_fingerprint: str | None = None,
    template: Template | None = None,
    untrained: Collection[str] = (),
) -> str:
    """Return the model card of an export, in Markdown.

    Args:
        modalities: the modalities under their names in the export.
        folder: name of the export's folder.
        base: name of the model that training began from.
        base_fingerprint: SHA-256 of that model's weights.
        template: conversation template of the training data.
        untrained: modalities whose patch embedding is untrained.
    """
    columns = ("name", "voxels", "patch", "tokens", "orientation", "mode", "scaling", "background", "windows")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, m in modalities.items():
        windows = "–"
        if len(m.size) == 4:
            windows = f"{m.size[3]} frames, {m.stride_within_seq} apart, every {m.stride_between_seq:g} of a window"
        size, patch = ("×".join(map(str, numbers)) for numbers in (m.size, m.patch))
        mode = m.mode if m.spacing is None else f"{m.mode}, {m.spacing:g} mm"
        cells = (name, size, patch, m.num_patches, m.orientation, mode, m.scaling, m.background, windows)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    warnings = [f"\n**{name} was never trained: its patch embedding has its initial values.**" for name in untrained]
    lines = [f"Trained on top of `{base}`." if base else "Not stated."]
    if base_fingerprint:
        lines.append(f"SHA-256 of its weights (names, shapes, types, bytes): `{base_fingerprint}`.")
    text = "Not stated."
    if template is not None:
        text = f"Trained with the template `{template}`, also recorded in `umbrella_config.json`. {_TEXTS[template]}"
    return _CARD.format(
        text=text,
        base_model=f"\nbase_model: {base}" if base and base.count("/") == 1 else "",  # the hub rejects other names
        vision_layers=config.vision.num_hidden_layers,
        vision_width=config.vision.hidden_size,
        text_layers=config.text.num_hidden_layers,
        text_width=config.text.hidden_size,
        vocab=config.text.vocab_size,
        version=version("umbrella-jax"),
        volumes="\n".join([*rows, *warnings]),
        base="\n".join(lines),
        folder=folder,
    )
