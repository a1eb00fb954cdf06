"""Names of parameters: the component, modality and adapter that a parameter belongs to.

A parameter's path joins the attributes that lead to it by dots, as in `language_model.model.embed_tokens.weight`. The
name of the tensor on the hub is the same, with the number of its layer after `layers.`, but for the tower's unused
layers, which the hub names as the others (convert/rules.py). The functions here take both.
"""

import re
from fnmatch import fnmatchcase

VISION_TOWER = "vision_tower."
VISION_MODEL = VISION_TOWER + "vision_model."
EMBEDDINGS = VISION_MODEL + "embeddings."
ENCODER = VISION_MODEL + "encoder."
UNUSED_LAYERS = VISION_MODEL + "unused."
PROJECTOR = "multi_modal_projector."
LANGUAGE_MODEL = "language_model."

FROZEN, UNUSED = "frozen", "unused"

COMPONENTS: dict[str, str] = {
    "patch_embed": EMBEDDINGS + "*",
    "vision_tower": ENCODER + "*",
    "projector": PROJECTOR + "*",
    "language_model": LANGUAGE_MODEL + "*",
}
"""{component: pattern of its parameters' paths}. Parameters that match no pattern cannot train, because
they do not affect the loss: SigLIP's layers above the one whose output LLaVA takes, its `post_layernorm`, and
LLaVA-OneVision's `image_newline`, which volumes do not use."""

_MODALITY = re.compile(re.escape(EMBEDDINGS) + r"(.+)_(?:proj\.(?:weight|bias)|positional_embeddings)")
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.weight")


def modality_of(path: str) -> str | None:
    """Return the modality whose patch embedding contains a parameter; None for other parameters."""
    match = _MODALITY.fullmatch(path)
    return match[1] if match else None


def component_of(path: str) -> str:
    """Return the component of `COMPONENTS` that contains a parameter, or `unused` if LLaVA does not use it."""
    return next((name for name, pattern in COMPONENTS.items() if fnmatchcase(path, pattern)), UNUSED)


def is_component(part: str) -> bool:
    """Return whether a part of a model that may be untrained is a component; otherwise it is a modality."""
    return part in COMPONENTS


def describe_part(part: str) -> str:
    """Return the subject of a message about an untrained part: a component, or a modality's patch embedding."""
    return part if is_component(part) else f"{part}: patch embedding"


def adapted_weight(path: str) -> str | None:
    """Return the path of the weight that a LoRA factor adapts; None for all other parameters."""
    match = _ADAPTER.fullmatch(path)
    return f"{match[1]}.weight" if match else None


def adapter_paths(weight: str) -> tuple[str, str]:
    """Return the paths of the LoRA factors A and B that adapt a weight."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
