"""The Pareto front: what is on it, how large it is, and its points as models."""

import copy
import json

import optuna
import pytest
import torch
from hypothesis import given, strategies as st
from tiny import FAMILIES, tiny_batch, tiny_model
from transformers import AutoModelForSequenceClassification

import hf_prune
from hf_prune import ParetoFront, SubNetwork
from hf_prune.search.front import FRONT_FILE, hypervolume, pareto_optimal


def dominated(point, points):
    return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)


COORDINATES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


class TestMathematics:
    def test_oracles(self):
        points = [(0, 1), (1, 0), (0, 1), (0.5, 0.5), (1, 1)]
        # (0.5, 0.5) is on the front as well; of the two equal points the first counts.
        assert pareto_optimal(points) == [True, True, False, True, False]
        assert pareto_optimal([]) == []
        for points, volume in [
            ([(0, 0)], 4),
            ([(0, 1), (1, 0)], 3),
            ([(1, 1)], 1),
            ([(0.5, 0.5), (0.2, 0.9)], 2.58),
            ([], 0),
            ([(2, 0), (0, 2), (3, -1)], 0),
        ]:
            assert hypervolume(points) == pytest.approx(volume)

    @given(COORDINATES)
    def test_the_front_is_what_nothing_dominates(self, points):
        optimal = pareto_optimal(points)
        for index, point in enumerate(points):
            assert optimal[index] == (not dominated(point, points) and point not in points[:index])

    @given(COORDINATES)
    def test_hypervolume_counts_the_cells_that_are_dominated(self, points):
        cells = sum(any(p[0] <= x and p[1] <= y for p in points) for x in range(6) for y in range(6))
        assert hypervolume(points, (6, 6)) == cells

    @given(COORDINATES)
    def test_hypervolume_is_that_of_the_front(self, points):
        front = [point for point, best in zip(points, pareto_optimal(points), strict=True) if best]
        assert hypervolume(front, (6, 6)) == hypervolume(points, (6, 6))


