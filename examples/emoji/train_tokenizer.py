"""Train the demo's CLIP-style byte-pair tokenizer on emoji names and keywords.

python train_tokenizer.py data out/tokenizer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

import sheets

STYLE_WORDS = "noto, flat, modern, black and white, line art, outline, drawing, icon, emoji, picture, a photo of"
WORDS = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
WORD_END = "</w>"


def corpus(data: Path) -> list[str]:
    texts = [STYLE_WORDS] * 3
    for style in ("noto", "fluent-flat"):
        for emoji in sheets.load(data, style, groups=())[1]:
            texts += [emoji.name] * 3 + [word.replace("_", " ").lower() for word in emoji.keywords]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=3200, help="entries without the two special ones and byte endings")
    args = parser.parse_args()

    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.train_from_iterator(
        corpus(args.data),
        trainers.BpeTrainer(vocab_size=args.size, initial_alphabet=letters, end_of_word_suffix=WORD_END),
    )
    vocabulary, merges = _parts(bpe)
    for token in [letter + WORD_END for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(args.out)
    longest = max(corpus(args.data), key=lambda text: len(tokenizer(text).input_ids))
    print(f"{len(tokenizer)} entries; longest caption {len(tokenizer(longest).input_ids)} tokens: {longest!r}")


def _parts(bpe: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(bpe.to_str())["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], [(left, right) for left, right in pairs]


if __name__ == "__main__":
    main()
