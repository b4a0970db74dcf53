"""`ModelConfig`: what config.json says of a model, checked once, with errors that name the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

ROPE_KINDS = ("default", "linear", "llama3")

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Value = TypeVar("_Value")


class ModelError(Exception):
    """The model, or the configuration it was asked to run with, cannot be used; one clear line for the user."""


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """How positions turn into angles."""

    kind: str = "default"
    """One of `ROPE_KINDS`."""
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's shape, in our words."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]


class _Named(msgspec.Struct):
    """The part of config.json that says which family this is."""

    architectures: list[str]


class _RopeFields(msgspec.Struct):
    """`rope_parameters` (transformers 5) or `rope_scaling` (before)."""

    rope_theta: PositiveFloat | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: float | None = None


class _Fields(msgspec.Struct):
    """config.json as HuggingFace writes it; what is not listed here does not change a decoder's arithmetic."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    hidden_act: str = "silu"
    rope_parameters: _RopeFields | None = None
    rope_scaling: _RopeFields | None = None
    rope_theta: PositiveFloat | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    quantization_config: dict[str, object] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class _Generation(msgspec.Struct):
    """The part of generation_config.json that belongs to the model."""

    eos_token_id: TokenId | list[TokenId] | None = None


def read_model_config(folder: Path, supported: Collection[str]) -> ModelConfig:
    """Reads config.json and, if there is one, generation_config.json.

    Args:
        folder: a HuggingFace model folder.
        supported: architectures that can be built.

    Raises:
        ModelError: anything is missing, malformed or not supported.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json")
    data = _read(path)
    architecture = _architecture(path, data, supported)
    fields = _decode(path, data, _Fields)
    _refuse_unsupported(path, fields)
    num_kv_heads = fields.num_key_value_heads or fields.num_attention_heads
    if fields.num_attention_heads % num_kv_heads:
        raise ModelError(
            f"{path}: num_attention_heads ({fields.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({num_kv_heads})"
        )
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_layers=fields.num_hidden_layers,
        num_heads=fields.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(path, fields),
        max_positions=fields.max_position_embeddings,
        rms_norm_eps=fields.rms_norm_eps,
        rope=_rope(path, fields),
        tie_word_embeddings=fields.tie_word_embeddings,
        attention_bias=fields.attention_bias,
        mlp_bias=fields.mlp_bias,
        eos_token_ids=_eos_token_ids(folder, fields),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _decode(path: Path, data: bytes, kind: type[_Struct]) -> _Struct:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:  # also its subclass ValidationError, which names the field
        raise ModelError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8") from error


def _architecture(path: Path, data: bytes, supported: Collection[str]) -> str:
    names = _decode(path, data, _Named).architectures
    for name in names:
        if name in supported:
            return name
    raise ModelError(
        f"{path}: architectures {', '.join(names) or '(empty)'} not supported; supported are "
        f"{', '.join(sorted(supported))}"
    )


def _refuse_unsupported(path: Path, fields: _Fields) -> None:
    """Names what would silently change the model's answers if it were ignored."""
    if fields.hidden_act != "silu":
        raise ModelError(f"{path}: hidden_act {fields.hidden_act!r} is not supported; supported is 'silu'")
    if fields.quantization_config is not None:
        method = fields.quantization_config.get("quant_method", "unnamed")
        raise ModelError(f"{path}: quantization_config (method {method}) is not supported")
    others = set(fields.layer_types or ()) - {"full_attention"}
    if others:
        raise ModelError(f"{path}: layer_types {', '.join(sorted(others))} not supported; supported is full_attention")
    window = fields.sliding_window if fields.use_sliding_window is not False else None
    if window is not None and window < fields.max_position_embeddings:
        raise ModelError(f"{path}: sliding_window {window} is not supported; it must be null")


def _head_dim(path: Path, fields: _Fields) -> int:
    head_dim = fields.head_dim
    if head_dim is None:
        head_dim, rest = divmod(fields.hidden_size, fields.num_attention_heads)
        if rest:
            raise ModelError(
                f"{path}: hidden_size ({fields.hidden_size}) must be a multiple of num_attention_heads "
                f"({fields.num_attention_heads}) where head_dim is absent"
            )
    if head_dim % 2:
        raise ModelError(f"{path}: head_dim ({head_dim}) must be even")
    return head_dim


def _rope(path: Path, fields: _Fields) -> Rope:
    name = "rope_parameters" if fields.rope_parameters is not None else "rope_scaling"
    rope = fields.rope_parameters or fields.rope_scaling or _RopeFields()
    kind = rope.rope_type or rope.type or "default"
    if kind not in ROPE_KINDS:
        raise ModelError(f"{path}: {name}.rope_type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if rope.partial_rotary_factor not in (None, 1.0):
        raise ModelError(f"{path}: {name}.partial_rotary_factor {rope.partial_rotary_factor} is not supported")
    theta = rope.rope_theta or fields.rope_theta or 10_000.0
    if kind == "default":
        return Rope(theta=theta)
    factor = _needed(f"{path}: {name}.factor", rope.factor)
    if kind == "linear":
        return Rope(kind=kind, theta=theta, factor=factor)
    low = _needed(f"{path}: {name}.low_freq_factor", rope.low_freq_factor)
    high = _needed(f"{path}: {name}.high_freq_factor", rope.high_freq_factor)
    if high <= low:
        raise ModelError(f"{path}: {name}.high_freq_factor ({high}) must be greater than low_freq_factor ({low})")
    return Rope(
        kind=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=_needed(
            f"{path}: {name}.original_max_position_embeddings", rope.original_max_position_embeddings
        ),
    )


def _needed(where: str, value: _Value | None) -> _Value:
    if value is None:
        raise ModelError(f"{where} is missing")
    return value


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """generation_config.json wins: fine-tunes for chat often correct the end token only there."""
    path = folder / "generation_config.json"
    generation = _decode(path, _read(path), _Generation) if path.is_file() else _Generation()
    found = generation.eos_token_id if generation.eos_token_id is not None else fields.eos_token_id
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)
