"""Accuracy and cost of the one-shot methods on SST-2, beside plain forward passes over the same sentences.

    python benchmarks/one_shot.py --model MODEL --train train.tsv.gz --dev dev.tsv --methods kcm:lstsq fisher:lstsq

MODEL is a sequence classifier fine-tuned on SST-2; the files have the columns `sentence` and `label`. A plain pass
takes the sentences in batches of 32 in the order of the data, padded per batch, on one thread, timed just before each
pruning. MACs are counted at 25.16 tokens, the mean length of the dev set, as in the papers.
"""

import argparse
import copy
import statistics
import time

import pandas
import torch
import transformers

import hf_prune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--methods", nargs="+", default=["kcm:lstsq", "fisher:lstsq"], metavar="METHOD[:RECOVER]")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--sequence-length", type=float, default=25.16)
    args = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    train, dev = (pandas.read_csv(path, sep="\t", quoting=3) for path in (args.train, args.dev))

    def logits(model: transformers.PreTrainedModel, texts: list[str]) -> torch.Tensor:
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        with torch.no_grad():
            chunks = (tokenizer(texts[i : i + 32], **options) for i in range(0, len(texts), 32))
            return torch.cat([model(**chunk).logits for chunk in chunks])

    def accuracy(model: transformers.PreTrainedModel) -> float:
        return 100 * (logits(model, dev.sentence.tolist()).argmax(-1).numpy() == dev.label.to_numpy()).mean()

    print(f"dense: {accuracy(dense):.2f} % on {len(dev)} sentences")
    print("| method | recover | MACs kept | accuracy, mean ± sd | seconds | plain passes |\n|---|---|---|---|---|---|")
    for method, macs in ((method, macs) for method in args.methods for macs in args.macs):
        name, _, recover = method.partition(":")
        options = {"method": name, "budget": {"macs": macs}} | ({"recover": recover} if recover else {})
        config = hf_prune.PruningConfig.from_dict({**options, "sequence_length": args.sequence_length})
        scores, seconds, passes = [], [], []
        for seed in args.seeds:
            sample = train.sample(args.samples, random_state=seed)
            started = time.perf_counter()
            logits(dense, sample.sentence.tolist())
            plain, model = time.perf_counter() - started, copy.deepcopy(dense)
            started = time.perf_counter()
            hf_prune.prune(model, config, sample.to_dict("records"), processing_class=tokenizer)
            seconds.append(time.perf_counter() - started)
            passes.append(seconds[-1] / plain)
            scores.append(accuracy(hf_prune.shrink(model)))
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        cells = [name, recover, macs, f"{statistics.mean(scores):.2f} ± {spread:.2f}"]
        cells += [f"{statistics.mean(seconds):.1f}", f"{statistics.mean(passes):.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
