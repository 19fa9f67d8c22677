"""Makes ``byte-level-merges.txt``: what a byte-level vocabulary learns from a few thousand words of many kinds.

    python -m tests.data.train_byte_level

It is kept, because what `tokenizers` learns may change from one of its versions to the next.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from edge_phi3.bench.quants import evaluation_text
from edge_phi3.byte_level import PATTERNS
from edge_phi3.conversion.imatrix import calibration_text

MERGES = Path(__file__).with_name("byte-level-merges.txt")
_OTHERS = """
Größe Straße Äpfel über schön ÜBER GRÖSSE Élan français déjà naïve ÇA où été Noël garçon Привет мир, как дела сегодня?
Привет МИР ёлка Ελληνικά γλώσσα ΑΘΗΝΑ Ωραία 日本語のテキストと漢字 東京都 中文文本 你好世界 한국어 문장 안녕하세요
مرحبا بالعالم العربية שלום עולם हिन्दी में नमस्ते दुनिया ภาษาไทย สวัสดี Tiếng Việt rất đẹp e\u0301te\u0301 n\u0303
😀😃👍🏽👨‍👩‍👧 🇩🇪🇫🇷 ½ ¾ Ⅷ ² ³ ١٢٣ १२३ don't I'LL we'VE She's THEY'RE l'été 1234567 3.14159 2024-01-31
if (x != y) { return a[i] / b->c; } // path/to/file\r\n\tint main(void);\n    def f(self):\n        pass\n\n\n----====
"""


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["gpt-4o"][0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1100, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([evaluation_text(), calibration_text(), *[_OTHERS] * 8], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    MERGES.write_text("".join(" ".join(pair) + "\n" for pair in merges), encoding="utf-8")


if __name__ == "__main__":
    main()
