"""The least-squares solves against closed forms, and reconstruction on models."""

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model

import hf_prune
from hf_prune import Calibrator
from hf_prune.calibration import select_real
from hf_prune.gates import observe, record_calls, resume_at
from hf_prune.layer_walk import _readers, walks
from hf_prune.least_squares import NormalEquations, ridge_solve, scale_solve
from hf_prune.reconstruction import reconstruct


def equations(features, targets):
    sums = NormalEquations(features.shape[1], targets.shape[1], features.device)
    for x, y in zip(features.split(3), targets.split(3), strict=True):
        sums.update(x, y)
    return sums


def test_one_of_two_neurons_left():
    features, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0], [1.0]])
    target = features @ weight
    new, bias = ridge_solve(equations(features[:, :1], target), weight[:1], None, ridge=1e-12)
    assert bias is None and new.item() == pytest.approx(2.5, abs=1e-6)
    assert (features[:, :1].double() @ new - target).square().sum().item() == pytest.approx(1.5, abs=1e-6)


def test_a_duplicate_inherits_the_weight():
    features = torch.randn(50, 6)
    features[:, 5] = features[:, 2]
    weight = torch.randn(6, 4)
    new, _ = ridge_solve(equations(features[:, :5], features @ weight), weight[:5], None, ridge=1e-10)
    assert torch.allclose(new[2], (weight[2] + weight[5]).double(), atol=1e-4)
    assert (features[:, :5].double() @ new - features @ weight).abs().max() < 1e-4


def test_the_residual_is_orthogonal_to_the_features():
    features, targets = torch.randn(60, 8), torch.randn(60, 5)
    new, bias = ridge_solve(equations(features, targets), torch.randn(8, 5), torch.randn(5), ridge=1e-12)
    residual = features.double() @ new + bias - targets
    assert (features.double().T @ residual).abs().max() < 1e-4 and residual.sum(0).abs().max() < 1e-4


def test_the_old_weight_counts_as_tokens_do():
    """A ridge of 2 is two tokens for each input, as large as those of the data, that the old weight fits."""
    features, targets, old = torch.randn(60, 8), torch.randn(60, 5), torch.randn(8, 5)
    size = features.square().mean().sqrt()
    tokens = size * (2 * 8) ** 0.5 * torch.eye(8)  # their Gram matrix is that of 16 independent tokens of this size
    both, wanted = torch.cat([features, tokens]), torch.cat([targets, tokens @ old])
    new, _ = ridge_solve(equations(features, targets), old, None, ridge=2.0)
    assert torch.allclose(new, torch.linalg.lstsq(both.double(), wanted.double()).solution, atol=1e-5)


@pytest.mark.parametrize("bias", [None, torch.randn(5)])
def test_nothing_changes_where_the_old_weight_fits(bias):
    features, weight = torch.randn(20, 8) @ torch.randn(8, 8), torch.randn(8, 5)
    targets = features @ weight + (0 if bias is None else bias)
    new, again = ridge_solve(equations(features, targets), weight, bias)
    assert torch.allclose(new, weight.double(), atol=1e-3)
    assert bias is None or torch.allclose(again, bias.double(), atol=1e-3)


@pytest.mark.parametrize("features", [torch.zeros(9, 4), torch.ones(9, 4), torch.ones(9, 1).expand(9, 4) * 3e-8])
def test_degenerate_features_keep_finite_weights(features):
    weight, targets = torch.randn(4, 3), torch.randn(9, 3)
    new, bias = ridge_solve(equations(features, targets), weight, torch.zeros(3))
    assert new.isfinite().all() and torch.allclose(
        features.double() @ new + bias, targets.double().mean(0).expand(9, 3)
    )


