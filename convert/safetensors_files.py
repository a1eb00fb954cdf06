"""Read and write checkpoint files: safetensors, and PyTorch's `.bin` for reading only."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from convert.checksum import KEY, PIECE, TensorCheck, crc32, read_checksums
from convert.foreign import adapter_faults, folder_contents, tensor_faults
from convert.lazy_tensor import BLOCK, Index, Tensor, copy_numbers
from convert.rules import hub_name, unwrapped_names
from umbrella_jax.errors import CheckpointError, ConfigError, is_out_of_memory
from umbrella_jax.io.reading import describe_pointer, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = "copy it again"
_RECORD = "umbrella_config.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# in the order in which the safetensors library writes them
_DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
_BUFFER = 4 << 20
"""Bytes to cast at once: few enough to stay in the CPU cache."""
_CODES = {np.dtype(dtype).name: code for code, dtype in _DTYPES.items()}


def open_safetensors(
    path: Path, expected: Mapping[str, str] | None = None, source: str = "its header"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of one file; only its header is read, which the library limits to 100 MB.

    Args:
        expected: {name on the hub: checksum}, which each tensor is compared with when it is read; by default the
            checksums in the file's metadata.
        source: name of the file that records `expected`, for messages.

    Raises CheckpointError for a file that is cut short, damaged or unreadable.
    """
    if pointer := describe_pointer(path):
        raise CheckpointError(f"{path}: {pointer}")
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as shard:  # checks the header and the file's length
            metadata = shard.metadata() or {}
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            text = file.read(length).decode()
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: cut short or damaged ({error}); download it again") from None
    header = {k: v for k, v in parse_json(text, path, CheckpointError, _AGAIN).items() if k != "__metadata__"}
    # an empty tensor has no numbers in the file, so the library accepts any length of its other axes
    endless = [name for name, entry in header.items() if max([0, *entry["shape"]]) > size]
    if endless:
        raise CheckpointError([f"{path}: {name}: an axis longer than the file; {_AGAIN}" for name in endless])

    if expected is None and KEY in metadata:
        expected = read_checksums(parse_json(metadata[KEY], f"{path}: {KEY}", CheckpointError, _AGAIN), path)

    def tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
        (first, last), shape, code = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        start, crc = 8 + length + first, (expected or {}).get(hub_name(name))
        check = None if crc is None else TensorCheck(path, name, start, last - first, crc, source)
        if code not in _DTYPES:
            return Tensor(shape, code, lambda out, index: None, str(path), name)  # raises when it is read
        dtype = np.dtype(_DTYPES[code])

        def fill(out: np.ndarray, index: Index) -> None:
            _fill(out, index, path, name, start, shape, dtype, check)

        return Tensor(shape, dtype.name, fill, str(path), name)

    return {name: tensor(name, entry) for name, entry in header.items()}, metadata


