"""A classifier with K attention heads: PASS and PASSCONC against one-shot pruning and gates under an L0 penalty.

    python benchmarks/pass_heads.py --model MODEL --train train.tsv.gz --dev dev.tsv --results pass_heads.json

MODEL is a BERT fine-tuned on SST-2; the files have the columns `sentence` and `label`. All methods train the weights
for as many steps, on the same sentences. `fisher` keeps the K heads with the largest Fisher information, `kprune`
those of K-prune, which also refits what it keeps (and leaves no layer empty); both then train what is left. `l0`
trains the same gates as PASS with a constant weight on the expected number of open ones and keeps those above 0.5, so
that K is not chosen but reached: `--l0` gives it weights. So that a CPU can do it, word embeddings are not trained and
there is no dropout. Latencies are those of the shrunk models against the dense one, CPU time of one thread in turns
with it: the whole model, and its attention modules.

Each run is added to the results as soon as it ends, and what is there is not run again, so that several processes can
share the work; beside the results a table is written (.md). `--step-time` only measures what a step of PASS costs
beside one of a plain `Trainer`: both train in turns, a step each, on the same batches; the median of `--steps` ratios.
"""

import argparse
import copy
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import pandas
import torch
import transformers
from transformers.models.bert.modeling_bert import BertAttention

import hf_prune
from hf_prune.gradients import collect_gradients
from hf_prune.methods.fisher import FisherBlock
from hf_prune.timing import example_inputs
from hf_prune.trainers.head_gates import closed_probability, soft_gates, top_heads
from hf_prune.units import site

METHODS = ["pass", "passconc", "fisher", "kprune", "l0"]


class L0Callback(hf_prune.PassCallback):
    """Gates under a constant L0 penalty and a threshold: Louizos et al., ICLR 2018; Voita et al., ACL 2019."""

    weight = 0.0

    def penalty(self, phi: torch.Tensor) -> torch.Tensor:
        return self.weight * (1 - closed_probability(phi)).sum()

    def on_step_end(self, *args, **kwargs) -> None:
        self.options.num_heads = max(int((soft_gates(self.gates.phi) > 0.5).sum()), 1)
        self._show_mask(self.gates)


def fisher(model: transformers.PreTrainedModel, data: list[dict], tokenizer, heads: int) -> None:
    """Mask all heads but those with the largest Fisher information."""
    units = hf_prune.prunable_units(model)
    groups = units.of_kind("heads")
    calibrator = hf_prune.Calibrator(model, data, processing_class=tokenizer, labels=True)
    blocks = {group.name: FisherBlock(group.size, site(model, group).weight.device) for group in groups}
    collect_gradients(calibrator, groups, blocks, per_sample=False)
    sizes = [group.size for group in groups]
    keep = top_heads(torch.cat([blocks[group.name].matrix.diagonal() for group in groups]), heads)
    names = [group.name for group in groups]
    hf_prune.apply_mask(model, hf_prune.PruningMask(dict(zip(names, keep.split(sizes), strict=True)), units))


def kprune(model: transformers.PreTrainedModel, data: list[dict], tokenizer, heads: int) -> None:
    """Mask all heads but those that K-prune keeps."""
    units = hf_prune.prunable_units(model)
    table = hf_prune.CostTable(model)
    first = units.of_kind("heads")[0]
    keep = torch.ones(first.size, dtype=torch.bool)
    keep[0] = False
    dense, less = (cost.params for cost in (table.of(), table.of(hf_prune.PruningMask({first.name: keep}, units))))
    left = dense - (sum(group.size for group in units.of_kind("heads")) - heads) * (dense - less)
    neurons = tuple(group.name for group in units.of_kind("neurons"))
    config = hf_prune.KPruneConfig(budget={"params": left}, exclude=neurons)
    hf_prune.prune(model, config, data, processing_class=tokenizer)


class Turns(transformers.TrainerCallback):
    """Lets trainers in threads take turns, a step each, and notes the CPU time of each step."""

    def __init__(self, mine: threading.Semaphore, next: threading.Semaphore) -> None:
        self.mine, self.next, self.times = mine, next, []

    def on_train_begin(self, *args, **kwargs) -> None:
        self.mine.acquire()
        self.started = time.process_time()

    def on_step_end(self, *args, **kwargs) -> None:
        self.times.append(time.process_time() - self.started)
        self.next.release()
        self.mine.acquire()
        self.started = time.process_time()

    def on_train_end(self, *args, **kwargs) -> None:
        self.next.release()


