"""`hf-prune inspect`: its figures and its text."""

import json

import pytest
from folders import save_tiny
from transformers import AutoModelForSequenceClassification

from hf_prune import known_pruners
from hf_prune.costs import CostTable
from hf_prune.errors import InfeasibleBudgetError
from hf_prune.methods import get_pruner
from hf_prune.selection import Selector


class TestInspect:
    def test_figures_are_those_of_the_library(self, run, dense):
        code, out, _ = run("inspect", dense, "--sequence-length", 20, "--json")
        found, model = json.loads(out), AutoModelForSequenceClassification.from_pretrained(dense)
        table = CostTable(model, sequence_length=20)
        assert code == 0
        assert {m: found[m] for m in ("macs", "params", "memory")} == table.of().to_dict()
        assert found["params"] == model.num_parameters() and found["memory"] == 4 * found["params"]
        assert found["sequence_lengths"] == {"encoder.layer": 20}
        heads = sum(table.unit[g.name].macs * g.size for g in table.units.of_kind("heads"))
        assert found["shares"]["attention"]["macs"] == pytest.approx(heads / table.of().macs)
        assert found["shares"]["attention"]["macs"] + found["shares"]["feed_forward"]["macs"] == pytest.approx(1)
        [stack] = found["stacks"]
        attention, feed_forward = stack["blocks"]
        assert (stack["name"], stack["layers"], stack["config"]) == ("encoder.layer", 3, "num_hidden_layers")
        assert (attention["units"], attention["heads_per_unit"], attention["config"]) == ([4, 4, 4], 1, "")
        assert (feed_forward["units"], feed_forward["config"]) == ([64] * 3, "intermediate_size")
        assert (found["needs_hf_prune"], found["standalone"]) == (False, False)

    def test_lowest_budgets_are_feasible_and_no_lower_ones(self, run, dense):
        lowest = json.loads(run("inspect", dense, "--json")[1])["lowest_macs"]
        model = AutoModelForSequenceClassification.from_pretrained(dense)
        assert sorted(lowest) == [name for name in known_pruners() if get_pruner(name).kinds]
        for name, ratio in lowest.items():
            kinds = get_pruner(name).kinds
            if kinds == ("layers",):
                assert 0 <= ratio - 1 / 3 <= 1e-4  # one of three
                continue
            Selector(CostTable(model), {"macs": ratio}, kinds)
            with pytest.raises(InfeasibleBudgetError):
                Selector(CostTable(model), {"macs": ratio - 2e-4}, kinds)

    def test_text(self, run, dense):
        code, out, err = run("inspect", dense)
        assert code == 0
        assert out.startswith(f"BertForSequenceClassification (bert) from {dense}\n")
        for part in ("n = 128 tokens", "64 a layer  intermediate_size", "4 a layer   -", "plain transformers.\n"):
            assert part in out
        assert out not in err

    def test_grouped_queries(self, run, tmp_path):
        out = run("inspect", save_tiny(tmp_path, "llama", tokenizer=False))[1]
        assert "KV groups of 2 heads  self_attn.o_proj  2 a layer   num_attention_heads" in out

    def test_units_that_stay(self, run, tmp_path):
        folder = save_tiny(tmp_path, "t5", tokenizer=False)
        lowest = json.loads(run("inspect", folder, "--json")[1])["lowest_macs"]
        assert (
            len({ratio for name, ratio in lowest.items() if name != "layer_drop"}) == 1
        )  # methods that prune heads elsewhere get no further than the others
        out = run("inspect", folder)[1]
        assert "layer.1.EncDecAttention.o  4 a layer (fixed)" in out
        assert "\nt5: feed-forward neurons and layers; its heads share one position bias and stay.\n" in out

    def test_config_without_a_class(self, run, tmp_path):
        folder = save_tiny(tmp_path, tokenizer=False)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
        code, out, err = run("inspect", folder)
        assert (code, out) == (1, "") and "say what the model is for with --task, one of base, causal-lm" in err
        assert json.loads(run("inspect", folder, "--task", "base", "--json")[1])["class"] == "BertModel"
