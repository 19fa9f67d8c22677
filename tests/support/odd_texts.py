"""Random texts of every kind that tokenizers treat in ways of their own, from a seed."""

import random
import unicodedata
from collections.abc import Sequence

from edge_phi3.engine.added_tokens import WHITE_SPACE

_WORDS = """
Hello world the THE tHe McDonald iPhone XMLHttpRequest don't I'LL we'Ve it'ſ 's l’été Größe GRÖSSE ǅ ǈubljana ÇA où
Привет МИР ΑΘΗΝΑ 日本語 東京 한국어 ｶﾅ नमस्ते สวัสดี việt e\u0301te\u0301 n\u0303 \u0301 \u0301\u0302a مرحبا שָׁלוֹם 😀
👨‍👩‍👧 👍🏽 🇩🇪 ½ Ⅷ ²³ ١٢٣ 1 12 123 1234 1234567 3.14159 2024-01-31 0x1F 1e-9 { } (); -> :// / // /* path/to/file \\n
```python def ---- ==== .... !!! … “q” «» _ __init__ # @ $x ~ ^ ᾳ ʰ ﬁ ª 〇 ー
""".split()  # noqa: SIM905 - a list of so many quoted words would be ten times as long
_WORDS += [" world", "    ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "  \n\t\n", "\x00", "\x1c", "\u200b", "\ufeff"]
_WORDS += ["\u2028", "\ufffd", "\u180e", "▁", "▁▁", " ▁", "<0x0A>", "[PAD32012]", "<|", "|>", "<", ">"]


def random_text(chance: random.Random, special: Sequence[str]) -> str:
    """Return a text; special tokens occur in it too, glued to what is around them."""
    kind = chance.randrange(6)
    if kind == 0:
        limits = (
            chance.choice((0x80, 0x250, 0x800, 0x3100, 0x10000, 0x110000)) for _ in range(chance.randrange(1, 30))
        )
        return "".join(chr(chance.randrange(limit)) for limit in limits).encode(errors="ignore").decode()
    if kind == 1:
        return "".join(chance.choices([*special, *WHITE_SPACE, "a", "\n"], k=chance.randrange(1, 12)))
    if kind == 2:
        return "".join(chance.choices("aB1 \n'sé.\u0301/▁=-", k=chance.randrange(1, 60)))
    if kind == 3:
        lengths = chance.choices((1, 3, 15, 16, 17, 64, 257), k=3)
        return "".join(chance.choice(" ▁\n\t\u00a0\u3000-=a9é") * length for length in lengths)
    words = chance.choices(
        [*_WORDS, *special], weights=[3] * len(_WORDS) + [1] * len(special), k=chance.randrange(1, 25)
    )
    text = (" " if kind == 4 else "").join(words)
    return unicodedata.normalize(chance.choice(("NFC", "NFD")), text) if chance.random() < 0.2 else text
