# Copyright 2026 The umbrella-jax authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The processor of UMBRELLA: scans to the tensors of its training, questions to token ids, tokens to text.

umbrella-jax writes this file into exports. It needs torch, transformers (4.46 or later), numpy and nibabel. Volumes and
ids are those of umbrella_jax.Processor; what cannot be the same, such as removing confounds, is refused.
"""

import gzip
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.openers import ImageOpener
from transformers import BatchFeature, ProcessorMixin

TURN_START, TURN_END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"
Modality = Mapping[str, Any]
"""A modality of umbrella_config.json: size, patch, orientation, mode, spacing, scaling, background, strides."""


class UmbrellaProcessor(ProcessorMixin):
    """Turns questions about scans into the model's input, as in its training, and tokens into text.

    A scan is the path of a NIfTI file or an image of nibabel, such as `nibabel.Nifti1Image(array, affine)`; an array,
    which has neither orientation nor voxel sizes, only for a modality that needs none (`as_stored`, no spacing); or a
    torch tensor of the modality's size, which is taken as preprocessed.
    """

    attributes: ClassVar[Any] = ["tokenizer"]  # transformers 4 reads these three
    tokenizer_class = "AutoTokenizer"
    valid_kwargs: ClassVar[Any] = ["modalities", "template"]

    def __init__(
        self, tokenizer: Any, modalities: Mapping[str, Modality], template: str = "umbrella", chat_template: Any = None
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.modalities, self.template = modalities, template

    def __call__(
        self, text: str | Sequence[str], images: Sequence[Any] = (), answers: str | Sequence[str] | None = None
    ) -> BatchFeature:
        """Return input_ids and attention_mask [B, T], pixel_values, and labels if there are answers.

        Args:
            text: a question, or B of them.
            images: (modality, scan) or (modality, scan, window of a run) of each image, which come before the question;
                for B questions, B lists of these.
            answers: the answers to learn.

        `pixel_values` is a tensor (n, 1, *size), or for images of several modalities a list of them. Raises ValueError
        for scans and texts that umbrella-jax refuses.
        """
        if isinstance(text, str):
            text, images, answers = [text], [images], None if answers is None else [answers]  # type: ignore[list-item]
        images, replies = images or [()] * len(text), [None] * len(text) if answers is None else answers
        if isinstance(replies, str) or not 0 < len(text) == len(images) == len(replies):
            raise ValueError(
                f"questions {text!r}, answers {answers!r}, {len(images)} lists of images: expected as many of each"
            )
        shown = [[self._image(image) for image in row] for row in images]
        rows = [self._encode(*row) for row in zip(text, shown, replies, strict=True)]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id or 0
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids, learned in rows:
            values = (ids, [1] * len(ids), [i if learns else -100 for i, learns in zip(ids, learned, strict=True)])
            for padded, own, fill in zip(columns.values(), values, (pad, 0, -100), strict=True):
                padding = [fill] * (length - len(own))
                padded.append([*padding, *own] if answers is None else [*own, *padding])
        batch: dict[str, Any] = {name: torch.tensor(values) for name, values in columns.items()}
        if answers is None:  # to generate from
            del batch["labels"]
        volumes = [(image[0], self.load_volume(*image)) for row in shown for image in row]
        if len({name for name, _ in volumes}) == 1:
            batch["pixel_values"] = torch.stack([volume[None] for _, volume in volumes])
        elif volumes:
            batch["pixel_values"] = [volume[None, None] for _, volume in volumes]
        return BatchFeature(batch)

    def load_volume(self, modality: str, scan: Any, window: int = 0) -> torch.Tensor:
        """Return a preprocessed volume, or a window of a run, float32 of the modality's size."""
        m = self.modalities[self._modality(modality)]
        if not isinstance(scan, torch.Tensor):
            return torch.from_numpy(load_volume(scan, m, window))
        if tuple(scan.shape) != tuple(m["size"]):
            raise ValueError(f"{modality}: a tensor of shape {tuple(scan.shape)}, expected {tuple(m['size'])}")
        if not scan.isfinite().all():
            raise ValueError(f"{modality}: a tensor with NaN or infinity")
        return scan.float()

    def decode(self, tokens: Any, **options: Any) -> str:
        """Return the text of an answer's tokens."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False, **options}
        return self.tokenizer.decode(tokens, **options).strip()

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        """Return the text of each row of tokens."""
        return [self.decode(row, **options) for row in tokens]

    def _modality(self, name: str) -> str:
        """Return the modality that a name means: itself, one that has it as an alias, or one of its family."""
        families = ({"T1", "sMRI"}, {"rsfMRI", "fMRI"})
        relatives = [m for family in families if name in family for m in self.modalities if m in family]
        aliased = [m for m, config in self.modalities.items() if name in config["aliases"]]
        for fits in ([m for m in self.modalities if m == name], aliased, relatives):
            if len(fits) == 1:
                return fits[0]
        raise ValueError(f"modality {name}: the model has {', '.join(self.modalities)}")

    def _image(self, image: Any) -> tuple[Any, ...]:
        """Return an image with the modality that its name means."""
        if not (isinstance(image, list | tuple) and len(image) in (2, 3) and isinstance(image[0], str)):
            raise ValueError(f"image {image!r}: expected (modality, scan) or (modality, scan, window of a run)")
        return (self._modality(image[0]), *image[1:])

    def _encode(self, question: str, images: Sequence[Any], answer: str | None) -> tuple[list[int], list[bool]]:
        """Return the ids of a question and its answer, an <image> per patch, and whether each is learned."""
        if not isinstance(question, str) or not isinstance(answer, str | None):
            raise ValueError(f"question {question!r}, answer {answer!r}: expected texts")
        control = sorted({TURN_START, TURN_END, IMAGE, *self.tokenizer.all_special_tokens})
        if forged := [token for token in control if token in question or token in (answer or "")]:
            raise ValueError(f"text contains {' and '.join(forged)}, a control token of the tokenizer; take it out")
        ids, learned = getattr(self, f"_encode_{self.template}")(question, len(images), answer)
        grids = [zip(self.modalities[m]["size"], self.modalities[m]["patch"], strict=True) for m, *_ in images]
        patches = iter([math.prod(size // patch for size, patch in grid) for grid in grids])
        image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if ids.count(image) != len(images):
            raise ValueError(f"{ids.count(image)} {IMAGE} in the text, {len(images)} images")
        repeats = [next(patches) if i == image else 1 for i in ids]
        return np.repeat(ids, repeats).tolist(), np.repeat(learned, repeats).tolist()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_umbrella(self, question: str, images: int, answer: str | None) -> tuple[list[int], list[bool]]:
        start, end, image = self.tokenizer.convert_tokens_to_ids([TURN_START, TURN_END, IMAGE])
        ids = [start, *self._ids("user\n"), *[image] * images, *self._ids(question), end, *self._ids("\n")]
        ids += [start, *self._ids("assistant\n")]
        learned, after = ([], []) if answer is None else ([*self._ids(answer), end], self._ids("\n"))
        return ids + learned + after, [False] * len(ids) + [True] * len(learned) + [False] * len(after)

    def _encode_original(self, question: str, images: int, answer: str | None) -> tuple[list[int], list[bool]]:
        text = f"{TURN_START}user\n{IMAGE * images}{question}{TURN_END}\n{TURN_START}assistant\n"
        ids = self._ids(text if answer is None else f"{text}{answer}{TURN_END}\n")
        turn = len(ids) - 1 - ids[::-1].index(self.tokenizer.convert_tokens_to_ids(TURN_START))
        return ids, [answer is not None and i >= turn for i in range(len(ids))]

    def _encode_chat(self, question: str, images: int, answer: str | None) -> tuple[list[int], list[bool]]:
        if answer is not None:
            raise ValueError("answers: which tokens are learned depends on the chat template; train with umbrella-jax")
        parts = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        render = self.tokenizer.apply_chat_template
        try:
            has_parts = IMAGE in render([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
        except Exception:  # a template is a program, which may raise anything
            has_parts = False
        chat = [{"role": "user", "content": parts if has_parts else IMAGE * images + question}]
        if question.strip() not in render(chat, tokenize=False, add_generation_prompt=True):
            raise ValueError("the chat template leaves out or rewrites the question")
        ids = render(chat, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
        return ids, [False] * len(ids)


def load_volume(scan: Any, m: Modality, window: int = 0) -> np.ndarray:
    """Return a preprocessed volume, or a window of a run, float32 of size m["size"].

    The steps and numbers are those of umbrella_jax.data.volume, which documents them.
    """
    for key, step in (("confounds", "regressing out confounds"), ("tr", "resampling to a repetition time")):
        if m.get(key) is not None:
            raise ValueError(
                f"{key}: {step} needs umbrella-jax (umbrella_jax.data.volume); give its result as a tensor"
            )
    name, voxels, affine, zooms = _open(scan)
    size, shape, as_stored = tuple(m["size"]), voxels.shape, m["orientation"] == "as_stored"
    if 0 in shape or len(shape) < len(size) or any(n != 1 for n in shape[len(size) :]):
        raise ValueError(f"{name}: shape {shape}; expected {len(size)} axes, as the modality's size {size} has")
    if affine is None and not as_stored:
        raise ValueError(f"{name}: no valid orientation; use a NIfTI with a valid qform or sform")
    if zooms is None and m["spacing"] is not None:
        raise ValueError(f"{name}: no plausible voxel sizes")
    orientation = nib.io_orientation(np.eye(4) if as_stored else affine)
    if not as_stored:
        orientation = nib.orientations.ornt_transform(orientation, nib.orientations.axcodes2ornt(m["orientation"]))
    frames: Any = 0
    if len(size) == 4:
        step = m["stride_within_seq"]
        span, stride = (size[3] - 1) * step + 1, max(round(m["stride_between_seq"] * size[3] * step), 1)
        if not 0 <= window < (count := max((shape[3] - span) // stride + 1, 0)):
            raise ValueError(f"{name}: no window {window}; {shape[3]} frames have {count}")
        frames = slice(window * stride, window * stride + span, step)
    index = (slice(None), slice(None), slice(None), frames, *(0,) * (len(shape) - 4))[: len(shape)]
    data = nib.apply_orientation(np.asarray(voxels[index]), orientation)
    limit = np.finfo(np.float32).max
    if data.dtype.kind not in "iuf" or not (data.min() >= -limit and data.max() <= limit):
        raise ValueError(f"{name}: voxels of type {data.dtype}; expected real numbers, neither NaN nor infinite")
    with np.errstate(over="ignore", invalid="ignore"):
        if len(size) == 4:
            volume = _preprocess_4d(name, data.astype(np.float32, copy=False), m)
        else:
            volume = _preprocess_3d(name, data, None if zooms is None else zooms[np.argsort(orientation[:, 0])], m)
    if not np.isfinite(volume).all():
        raise ValueError(f"{name}: scaling {m['scaling']} takes it beyond float32")
    return volume


def _open(scan: Any) -> tuple[str, Any, np.ndarray | None, np.ndarray | None]:
    """Return name, voxels (read when indexed), affine and voxel sizes in mm; None if these are absent or invalid."""
    if isinstance(scan, np.ndarray):
        return "array", scan, None, None
    if isinstance(scan, nib.Nifti1Pair):
        name, header = "image", scan.header
    else:
        name = str(scan)
        if name.endswith(".gz"):  # damage shows in the checksum at the end
            with gzip.open(name) as content:
                while content.read(1 << 20):
                    pass
        scan = nib.load(name)
        if not isinstance(scan, nib.Nifti1Pair):
            raise ValueError(f"{name}: {type(scan).__name__}; expected NIfTI")
        with ImageOpener(scan.file_map.get("header", scan.file_map["image"]).filename) as content:
            header = type(scan.header).from_fileobj(content, check=False)  # as stored; nibabel's is repaired
    pixdim, has_sform = np.abs(header["pixdim"][1:4].astype(np.float64)), int(scan.header["sform_code"]) > 0
    affine = None
    if has_sform or (int(scan.header["qform_code"]) > 0 and header["pixdim"][0] in (-1, 0, 1)):
        affine = np.asarray(scan.header.get_sform() if has_sform else scan.header.get_qform(), np.float64)
        if not np.isfinite(affine).all() or np.isnan(nib.io_orientation(affine)).any():
            return name, scan.dataobj, None, None
    unit = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    zooms = (voxel_sizes(affine) if has_sform else pixdim) * unit
    return name, scan.dataobj, affine, zooms if ((zooms >= 1e-3) & (zooms <= 1e3)).all() else None


def _preprocess_3d(name: str, data: np.ndarray, zooms: Any, m: Modality) -> np.ndarray:
    if m["mode"] == "resize":
        weights = [_area_weights(*axis) for axis in zip(data.shape, m["size"], strict=True)]
        volume = _resample(data, weights)
    else:
        weights = [_linear_weights(*axis, m["spacing"]) for axis in zip(data.shape, zooms, m["size"], strict=True)]
        volume = _padded(name, data, weights, m)
    if m["scaling"] == "znorm":
        mean, std = _moments(volume)
        if m["mode"] == "resize" and np.ptp(volume) < 1e-4 * abs(mean):  # float32 has few digits for the differences
            volume = _resample(data.astype(np.float64) - mean, weights)
            mean, std = _moments(volume)
        volume -= mean
        volume /= std
    elif m["scaling"] == "minmax":
        volume /= _largest(name, volume)
    return volume


def _padded(name: str, data: np.ndarray, weights: Sequence[np.ndarray], m: Modality) -> np.ndarray:
    """Return the resampled volume with its background around it. Raise ValueError if anything else is cropped."""
    background = _find_background(data, m["background"])
    used = [np.flatnonzero(w.any(axis=0)) for w in weights]
    kept = data[tuple(slice(near[0], near[-1] + 1) for near in used)]
    inside = tuple(slice(near[0], near[-1] + 1) for near in (np.flatnonzero(w.any(axis=1)) for w in weights))
    volume = _resample(data, weights)
    if background is None:
        if kept.shape != data.shape or volume[inside].shape != volume.shape:
            raise ValueError(f"{name}: its background is unknown; mask the volume with 0")
        return volume
    if kept.shape != data.shape and (~_mask(data, background)).sum() != (~_mask(kept, background)).sum():
        raise ValueError(f"{name}: voxels other than background lie outside the field of the modality")
    if background[1] == 0:
        return volume
    padded = np.full_like(volume, background[1])
    padded[inside] = volume[inside]
    return padded


def _preprocess_4d(name: str, data: np.ndarray, m: Modality) -> np.ndarray:
    size, scaling = tuple(m["size"]), m["scaling"]
    background = _find_background(data, m["background"])
    is_masked = scaling in ("znorm_zeroback", "znorm_minback")
    if background is None and (is_masked or any(n < s for n, s in zip(data.shape[:3], size[:3], strict=True))):
        raise ValueError(f"{name}: its background is unknown; mask the volume with 0")
    if scaling == "minmax" or background == ("nonpositive", 0.0):
        maximum = _largest(name, data)
    volume = np.full(size, 0.0 if background is None else background[1], np.float32)
    inside, outside = zip(*(_centred(*axis) for axis in zip(data.shape[:3], size[:3], strict=True)), strict=True)
    volume[outside] = data[inside]
    if scaling == "minmax":
        volume /= maximum
    if not is_masked or background is None:
        return volume
    flat = data.ravel("K")
    voxels = flat[flat > 0] if background[0] == "nonpositive" else data[~_mask(data, background)]
    if not voxels.size:
        raise ValueError(f"{name}: every voxel has the background's value, {background[1]:.6g}")
    mean, std = _moments(voxels)
    mask = _mask(volume, background)
    volume -= mean
    volume /= std
    volume[mask] = (voxels.min() - mean) / std if scaling == "znorm_minback" else 0
    return volume


def _find_background(data: np.ndarray, rule: str | float) -> tuple[str, float] | None:
    """Return (nonpositive or equal, value of the background); None if `auto` cannot decide."""
    lowest = float(data.min())
    negative = -data.sum(where=data < 0, dtype=np.float64) if lowest < 0 else 0.0
    if rule == "auto" and lowest < 0:
        below = float(negative / (negative + data.sum(where=data > 0, dtype=np.float64)))
        if below > 0.05:
            shares = {value: float(_mask(data, ("equal", value)).mean()) for value in (0.0, lowest)}
            value = max(shares, key=lambda v: shares[v])
            return ("equal", value) if shares[value] >= 0.05 else None
    if rule in ("auto", "nonpositive"):
        return "nonpositive", 0.0
    return "equal", lowest if rule == "lowest" else float(rule)


def _mask(data: np.ndarray, background: tuple[str, float]) -> np.ndarray:
    """Return which voxels are background; with one value, those of a run that have it in every frame."""
    if background[0] == "nonpositive":
        return data <= 0
    equal = data == background[1]
    return equal.all(axis=-1) if data.ndim == 4 else equal


def _area_weights(length: int, size: int) -> np.ndarray:
    """Return weights (size, length) of adaptive average pooling."""
    i, j = np.arange(size)[:, None], np.arange(length)
    window = (i * length // size <= j) & (j < -(-(i + 1) * length // size))
    return (window / window.sum(axis=1, keepdims=True)).astype(np.float32)


def _linear_weights(length: int, zoom: float, size: int, spacing: float) -> np.ndarray:
    """Return weights (size, length) of antialiased linear resampling to `spacing` mm around the centre."""
    resampled = max(round(length * zoom / spacing), 1)
    inside, outside = _centred(resampled, size)
    middles = (np.arange(inside.start, inside.stop) - (resampled - 1) / 2) * spacing
    distance = np.abs(middles[:, None] - (np.arange(length) - (length - 1) / 2) * zoom)
    triangle = np.maximum(1 - distance / max(zoom, spacing), 0)
    weights = np.zeros((size, length), np.float32)
    weights[outside] = triangle / triangle.sum(axis=1, keepdims=True)
    return weights


def _resample(volume: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resample (X, Y, Z) to float32 (U, V, W) by weights (U, X), (V, Y), (W, Z), the slowest axis in memory first."""
    order = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))
    slow, middle, fast = (weights[axis] for axis in order)
    data = volume.transpose(order)
    if _is_identity(slow):
        reduced = data.astype(np.float32)
    else:
        reduced = np.zeros((len(slow), *data.shape[1:]), np.float32)
        for row, out in zip(slow, reduced, strict=True):
            if len(near := np.flatnonzero(row)):
                some = slice(near[0], near[-1] + 1)
                out[...] = np.tensordot(row[some], data[some].astype(np.float32), 1)
    reduced = reduced if _is_identity(middle) else middle @ reduced
    reduced = reduced if _is_identity(fast) else reduced @ fast.T
    return np.ascontiguousarray(reduced.transpose(np.argsort(order)))


