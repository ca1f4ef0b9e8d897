"""A classifier with K attention heads: PASS and PASSCONC against one-shot pruning and gates under an L0 penalty.

    python benchmarks/pass_heads.py --model MODEL --train train.tsv.gz --dev dev.tsv --heads 36 18 8 4

MODEL is a BERT fine-tuned on SST-2; the files have the columns `sentence` and `label`. All trained rows get as many
steps. `fisher` keeps the K heads with the largest Fisher information of 2,048 sentences and trains nothing,
`fisher+train` then trains what is left. `l0` trains the same gates with a constant weight on the expected number of
open ones and keeps those above 0.5, so that K is not chosen but reached: give it weights with `--l0`. Latencies are
those of the shrunk models against the dense one, timed in turns with it: the whole model, and its attention modules.
"""

import argparse
import copy
import statistics
import tempfile
import time

import pandas
import torch
import transformers
from transformers.models.bert.modeling_bert import BertAttention

import hf_prune
from hf_prune.benchmark import example_inputs
from hf_prune.methods.fisher import FisherBlock
from hf_prune.trainers.head_gates import closed_probability, soft_gates, top_heads
from hf_prune.units import site


class L0Callback(hf_prune.PassCallback):
    """Gates under a constant L0 penalty and a threshold: Louizos et al., ICLR 2018; Voita et al., ACL 2019."""

    weight = 0.0

    def penalty(self, phi: torch.Tensor) -> torch.Tensor:
        return self.weight * (1 - closed_probability(phi)).sum()

    def on_step_end(self, *args, **kwargs) -> None:
        self.options.num_heads = max(int((soft_gates(self.gates.phi) > 0.5).sum()), 1)
        self._show_mask(self.gates)


def one_shot(model: transformers.PreTrainedModel, data: list[dict], tokenizer, heads: int) -> hf_prune.PruningMask:
    """The mask of the heads with the largest Fisher information."""
    units = hf_prune.prunable_units(model)
    groups = units.of_kind("heads")
    calibrator = hf_prune.Calibrator(model, data, processing_class=tokenizer, labels=True)
    fisher = {group.name: FisherBlock(group.size, site(model, group).weight.device) for group in groups}
    calibrator.collect_gradients(groups, fisher, per_sample=False)
    sizes = [group.size for group in groups]
    module = torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes))
    keep = top_heads(torch.cat([fisher[group.name].matrix.diagonal() for group in groups]), heads, module)
    return hf_prune.PruningMask(dict(zip([g.name for g in groups], keep.split(sizes), strict=True)), units)


def latency(dense: transformers.PreTrainedModel, small: transformers.PreTrainedModel, repeats: int) -> list[float]:
    """Time of `small` against `dense`, of the whole and of the attention modules, for 32 sentences of 25 tokens."""
    inputs = example_inputs(dense, batch_size=32, sequence_length=25)
    ratios = []
    for _ in range(repeats):
        times = []
        for model in (dense, small):
            marks: list[float] = []

            def mark(*_, marks: list[float] = marks) -> None:
                marks.append(time.perf_counter())

            blocks = [module for module in model.modules() if isinstance(module, BertAttention)]
            handles = [b.register_forward_pre_hook(mark) for b in blocks] + [
                b.register_forward_hook(mark) for b in blocks
            ]
            begin = time.perf_counter()
            with torch.no_grad():
                model(**inputs)
            inside = sum(end - start for start, end in zip(marks[::2], marks[1::2], strict=True))
            times.append((time.perf_counter() - begin, inside))
            for handle in handles:
                handle.remove()
        ratios.append([b / a for a, b in zip(*times, strict=True)])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--heads", type=int, nargs="+", default=[36, 18, 8, 4])
    parser.add_argument("--methods", nargs="+", default=["pass", "passconc", "fisher", "fisher+train", "l0"])
    parser.add_argument("--l0", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    train, dev = (pandas.read_csv(path, sep="\t", quoting=3) for path in (args.train, args.dev))

    def encoded(frame: pandas.DataFrame) -> list[dict]:
        tokens = tokenizer(frame.sentence.tolist(), truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(tokens, frame.label, strict=True)]

    def accuracy(model: transformers.PreTrainedModel) -> float:
        right = 0
        with torch.no_grad():
            for start in range(0, len(dev), 32):
                rows = dev[start : start + 32]
                batch = tokenizer(rows.sentence.tolist(), padding=True, truncation=True, return_tensors="pt")
                right += int((model.eval()(**batch).logits.argmax(-1) == torch.tensor(rows.label.to_numpy())).sum())
        return 100 * right / len(dev)

    def run(method: str, target: float, seed: int) -> tuple[transformers.PreTrainedModel, hf_prune.PruningMask, float]:
        model = copy.deepcopy(dense)
        sample = train.sample(min(args.steps * args.batch_size, len(train)), random_state=seed)
        options = {
            "output_dir": scratch,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "train_sampling_strategy": "group_by_length",
            "seed": seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        started = time.perf_counter()
        if method.startswith("fisher"):
            mask = one_shot(model, sample[:2048].to_dict("records"), tokenizer, int(target))
            hf_prune.apply_mask(model, mask)
            training = hf_prune.PruningTrainingArguments(**options)
            trainer = hf_prune.PruningTrainer(
                model, training, train_dataset=encoded(sample), processing_class=tokenizer
            )
        else:
            heads = 1 if method == "l0" else int(target)
            training = hf_prune.PassTrainingArguments(**options, num_heads=heads, concentrate=method == "passconc")
            trainer = hf_prune.PassTrainer(model, training, train_dataset=encoded(sample), processing_class=tokenizer)
            if method == "l0":
                trainer.callback.__class__ = L0Callback
                trainer.callback.weight = target
        if method != "fisher":
            trainer.train()
        return trainer.pruned_model().eval(), trainer.pruning_mask(), time.perf_counter() - started

    print(f"dense: {accuracy(dense):.2f} % on {len(dev)} sentences; {args.steps} steps of {args.batch_size} sentences")
    names = ["method", "asked", "heads kept", "accuracy", "empty modules", "latency", "attention latency", "seconds"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods:
            for target in args.l0 if method == "l0" else args.heads:
                rows = []
                for seed in args.seeds:
                    model, mask, seconds = run(method, target, seed)
                    empty = sum(not mask[g.name].any() for g in hf_prune.prunable_units(dense).of_kind("heads"))
                    ratios = latency(dense, model, args.repeats)
                    rows.append([mask.kept("heads"), accuracy(model), empty, *ratios, seconds])
                kept, scores, empties, whole, attention, seconds = zip(*rows, strict=True)
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                cells = [method, target, "/".join(map(str, kept)), f"{statistics.mean(scores):.2f} ± {spread:.2f}"]
                cells += ["/".join(map(str, empties)), f"{statistics.mean(whole):.2f}×"]
                cells += [f"{statistics.mean(attention):.2f}×", f"{statistics.mean(seconds):.0f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
