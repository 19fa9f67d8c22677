"""A LoRA adapter as PEFT saves it -> the tensors of a GGUF adapter, those of llama.cpp's ``convert_lora_to_gguf.py``.

llama.cpp scales each product ``B A`` by the file's one ``adapter.lora.alpha`` over its rank. Where PEFT scales it
otherwise (``alpha_pattern``; ``rank_pattern`` with rsLoRA), ``B`` has the difference in it. So it has where an adapter
was trained on split projections, which that script leaves as they are and no Phi-3 can load: those of one fused matrix
become one of a larger rank, whose ``A`` has theirs below each other, and ``B`` theirs as blocks on its diagonal.
"""

import math
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import gguf
import msgspec
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from edge_phi3.conversion import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SafetensorsFile,
    StoredTensor,
    canonical_name,
)
from edge_phi3.conversion.json_files import PositiveNumber, Size, read_json, typed
from edge_phi3.conversion.phi3 import EMBEDDING, HEAD, IN_GGUF, PARTS, REFUSED
from edge_phi3.conversion.plan import STORED_TYPES, Plan, PlannedTensor, encode, matrix_type, tensor_type, to_float32

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<factor>[AB])(\.default)?(\.weight)?")
_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<module>[\w.]+_proj)\.weight")
_WHOLE = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}
_FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}

_ALLOWED = ("LORA", "none")
_MERGE = "merge it into its model with merge_and_unload() of peft, and convert the folder that save_pretrained() writes"

Values = NDArray[np.float32]


class _Config(msgspec.Struct, frozen=True):
    r: Size
    lora_alpha: Annotated[float, msgspec.Meta(gt=0)]
    use_rslora: bool = False
    alpha_pattern: dict[str, PositiveNumber] = {}

    def alpha(self, module: str, rank: int) -> float:
        """Return what llama.cpp must divide by the rank to scale a module as PEFT does."""
        found = (alpha for pattern, alpha in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
        return next(found, self.lora_alpha) * (math.sqrt(rank) if self.use_rslora else 1)


class _Pair(NamedTuple):
    a: StoredTensor
    b: StoredTensor
    rank: int
    alpha: float


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model beside it."""
    others = (path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and next(others, None) is None


def plan_adapter(folder: Path, outtype: str) -> tuple[Plan, gguf.GGUFWriter, list[StoredTensor]]:
    """Return the output's tensors and header, and the stored tensors."""
    stated = read_json(folder / ADAPTER_CONFIG) or {}
    for name, why in REFUSED["adapters"].items():
        if (value := stated.get(name)) and value not in _ALLOWED:
            raise UnsupportedModelError(f"{ADAPTER_CONFIG}: {name} is {value!r}, and {why}; {_MERGE}.")
    config = typed({name: value for name, value in stated.items() if value is not None}, _Config, ADAPTER_CONFIG)
    file = SafetensorsFile(folder / ADAPTER_WEIGHTS)
    pairs = _pairs(file, config)
    stored = [factor for pair in pairs.values() for factor in (pair.a, pair.b)]
    wanted = matrix_type({tensor.name: tensor for tensor in stored}, outtype)
    alpha = config.alpha("", config.r)
    planned: list[PlannedTensor] = []
    done: set[str] = set()
    for name, pair in pairs.items():
        layer = _LAYER.fullmatch(name)
        module = layer["module"] if layer else name
        fused = _FUSED.get(module, module)
        target = f"blk.{layer['number']}.{IN_GGUF[fused]}.weight" if layer else _WHOLE[name]
        if target in done:
            continue
        done.add(target)
        a: StoredTensor | Values = pair.a
        b: StoredTensor | Values = pair.b
        if layer and fused != module:
            siblings = [f"model.layers.{layer['number']}.{part}.weight" for part in PARTS[fused]]
            a, b = _fuse(siblings, pairs, alpha)
        elif pair.alpha != alpha:
            b = _values(pair.b) * np.float32(pair.alpha / alpha)
        if name == EMBEDDING:  # llama.cpp looks rows up in it
            a = np.ascontiguousarray(_values(pair.a).T)
        planned += [_planned(f"{target}.lora_a", a, wanted, outtype), _planned(f"{target}.lora_b", b, wanted, outtype)]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(folder.resolve().name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    return Plan(wanted, planned), writer, stored


def _pairs(file: SafetensorsFile, config: _Config) -> dict[str, _Pair]:
    """Return the factors of each module by the name of its weight, in the order of the file."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for stored in file.tensors.values():
        factor = _FACTOR.fullmatch(stored.name)
        name = canonical_name(f"{factor['module']}.weight") if factor else ""
        layer = _LAYER.fullmatch(name)
        if factor is None or not (name in _WHOLE or (layer and layer["module"] in {*_FUSED, *IN_GGUF})):
            raise UnsupportedModelError(f"{stored.name} is no factor of a matrix of a Phi-3; {_MERGE}.")
        if len(stored.shape) != 2 or stored.dtype not in STORED_TYPES:
            raise CheckpointError(f"{stored.name} is no matrix of BF16, F16 or F32, but {stored.dtype} {stored.shape}.")
        found.setdefault(name, {})[factor["factor"]] = stored
    if not found:
        raise CheckpointError(f"{file.path} holds no tensors.")
    pairs = {}
    for name, factors in found.items():
        if factors.keys() != {"A", "B"} or (rank := factors["A"].shape[0]) != factors["B"].shape[1]:
            raise CheckpointError(f"{file.path} does not have the two factors of {name}, or not of one rank.")
        pairs[name] = _Pair(factors["A"], factors["B"], rank, config.alpha(name.removesuffix(".weight"), rank))
    return pairs


def _fuse(names: list[str], pairs: dict[str, _Pair], alpha: float) -> tuple[Values, Values]:
    """Return the factors of a fused matrix, given those of its parts."""
    changed = [pairs[name] for name in names if name in pairs]
    rows = [pairs[name].b.shape[0] if name in pairs else 0 for name in names]
    rows[-2:] = [max(rows[-2:])] * 2  # keys and values have as many, and gate and up
    rows[0] = rows[0] or changed[0].a.shape[1]  # queries are as wide as the model
    if not all(rows):
        raise UnsupportedModelError(
            f"{names[0]} is changed, but neither keys nor values, which tell their size; {_MERGE}."
        )
    b = np.zeros((sum(rows), rank := sum(pair.rank for pair in changed)), np.float32)
    row = column = 0
    for name, count in zip(names, rows, strict=True):
        if (pair := pairs.get(name)) is not None:
            if pair.b.shape[0] != count or pair.a.shape[1] != changed[0].a.shape[1]:
                raise CheckpointError(f"{name} does not fit the other parts of its matrix.")
            scale = np.float32(pair.alpha / pair.rank / (alpha / rank))
            b[row : row + count, column : column + pair.rank] = _values(pair.b) * scale
            column += pair.rank
        row += count
    return np.concatenate([_values(pair.a) for pair in changed]), b


def _values(stored: StoredTensor) -> Values:
    return to_float32(stored.read(0, stored.size), stored.dtype).reshape(stored.shape)


def _planned(name: str, values: StoredTensor | Values, wanted: GgmlType, outtype: str) -> PlannedTensor:
    if isinstance(values, StoredTensor):
        return PlannedTensor(name, values.shape, tensor_type(name, values.shape, wanted), (values,))
    # What was computed here is not rounded, unless a type is asked for.
    type_ = tensor_type(name, values.shape, GgmlType.F32 if outtype == "auto" else wanted)
    return PlannedTensor(name, values.shape, type_, encode(values.ravel(), "F32", type_, name=name))