def _is_identity(weights: np.ndarray) -> bool:
    length = len(weights)
    return weights.shape == (length, length) and bool((weights.diagonal() == 1).all()) and weights.sum() == length


def _centred(length: int, size: int) -> tuple[slice, slice]:
    """Return the slices to read from and to write to that pad or crop an axis around its centre."""
    cut, pad = max(length - size, 0) // 2, max(size - length, 0) // 2
    common = min(length, size)
    return slice(cut, cut + common), slice(pad, pad + common)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation; the latter is 1 if only rounding makes the values differ."""
    mean = float(values.mean(dtype=np.float64))
    squares = np.square(values - np.float32(mean)).sum()
    std = float(np.sqrt(np.float32(float(squares) / values.size)))
    if std == math.inf:  # NaN makes the result fail its check, division by infinity would not
        return mean, math.nan
    if std > max(1e-4 * abs(mean), 1e-16):
        return mean, std
    std = float(values.std(dtype=np.float64))
    step = float(np.spacing(np.abs(np.array([values.min(), values.max()], np.float32)).max()))
    return mean, std if std > 2 * step else 1.0


def _largest(name: str, data: np.ndarray) -> float:
    if (maximum := float(data.max())) > 0:
        return maximum
    raise ValueError(f"{name}: no voxel is above 0")


UmbrellaProcessor.register_for_auto_class("AutoProcessor")