def test_scale_is_the_damped_solution_of_the_normal_equations():
    features, weight, target = torch.randn(40, 6), torch.randn(6, 4), torch.randn(40, 4)
    outputs = torch.stack([torch.outer(features[:, u], weight[u]).flatten() for u in range(6)], 1).double()
    gram = outputs.T @ outputs
    right = outputs.T @ target.double().flatten() - gram.sum(1)
    factor = 1 + torch.linalg.solve(gram @ gram + torch.eye(6), gram @ right)
    assert torch.allclose(scale_solve(equations(features, target), weight, 1), weight * factor[:, None], atol=1e-5)


def test_scale_joins_the_columns_of_a_head():
    features, weight = torch.randn(40, 6), torch.randn(6, 4)
    target = torch.cat([features[:, :3] * 2, features[:, 3:] * -1], 1) @ weight
    assert torch.allclose(
        scale_solve(equations(features, target), weight, 3),
        torch.cat([weight[:3] * 2, -weight[3:]]).double(),
        atol=1e-3,
    )


def without_the_second(model):
    """A mask that prunes the second unit of every group of heads and neurons."""
    units = hf_prune.prunable_units(model)
    groups = [group for group in units.of_kind("heads", "neurons") if group.prunable]
    return units, hf_prune.PruningMask({group.name: torch.arange(group.size) != 1 for group in groups}, units)


@pytest.mark.parametrize("name", FAMILIES)
def test_reconstruction_beats_the_bare_mask_for_heads_and_neurons(name):
    model = tiny_model(name)
    data = [tiny_batch(name, size=32, padded=True, seed=seed) for seed in range(2)]
    units, mask = without_the_second(model)
    with torch.no_grad():
        dense = model(**data[0]).logits
        bare = copy.deepcopy(model)
        hf_prune.apply_mask(bare, mask)
        before = (bare(**data[0]).logits - dense).square().mean()
        reconstruct(model, units, mask, hf_prune.Calibrator(model, data))
        hf_prune.apply_mask(model, mask)
        after = (model(**data[0]).logits - dense).square().mean()
    assert after < before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "whisper", "t5"])
def test_an_empty_mask_changes_nothing(name):
    model = tiny_model(name)
    state = copy.deepcopy(model.state_dict())
    units = hf_prune.prunable_units(model)
    reconstruct(model, units, hf_prune.PruningMask({}, units), hf_prune.Calibrator(model, [tiny_batch(name)]))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_target_is_the_teacher_with_its_residual_stream():
    """Layer by layer, the pruned model comes as close to the dense one as least squares allows."""
    model, data = tiny_model("bert"), [tiny_batch("bert", size=64, padded=True)]
    units = hf_prune.prunable_units(model)
    name = "encoder.layer.1.output.dense"
    mask = hf_prune.PruningMask({name: torch.arange(64) < 40}, units)
    site, seen = model.bert.encoder.layer[1].output.dense, {}
    handle = site.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(**data[0])
    handle.remove()
    real = data[0]["attention_mask"].bool()
    x = seen["x"][real]
    x, target = x.double(), site(x).double().detach()
    ones = torch.cat([x[:, :40], torch.ones(len(x), 1)], 1)
    best = (ones @ torch.linalg.lstsq(ones, target).solution - target).square().sum()
    reconstruct(model, units, mask, hf_prune.Calibrator(model, data), ridge=1e-9)
    reached = (x[:, :40] @ site.weight.double()[:, :40].T + site.bias.double() - target).square().sum()
    assert reached.item() == pytest.approx(best.item(), rel=1e-3)


