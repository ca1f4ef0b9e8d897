"""Calibration data in every form, what is left out of the statistics, and what stops a run."""

import copy

import pytest
import torch
from tiny import VOCAB, tiny_batch, tiny_model
from torch.utils.data import DataLoader

import hf_prune
from hf_prune import CalibrationError, Calibrator, ConfigError, KCMConfig
from hf_prune.statistics import Moments

SITE = "encoder.layer.1.output.dense"


class Words:
    """A tokenizer of whole words, with the calls that a Calibrator makes of one."""

    pad_token_id = 0
    model_max_length = 1000

    def __call__(self, text, truncation=False, max_length=None):
        ids = [3 + hash(word) % 90 for word in text.split()]
        ids = ids[:max_length] if truncation else ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


class Unknown(Words):
    """What AutoTokenizer makes of a folder without tokenizer files."""

    all_special_ids = (1, 2)

    def __call__(self, text, truncation=False, max_length=None):
        return {"input_ids": [2] + [1] * len(text.split()), "attention_mask": [1] * (1 + len(text.split()))}


def moments_of(calibrator, name=SITE):
    columns = calibrator.units[name].size * calibrator.units[name].width
    statistic = Moments(columns, torch.device("cpu"))
    calibrator.collect({name: statistic})
    return statistic


def inputs_of(model, batch, name=SITE):
    seen = []
    handle = model.base_model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].double()


