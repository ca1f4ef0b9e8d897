# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_prune[examples]", "sacrebleu"]
# ///
"""Train a German-English translator from scratch that ends with exactly K of its 72 attention heads (PASS).

    python examples/pass_translation.py --train_file train.tsv --test_file val.tsv --num_heads 36 \\
        --num_train_epochs 30 --learning_rate 5e-4 --warmup_steps 1000 --per_device_train_batch_size 128 \\
        --eval_strategy epoch --output_dir de-en-36

6 encoder and 6 decoder layers of 4 heads each, as in the paper: 24 heads attend within the encoder, 24 within the
decoder, 24 from the decoder to the encoder. The files are tables (.tsv, .csv) with the columns `de` and `en`, such as
Multi30k; or give a --dataset of the Hub with a column `translation`, such as IWSLT. BLEU is that of sacrebleu on what
the model generates. Several GPUs: accelerate launch --config_file examples/accelerate/multi_gpu.yaml ...
"""

from dataclasses import dataclass, field

import numpy as np
import sacrebleu
from datasets import DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    set_seed,
)

import hf_prune


@dataclass
class TranslationArguments:
    train_file: str | None = field(default=None, metadata={"help": "Table with the columns of both languages."})
    test_file: str | None = field(default=None, metadata={"help": "Another one for the evaluation."})
    dataset: str | None = field(default=None, metadata={"help": "Dataset of the Hub with a column `translation`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    source: str = field(default="de", metadata={"help": "Language to translate from."})
    target: str = field(default="en", metadata={"help": "Language to translate to."})
    vocab_size: int = field(default=8000, metadata={"help": "Subwords of both languages together."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    max_length: int = field(default=128, metadata={"help": "Longer sentences are cut to this many subwords."})


def load_data(args: TranslationArguments) -> DatasetDict:
    """Splits `train` and `test` with the columns `source` and `target`."""
    if args.dataset:
        splits = load_dataset(args.dataset, args.dataset_config)
        splits = DatasetDict(train=splits["train"], test=splits["validation"]).flatten()
        columns = {f"translation.{args.source}": "source", f"translation.{args.target}": "target"}
    elif args.train_file and args.test_file:
        files = {"train": args.train_file, "test": args.test_file}
        tabs = {"delimiter": "\t", "quoting": 3} if ".tsv" in args.train_file else {}
        splits = load_dataset("csv", data_files=files, **tabs)
        columns = {args.source: "source", args.target: "target"}
    else:
        raise SystemExit("Give --dataset, or --train_file and --test_file.")
    return splits.select_columns(list(columns)).rename_columns(columns)


def train_tokenizer(data: DatasetDict, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((text for name in ("source", "target") for text in data["train"][name]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = HfArgumentParser(
        (TranslationArguments, hf_prune.Seq2SeqPassTrainingArguments), description="Prune heads in training."
    )
    data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    data = load_data(data_args)
    tokenizer = train_tokenizer(data, data_args.vocab_size)
    with args.main_process_first():
        data = data.map(
            lambda rows: tokenizer(
                rows["source"], text_target=rows["target"], truncation=True, max_length=data_args.max_length
            ),
            batched=True,
            remove_columns=["source", "target"],
        )
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=data_args.hidden_size,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * data_args.hidden_size,
        decoder_ffn_dim=4 * data_args.hidden_size,
        dropout=0.3,
        max_position_embeddings=data_args.max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.generation_config.max_length = data_args.max_length

    def bleu(prediction: EvalPrediction) -> dict[str, float]:
        texts = [
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        found, wanted = ([text.strip() for text in column] for column in texts)
        return {"bleu": sacrebleu.corpus_bleu(found, [wanted]).score}

    args.predict_with_generate = True
    trainer = hf_prune.Seq2SeqPassTrainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=bleu,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        report = hf_prune.PruningReport.load(args.output_dir)
        print(report.facts["metrics"], report, f"Saved to {args.output_dir}.", sep="\n")


if __name__ == "__main__":
    main()
