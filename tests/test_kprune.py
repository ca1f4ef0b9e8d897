"""K-prune against a plain transcript of its algorithm, its oracles, and every kind of head."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from pruned import fail_at
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import CalibrationError, Calibrator, ConfigError, KPruneConfig, PruningMask
from hf_prune.divergence import Predictions, curvature, divergence
from hf_prune.gates import observe
from hf_prune.least_squares import NormalEquations, ridge_solve
from hf_prune.methods.kprune import _Student
from hf_prune.selection import Selector
from hf_prune.units import base_model, kept_columns, output_matrix, site

RESIDUAL = {"attention.output.dense": "", "output.dense": "intermediate", "attn.c_proj": "", "mlp.c_proj": "ln_2"}


def scored(model, student, open_groups, batches, config):
    """K_pred + λ·K_rep of the units of some groups of the student."""
    prediction = {g.name: torch.zeros(g.size * g.width).double() for g in open_groups}
    energy, tokens, samples = copy.deepcopy(prediction), 0, 0
    for batch in batches:
        masks = {g.name: torch.ones(g.size * g.width, requires_grad=True) for g in open_groups}
        seen, handles = {}, []
        for g in open_groups:

            def multiply(module, args, name=g.name, masks=masks, seen=seen):
                seen[name] = args[0].detach()
                return (args[0] * masks[name],)

            handles.append(site(student, g).register_forward_pre_hook(multiply))
        own = student(**batch).logits
        for handle in handles:
            handle.remove()
        real = batch["attention_mask"].bool()
        if config.kpred == "fisher":
            p = (own / config.gamma).softmax(1).detach()
            for row in range(len(own)):  # Σ_y p_y·(∂ log p_y / ∂m)², example by example
                log_p = (own[row] / config.gamma).log_softmax(0) * config.gamma
                for y in range(own.shape[1]):
                    gradients = torch.autograd.grad(log_p[y], list(masks.values()), retain_graph=True)
                    for name, gradient in zip(masks, gradients, strict=True):
                        prediction[name] += p[row, y] * gradient.double().square() / 2
        else:
            with torch.no_grad():
                dense = model(**batch).logits
            scaled = ((x / config.gamma).log_softmax(1) for x in (own, dense))
            kl = torch.nn.functional.kl_div(*scaled, log_target=True, reduction="batchmean") * config.gamma**2
            for name, gradient in zip(masks, torch.autograd.grad(kl, list(masks.values())), strict=True):
                prediction[name] += gradient.double().square() / 2
        for name, x in seen.items():
            energy[name] += x[real].double().square().sum(0)
        tokens, samples = tokens + int(real.sum()), samples + len(own)
    scores = {}
    for g in open_groups:
        weights = output_matrix(site(student, g)).detach().double().square().mean(1)
        knowledge = prediction[g.name] / samples + config.lam * weights * energy[g.name] / tokens
        scores[g.name] = knowledge
        if g.kind == "heads":
            scores[g.name] = config.mu * knowledge.reshape(g.size, g.width).mean(1)
    return scores


def transcript(model, batches, config):
    """Algorithm 1 with full forward and backward passes of the masked model."""
    units = hf_prune.prunable_units(model)
    calibrator = Calibrator(model, batches)
    n, _ = calibrator.lengths
    selector = Selector(hf_prune.CostTable(model, units, sequence_length=n), config.budget)
    groups = units.of_kind("heads", "neurons")
    student, decided = copy.deepcopy(model), {}
    base, teacher_base = base_model(student), base_model(model)
    for target in groups:
        if config.kpred == "paper" or target.kind == "heads":  # anew for each sub-layer, or for each layer
            scores = scored(model, student, groups[groups.index(target) :], batches, config)
        keep = decided[target.name] = selector.select(scores, decided)[target.name]
        if keep.all():
            continue
        columns = kept_columns(target, keep)
        module = site(student, target)
        equations = NormalEquations(len(columns), output_matrix(module).shape[1], module.weight.device)
        layer = target.name.removesuffix(next(end for end in RESIDUAL if target.name.endswith("." + end)))
        residual = (layer + RESIDUAL[target.name.removeprefix(layer)]).rstrip(".")
        for batch in batches:
            rows = {}
            for key, root in (("teacher", teacher_base), ("student", base)):
                rows[key] = {}
                with (
                    torch.no_grad(),
                    observe(
                        root,
                        {
                            target.name: lambda x, r=rows[key]: r.__setitem__("in", x),
                            residual: lambda x, r=rows[key]: r.__setitem__("res", x),
                        },
                        {target.name: lambda x, r=rows[key]: r.__setitem__("out", x)},
                    ),
                ):
                    root(**batch)
            real = batch["attention_mask"].bool()
            wanted = rows["teacher"]["out"] + rows["teacher"]["res"] - rows["student"]["res"]
            equations.update(rows["student"]["in"][real][:, columns], wanted[real])
        with torch.no_grad():
            matrix = output_matrix(module)
            weight, bias = ridge_solve(equations, matrix[columns], module.bias)
            matrix.zero_()
            matrix[columns] = weight.to(matrix.dtype)
            module.bias.copy_(bias)
    return PruningMask(decided, units), student


@pytest.mark.parametrize("kpred", ["fisher", "paper"])
@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_equals_the_plain_transcript(name, labels, kpred):
    auto = T.AutoModelForSequenceClassification
    model = tiny_model(name, auto, num_labels=labels)
    batches = [tiny_batch(name, size=8, padded=True, seed=seed) for seed in range(4)]
    config = KPruneConfig(budget={"macs": 0.6}, lam=0.01, mu=8.0, kpred=kpred, recover="lstsq_outputs")
    mask, student = transcript(model, batches, config)
    assert hf_prune.prune(model, config, batches).mask == mask
    with torch.no_grad():
        for batch in batches:
            assert torch.allclose(model(**batch).logits, student(**batch).logits, atol=2e-3)


def test_the_divergence_has_no_gradient_while_nothing_is_pruned():
    model, batch = tiny_model("bert"), tiny_batch("bert", size=8, padded=True)
    logits = model(**batch).logits
    student, teacher = Predictions(logits, [1] * 8), Predictions(logits.detach(), [1] * 8)
    (gradient,) = torch.autograd.grad(divergence(student, teacher, 2.0).sum(), logits)
    assert gradient.abs().max() < 1e-6
    with pytest.raises(ConfigError, match="rounding"):
        KPruneConfig(budget={"macs": 0.5}, lam=0, kpred="paper")
    KPruneConfig(budget={"macs": 0.5}, lam=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_curvature_is_the_hessian_of_the_divergence(classes, gamma):
    logits = torch.randn(1, classes, dtype=torch.float64, requires_grad=True)
    teacher = Predictions(logits.detach().clone(), [1])
    hessian = torch.autograd.functional.hessian(
        lambda z: divergence(Predictions(z, [1]), teacher, gamma).sum(), logits.detach()
    ).reshape(classes, classes)
    directions = curvature(Predictions(logits, [1]), gamma, [(0,)])
    rows = torch.stack([torch.autograd.grad(v.sum(), logits, retain_graph=True)[0][0] for v in directions])
    assert torch.allclose(rows.T @ rows, hessian, atol=1e-10)


@pytest.mark.parametrize("numbers", [True, False])
def test_random_curvature_has_the_hessian_for_its_mean(numbers):
    logits = torch.tensor([[0.3, -0.5, 1.0, 0.1]], dtype=torch.float64).expand(40000, 4).clone().requires_grad_()
    teacher = Predictions(logits.detach()[:1].clone(), [1], numbers)
    hessian = torch.autograd.functional.hessian(
        lambda z: divergence(Predictions(z, [1], numbers), teacher, 2.0).sum(), logits.detach()[:1]
    ).reshape(4, 4)
    (direction,) = curvature(Predictions(logits, [40000], numbers), 2.0, [(0,)])
    (rows,) = torch.autograd.grad(direction.sum(), logits)
    assert torch.allclose(rows.T @ rows / len(rows), hessian, atol=0.02 * float(hessian.diagonal().max()))


def test_start_and_end_of_a_span_share_a_direction():
    logits = torch.tensor([[0.3, -0.5, 1.0, 0.1]], dtype=torch.float64).expand(20000, 4).clone().requires_grad_()
    one = Predictions(logits.detach()[:1].clone(), [1])
    hessian = torch.autograd.functional.hessian(
        lambda z: divergence(Predictions(z, [1]), one, 2.0).sum(), logits.detach()[:1]
    ).reshape(4, 4)
    student = object.__new__(_Student)
    student.config, student.calibrator = KPruneConfig(budget={"macs": 0.5}), SimpleNamespace(examples=[range(20000)])
    student._student = lambda index, batch: [Predictions(logits, [1] * 20000)] * 2
    (direction,) = student._curvature(0, {})  # with seed=0
    (rows,) = torch.autograd.grad(direction, logits)
    assert torch.allclose(rows.T @ rows / len(rows), 2 * hessian, atol=0.04 * float(hessian.diagonal().max()))
    student.config.seed = 1
    (other,) = torch.autograd.grad(student._curvature(0, {})[0], logits)
    assert not torch.equal(other, rows)


@pytest.mark.parametrize(
    ("budget", "heads", "neurons"),
    [  # S of the heads (5, 1) and of the neurons (3, 2, .5, 4); what is left of a budget goes to the best that fits
        (12, [1, 1], [1, 1, 1, 1]),
        (11, [1, 1], [1, 1, 0, 1]),
        (9, [1, 0], [1, 1, 1, 1]),
        (7, [1, 0], [1, 1, 0, 1]),
        (6, [1, 0], [1, 0, 0, 1]),
    ],
)
def test_the_threshold_meets_the_budget(budget, heads, neurons):
    model = tiny_model("bert", num_hidden_layers=1, num_attention_heads=2, intermediate_size=4)
    units = hf_prune.prunable_units(model)
    table = hf_prune.CostTable(model, units, sequence_length=9)
    head_name, neuron_name, _ = units
    table.unit[head_name], table.unit[neuron_name] = hf_prune.Costs(macs=4), hf_prune.Costs(macs=1)
    scores = {head_name: 4 * torch.tensor([5.0, 1.0]), neuron_name: torch.tensor([3.0, 2.0, 0.5, 4.0])}
    mask = Selector(table, {"macs": budget}).select(scores)
    assert mask[head_name].tolist() == [bool(x) for x in heads]
    assert mask[neuron_name].tolist() == [bool(x) for x in neurons]


HEADS = {
    "regression": (T.AutoModelForSequenceClassification, {"num_labels": 1}),
    "multi-label": (
        T.AutoModelForSequenceClassification,
        {"num_labels": 4, "problem_type": "multi_label_classification"},
    ),
    "seven classes": (T.AutoModelForSequenceClassification, {"num_labels": 7}),
    "question answering": (T.AutoModelForQuestionAnswering, {}),
    "masked LM": (T.AutoModelForMaskedLM, {}),
    "tokens": (T.AutoModelForTokenClassification, {"num_labels": 5}),
    "no head": (T.AutoModel, {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head(head):
    auto, options = HEADS[head]
    model = tiny_model("bert", auto, **options)
    batches = [tiny_batch("bert", size=8, padded=True, seed=seed) for seed in range(3)]
    state = copy.deepcopy(model.state_dict())
    result = hf_prune.prune(model, KPruneConfig(budget={"macs": 0.6}, mu=8.0), batches)
    assert 0 < result.mask.density("heads") < 1
    small = hf_prune.shrink(model)
    again = tiny_model("bert", auto, **options)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    assert hf_prune.prune(again, KPruneConfig(budget={"macs": 0.6}, mu=8.0), batches).mask == result.mask
    with torch.no_grad():
        assert all(x.isfinite().all() for x in small(**batches[0]).to_tuple())


def test_padding_does_not_change_the_knowledge_of_spans():
    masks = []
    for width in (9, 14):
        model = tiny_model("bert", T.AutoModelForQuestionAnswering)
        batches = [tiny_batch("bert", size=8, padded=True, seed=seed) for seed in range(3)]
        wide = [{k: torch.nn.functional.pad(v, (0, width - 9)) for k, v in batch.items()} for batch in batches]
        masks.append(hf_prune.prune(model, KPruneConfig(budget={"macs": 0.6}), wide).mask)
    assert masks[0] == masks[1]


def test_a_head_that_is_not_understood_is_an_error_and_changes_nothing():
    model = tiny_model("bert", T.AutoModelForPreTraining)
    model.config.num_labels = 2
    batch = tiny_batch("bert", size=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(hf_prune.UnsupportedModelError, match="prediction_logits"):
        hf_prune.prune(model, KPruneConfig(budget={"macs": 0.6}), [batch])
    assert hf_prune.current_mask(model) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_failure_on_the_way_changes_nothing(monkeypatch):
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    layers = list(model.base_model.encoder.layer)
    fail_at(monkeypatch, 3)
    with pytest.raises(CalibrationError, match="encoder.layer.2.output.dense is not finite"):
        hf_prune.prune(model, KPruneConfig(budget={"macs": 0.6}), [tiny_batch("bert", size=8)])
    assert list(model.base_model.encoder.layer) == layers and "forward" not in vars(layers[0])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "option", [{"gamma": 0}, {"lam": -1}, {"mu": float("nan")}, {"kpred": "kl"}, {"seed": 0.5}, {"recover": "full"}]
)
def test_options_out_of_range(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        KPruneConfig(budget={"macs": 0.5}, **option)


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_a_dropped_layer_is_the_teachers_alone(name):
    """Depth first: the mask is that of the shortened model, the refit aims at the model with all its layers."""
    batches = [tiny_batch(name, size=24, padded=True, seed=seed) for seed in range(3)]
    outputs = {}
    with torch.no_grad():
        dense = tiny_model(name)(**batches[0]).logits
        for recover in ("lstsq", "none"):
            model = tiny_model(name)
            config = KPruneConfig(budget={"macs": 0.6}, mu=8.0, drop_layers=1, recover=recover)
            result = hf_prune.prune(model, config, batches)
            assert result.mask.total("layers") - result.mask.kept("layers") == 1
            assert hf_prune.current_mask(model) == result.mask
            masked = model(**batches[0]).logits
            outputs[recover] = hf_prune.shrink(model)(**batches[0]).logits
            assert torch.allclose(outputs[recover], masked, atol=1e-4)
    assert (outputs["lstsq"] - dense).norm() < (outputs["none"] - dense).norm()


def test_refits_of_the_bias_keep_the_mean_output():
    model, batches = tiny_model("bert"), [tiny_batch("bert", size=8, padded=True, seed=seed) for seed in range(3)]
    weights = [p.clone() for name, p in model.named_parameters() if name.endswith("output.dense.weight")]
    hf_prune.prune(model, KPruneConfig(budget={"macs": 0.6}, mu=8.0, recover="bias"), batches)
    after = [p for name, p in model.named_parameters() if name.endswith("output.dense.weight")]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    plain = tiny_model("bert")
    hf_prune.prune(plain, KPruneConfig(budget={"macs": 0.6}, mu=8.0, recover="none"), batches)
    name = "encoder.layer.0.attention.output.dense"
    means = []
    for one in (tiny_model("bert"), model, plain):
        rows = []
        for batch in batches:
            with torch.no_grad(), observe(one.base_model, {}, {name: rows.append}):
                one(**batch)
            rows[-1] = rows[-1][batch["attention_mask"].bool()]
        means.append(torch.cat(rows).mean(0))
    assert torch.allclose(means[0], means[1], atol=1e-5) and not torch.allclose(means[0], means[2], atol=1e-3)


def test_labels_that_come_along_change_nothing():
    """With labels the first output of a model is its loss, which is of no example."""
    batch = {
        name: value for name, value in tiny_batch("bert", size=24, labels=True).items() if name != "attention_mask"
    }
    masks = []
    for labels in (False, True):
        model = tiny_model("bert")
        calibrator = Calibrator(model, [batch], labels=labels)
        config = KPruneConfig(budget={"macs": 0.6}, recover="none")
        masks.append(hf_prune.prune(model, config, calibrator).mask)
    assert masks[0] == masks[1]
