"""`load_umbrella` against the golden values, under any version of transformers.

golden/README.md says that greedy.npz was made before training. It was made after: with the patch embedding that
train.npz ends with, every row is the same to the last token, and before training only the row without images is.
"""

from pathlib import Path

import numpy as np
import torch

from convert.torch_model import load_umbrella
from umbrella_jax.config.schema import ModalityConfig

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = {"umbrella_T1_rsfMRI": ("T1", "rsfMRI"), "umbrella_sMRI_fMRI": ("sMRI", "fMRI")}
SIZES = (
    ModalityConfig(size=(20, 24, 16), patch=(6, 5, 4)),
    ModalityConfig(size=(12, 8, 8, 6), patch=(4, 4, 2, 3)),
)


def check(folder: str) -> None:
    """Embeddings, tower, features and logits as in forward.npz; greedy tokens as in greedy.npz."""
    names = FOLDERS[folder]
    model = load_umbrella(GOLDEN / folder, modalities=dict(zip(names, SIZES, strict=True)))
    golden, train, greedy = (dict(np.load(GOLDEN / f"{n}.npz")) for n in ("forward", "train", "greedy"))
    base = getattr(model, "model", model)
    embeddings = getattr(base.vision_tower, "vision_model", base.vision_tower).embeddings

    def close(value: torch.Tensor, expected: np.ndarray) -> None:
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-5, rtol=0)

    with torch.no_grad():
        for kind in ("t1", "fmri"):
            volumes = torch.from_numpy(golden[kind])
            hidden = base.vision_tower(volumes, output_hidden_states=True).hidden_states[-1]
            close(embeddings(volumes), golden[f"{kind}_patch_embed"])
            close(hidden, golden[f"{kind}_hidden"])
            close(base.multi_modal_projector(hidden), golden[f"{kind}_features"])

    images = ("t1", slice(2)), ("fmri", slice(1)), None  # row 3 has both modalities, which is no stock call

    def inputs(row: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(golden["input_ids"][row : row + 1, : golden["attention_mask"][row].sum()])
        image = images[row]
        volumes = {} if image is None else {"pixel_values": torch.from_numpy(golden[image[0]][image[1]])}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **volumes}

    with torch.no_grad():
        for row in range(3):
            length = int(golden["attention_mask"][row].sum())
            close(model(**inputs(row)).logits[0], golden["logits"][row, :length])

        for end in ("_proj.weight", "_proj.bias", "_positional_embeddings"):
            for old, new in zip(FOLDERS["umbrella_T1_rsfMRI"], names, strict=True):
                embeddings.get_parameter(new + end).copy_(torch.from_numpy(train[f"after.{old}{end}"]))
        for row in range(3):
            tokens = model.generate(**inputs(row), max_new_tokens=24, do_sample=False, pad_token_id=0)
            assert tokens[0, -24:].tolist() == greedy[f"row{row}"].tolist()
