"""Standard NAS: every sub-network is trained, and the hopeless are given up early."""

import optuna
import pytest
import torch
from searches import DATA, MODEL, SPACE
from tiny import tiny_model
from transformers import Trainer, TrainingArguments

import hf_prune
from hf_prune.metrics import Accuracy, compute_metrics_for


class TestStandardNAS:
    def trainer(self, tmp_path, steps=8, **options):
        rows = [{key: value[i] for key, value in batch.items()} for batch in DATA for i in range(8)]
        made = []

        def make(model):
            args = TrainingArguments(
                str(tmp_path / "out"),
                max_steps=steps,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                **{"eval_strategy": "steps", "eval_steps": 2, **options},
            )
            made.append(
                Trainer(
                    model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics_for(Accuracy())
                )
            )
            return made[-1]

        return make, made

    def test_trains_each_and_gives_up_early(self, tmp_path):
        make, made = self.trainer(tmp_path)
        front = hf_prune.standard_nas(
            MODEL, SPACE, make, metric="eval_accuracy", greater_is_better=True, num_samples=8, method="random"
        )
        assert len(made) == 8
        steps = [trainer.state.global_step for trainer in made]
        assert steps[0] == 8 and min(steps) < 8  # the first has nothing to be compared with, some are given up
        assert len(front.evaluated) == sum(step == 8 for step in steps)
        ends = {t.model.num_parameters(): t.state.log_history[-2]["eval_accuracy"] for t in made}
        for point in front.evaluated:
            assert point.error == pytest.approx(1 - ends[int(point.costs["params"])])
        # Each was trained from the weights of the model, which stays as it was.
        assert torch.equal(MODEL.classifier.weight, tiny_model("bert").classifier.weight)

    def test_goes_on(self, tmp_path):
        make, made = self.trainer(tmp_path, steps=2)
        options = {"storage": tmp_path / "log", "pruner": optuna.pruners.NopPruner()}
        hf_prune.standard_nas(MODEL, SPACE, make, num_samples=2, **options)
        front = hf_prune.standard_nas(MODEL, SPACE, make, num_samples=4, **options)
        assert len(made) == len(front.evaluated) == 4
        with pytest.raises(hf_prune.ConfigError, match="another metric"):
            hf_prune.standard_nas(MODEL, SPACE, make, metric="eval_accuracy", **options)

    def test_wrong_calls(self, tmp_path):
        make, _ = self.trainer(tmp_path, steps=1, eval_strategy="no")
        with pytest.raises(hf_prune.ConfigError, match="did not evaluate"):
            hf_prune.standard_nas(MODEL, SPACE, make)
        make, _ = self.trainer(tmp_path, steps=2)
        with pytest.raises(hf_prune.ConfigError, match="Unknown metric 'accuracy'. .*eval_accuracy"):
            hf_prune.standard_nas(MODEL, SPACE, make, metric="accuracy")

    def test_evaluations_of_something_else(self, tmp_path):
        make, made = self.trainer(tmp_path, steps=2)

        def several(model):
            trainer = make(model)
            trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
            return trainer

        front = hf_prune.standard_nas(MODEL, SPACE, several, metric="eval_a_loss", num_samples=1)
        (loss,) = [row["eval_a_loss"] for row in made[0].state.log_history if "eval_a_loss" in row]
        assert [point.error for point in front.evaluated] == [loss]

        def pruning(model):
            stock = make(model)
            args = hf_prune.PruningTrainingArguments(**stock.args.to_dict())
            return hf_prune.PruningTrainer(
                model, args, train_dataset=stock.train_dataset, eval_dataset=stock.eval_dataset
            )

        assert len(hf_prune.standard_nas(MODEL, SPACE, pruning, num_samples=1).evaluated) == 1

    def test_all_are_given_up(self, tmp_path):
        class Prune(optuna.pruners.BasePruner):
            def prune(self, study, trial):
                return True

        make, _ = self.trainer(tmp_path, steps=4)
        with pytest.raises(hf_prune.ConfigError, match="The pruner gave all 2 sub-networks up early"):
            hf_prune.standard_nas(MODEL, SPACE, make, num_samples=2, pruner=Prune())

    def test_trained_sub_networks_are_not_kept(self, tmp_path):
        make, _ = self.trainer(tmp_path, steps=2)
        front = hf_prune.standard_nas(MODEL, SPACE, make, num_samples=1)
        with pytest.raises(hf_prune.ConfigError, match="were not kept"):
            front.save_models(tmp_path / "front", MODEL)
        assert not (tmp_path / "front").exists() and not front.report(0, MODEL).evaluation