def _fill(
    out: np.ndarray,
    index: Index,
    path: Path,
    name: str,
    start: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    check: TensorCheck | None,
) -> None:
    """Read a region of the tensor that starts at byte `start` into `out`; the first read checks the whole tensor."""
    whole = out.flags.c_contiguous and all(i == slice(0, n) for i, n in zip(index, shape, strict=True))
    if check is not None and not check.done and not whole:
        check.ensure()
    summed = check is not None and not check.done
    if not out.flags.c_contiguous or any(i != slice(0, n) for i, n in zip(index[1:], shape[1:], strict=True)):
        # only the pages of the mapped file with these columns are read; it is mapped again for each block, since the
        # process keeps the pages of a mapping
        rows = max(1, BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))
        for row in range(index[0].start, index[0].stop, rows):
            part = slice(row, min(row + rows, index[0].stop))
            mapped = np.memmap(path, dtype, "r", start, shape)
            copy_numbers(out[row - index[0].start :][:rows], mapped[(part, *index[1:])], str(path), name)
        return
    # whole rows are contiguous in the file: read them straight into `out`, without the page faults of a mapped file
    start += index[0].start * math.prod(shape[1:]) * dtype.itemsize if index else 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        if out.dtype == dtype:
            crc = _read(file, out, path, name, 0 if summed else None)
        else:
            flat = out.reshape(-1)
            buffer = np.empty(min(flat.size, _BUFFER // dtype.itemsize), dtype)
            crc = 0 if summed else None
            for i in range(0, flat.size, max(buffer.size, 1)):
                piece = flat[i : i + buffer.size]
                crc = _read(file, buffer[: piece.size], path, name, crc)
                copy_numbers(piece, buffer[: piece.size], str(path), name)
    if check is not None and crc is not None:
        check.compare(crc)


def _read(file: FileIO, out: np.ndarray, path: Path, name: str, crc: int | None) -> int | None:
    """Read the next bytes of a file into a C-contiguous array.

    Returns the CRC-32 of the bytes, continued from `crc`, or None if `crc` is None.
    """
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = file.readinto(left[: BLOCK if crc is None else PIECE])
        if not count:
            raise CheckpointError(f"{path}: {name}: the file became shorter while it was read")
        crc = None if crc is None else crc32(left[:count], crc)
        left = left[count:]
    return crc


def open_bin(path: Path) -> dict[str, Tensor]:
    """Read a file that torch.save wrote."""
    try:
        from umbrella_jax.io.torch_files import read_bin
    except ImportError:
        remedy = "pip install 'umbrella-jax[torch]', or save the model as safetensors"
        raise CheckpointError(f"{path}: needs PyTorch to be read; {remedy}") from None
    return {name: Tensor.from_array(array, str(path), name) for name, array in read_bin(path).items()}


def open_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """Return {name: tensor} for a checkpoint: its single file, or the shards that its index names.

    The file is `model.safetensors` or, without one, `pytorch_model.bin`, which needs PyTorch. The folder may be one of
    the hub or of a Trainer; its other files are ignored. Only the headers of safetensors files are read. Names are
    those in the file, without the parts that wrappers add (`rules.unwrapped_names`).

    Raises CheckpointError with every file that is missing or damaged, every tensor that is duplicated or missing from
    index or shards, and for adapters that are not merged and quantised weights.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    record = directory / _RECORD
    stated = read_json(record, CheckpointError, _AGAIN) if record.is_file() else {}
    expected = read_checksums(stated[KEY], record) if isinstance(stated, dict) and KEY in stated else None
    open_file: Callable[[Path], dict[str, Tensor]] = lambda path: open_safetensors(path, expected, str(record))[0]  # noqa: E731
    if not single.exists() and not index.exists():
        single, index, open_file = directory / _BIN, directory / _BIN_INDEX, open_bin
        if not single.exists() and not index.exists():
            found = folder_contents(directory) or "nothing that is known; name the folder of a model"
            raise CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX}; found {found}")
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory}: holds both {single.name} and {index.name}; remove the outdated one")
    weight_map = _weight_map(index) if index.exists() else None

    faults = adapter_faults(directory)
    tensors: dict[str, Tensor] = {}
    whole = True
    for file in [single.name] if weight_map is None else sorted(set(weight_map.values())):
        path = directory / file
        if not path.is_file():
            faults.append(f"{path}: missing, but {index.name} names it; download it again")
            whole = False
            continue
        try:
            shard = open_file(path)
        except CheckpointError as error:
            faults += error.faults
            whole = False
            continue
        for name, tensor in shard.items():
            if name in tensors:
                faults.append(f"{path}: {name}: also in {tensors[name].file}; expected in one shard only")
            elif weight_map is not None and name not in weight_map:
                faults.append(f"{path}: {name}: not in {index.name}; the index belongs to other shards, copy it again")
            tensors.setdefault(name, tensor)
    if whole:  # or every tensor of a missing shard would be reported again
        for name, file in sorted((weight_map or {}).items()):
            where = tensors[name].file if name in tensors else None
            if where != str(directory / file):
                faults.append(f"{index}: {name}: expected in {file}, found in {where or 'none'}; copy all files again")
    faults += tensor_faults(tensors, directory)
    if faults:
        raise CheckpointError(faults)
    unwrapped: dict[str, Tensor] = {}
    for name, short in unwrapped_names(tensors).items():
        if short in unwrapped:
            faults.append(f"{tensors[name].file}: {name}: the same tensor as {unwrapped[short].name}; remove one")
        unwrapped[short] = tensors[name]
    if faults:
        raise CheckpointError(faults)
    return unwrapped


def tensor_names(directory: Path) -> list[str] | None:
    """Return the names in a checkpoint, as `open_checkpoint` does, opening no shard that an index lists.

    Returns None without weights. Raises CheckpointError for files that cannot be read.
    """
    for single, index in ((SINGLE, INDEX), (_BIN, _BIN_INDEX)):
        if (directory / index).exists():
            return [*unwrapped_names(_weight_map(directory / index)).values()]
        if (directory / single).exists():
            return [*open_checkpoint(directory)]
    return None


def _weight_map(index: Path) -> dict[str, str]:
    """Return {tensor: file name of its shard} from the index; shards are in the same folder."""
    found = read_json(index, CheckpointError, _AGAIN)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no index with a weight_map; {_AGAIN}")
    faults = [
        f"{index}: {name}: in {file!r}; expected the name of a file beside it"
        for name, file in weight_map.items()
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file or len(os.fsencode(file)) > 255
    ]
    if faults:
        raise CheckpointError(faults)
    return weight_map


def weight_files(directory: Path) -> list[Path]:
    """Return the files of the weights in safetensors: the single file, or the index and the shards that it names."""
    index = directory / INDEX
    if not index.exists():
        return [directory / SINGLE]
    return [index, *(directory / shard for shard in sorted(set(_weight_map(index).values())))]


def write_checkpoint(
    directory: str | Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB"
) -> dict[str, str]:
    """Write `model.safetensors`, or shards and their index if one file would be larger than `max_shard_size`.

    Only one tensor is in memory at a time. A file gets its name only when it is complete; the index is written last.
    Returns the checksum of each tensor.
    """
    directory = Path(directory)
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda t: t.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_bytes(max_shard_size),
    )
    directory.mkdir(parents=True, exist_ok=True)
    checksums: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        checksums |= write_safetensors(directory / file, {name: tensors[name] for name in names})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        temporary = directory / f".{INDEX}.tmp"
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, directory / INDEX)
    return checksums


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    number = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if number < 1:
        raise ConfigError(f"max_shard_size: {size!r}: expected a size such as 500MB or 5GB")
    return int(number)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, record: bool = False
) -> dict[str, str]:
    """Write one file, one tensor at a time in the order of `tensors`, with the layout of the safetensors library.

    The library itself needs all tensors in memory at once. Returns the checksum of each tensor; with `record`, the
    file's metadata contains them, too.
    """
    types = list(_CODES)
    order = sorted(tensors.items(), key=lambda item: (types.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}

    def dump(checksums: Mapping[str, str]) -> bytes:
        if record:
            header["__metadata__"][KEY] = json.dumps(checksums)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    checksums = dict.fromkeys(tensors, "0" * 8)  # placeholders of the final length
    text = dump(checksums)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            crc = 0
            for block in tensor.blocks():
                data = block.reshape(-1).view(np.uint8).data
                crc = crc32(data, crc)
                file.write(data)
            checksums[name] = f"{crc:08x}"
        file.truncate(8 + len(text) + end)
        file.seek(8)
        file.write(dump(checksums))
    os.replace(temporary, path)
    return checksums


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256, in hex, of all names, shapes, types and SHA-256s of the tensors' bytes, sorted by name."""

    def one(tensor: Tensor) -> str:
        sha = hashlib.sha256()
        for block in tensor.blocks():
            sha.update(block.reshape(-1).view(np.uint8).data)
        return sha.hexdigest()

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        digests = pool.map(one, tensors.values())
        lines = [[name, t.shape, t.dtype, sha] for (name, t), sha in zip(tensors.items(), digests, strict=True)]
    return hashlib.sha256("".join(json.dumps(line) + "\n" for line in sorted(lines)).encode()).hexdigest()
