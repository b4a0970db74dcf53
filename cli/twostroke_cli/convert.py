"""Turns a GGUF file into a HuggingFace folder: `python -m twostroke_cli.convert GGUF FOLDER`.

A process of its own, so that the command that asked for it never holds torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(gguf: Path, target: Path) -> None:
    """Writes bf16 safetensors, configuration and tokenizer.

    transformers keeps GGUF weights packed unless told to expand them, and cannot save packed ones.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    expand = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=expand)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    origin = {"file": gguf.name, "note": "a quantised file expanded to bf16: not the original weights"}
    (target / "twostroke_origin.json").write_text(json.dumps(origin, indent=1) + "\n")
    for path in target.iterdir():  # safetensors writes for its user alone
        path.chmod(0o644)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