@pytest.mark.parametrize("recover", ["lstsq", "bias", "scale"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("name", ["bert", "deberta-v2", "gpt2", "whisper"])
def test_the_bias_stands_for_a_block_that_lost_all_its_units(name, kind, recover):
    model, data = tiny_model(name), [tiny_batch(name, size=40)]
    units = hf_prune.prunable_units(model)
    group = next(g for g in units.of_kind(kind) if g.layer == 0)
    site, seen = model.base_model.get_submodule(group.name), {}
    with torch.no_grad(), observe(model.base_model, {}, {group.name: lambda x: seen.update(output=x)}):
        model(**data[0])
    expected = seen["output"].flatten(0, -2).mean(0) if recover != "scale" else site.bias.detach().clone()
    mask = hf_prune.PruningMask({group.name: torch.zeros(group.size, dtype=torch.bool)}, units)
    reconstruct(model, units, mask, Calibrator(model, data), recover=recover)
    assert torch.allclose(site.bias, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "vit", "gpt_neox", "gpt_neox/serial"])
def test_the_last_block_of_a_layer_makes_up_for_all_that_was_pruned_before_it(name):
    """Also where attention and feed-forward read the same stream, and are added to it together."""
    model, data = tiny_model(name), [tiny_batch(name, size=40, seed=1)]
    dense, base = copy.deepcopy(model).base_model, model.base_model
    units = hf_prune.prunable_units(model)
    groups = units.of_layer(next(iter(units.stacks)), 0)
    layer, site = groups[0].name.partition(".0.")[0] + ".0", groups[-1].name
    mask = hf_prune.PruningMask({g.name: torch.arange(g.size) >= g.size // 2 for g in groups}, units)
    reconstruct(model, units, mask, Calibrator(model, data), ridge=1e-9)
    hf_prune.apply_mask(model, mask)
    seen = {}
    with torch.no_grad():
        with observe(dense, {}, {layer: lambda x: seen.update(dense=x)}):
            dense(**data[0])
        ends = {site: lambda x: seen.update(out=x), layer: lambda x: seen.update(end=x)}
        with observe(base, {site: lambda x: seen.update(x=x)}, ends):
            base(**data[0])
    features, out, end, dense_end = (seen[key].flatten(0, -2).double() for key in ("x", "out", "end", "dense"))
    features = features[:, mask[site]]
    if base.get_submodule(site).bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
    target = dense_end - (end - out)
    best = (features @ torch.linalg.lstsq(features, target).solution - target).square().sum()
    assert (end - dense_end).square().sum().item() == pytest.approx(best.item(), rel=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_tokens_than_units_are_fitted_and_the_old_weights_hold_the_rest(name):
    """On the tokens that it was fitted to the model comes closer to the dense one, on others it does not go astray."""
    model, data, others = tiny_model(name), tiny_batch(name, size=2), tiny_batch(name, size=32, seed=1)
    units, mask = without_the_second(model)
    with torch.no_grad():
        dense = [model(**batch).logits for batch in (data, others)]
        bare = copy.deepcopy(model)
        hf_prune.apply_mask(bare, mask)
        reconstruct(model, units, mask, hf_prune.Calibrator(model, [data]))
        hf_prune.apply_mask(model, mask)
        gaps = [
            [(m(**batch).logits - logits).square().mean().item() for m in (bare, model)]
            for batch, logits in zip((data, others), dense, strict=True)
        ]
    assert gaps[0][1] < gaps[0][0] and gaps[1][1] < 2 * gaps[1][0], gaps


def test_products_that_overflow_name_the_layer_and_change_nothing():
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight.mul_(1e20)
        layer.output.dense.weight.mul_(1e-20)
    state = copy.deepcopy(model.state_dict())
    units, mask = without_the_second(model)
    calibrator = hf_prune.Calibrator(model, [tiny_batch("bert")])
    with pytest.raises(hf_prune.CalibrationError, match="inputs of encoder.layer.1.output.dense are NaN or infinite"):
        reconstruct(model, units, mask, calibrator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    reconstruct(model, units, mask, calibrator, dtype=torch.float64)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_same_example_again_and_again_is_solved(seed):
    model = tiny_model("bert", seed=seed)
    hf_prune.prune(model, hf_prune.KCMConfig(budget={"macs": 0.9}), [{"input_ids": [2, 1, 1, 3]}] * 90)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_walking_layer_by_layer_is_the_forward_pass(name):
    model = tiny_model(name)
    calibrator = Calibrator(model, [tiny_batch(name, padded=True, seed=seed) for seed in range(2)])
    calls = calibrator.collect({}, record=True)
    with calibrator.evaluating():
        for walk in walks(calibrator, calibrator.units, calls):
            for layer in walk.layers:
                walk.enter([])
                walk.leave(copy.deepcopy(layer))
            for call, teacher, student in zip(calls, walk.teacher, walk.student, strict=True):
                assert torch.allclose(teacher, call[walk.stack].end, atol=1e-5)
                assert torch.allclose(student, call[walk.stack].end, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_at_a_layer_is_the_forward_pass(name):
    model, batch = tiny_model(name), tiny_batch(name, padded=True)
    base = model.base_model
    with torch.no_grad():
        stacks = list(hf_prune.prunable_units(model).stacks)
        with record_calls(base, stacks) as calls:
            dense = model(**batch).logits
        for stack in stacks:
            seen = []
            with observe(base, {f"{stack}.1": seen.append}):
                model(**batch)
            for start in ((0, calls[stack].hidden), (1, seen[0]), (len(calls[stack].rest), calls[stack].end)):
                with resume_at(base, calls, {stack: start}):
                    assert torch.allclose(model(**batch).logits, dense, atol=1e-5)
        assert "forward" not in vars(base.get_submodule(stacks[0])[0])


def test_float64_products_are_those_of_the_features():
    generator = torch.Generator().manual_seed(0)
    features = 1 + 1e-4 * torch.randn(300, 6, generator=generator, dtype=torch.float64)  # nearly collinear
    errors = {}
    for dtype in (torch.float32, torch.float64):
        sums = NormalEquations(6, 1, features.device, dtype)
        sums.update(features, features[:, :1])
        errors[dtype] = (sums.gram - features.T @ features).abs().max()
    assert errors[torch.float64] == 0 < errors[torch.float32]
    outputs = []
    batch = tiny_batch("bert", size=24, padded=True)
    for precision in ("float32", "float64"):
        model = tiny_model("bert")
        hf_prune.prune(model, hf_prune.KCMConfig(budget={"macs": 0.7}, precision=precision), [batch])
        outputs.append(model(**batch).logits)
    assert torch.allclose(*outputs, atol=1e-2) and not torch.equal(*outputs)
    with pytest.raises(hf_prune.ConfigError, match="precision"):
        hf_prune.KCMConfig(budget={"macs": 0.7}, precision="float16")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_block_reads_with_is_fitted_to_what_it_computes_in_the_dense_model(name):
    """No other weights would bring them closer, given what they read now."""
    model, data = tiny_model(name), [tiny_batch(name, size=60, padded=True)]
    calibrator = Calibrator(model, data)
    base, dense = model.base_model, copy.deepcopy(model).base_model
    units, mask = without_the_second(model)
    reconstruct(model, units, mask, calibrator, ridge=1e-7)
    hf_prune.apply_mask(model, mask)
    checked = 0
    for group in units.of_kind("heads", "neurons"):
        if not group.prunable:
            continue
        prefix, layer = f"{group.stack}.{group.layer}.", base.get_submodule(group.stack)[group.layer]
        for projections, encoder in _readers(layer, group):
            real = calibrator.real_tokens(data[0], next(iter(units.stacks)) if encoder else group.stack)
            for site in (prefix + path for path in projections):
                seen = {}
                with torch.no_grad():
                    with observe(dense, {}, {site: lambda y, seen=seen: seen.update(dense=y)}):
                        dense(**data[0])
                    inputs = {site: lambda x, seen=seen: seen.update(x=x)}
                    with observe(base, inputs, {site: lambda y, seen=seen: seen.update(y=y)}):
                        base(**data[0])
                x, y, target = (select_real(seen[key], real, site).double() for key in ("x", "y", "dense"))
                if base.get_submodule(site).bias is not None:
                    x = torch.cat([x, torch.ones(len(x), 1)], 1)
                best = (x @ torch.linalg.lstsq(x, target).solution - target).square().sum()
                assert (y - target).square().sum() <= best * 1.01 + 1e-6 * target.square().sum(), site
                checked += 1
    assert checked >= 4
