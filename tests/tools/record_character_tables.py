#!/usr/bin/env python3
"""Writes crates/engine/src/tokenizer/character_tables.rs: the character classes of the reference tokenizer.

    python3 -m venv .venv && .venv/bin/pip install tokenizers==0.23.3
    .venv/bin/python tests/tools/record_character_tables.py > crates/engine/src/tokenizer/character_tables.rs

The reference mixes Unicode versions: its general categories are older than its lower-casing.
Instead of guessing the version of each table, this script asks the reference about every code
point, so the two agree by construction. Values (decompositions, combining classes) are not
recorded: Unicode guarantees that they never change.
"""

from tokenizers import __version__, normalizers, pre_tokenizers

OFF = dict(clean_text=False, handle_chinese_chars=False, strip_accents=False, lowercase=False)
CLEAN = normalizers.BertNormalizer(**{**OFF, "clean_text": True})
STRIP = normalizers.BertNormalizer(**{**OFF, "strip_accents": True})
NFD = normalizers.NFD()
WORDS = pre_tokenizers.BertPreTokenizer()


def ranges(points):
    found = []
    for point in points:
        if found and found[-1][1] == point - 1:
            found[-1][1] = point
        else:
            found.append([point, point])
    return found


def is_dropped(text):
    return CLEAN.normalize_str(text) == ""


def is_stripped_mark(text):
    # A character that decomposes never occurs after decomposition.
    return NFD.normalize_str(text) == text and STRIP.normalize_str(text) == ""


def is_punctuation(text):
    return [word for word, _ in WORDS.pre_tokenize_str(f"a{text}b")] == ["a", text, "b"]


def is_decomposed(text):
    return NFD.normalize_str(text) != text


def is_reordered(text):
    # Next to marks of class 1 (overlay), 232 (above right) and 240 (the highest), one of which any
    # other class moves across.
    moved = (text + "\u0334", "\u0315" + text, "\u0345" + text)
    return not (is_decomposed(text) or is_stripped_mark(text)) and any(map(is_decomposed, moved))


TABLES = [
    ("DROPPED", "Removed from the text before anything else, as control, format and private characters are.", is_dropped),
    ("DECOMPOSED", "Taken apart where accents are stripped: a canonical decomposition that the reference knows.", is_decomposed),
    ("REORDERED", "Left by stripping, yet sorted by canonical reordering.", is_reordered),
    ("MARKS", "Removed after decomposition where accents are stripped: nonspacing marks.", is_stripped_mark),
    ("PUNCTUATION", "Each character is a separate word.", is_punctuation),
]

print("//! Character classes of the reference tokenizer, as inclusive ranges in rising order.")
print("//!")
print(f"//! Recorded from `tokenizers` {__version__} by `tests/tools/record_character_tables.py`; not edited by hand.")
characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
for name, meaning, holds in TABLES:
    rows = ranges([ord(c) for c in characters if holds(c)])
    print(f"\n/// {meaning}")
    print("#[rustfmt::skip]")
    print(f"pub(super) const {name}: &[(u32, u32)] = &[")
    for at in range(0, len(rows), 6):
        print("    " + " ".join(f"(0x{a:04x}, 0x{b:04x})," for a, b in rows[at : at + 6]))
    print("];")
