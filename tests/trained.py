"""Trainers of tiny models, and their data."""

import transformers as T
from tiny import SEQ2SEQ, tiny_batch, tiny_model

import hf_prune
from hf_prune.trainers.head_gates import HeadGates

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dropout=0.0)
FAMILIES = {"bert": 12, "llama": 6, "bart": 36, "vit": 12, "gpt2": 12}  # number of heads (KV groups)


def examples(name, size=24):
    batch = tiny_batch(name, size=size, padded=True, labels=True)
    return [{key: value[i] for key, value in batch.items()} for i in range(size)]


def arguments(name, folder, cls=None, **options):
    if cls is None:
        cls = hf_prune.Seq2SeqPassTrainingArguments if name in SEQ2SEQ else hf_prune.PassTrainingArguments
        options = {"num_heads": 3, **options}
    defaults = dict(
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return cls(str(folder), **{**defaults, **options})


def make_trainer(name, folder, model=None, callbacks=None, **options):
    cls = hf_prune.Seq2SeqPassTrainer if name in SEQ2SEQ else hf_prune.PassTrainer
    args = arguments(name, folder, **options)
    model = model if model is not None else tiny_model(name)
    return cls(model, args, train_dataset=examples(name), eval_dataset=examples(name, 8), callbacks=callbacks)


def gate_values(trainer):
    values = []

    class Spy(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            values.append(HeadGates(model).phi)

    trainer.add_callback(Spy())
    return values
