"""Fine-tune an encoder on one of the benchmarks' tasks, in minutes on a CPU.

    python benchmarks/fine_tune.py --task stsb --model ENCODER --train train.tsv.gz --dev dev.tsv.gz --output OUT

The files of `sst2` have the columns `sentence` and `label`, those of `stsb` `sentence1`, `sentence2` and `label`;
those of `squad` are JSON lines with `question`, `context` and `answers`.
"""

import argparse

import torch
import transformers
from tasks import TASKS, inputs, run, up_to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    for name in ("model", "train", "dev", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512, help="leave out examples of more tokens")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    transformers.set_seed(0)
    model = task.auto.from_pretrained(args.model, **task.options)
    train, dev = (up_to(args.longest, task.read(path, tokenizer)) for path in (args.train, args.dev))
    options = transformers.TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(model, options, train_dataset=inputs(train), processing_class=tokenizer)
    trainer.train()
    print(
        f"{args.task}: {task.metric} {task.score(run(model.eval(), dev, tokenizer), dev):.2f} on {len(dev)} examples"
    )
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