def make_front(model, errors, members=None, **options):
    """A front of the sub-networks of `small` with some heads and neurons."""
    space = hf_prune.search_space("small", model)
    table = hf_prune.CostTable(model, sequence_length=16)
    members = members or [{"num_layers": 1 + i % 3, "num_heads": 1 + i, "num_units": 16 * (1 + i)} for i in range(4)]
    points = [
        SubNetwork(member, error, table.of(mask).to_dict(), mask)
        for member, error in zip(members, errors, strict=True)
        for mask in [space.mask(member)]
    ]
    return ParetoFront(points, table.of().to_dict(), lengths=table.lengths, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("bert")


@pytest.fixture
def front(model):
    return make_front(model, [0.5, 0.3, 0.1, 0.2], facts={"metric": "accuracy"})


class TestFront:
    def test_points(self, front):
        # The third sub-network is the largest and the best, the fourth has fewer parameters and beats the second.
        assert [point.error for point in front.evaluated] == [0.5, 0.2, 0.3, 0.1]
        assert [point.error for point in front] == [0.5, 0.2, 0.1] and front[-1].member["num_heads"] == 3
        costs = [point.costs["params"] for point in front]
        assert costs == sorted(costs) and [p.error for p in front[:2]] == [0.5, 0.2]

    def test_another_cost(self, model):
        front = make_front(model, [0.5, 0.3, 0.1, 0.2], cost="macs")
        assert [p.costs["macs"] for p in front] == sorted(p.costs["macs"] for p in front)

    def test_hypervolume(self, front):
        ratios = [(p.costs["params"] / front.dense["params"], p.error) for p in front.evaluated]
        assert front.hypervolume() == pytest.approx(hypervolume(ratios))
        assert front.hypervolume((2.0, 0.1)) == 0 < front.hypervolume((2.0, 0.5)) < front.hypervolume()

    def test_table(self, front):
        text = str(front)
        assert text.startswith("3 of 4 evaluated sub-networks are on the front of error and params, hypervolume ")
        head, _, *rows = front.table().splitlines()
        assert head == "| # | macs | params | memory | heads | neurons | layers | error |"
        assert len(rows) == 3
        assert rows[0].endswith("| 1 | 16 | 1 | 0.5000 |") and rows[2].endswith("| 9 | 144 | 3 | 0.1000 |")
        share = front[0].costs["params"] / front.dense["params"]
        assert f"| {share:.1%} |" in rows[0]

    def test_select(self, front):
        ratio = front[1].costs["params"] / front.dense["params"]
        assert front.select({"params": 1.0}) == 2
        assert front.select({"params": ratio}) == 1 == front.select({"params": int(front[1].costs["params"])})
        assert front.select({"params": 1.0, "macs": front[1].costs["macs"] / front.dense["macs"]}) == 1

    @pytest.mark.parametrize("budget", [{}, {"params": 0}, {"speed": 0.5}, {"params": 1e12}, {"latency": 0.5}])
    def test_malformed_budgets(self, front, budget):
        with pytest.raises(hf_prune.ConfigError):
            front.select(budget)

    def test_budgets_below_the_front(self, front):
        with pytest.raises(hf_prune.InfeasibleBudgetError, match="the cheapest ones are at") as error:
            front.select({"params": 0.01})
        least = json.loads(str(error.value).partition("at {")[2].partition("}")[0].partition(": ")[2])
        assert front.select({"params": least}) == 0  # what it says is feasible

    def test_plot(self, front, tmp_path):
        figure = front.plot(tmp_path / "front.png", {"K-prune": (0.5, 0.25)})
        assert (tmp_path / "front.png").stat().st_size > 5000
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["evaluated", "front", "K-prune"]  # the whole model was not evaluated
        (axes,) = figure.axes
        ratios = [p.costs["params"] / front.dense["params"] for p in front]
        assert axes.lines[0].get_xydata().tolist() == [[x, p.error] for x, p in zip(ratios, front, strict=True)]

    def test_the_dense_model_is_marked(self, model, tmp_path):
        space = hf_prune.search_space("small", model)
        front = make_front(model, [0.5, 0.1], [space.smallest, space.largest])
        figure = front.plot(tmp_path / "front.svg")
        assert figure.axes[0].lines[-1].get_xydata().tolist() == [[1.0, 0.1]]
        assert figure.legends[0].get_texts()[-1].get_text() == "dense"


class TestFiles:
    def test_round_trip(self, front, tmp_path):
        front.save(tmp_path / "new")
        loaded = ParetoFront.load(tmp_path / "new")
        assert list(loaded) == list(front)
        assert [(p.member, p.error, p.costs) for p in loaded.evaluated] == [
            (p.member, p.error, p.costs) for p in front.evaluated
        ]
        assert loaded.evaluated[2].mask is None  # files hold the masks of the front
        assert str(loaded) == str(front) and loaded.facts == front.facts and loaded.cost == front.cost
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again" / FRONT_FILE).read_text() == (tmp_path / "new" / FRONT_FILE).read_text()

    def test_nothing_else_is_left(self, front, tmp_path):
        front.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [FRONT_FILE]

    @pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"version": 2}', '{"version": 1, "points": 3}'])
    def test_malformed(self, tmp_path, text):
        if text is not None:
            (tmp_path / FRONT_FILE).write_text(text)
        with pytest.raises(hf_prune.PruningError):
            ParetoFront.load(tmp_path)

    def test_a_folder_that_cannot_be_written(self, front, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(hf_prune.SaveError):
            front.save(tmp_path / "file")


class TestModels:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("name", ["small", "large"])
    def test_extracted_logits_equal_those_of_the_sub_network(self, family, name):
        model = tiny_model(family)
        before = copy.deepcopy(model.state_dict())
        space = hf_prune.search_space(name, model)
        member = space.sample(torch.Generator().manual_seed(3))
        mask = space.mask(member)
        front = ParetoFront([SubNetwork(member, 0.5, {"params": 1.0}, mask)], {"params": 2.0})
        small = front.extract(0, model)
        batch = tiny_batch(family, padded=True)
        with torch.no_grad():
            ours, subnetwork = small(**batch).logits, hf_prune.subnetwork(model, mask)(**batch).logits
            hf_prune.apply_mask(model, mask)
            masked = model(**batch).logits
            hf_prune.remove_mask(model)
        assert torch.allclose(ours, subnetwork, rtol=1e-6, atol=1e-6)
        assert torch.allclose(ours, masked, rtol=1e-4, atol=1e-5)
        for key, value in model.state_dict().items():  # the super-network is as it was
            assert torch.equal(value, before[key]), key

    def test_bit_equal_to_the_sub_network(self, front, model):
        batch = tiny_batch("bert", padded=True)
        with torch.no_grad():
            for index, point in enumerate(front):
                ours = front.extract(index, model)(**batch).logits
                assert torch.equal(ours, hf_prune.subnetwork(model, point.mask)(**batch).logits)

    def test_extracted_models_are_independent_and_train(self, front, model):
        small = front.extract(0, model)
        assert small.num_parameters() == front[0].costs["params"]
        before = copy.deepcopy(model.state_dict())
        small.train()(**tiny_batch("bert", labels=True)).loss.backward()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_another_model(self, front):
        with pytest.raises(hf_prune.MaskError):
            front.extract(0, tiny_model("distilbert"))

    def test_save_models(self, front, model, tmp_path):
        folders = front.save_models(tmp_path / "front", model)
        assert [folder.name for folder in folders] == ["00", "01", "02"]
        batch = tiny_batch("bert")
        for index, folder in enumerate(folders):
            loaded = AutoModelForSequenceClassification.from_pretrained(folder)
            with torch.no_grad():
                assert torch.equal(loaded(**batch).logits, front.extract(index, model)(**batch).logits)
            report = hf_prune.PruningReport.load(folder)
            assert report.packages["optuna"] == optuna.__version__
            assert report.method == "nas" and report.config["metric"] == "accuracy"
            assert report.after == front[index].costs and report.facts["error"] == front[index].error
            assert hf_prune.PruningMask.load(folder) == front[index].mask
        assert list(ParetoFront.load(tmp_path / "front")) == list(front)
        # A smaller one takes its place.
        (tmp_path / "front" / "02" / "pruning_report.json").unlink()  # somebody else's folder
        smaller = make_front(model, [0.5], [front[0].member], facts={"metric": "accuracy"})
        assert smaller.save_models(tmp_path / "front", model) == folders[:1]
        assert sorted(path.name for path in (tmp_path / "front").iterdir()) == ["00", "02", FRONT_FILE]

    def test_cards_tell_the_quality(self, model, tmp_path):
        space = hf_prune.search_space("small", model)
        front = hf_prune.search_subnetworks(model, space, [tiny_batch("bert", 8, labels=True)], num_samples=3)
        for index, folder in enumerate(front.save_models(tmp_path, model)):
            card = (folder / "README.md").read_text()
            assert f"accuracy {1 - front.dense_error:.4f} → {1 - front[index].error:.4f} (n = 8)" in card
            assert "Its quality was not measured" not in card
