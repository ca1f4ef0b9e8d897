"""What users do with a Hub, for test_push.py: one process with the Hub's address in its environment. Prints JSON."""

import json
import logging
import os
import re
import sys
import traceback
import urllib.request
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import huggingface_hub.utils._http
import torch
import transformers as T
from datasets import Dataset
from folders import tokenizer
from loopback_hub import OTHER_TOKEN, READ_TOKEN
from pruned import logits as logits_of
from tiny import tiny_batch, tiny_model

import hf_prune

scratch = Path(sys.argv[1])
results, errors = {}, {}
huggingface_hub.utils._http.time.sleep = lambda seconds: None  # between the tries of an upload
logging.basicConfig(level=logging.DEBUG)  # whatever is logged must hold no token
T.logging.disable_progress_bar()


def fail(method, path, status=None, times=1, lost=False):
    body = json.dumps({"method": method, "path": path, "status": status, "times": times, "lost": lost}).encode()
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/_fail", body)


def recover():
    urllib.request.urlopen(urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/_fail", method="DELETE"))


def logits(model):
    return logits_of(model, tiny_batch("bert"))


def refused(name, push, *args, **kwargs):
    try:
        push(*args, **kwargs)
    except hf_prune.PruningError:
        errors[name] = traceback.format_exc()


def pruned(seed=0, **options):
    model = hf_prune.prunable(tiny_model("bert", seed=seed))
    model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}, **options))
    return model.shrink().eval()


def same(model, repo, cls=T.BertForSequenceClassification, **options):
    return torch.equal(logits(model), logits(cls.from_pretrained(repo, **options).eval()))


def run_snippet(repo):
    card = huggingface_hub.ModelCard.load(repo)
    found = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], found)
    return found


# What each road uploads, and that it loads again

plain = pruned(allocation="uniform")
plain.push_to_hub("plain", processing_class=tokenizer(), tags=["tiny"])
results["plain"] = same(plain, "user/plain") and len(run_snippet("user/plain")["tokenizer"]) > 5

layout = pruned()
done = layout.pruning_result
hf_prune.push_to_hub(layout, "user/layout", report=done.report, mask=done.mask)
results["layout"] = same(layout, "user/layout") and torch.equal(
    logits(layout), logits(run_snippet("user/layout")["model"].eval())
)

layout.push_to_hub("user/standalone", standalone=True)
torch.save(logits(layout), scratch / "standalone.pt")

layout.save_pretrained(scratch / "folder", processing_class=tokenizer(), max_shard_size="20KB")
(scratch / "folder" / "checkpoint-1").mkdir()
for name in ("training_args.bin", ".env", "checkpoint-1/model.safetensors", "credentials.json", "train_log.txt"):
    (scratch / "folder" / name).write_bytes(b"secret")
before = {path.name: path.read_bytes() for path in (scratch / "folder").iterdir() if path.is_file()}
hf_prune.push_to_hub(scratch / "folder", "user/folder")
hf_prune.push_to_hub(scratch / "folder", "user/folder")  # all is there: no second commit
results["folder"] = same(layout, "user/folder")
layout.push_to_hub("user/resharded", max_shard_size="20KB")
layout.push_to_hub("user/resharded")

layout.push_to_hub("user/plain", revision="layout")
results["revision"] = same(layout, "user/plain", revision="layout") and same(plain, "user/plain")
results["pull request"] = layout.push_to_hub("user/plain", create_pr=True).pr_url
results["pull request loads"] = same(layout, "user/plain", revision="refs/pr/1") and same(plain, "user/plain")
hf_prune.push_to_hub(scratch / "folder", "user/private", private=True)
results["private"] = same(layout, "user/private")

card = scratch / "folder" / "README.md"
written = card.read_text()
card.write_text("---\nlicense: mit\n---\n# My words\n")
hf_prune.push_to_hub(scratch / "folder", "user/own-card")
card.write_text("---\nlicense: mit\n---\n# My better words\n")
hf_prune.push_to_hub(scratch / "folder", "user/own-card")
card.write_text(written)

layout.push_to_hub("user/claimed")
huggingface_hub.upload_file(path_or_fileobj=b"# Edited\n", path_in_repo="README.md", repo_id="user/claimed")
pruned(seed=9).push_to_hub("user/claimed")

# What is known of a dense model that came from the Hub

