"""The weights of a pruned model on disk: safetensors whose headers are checked before a model is built or filled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scap_hub.documents import LARGEST, own_file, parse_json, read_document
from scap_hub.errors import CheckpointError
from scap_hub.private import versioned
from scap_hub.text import first_few, one_line

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WHOLE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


class Stored(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that the index lists; they need not exist.

    Raises:
        CheckpointError: The index is malformed.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():  # in the order of transformers
        return [folder / WEIGHTS]
    try:
        names = set(parse_json(read_document(folder, INDEX))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} lists no weights ({error!r}): save the checkpoint again") from None


def stored_in(files: list[Path]) -> dict[str, Stored]:
    """What the headers of the files say; no weight is read.

    Raises:
        CheckpointError: A file is absent, truncated, malformed, or holds a type of numbers that no model of ours has.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            _check_length(own_file(path.parent, path.name))
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dict
                    part = file.get_slice(name)
                    found[name] = Stored(tuple(part.get_shape()), (_FLOATS | _WHOLE)[part.get_dtype()])
        except KeyError as error:
            raise CheckpointError(f"{path} holds numbers of type {error}, which no pruned model has") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None
    return found


def _check_length(path: Path) -> None:
    """The header is read into memory, so it must be no longer than the file that it claims to describe."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(LARGEST, path.stat().st_size):
        raise OSError(f"its header claims {length} bytes")


def check_fit(model: nn.Module, stored: Mapping[str, Stored], where: Path) -> None:
    """Compares the headers with a model, before any weight is read.

    Raises:
        CheckpointError: They are not of this model; says which tensors show it.
    """
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    # Of tied tensors only one is stored.
    held = {id(tensor) for name, tensor in wanted.items() if name in stored}
    problems = [f"{name} is missing" for name, tensor in wanted.items() if id(tensor) not in held]
    for name, (shape, dtype) in stored.items():
        if name not in wanted:
            problems.append(f"{name} is unknown")
        elif tuple(wanted[name].shape) != shape:
            problems.append(f"{name} has {shape} instead of {tuple(wanted[name].shape)}")
        elif wanted[name].dtype != dtype and not (wanted[name].is_floating_point() and dtype.is_floating_point):
            problems.append(f"{name} holds {dtype} instead of {wanted[name].dtype}")
    if problems:
        raise CheckpointError(f"{where} does not fit the rebuilt model: {first_few(problems)}")


def fill(
    model: nn.Module,
    stored: Mapping[str, Stored],
    files: list[Path],
    buffer_dtypes: Mapping[str, str],
    allow_nan: bool,
) -> None:
    """Gives a model whose parameters have no memory its weights, in the precision in which they were saved.

    Args:
        model: Fits the headers.
        stored: What these say.
        files: The files.
        buffer_dtypes: Precision of buffers that are not stored, by name.
        allow_nan: Whether to take weights that are not finite.

    Raises:
        CheckpointError: Weights are not finite, or a precision is named for what is no buffer.
    """
    _materialise(model, stored)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        for name, dtype in buffer_dtypes.items():
            if name in stored:
                raise KeyError(name)
            tensors[name].data = tensors[name].data.to(PRECISIONS[dtype])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'buffer_dtypes' in config.json does not fit the rebuilt model: {error}") from None
    state = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for name in state.keys() & tensors.keys():
        tensors[name].data = tensors[name].data.to(state[name].dtype)
    # Checked already; what is missing is tied to what is there.
    model.load_state_dict(versioned(model, state), strict=False)
    if not allow_nan and (broken := not_finite(model)):
        raise CheckpointError(
            f"{files[0].parent}: {broken!r} holds NaN or infinite numbers, so the model computes nothing of use; "
            "load(..., allow_nan=True) loads it all the same"
        )


def _materialise(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Gives parameters memory; tied ones, which are one tensor, stay one."""
    dtypes = {id(t): stored[name].dtype for name, t in model.state_dict(keep_vars=True).items() if name in stored}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if id(old) not in made:
                    empty = torch.empty_like(old, device="cpu", dtype=dtypes.get(id(old), old.dtype))
                    made[id(old)] = nn.Parameter(empty, old.requires_grad)
                module._parameters[name] = made[id(old)]


def not_finite(model: nn.Module) -> str | None:
    """The first saved tensor with NaN in it, or with infinities where it is a parameter; a buffer may hold a mask."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not tensor.is_meta:
            fine = tensor.isfinite() if isinstance(tensor, nn.Parameter) else ~tensor.isnan()
            if not fine.all():
                return name
    return None
