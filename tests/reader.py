"""Where the code of README and docs runs: a folder with tiny models under the names that a reader has chosen."""

import re
from pathlib import Path

from tiny import VOCAB, tiny_model
from transformers import BertTokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
WORDS = (
    "a about all and as be bright but by can character clever does dull end every few film for from full funny hardly "
    "hundred is it joke like long love music never new no not of old one or plot quiet real scene slow so story texts "
    "that the their this those thousand to too unlabelled very warm was well what who with"
).split()
TEXTS = [" ".join(WORDS[(3 * i + k * (i % 7 + 1)) % len(WORDS)] for k in range(4 + i % 6)) for i in range(200)]


def code_blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The commands in the bash blocks of a page, one a line."""
    lines = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r" > \S+$", "", line.partition(" #")[0].strip()) for line in lines]
    return [part for line in lines for part in re.split(r" && ", line) if part]


def furnish(folder: Path) -> None:
    """A classifier `bert-sst2`, language models `llama` and `gpt2`, a translator `bart`; texts, labelled or not."""
    for name, family in (("bert-sst2", "bert"), ("llama", "llama"), ("gpt2", "gpt2"), ("bart", "bart")):
        tiny_model(family).save_pretrained(folder / name)
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]
        assert len(vocab) <= VOCAB
        (folder / name / "vocab.txt").write_text("\n".join(vocab))
        BertTokenizerFast(str(folder / name / "vocab.txt"), model_max_length=64).save_pretrained(folder / name)
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    rows = (f'{{"text": "{text}", "label": {len(text) % 2}}}' for text in TEXTS)
    (folder / "train.jsonl").write_text("\n".join(rows))
