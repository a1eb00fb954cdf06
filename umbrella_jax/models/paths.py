"""Parameter paths: the component, modality and adapter that each belongs to."""

import re
from fnmatch import fnmatchcase

FROZEN, UNUSED = "frozen", "unused"


COMPONENTS: dict[str, str] = {
    "patch_embed": "vision_tower.vision_model.embeddings.*",
    "vision_tower": "vision_tower.vision_model.encoder.*",
    "projector": "multi_modal_projector.*",
    "language_model": "language_model.*",
}
"""The groups that have a name, as path patterns. What none of them covers (SigLIP's `post_layernorm`, whose output
LLaVA does not take) cannot train: nothing that it does reaches the loss."""


_MODALITY = re.compile(r"vision_tower\.vision_model\.embeddings\.(\w+?)_(?:proj\.\w+|positional_embeddings)")


def modality_of(path: str) -> str | None:
    """The modality whose patch embedding holds this parameter; None for all others."""
    match = _MODALITY.fullmatch(path)
    return match[1] if match else None


def component_of(path: str) -> str:
    """The name in `COMPONENTS` of what holds a parameter, `unused` where LLaVA does not use it."""
    return next((name for name, pattern in COMPONENTS.items() if fnmatchcase(path, pattern)), UNUSED)


_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.weight")


def adapted_weight(path: str) -> str | None:
    """The path of the weight beside which this part of an adapter lies; None for all other parameters."""
    match = _ADAPTER.fullmatch(path)
    return f"{match[1]}.weight" if match else None


def adapters(weight: str) -> tuple[str, str]:
    """Paths of A and B beside a weight."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
