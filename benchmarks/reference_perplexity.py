"""Perplexity of the two small reference models in float32, against the figures in their data's manifest.

    python benchmarks/reference_perplexity.py ../shared/data

A difference beyond the last digit means our tokenizer, our windows, our decoder or our sums are wrong.
"""

import sys
from pathlib import Path

from harness import emit
from lilliput.data.documents import read_documents
from lilliput.data.streams import windows
from lilliput.data.tokenizer import Tokenizer
from lilliput.measure.quality import evaluate
from lilliput.measure.reference import open_original

CASES = (
    # model, text, tokens of a window, only documents that fit in one, predicted tokens and perplexity in the manifest
    ("stories260K", "tinystories/stories_a.jsonl", 512, True, 172_592, 4.510),
    ("tales7m", "corpus/valid.jsonl.gz", 256, False, 171_808, 27.662),
)


def main(data: Path) -> int:
    wrong = 0
    for model, text, length, whole, tokens, perplexity in CASES:
        folder = data / model / "hf"
        tokenizer = Tokenizer.open(folder)
        documents = read_documents(data / text)
        if whole:
            documents = [d for d in documents if len(tokenizer.encode(d)) <= length]
        cut = windows(documents, tokenizer, length=length)
        (row,) = evaluate(open_original(folder), cut, bits=[None])
        right = row.tokens == tokens and abs(row.perplexity - perplexity) <= 0.0005
        wrong += not right
        emit(
            "reference_perplexity",
            model=model,
            text=text,
            expected=perplexity,
            right=right,
            **row.model_dump(exclude_none=True),
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