def latency(dense: transformers.PreTrainedModel, small: transformers.PreTrainedModel, repeats: int) -> list[float]:
    """Time of `small` against `dense`, of the whole and of the attention modules, for 32 sentences of 25 tokens."""
    inputs = example_inputs(dense, batch_size=32, sequence_length=25)
    ratios = []
    for _ in range(repeats):
        times = []
        for model in (dense, small):
            marks: list[float] = []

            def mark(*_, marks: list[float] = marks) -> None:
                marks.append(time.process_time())

            blocks = [module for module in model.modules() if isinstance(module, BertAttention)]
            handles = [b.register_forward_pre_hook(mark) for b in blocks] + [
                b.register_forward_hook(mark) for b in blocks
            ]
            begin = time.process_time()
            with torch.no_grad():
                model(**inputs)
            inside = sum(end - start for start, end in zip(marks[::2], marks[1::2], strict=True))
            times.append((time.process_time() - begin, inside))
            for handle in handles:
                handle.remove()
        ratios.append([b / a for a, b in zip(*times, strict=True)])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


class Benchmark:
    """The model, the data, and one run of a method."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        self.dense = transformers.AutoModelForSequenceClassification.from_pretrained(
            args.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).eval()
        self.dense.get_input_embeddings().requires_grad_(False)
        self.units = hf_prune.prunable_units(self.dense)
        self.train, self.dev = (pandas.read_csv(path, sep="\t", quoting=3) for path in (args.train, args.dev))
        self.dev = self.dev.loc[self.dev.sentence.str.len().sort_values().index]

    def encoded(self, frame: pandas.DataFrame) -> list[dict]:
        tokens = self.tokenizer(frame.sentence.tolist(), truncation=True, max_length=self.args.max_length)
        return [
            {"input_ids": ids, "labels": int(label)}
            for ids, label in zip(tokens["input_ids"], frame.label, strict=True)
        ]

    def accuracy(self, model: transformers.PreTrainedModel) -> float:
        right = 0
        with torch.no_grad():
            for start in range(0, len(self.dev), 32):
                rows = self.dev[start : start + 32]
                batch = self.tokenizer(rows.sentence.tolist(), padding=True, truncation=True, return_tensors="pt")
                right += int((model.eval()(**batch).logits.argmax(-1) == torch.tensor(rows.label.to_numpy())).sum())
        return 100 * right / len(self.dev)

    def options(self, folder: str, seed: int) -> dict:
        """Training arguments that all methods share."""
        return {
            "output_dir": folder,
            "max_steps": self.args.steps,
            "per_device_train_batch_size": self.args.batch_size,
            "learning_rate": self.args.learning_rate,
            "train_sampling_strategy": "group_by_length",
            "seed": seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }

    def step_time(self) -> float:
        """Time of a step of PASS against one of a plain `Trainer`, in turns on the same batches."""
        sample = self.train.sample(self.args.steps * self.args.batch_size, random_state=0)
        data = {"train_dataset": self.encoded(sample), "processing_class": self.tokenizer}
        first, second = threading.Semaphore(1), threading.Semaphore(0)
        turns = [Turns(first, second), Turns(second, first)]
        with tempfile.TemporaryDirectory() as scratch:
            options = self.options(scratch, seed=0)
            trainers = [
                transformers.Trainer(copy.deepcopy(self.dense), transformers.TrainingArguments(**options), **data),
                hf_prune.PassTrainer(
                    copy.deepcopy(self.dense), hf_prune.PassTrainingArguments(**options, num_heads=8), **data
                ),
            ]
            for trainer, turn in zip(trainers, turns, strict=True):
                trainer.add_callback(turn)
            threads = [threading.Thread(target=trainer.train) for trainer in trainers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return statistics.median(b / a for a, b in zip(*(turn.times[5:] for turn in turns), strict=True))

    def run(self, method: str, target: float, seed: int) -> dict:
        args, model = self.args, copy.deepcopy(self.dense)
        sample = self.train.sample(min(args.steps * args.batch_size, len(self.train)), random_state=seed)
        calibration = sample[: args.sentences].to_dict("records")
        started, one_shot = time.process_time(), None
        with tempfile.TemporaryDirectory() as scratch:
            options = self.options(scratch, seed)
            data = {"train_dataset": self.encoded(sample), "processing_class": self.tokenizer}
            if method in ("fisher", "kprune"):
                {"fisher": fisher, "kprune": kprune}[method](model, calibration, self.tokenizer, int(target))
                one_shot = self.accuracy(model)
                trainer = hf_prune.PruningTrainer(model, hf_prune.PruningTrainingArguments(**options), **data)
            else:
                heads = 1 if method == "l0" else int(target)
                training = hf_prune.PassTrainingArguments(**options, num_heads=heads, concentrate=method == "passconc")
                trainer = hf_prune.PassTrainer(model, training, **data)
                if method == "l0":
                    trainer.callback.__class__ = L0Callback
                    trainer.callback.weight = target
            trainer.train()
        seconds = time.process_time() - started
        small, mask = trainer.pruned_model().eval(), trainer.pruning_mask()
        whole, attention = latency(self.dense, small, args.repeats)
        return {
            "method": method,
            "target": target,
            "seed": seed,
            "heads": [int(mask[group.name].sum()) for group in self.units.of_kind("heads")],
            "one_shot": one_shot,
            "accuracy": self.accuracy(small),
            "latency": whole,
            "attention_latency": attention,
            "seconds": seconds,
        }


def table(results: dict) -> str:
    """The results as Markdown."""
    columns = ["method", "K or weight", "seeds", "heads kept", "one-shot", "accuracy", "empty modules", "latency"]
    columns += ["attention latency"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    runs: dict[tuple, list[dict]] = {}
    for run in results["runs"]:
        runs.setdefault((METHODS.index(run["method"]), -run["target"]), []).append(run)

    def spread(scores: list[float]) -> str:
        return f"{statistics.mean(scores):.2f}" + (f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else "")

    for (method, target), rows in sorted(runs.items()):
        cells = [METHODS[method], f"{-target:g}", len(rows), "/".join(str(sum(row["heads"])) for row in rows)]
        shots = [row["one_shot"] for row in rows if row["one_shot"] is not None]
        cells += [spread(shots) if shots else "", spread([row["accuracy"] for row in rows])]
        cells += ["/".join(str(row["heads"].count(0)) for row in rows)]
        cells += [f"{statistics.mean(row[key] for row in rows):.2f}×" for key in ("latency", "attention_latency")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    budget = results["budget"]
    return "\n".join(
        [
            "# PASS against one-shot pruning of heads and an L0 penalty",
            "",
            f"SST-2, dense {results['dense']:.2f} %, 6 × 12 heads; {budget['steps']} steps of {budget['batch_size']} "
            f"sentences at a learning rate of {budget['learning_rate']:g}, one-shot masks from {budget['sentences']} "
            "sentences. Made by:",
            "",
            "    python benchmarks/pass_heads.py --model MODEL --train train.tsv.gz --dev dev.tsv \\",
            "        --results benchmarks/results/pass_heads.json "
            + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in budget.items()),
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--step-time", action="store_true")
    parser.add_argument("--heads", type=int, nargs="+", default=[36, 18, 8, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--l0", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--sentences", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    benchmark = Benchmark(args)
    if args.step_time:
        print(f"A step of PASS takes {benchmark.step_time():.3f} times one of a plain Trainer.")
        return
    if args.results is None:
        parser.error("--results is missing")
    budget = {
        name: getattr(args, name) for name in ("steps", "batch_size", "max_length", "learning_rate", "sentences")
    }

    def load() -> dict:
        results = json.loads(args.results.read_text())
        if results["budget"] != budget:
            raise SystemExit(f"{args.results} holds runs with {results['budget']}: give another file.")
        return results

    def save(results: dict) -> None:
        args.results.write_text(json.dumps(results, indent=1) + "\n")
        args.results.with_suffix(".md").write_text(table(results))

    if not args.results.exists():
        args.results.parent.mkdir(parents=True, exist_ok=True)
        save({"budget": budget, "dense": benchmark.accuracy(benchmark.dense), "runs": []})
    layers = len(benchmark.units.of_kind("heads"))
    for seed in args.seeds:
        for method in args.methods:
            for target in args.l0 if method == "l0" else args.heads:
                key = {"method": method, "target": target, "seed": seed}
                done = any(run.items() >= key.items() for run in load()["runs"])
                if not done and not (method == "kprune" and target < layers):
                    run = benchmark.run(**key)
                    results = load()  # which another process may have written to
                    save({**results, "runs": [*results["runs"], run]})
    print(table(load()))


if __name__ == "__main__":
    main()
