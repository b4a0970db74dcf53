"""How a figure stands: against the card's limit, and against the ratio to the peer that is asked for.

The limit of a decode step is reading every weight (but the embedding) and the KV of every context once, at the rate of
a device copy measured in the same run; that of a prefill its multiplications at the rate of a large matrix product, or
reading the weights, whichever takes longer. Causal attention counts half of its square; the head is for last tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TARGET_RATIOS = {
    "decode/bf16/b1/c1024": 0.81,
    "decode/bf16/b8/c1024": 0.88,
    "decode/bf16/b32/c1024": 0.88,
    "decode/bf16/b64/c1024": 0.90,
    "decode/bf16/b128/c1024": 0.91,
    "decode/bf16/b256/c1024": 0.90,
    "decode/bf16/b16/c8192": 0.92,
    "prefill/bf16/1x8192": 0.98,
    "prefill/bf16/8x1024": 0.98,
    "prefill/bf16/1x1024": 0.90,
    "prefill/bf16/1x128": 0.69,
    "throughput/bf16/512x512+256": 1.06,
}
"""Ours over the peer's, on one card in one run: times at most this, rates at least this."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of the device, measured in the run that they judge."""

    copy_bytes_s: float
    """Device copy, bytes read and written."""
    matmul_flops_s: float
    """A large bfloat16 product."""


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a Llama-shaped model makes a card read and multiply, bfloat16."""

    layer_weights: int
    """Weights of all layers' linear parts."""
    head_weights: int
    kv_bytes: int
    """Of one token in all layers."""
    attention_width: int
    """Query heads times head size, times layers."""

    @classmethod
    def of(cls, config: dict[str, int]) -> ModelCost:
        """From the fields of a config.json."""
        hidden, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
        q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * config["intermediate_size"]
        return cls(
            layer_weights=layers * layer,
            head_weights=hidden * config["vocab_size"],
            kv_bytes=layers * 2 * kv * 2,
            attention_width=layers * q,
        )

    @property
    def weight_bytes(self) -> int:
        """Read by every step."""
        return 2 * (self.layer_weights + self.head_weights)

    def decode_seconds(self, batch: int, context: int, ceilings: Ceilings) -> float:
        """The least that a decode step can take."""
        return (self.weight_bytes + batch * context * self.kv_bytes) / ceilings.copy_bytes_s

    def prefill_seconds(self, batch: int, length: int, ceilings: Ceilings) -> float:
        """The least that a step of whole prompts can take."""
        linear = 2 * batch * (length * self.layer_weights + self.head_weights)
        attention = 2 * batch * length * length * self.attention_width
        return max((linear + attention) / ceilings.matmul_flops_s, self.weight_bytes / ceilings.copy_bytes_s)


def limit_ms(case: str, cost: ModelCost, ceilings: Ceilings) -> float | None:
    """The least milliseconds of a decode or prefill case; None: the case has no limit of this kind."""
    if match := re.fullmatch(r"decode/\w+/b(\d+)/c(\d+)", case):
        return 1000 * cost.decode_seconds(int(match[1]), int(match[2]), ceilings)
    if match := re.fullmatch(r"prefill/\w+/(\d+)x(\d+)", case):
        return 1000 * cost.prefill_seconds(int(match[1]), int(match[2]), ceilings)
    return None


def is_rate(unit: str) -> bool:
    """Whether more is better."""
    return unit.endswith("/s")


def standing(case: str, value: float, unit: str, peer_value: float | None) -> str:
    """`0.897 of the peer (target 0.90, met)`; empty without a peer."""
    if not peer_value:
        return ""
    ratio, target = value / peer_value, TARGET_RATIOS.get(case)
    if target is None:
        return f"{ratio:.3f} of the peer"
    met = ratio >= target if is_rate(unit) else ratio <= target
    return f"{ratio:.3f} of the peer (target {target:.2f}, {'met' if met else 'missed'})"
