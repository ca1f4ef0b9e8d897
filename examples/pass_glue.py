# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_prune[examples]"]
# ///
"""Fine-tune a text classifier that ends with exactly K attention heads (PASS, or PASSCONC with --concentrate).

    python examples/pass_glue.py --model google-bert/bert-base-uncased --dataset nyu-mll/glue --dataset_config sst2 \\
        --num_heads 48 --num_train_epochs 3 --learning_rate 2e-5 --output_dir bert-sst2-48

The data may also be files, .tsv, .csv or .json lines, with a header: --train_file train.tsv --test_file dev.tsv. The
penalty grows over the first part of the run: give it a few hundred steps at least. --train_weights false trains the
gates alone, --distillation_weight 0.5 lets the dense --model teach the pruned one (it must be fine-tuned already).
Several GPUs: accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/pass_glue.py ...
"""

from dataclasses import dataclass, field

from datasets import DatasetDict, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

import hf_prune
from hf_prune.metrics import Accuracy, compute_metrics_for


@dataclass
class DataArguments:
    model: str = field(metadata={"help": "Model of the Hub, or a folder."})
    dataset: str | None = field(default=None, metadata={"help": "Dataset of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, such as sst2."})
    train_file: str | None = field(default=None, metadata={"help": "A .tsv, .csv or .json file instead."})
    test_file: str | None = field(default=None, metadata={"help": "Another one for the evaluation."})
    text_column: str = field(default="sentence", metadata={"help": "Column of texts."})
    label_column: str = field(default="label", metadata={"help": "Column of classes, numbered from 0."})
    test_split: str = field(default="validation", metadata={"help": "Split of the dataset for the evaluation."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


def load_data(args: DataArguments) -> DatasetDict:
    """Splits `train` and `test` with the columns `text` and `label`."""
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
    return splits.select_columns(list(columns)).rename_columns(columns)


def main() -> None:
    parser = HfArgumentParser((DataArguments, hf_prune.PassTrainingArguments), description="Prune heads in training.")
    data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(data_args.model)
    with args.main_process_first():
        data = load_data(data_args).map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=data_args.max_length),
            batched=True,
            remove_columns="text",
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        data_args.model, num_labels=len(data["train"].unique("labels"))
    )
    args.eval_strategy = "epoch" if args.eval_strategy == "no" else args.eval_strategy
    trainer = hf_prune.PassTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics_for(Accuracy()),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        report = hf_prune.PruningReport.load(args.output_dir)
        for when, metrics in report.facts["metrics"].items():
            print(f"{when}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        print(report, f"Saved to {args.output_dir}.", sep="\n")


if __name__ == "__main__":
    main()
