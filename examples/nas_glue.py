# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_prune[examples,search]"]
# ///
"""Fine-tune a text classifier as a super-network, search its sub-networks, and save the best one of half its size.

    python examples/nas_glue.py --model google-bert/bert-base-uncased --dataset nyu-mll/glue --dataset_config sst2 \\
        --search_space small --strategy full --num_train_epochs 3 --learning_rate 2e-5 --output_dir bert-sst2-nas

The data may also be files, .tsv, .csv or .json lines, with a header: --train_file train.tsv --test_file dev.tsv. 30 %
of the training data are held out for the search; the test data say how good the chosen sub-network is. OUTPUT_DIR gets
the super-network (`supernet`), the front with its plot, and the chosen sub-network (`model`).
Several GPUs: accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/nas_glue.py ...
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

import hf_prune
from hf_prune.metrics import Accuracy, compute_metrics_for
from hf_prune.search.study import check_method


@dataclass
class DataArguments:
    model: str = field(metadata={"help": "Model of the Hub, or a folder."})
    dataset: str | None = field(default=None, metadata={"help": "Dataset of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, such as sst2."})
    train_file: str | None = field(default=None, metadata={"help": "A .tsv, .csv or .json file instead."})
    test_file: str | None = field(default=None, metadata={"help": "Another one for the test."})
    text_column: str = field(default="sentence", metadata={"help": "Column of texts."})
    label_column: str = field(default="label", metadata={"help": "Column of classes, numbered from 0."})
    test_split: str = field(default="validation", metadata={"help": "Split of the dataset for the test."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


@dataclass
class SearchArguments:
    params: float = field(default=0.5, metadata={"help": "Ratio of the parameters that the chosen one may have."})
    method: str = field(default="nsga2", metadata={"help": "random, local, nsga2, tpe or gp."})
    samples: int = field(default=100, metadata={"help": "Sub-networks to evaluate."})
    validation_samples: int = field(default=2048, metadata={"help": "Held-out examples to evaluate them on."})
    storage: str | None = field(default=None, metadata={"help": "A file, to go on with the search later."})


def load_data(args: DataArguments, validation_samples: int) -> DatasetDict:
    """Splits `train`, `validation` and `test` with the columns `text` and `labels`."""
    if args.train_file and args.test_file:
        files = {"train": args.train_file, "test": args.test_file}
        if ".json" in args.train_file:
            splits = load_dataset("json", data_files=files)
        else:
            tabs = {"delimiter": "\t", "quoting": 3} if ".tsv" in args.train_file else {}
            splits = load_dataset("csv", data_files=files, **tabs)
    elif args.dataset:
        splits = load_dataset(args.dataset, args.dataset_config)
        splits = DatasetDict(train=splits["train"], test=splits[args.test_split])
    else:
        raise SystemExit("Give --dataset, or --train_file and --test_file.")
    columns = {args.text_column: "text", args.label_column: "labels"}
    splits = splits.select_columns(list(columns)).rename_columns(columns)
    parts = splits["train"].train_test_split(0.3, seed=128)
    held_out = parts["test"].select(range(min(validation_samples, len(parts["test"]))))
    return DatasetDict(train=parts["train"], validation=held_out, test=splits["test"])


def main() -> None:
    parser = HfArgumentParser(
        (DataArguments, SearchArguments, hf_prune.SuperNetTrainingArguments), description="Search a super-network."
    )
    data_args, search_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    output = Path(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(data_args.model)
    with args.main_process_first():
        data = load_data(data_args, search_args.validation_samples).map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=data_args.max_length),
            batched=True,
            remove_columns="text",
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        data_args.model, num_labels=len(data["train"].unique("labels"))
    )
    space = hf_prune.search_space(args.search_space, model)
    # What the search would refuse, before hours of training.
    check_method(search_args.method, space)
    hf_prune.search_space(args.search_space, model, budget={"params": search_args.params})
    trainer = hf_prune.SuperNetTrainer(
        model,
        args,
        space=space,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics_for(Accuracy()),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(str(output / "supernet"))

    front = hf_prune.search_subnetworks(
        model,
        space,
        data["validation"],
        method=search_args.method,
        num_samples=search_args.samples,
        seed=args.seed,
        storage=search_args.storage,
        processing_class=tokenizer,
        batch_size=64,
    )
    front.save(output)
    if trainer.is_world_process_zero():
        print(front)
        front.plot(output / "front.png")

    chosen = front.select({"params": search_args.params})
    small = front.extract(chosen, model)
    accuracies = {}
    for name, candidate in (("super-network", model), ("sub-network", small)):
        # A Trainer of its own, for it may be shrunk. Trained further here, the sub-network would get better still.
        tester = hf_prune.PruningTrainer(
            candidate,
            hf_prune.PruningTrainingArguments(
                args.output_dir, per_device_eval_batch_size=64, use_cpu=args.use_cpu, report_to="none"
            ),
            eval_dataset=data["test"],
            processing_class=tokenizer,
            compute_metrics=compute_metrics_for(Accuracy()),
        )
        accuracies[name] = tester.evaluate()["eval_accuracy"]
    report = front.report(chosen, model)
    report.evaluation = [
        {
            "metric": "accuracy",
            "before": accuracies["super-network"],
            "after": accuracies["sub-network"],
            "n": len(data["test"]),
            "dataset": data_args.dataset or Path(data_args.test_file).name,
            "split": data_args.test_split if data_args.dataset else None,
        }
    ]
    if trainer.is_world_process_zero():
        hf_prune.save_pretrained(
            small,
            output / "model",
            processing_class=tokenizer,
            mask=front[chosen].mask,
            report=report,
        )
        print(report)
        print(", ".join(f"{name}: accuracy {value:.4f}" for name, value in accuracies.items()))
        print(f"Saved to {output}.")


if __name__ == "__main__":
    main()