tiny_model("bert").save_pretrained(scratch / "dense")
(scratch / "dense" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Dense\n")
huggingface_hub.create_repo("user/dense")
huggingface_hub.upload_folder(repo_id="user/dense", folder_path=scratch / "dense")
child = hf_prune.AutoPrunableModelForSequenceClassification.from_pretrained("user/dense")
child.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
child.shrink().save_pretrained(scratch / "child")
results["unknown license"] = hf_prune.PruningReport.load(scratch / "child").metadata
hf_prune.push_to_hub(scratch / "child", "user/child")  # learns it from the card
child.push_to_hub("user/child-in-memory")  # knows it from the cache
fail("HEAD", "/user/plain/resolve/.*README", 500, 99)
orphan = replace(layout.pruning_result.report, metadata={"base_model": "user/plain", "base_revision": "main"})
hf_prune.push_to_hub(layout, "user/orphan", report=orphan)
recover()

# Failures, and what a second try makes of them

fail("PUT", "/_lfs/", 503)
pruned(seed=1).push_to_hub("user/flaky")  # huggingface_hub tries again by itself
for name, failure in {
    "cut": ("PUT", "/_lfs/", None, 99),
    "broken": ("PUT", "/_lfs/", 500, 99),
    "refused": ("POST", "/commit/", 403, 1),
    "unknown": ("POST", "/commit/", 401, 1),
    "no network": ("POST", "/api/repos/create", None, 1),
    "lost": ("POST", "/commit/", None, 1, True),
}.items():
    model = pruned(seed=2 + len(errors))
    model.save_pretrained(scratch / name)
    files = {path.name: path.read_bytes() for path in (scratch / name).iterdir()}
    fail(*failure)
    refused(name, hf_prune.push_to_hub, scratch / name, f"user/{name.replace(' ', '-')}")
    recover()
    intact = files == {path.name: path.read_bytes() for path in (scratch / name).iterdir()}
    hf_prune.push_to_hub(scratch / name, f"user/{name.replace(' ', '-')}")
    results[name] = intact and same(model, f"user/{name.replace(' ', '-')}")

refused("public", hf_prune.push_to_hub, scratch / "cut", "user/plain", private=True)
refused("another's", hf_prune.push_to_hub, scratch / "cut", "other/plain")
huggingface_hub.create_repo("other/taken", token=OTHER_TOKEN)
refused("taken", hf_prune.push_to_hub, scratch / "cut", "other/taken")
layout.push_to_hub("other/taken", create_pr=True)
results["another's pull request"] = same(layout, "other/taken", revision="refs/pr/1")
refused("read only", hf_prune.push_to_hub, scratch / "cut", "user/read-only", token=READ_TOKEN)
refused("wrong token", hf_prune.push_to_hub, scratch / "cut", "user/wrong", token="hf_" + "wrongWRO" * 4)
refused("broken token", hf_prune.push_to_hub, scratch / "cut", "user/wrong", token="hf_" + "wrongWRO" * 4 + "\n")
layout.pruning_result.report.metadata["license"] = "free-for-all"
refused("license", layout.push_to_hub, "user/license")
results["intact"] = before == {p.name: p.read_bytes() for p in (scratch / "folder").iterdir() if p.is_file()}

# The trainers

words = ["good film", "very bad film", "film"] * 4
data = Dataset.from_list([{**dict(tokenizer()(text)), "labels": index % 2} for index, text in enumerate(words)])
for strategy in ("end", "every_save"):
    trainer = hf_prune.PassTrainer(
        tiny_model("bert"),
        hf_prune.PassTrainingArguments(
            str(scratch / strategy),
            num_heads=5,
            max_steps=4,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            push_to_hub=True,
            hub_token=os.environ["HF_TOKEN"],
            hub_model_id=f"user/trained-{strategy}",
            hub_strategy=strategy,
            hub_private_repo=True,
            report_to="none",
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        compute_metrics=lambda prediction: {"accuracy": 0.5},
    )
    if strategy == "every_save":
        fail("POST", "/commit/", 500)  # the first save is not pushed, and the training goes on
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub(license="mit", language="en")
    else:
        trainer.save_model()
    results[strategy] = same(trainer.pruned_model().eval(), f"user/trained-{strategy}")
refused(
    "checkpoints",
    lambda: hf_prune.PruningTrainer(
        tiny_model("bert"),
        hf_prune.PruningTrainingArguments(
            str(scratch / "refused"), push_to_hub=True, hub_strategy="all_checkpoints", report_to="none"
        ),
    ),
)

del os.environ["HF_TOKEN"]
refused("no token", hf_prune.push_to_hub, scratch / "cut", "user/no-token")
print(json.dumps({"results": results, "errors": errors}))
