"""The tasks of the benchmarks: sentence sentiment, similarity of two sentences, and questions about a paragraph."""

import collections
import gzip
import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas
import torch
import transformers
from scipy.stats import spearmanr

Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """How a task is read and scored.

    Args:
        auto (`type`): Auto class of its models.
        metric (`str`): What `score` returns, in percent.
        read (`Callable`): (file, tokenizer) -> tokenised examples with labels, and what `score` needs beside.
        score (`Callable`): (model outputs, examples) -> the metric.
        options (`dict`): For the model.
    """

    auto: Any
    metric: str
    read: Callable[[str, Any], Examples]
    score: Callable[[list[Any], Examples], float]
    options: dict[str, Any]


def read_pairs(*columns: str) -> Callable[[str, Any], Examples]:
    """Reads a table with text columns and a column `label`."""

    def read(path: str, tokenizer: Any) -> Examples:
        table = pandas.read_csv(path, sep="\t", quoting=3).dropna()
        encoded = tokenizer(*(table[c].tolist() for c in columns), truncation=True)
        return [
            {"input_ids": encoded.input_ids[i], "token_type_ids": encoded.token_type_ids[i], "labels": label}
            for i, label in enumerate(table.label.tolist())
        ]

    return read


def read_squad(path: str, tokenizer: Any) -> Examples:
    """Reads questions with the first 384 tokens of their paragraphs."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    encoded = tokenizer(
        [row["question"].strip() for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=384,
        return_offsets_mapping=True,
    )
    examples = []
    for i, row in enumerate(rows):
        offsets, kinds = encoded.offset_mapping[i], encoded.sequence_ids(i)
        start, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
        inside = [t for t, (a, b) in enumerate(offsets) if kinds[t] == 1 and a < start + len(text) and b > start]
        examples.append(
            {
                "input_ids": encoded.input_ids[i],
                "token_type_ids": encoded.token_type_ids[i],
                "start_positions": inside[0] if inside else 0,
                "end_positions": inside[-1] if inside else 0,
                "context": row["context"],
                "answers": row["answers"]["text"],
                "offsets": [pair if kinds[t] == 1 else None for t, pair in enumerate(offsets)],
            }
        )
    return examples


def accuracy(outputs: list[Any], examples: Examples) -> float:
    """Percent of examples whose label has the highest logit."""
    hits = [int(o["logits"].argmax()) == e["labels"] for o, e in zip(outputs, examples, strict=True)]
    return 100 * sum(hits) / len(hits)


def spearman(outputs: list[Any], examples: Examples) -> float:
    """Spearman's correlation of predictions and labels, in percent."""
    return 100 * float(spearmanr([float(o["logits"]) for o in outputs], [e["labels"] for e in examples]).statistic)


def squad_f1(outputs: list[Any], examples: Examples) -> float:
    """Mean F1 of the words of the best span of up to 30 tokens, in percent, as in SQuAD 1.1."""
    scores = []
    for output, example in zip(outputs, examples, strict=True):
        offsets = example["offsets"]
        allowed = torch.tensor([pair is not None for pair in offsets])
        both = output["start_logits"][: len(offsets), None] + output["end_logits"][None, : len(offsets)]
        spans = torch.ones_like(both).triu().tril(30).bool() & allowed[:, None] & allowed
        start, end = divmod(int(both.masked_fill(~spans, -torch.inf).argmax()), len(offsets))
        text = example["context"][offsets[start][0] : offsets[end][1]]
        scores.append(max(_f1(_words(text), _words(answer)) for answer in example["answers"]))
    return 100 * sum(scores) / len(scores)


def gap(outputs: list[Any], dense: list[Any], examples: Examples) -> float:
    """Mean KL from the dense model's predictions: of classes, or of the start and the end of a span over the real
    tokens; for a number the squared error."""
    found = []
    for output, target, example in zip(outputs, dense, examples, strict=True):
        for name, teacher in target.items():
            if name == "logits" and len(teacher) == 1:
                found.append(float((output[name] - teacher).square()))
                continue
            size = len(teacher) if name == "logits" else len(example["input_ids"])
            student, teacher = (x[:size].log_softmax(0) for x in (output[name], teacher))
            found.append(float((teacher.exp() * (teacher - student)).sum()))
    return sum(found) / len(found)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(words: list[str], answer: list[str]) -> float:
    shared = sum((collections.Counter(words) & collections.Counter(answer)).values())
    return 2 * shared / (len(words) + len(answer)) if shared else float(words == answer)


SEQUENCE, QUESTION = transformers.AutoModelForSequenceClassification, transformers.AutoModelForQuestionAnswering
TASKS = {
    "sst2": Task(SEQUENCE, "accuracy", read_pairs("sentence"), accuracy, {"num_labels": 2}),
    "stsb": Task(SEQUENCE, "Spearman", read_pairs("sentence1", "sentence2"), spearman, {"num_labels": 1}),
    "squad": Task(QUESTION, "F1", read_squad, squad_f1, {}),
}
INPUTS = ("input_ids", "token_type_ids", "labels", "start_positions", "end_positions")


def up_to(tokens: int, examples: Examples) -> Examples:
    """The examples of at most so many tokens."""
    return [example for example in examples if len(example["input_ids"]) <= tokens]


def inputs(examples: Examples) -> Examples:
    """What a model takes of the examples."""
    return [{name: value for name, value in example.items() if name in INPUTS} for example in examples]


def batches(examples: Examples, tokenizer: Any, size: int = 32) -> Any:
    """Padded batches without labels, in the order of the data."""
    for start in range(0, len(examples), size):
        rows = [{k: e[k] for k in ("input_ids", "token_type_ids")} for e in examples[start : start + size]]
        yield tokenizer.pad(rows, return_tensors="pt")


def run(model: Any, examples: Examples, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """The outputs of a model for each example."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found: list[dict[str, torch.Tensor]] = [{}] * len(examples)
    position = 0
    with torch.inference_mode():
        for batch in batches([examples[i] for i in order], tokenizer):
            outputs = {k: v.float() for k, v in model(**batch).items() if k.endswith("logits")}
            for row in range(len(batch["input_ids"])):
                found[order[position]] = {name: value[row] for name, value in outputs.items()}
                position += 1
    return found
