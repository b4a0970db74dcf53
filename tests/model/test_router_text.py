"""The router's tokenizer and chat templates against transformers', which the router does without."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from twostroke_router.errors import RequestError
from twostroke_router.text import ModelFolderError, Text, load_text

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "What is 'it'?"},
    {"role": "assistant", "content": "日本語 🙂"},
    {"role": "user", "content": "  and\n\nthen?  "},
]
TEMPLATES = {
    "llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + '<|eot|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "whitespace": (
        "{% for message in messages %}\n    {% if message.role == 'system' %}\n  S: {{ message.content }}\n"
        "    {% else %}\n"
        "\t{{- message.role }}: {{ message.content -}}\n    {% endif %}\n{% endfor %}\n{{ eos_token }}"
    ),
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{% if tools %}tools{% endif %}",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{{ strftime_now('%Y') }}{{ messages[-1].content.split()[0].upper() }}{{ none_such is defined }}"
    ),
}


def with_template(source: Path, target: Path, template: str | None, in_file: bool) -> Path:
    """A copy of a model's text side with another chat template."""
    target.mkdir()
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["chat_template"]
    if in_file and template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:
        config["chat_template"] = template
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode_chat(text: Text, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
    return list(asyncio.run(text.encode_chat(messages, add_generation_prompt=add_generation_prompt)))


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(tiny_llama: Path, tmp_path: Path, name: str, in_file: bool) -> None:
    folder = with_template(tiny_llama, tmp_path / "model", TEMPLATES[name], in_file)
    text, tokenizer = load_text(folder), reference(folder)
    for messages in (MESSAGES, MESSAGES[:2]):
        for flag in (True, False):
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=flag, tokenize=True, return_dict=False
            )
            assert encode_chat(text, messages, flag) == expected


def test_prompts(tiny_llama: Path) -> None:
    text, tokenizer = load_text(tiny_llama), reference(tiny_llama)
    for prompt in ("the quick fox", "日本語 🙂\n\n ", "<|im_start|>user", "ab " * 4000, ""):
        for flag in (True, False):
            ours = list(asyncio.run(text.encode(prompt, "prompt", add_special_tokens=flag)))
            assert ours == tokenizer(prompt, add_special_tokens=flag)["input_ids"]


def test_the_tokenizers_own_special_tokens_are_added_to_prompts_only(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_template(tiny_llama, tmp_path / "model", "{{ messages[0].content }}", in_file=True)
    stored = json.loads((folder / "tokenizer.json").read_text())
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    piece = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": piece,
        "pair": piece,
        "special_tokens": {"<|endoftext|>": special},
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    text = load_text(folder)
    prompt = asyncio.run(text.encode("the fox", "prompt"))
    assert prompt[0] == 0
    assert encode_chat(text, [{"role": "user", "content": "the fox"}]) == list(prompt[1:])


def test_token_bytes(tiny_llama: Path) -> None:
    text, sentence = load_text(tiny_llama), "naïve 日本語 🙂 the fox"
    ids = asyncio.run(text.encode(sentence, "prompt"))
    assert b"".join(map(text.token_bytes, ids)).decode() == sentence
    assert text.token_bytes(2) == b"<|im_end|>"
    assert text.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_refuses_is_the_messages_error(
    tiny_llama: Path, tmp_path: Path, template: str | None, expected: str
) -> None:
    text = load_text(with_template(tiny_llama, tmp_path / "model", template, in_file=True))
    with pytest.raises(RequestError, match=expected) as refused:
        encode_chat(text, MESSAGES)
    assert refused.value.param == "messages"


def test_lone_surrogates_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match="prompt: is not valid Unicode"):
        asyncio.run(load_text(tiny_llama).encode("a\ud800", "prompt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("config.json", "[]"),
        ("config.json", '{"vocab_size": "many"}'),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_a_broken_folder_is_one_clear_line(tiny_llama: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = with_template(tiny_llama, tmp_path / "model", None, in_file=False)
    (folder / name).write_text(content)
    with pytest.raises(ModelFolderError) as refused:
        load_text(folder)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value) or "chat template" in str(refused.value)