def test_moments_are_those_of_real_tokens():
    model, batch = tiny_model("bert"), tiny_batch("bert", padded=True)
    x = inputs_of(model, batch)[batch["attention_mask"].bool()]
    statistic = moments_of(Calibrator(model, [batch]))
    assert statistic.count == len(x) == batch["attention_mask"].sum()
    for ours, theirs in (
        (statistic.mean, x.mean(0)),
        (statistic.mean_absolute, x.abs().mean(0)),
        (statistic.rms, x.square().mean(0).sqrt()),
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_every_form_of_the_data_gives_the_same_statistics():
    from datasets import Dataset

    model = tiny_model("bert")
    texts = ["one two three four", "five six", "seven eight nine ten eleven", "twelve", "one five nine"] * 3
    tokenised = [Words()(text) for text in texts]
    tensors = [{key: torch.tensor(value) for key, value in item.items()} for item in tokenised]
    padded = [{key: torch.nn.functional.pad(v, (0, 7 - len(v))) for key, v in item.items()} for item in tensors]
    loader = DataLoader(padded, batch_size=4)
    forms = [
        (texts, {"processing_class": Words()}),
        ([{"text": text, "label": 1} for text in texts], {"processing_class": Words()}),
        (
            Dataset.from_dict({"a": texts, "b": texts, "label": [0] * 15}),
            {"processing_class": Words(), "text_column": "b"},
        ),
        (tokenised, {}),
        (tensors, {"batch_size": 2}),
        ([{**item, "text": "is ignored", "labels": 1} for item in tokenised], {}),
        (Dataset.from_list(tokenised), {"batch_size": 1}),
        (loader, {}),
        ((batch for batch in loader), {}),
        (list(loader), {}),
    ]
    calibrators = [Calibrator(model, data, **options) for data, options in forms]
    first = moments_of(calibrators[0])
    for calibrator in calibrators:
        assert (calibrator.samples, calibrator.tokens, len(calibrator)) == (15, 45, 15)
        assert calibrator.lengths == (3.0, None)
        again = moments_of(calibrator)
        assert again.count == 45 and torch.allclose(again.square, first.square, rtol=1e-5)
    assert len({calibrator.fingerprint for calibrator in calibrators[:2]}) == 1
    assert calibrators[0].fingerprint != Calibrator(model, texts[:-1], processing_class=Words()).fingerprint


@pytest.mark.parametrize("samples", [1, 4, 5])
def test_max_samples_reads_no_more(samples):
    model = tiny_model("bert")
    rows = [{"input_ids": [5, 6, 7]} for _ in range(5)]
    assert Calibrator(model, rows, max_samples=samples).samples == samples
    loader = DataLoader([{"input_ids": torch.full((3,), 7)} for _ in range(5)], batch_size=2)
    assert Calibrator(model, loader, max_samples=samples).samples == samples
    endless = ({"input_ids": torch.full((2, 3), 7)} for _ in iter(int, 1))
    assert Calibrator(model, endless, max_samples=samples).samples == samples


def test_text_is_cut_to_what_the_model_takes():
    model = tiny_model("bert")
    assert Calibrator(model, ["word " * 500], processing_class=Words()).tokens == 64
    assert Calibrator(model, ["word " * 500], processing_class=Words(), max_length=10).tokens == 10


def test_decoders_of_encoder_decoders_leave_out_their_own_padding():
    model = tiny_model("bart")
    batch = tiny_batch("bart", size=2, padded=True)
    name = "decoder.layers.0.fc2"
    labels = torch.tensor([[5, 6, 7, 8, 2], [5, 2, -100, -100, -100]])
    given = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    calibrator = Calibrator(model, [{**given, "labels": labels}])
    assert moments_of(calibrator, name).count == 7 and moments_of(calibrator, "encoder.layers.0.fc2").count == 16
    assert calibrator.lengths == (8.0, 3.5)
    shifted = torch.tensor([[2, 5, 6, 7, 8], [2, 5, 0, 0, 0]])
    same = [{**given, "decoder_input_ids": shifted}]
    masked = [{**given, "decoder_input_ids": shifted, "decoder_attention_mask": (labels != -100).long()}]
    assert moments_of(Calibrator(model, same), name).count == 7
    assert moments_of(Calibrator(model, masked), name).count == 7


def test_mode_and_gradients_are_left_alone():
    model = tiny_model("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    first, second = (moments_of(Calibrator(model, [tiny_batch("bert")])) for _ in range(2))
    assert torch.equal(first.square, second.square)  # dropout is off
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_calibrator_is_reused_for_its_model_only():
    model = tiny_model("bert")
    calibrator = Calibrator(model, [tiny_batch("bert", size=16)])
    first = hf_prune.prune(model, KCMConfig(budget={"macs": 0.8}, recover="none"), calibrator).mask
    hf_prune.remove_mask(model)
    assert hf_prune.prune(model, KCMConfig(budget={"macs": 0.8}, recover="none"), calibrator).mask == first
    with pytest.raises(CalibrationError, match="made for another model"):
        hf_prune.prune(tiny_model("bert"), KCMConfig(budget={"macs": 0.8}), calibrator)


BAD = {
    "none": (None, {}, "needs calibration data"),
    "empty list": ([], {}, "empty"),
    "empty generator": (iter(()), {}, "empty"),
    "one text": ("a text", {}, "are one str"),
    "one batch": (tiny_batch("bert"), {}, "are one dict"),
    "text alone": (["a text"], {}, "pass processing_class=tokenizer"),
    "numbers": ([1, 2], {}, "must be a string or a dict"),
    "tuples": ((b for b in [(1, 2)]), {}, "batch must be a dict of tensors"),
    "two texts": ([{"a": "x", "b": "y"}], {"processing_class": Words()}, "name one with text_column="),
    "wrong column": ([{"a": "x"}], {"processing_class": Words(), "text_column": "b"}, "text_column 'b' is not in"),
    "no text column": ([{"a": "x", "b": 1}], {"processing_class": Words(), "text_column": "b"}, "got int: 1"),
    "an empty cell": ([{"a": "x"}, {"a": None}], {"processing_class": Words()}, "got NoneType"),
    "unknown words": (["x y", "z"], {"processing_class": Unknown()}, "knows none of the words"),
    "other inputs": ([{"pixel_values": [1.0]}], {}, "needs 'input_ids', the calibration data have"),
    "all padding": (
        [{"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}],
        {},
        "nothing but padding",
    ),
    "no text": ([""], {"processing_class": Words()}, "nothing but padding"),
    "some keys": (
        [{"input_ids": [3, 4]}, {"input_ids": [3], "token_type_ids": [0]}],
        {},
        "have 'token_type_ids'|and some have not",
    ),
    "some masks": (
        [{"input_ids": [3, 4, 5]}, {"input_ids": [3, 0, 0], "attention_mask": [1, 0, 0]}],
        {},
        "Some examples have 'attention_mask'",
    ),
    "other tokenizer": ([{"input_ids": [3, VOCAB]}], {}, f"to {VOCAB}, the vocabulary of the model has {VOCAB}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_stop_before_anything_changes(case):
    data, options, message = BAD[case]
    model = tiny_model("bert")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises((CalibrationError, ConfigError), match=message):
        hf_prune.prune(model, KCMConfig(budget={"macs": 0.8}), data, **options)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert hf_prune.current_mask(model) is None


@pytest.mark.parametrize("option", ["max_samples", "batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_options_are_whole_numbers(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be a whole number of at least 1"):
        Calibrator(tiny_model("bert"), [tiny_batch("bert")], **{option: value})


def test_an_encoder_decoder_needs_something_to_decode():
    batch = {key: value for key, value in tiny_batch("t5").items() if key != "decoder_input_ids"}
    with pytest.raises(CalibrationError, match="needs 'labels' or 'decoder_input_ids'"):
        Calibrator(tiny_model("t5"), [batch])


def test_nan_activations_name_the_layer():
    model = tiny_model("bert")
    model.bert.encoder.layer[1].intermediate.dense.weight.data *= 1e38  # finite, but their products are not
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="inputs of encoder.layer.1.output.dense are NaN or infinite"):
        hf_prune.prune(model, KCMConfig(budget={"macs": 0.8}), [tiny_batch("bert", size=16)])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "whisper", "vit"])
def test_parts_hold_the_same_examples_in_order(name):
    model = tiny_model(name)
    batches = [tiny_batch(name, size=size, padded=True, seed=size) for size in (5, 1, 8)]
    whole = Calibrator(model, batches)
    for start in (whole, whole.split(3)[0]):
        for tokens in (1, 20, 10**6):
            parts = start.in_parts(tokens)
            assert len(parts) == len(start)
            for key in batches[0]:
                rows = [torch.cat([batch[key] for _, batch in one.batches("")]) for one in (start, parts)]
                assert torch.equal(*rows)
            numbers = [[n for i, _ in one.batches("") for n in one.examples[i]] for one in (start, parts)]
            assert numbers[0] == numbers[1]
            sizes = [len(next(iter(batch.values()))) for _, batch in parts.batches("")]
            assert max(sizes) == 1 if tokens == 1 else True
            assert tokens < 10**6 or sizes == [len(next(iter(b.values()))) for _, b in start.batches("")]
