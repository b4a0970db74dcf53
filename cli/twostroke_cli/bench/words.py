"""Text of a known length. A word of this list, with the space before it, is one token in the usual BPE vocabularies."""

from __future__ import annotations

import random

_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its "
    "about than into them can only other time new some could these two may first then do any like my now over such "
    "our man me even most made after also did many off before must well back through years much where your way down "
    "should because long each just state those people too still work life day world house place great right hand "
    "small water part year number three school order group white city land line"
)
WORDS = tuple(_TEXT.split())


def text_of(key: str, length: int) -> str:
    """`length` words. Equal keys begin with equal words, whatever the length."""
    return " ".join(random.Random(key).choices(WORDS, k=length))


def ids_of(key: str, length: int, vocab_size: int) -> list[int]:
    """`length` token ids below `vocab_size`; equal keys begin with equal ids."""
    return random.Random(key).choices(range(vocab_size), k=length)
