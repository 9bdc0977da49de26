"""Two processes train, spread weights and answer as one does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from many_processes import CONFIG, COUNTS, questions
from safetensors.torch import load_file
from test_finetune_arms import tiny

from sfa_core.models.answers import answer
from sfa_core.training.checkpoints import read_log
from sfa_core.documents.generate import documents
from sfa_core.models.evaluate import evaluate, merge_replies, deal_batches
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import load_arm
from sfa_core.training.sharding import shard

parts = attrgetter("records", "summary")  # of an evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The work of two processes, and beside it that of one."
    folder = tmp_path_factory.mktemp("processes")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launcher, Path(__file__).with_name("many_processes.py"), folder], text=True, timeout=900,
                          capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    finetune(tiny(), documents(11, seed=5), CONFIG, folder / "one", progress=False)
    return folder


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_two_processes_fine_tune_as_one(folder, kind):
    """Log, checkpoints and arm, data-parallel and with weights spread by FSDP2, the latter stopped and taken up
    again half-way."""
    one, two = read_log(folder / "one"), read_log(folder / kind)
    assert two.targets.equals(one.targets) and two.step.equals(one.step)
    for column in ("loss", "gradient_norm"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-3)
    files = sorted(path.relative_to(folder / "one" / "arm") for path in (folder / "one" / "arm").glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        ours, theirs = load_file(folder / kind / "arm" / name), load_file(folder / "one" / "arm" / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():  # Adam moves a weight by about its rate a step, whatever its gradient
            assert (ours[key] - value).abs().max() < 0.1 * CONFIG.steps * CONFIG.learning_rate, key


def test_what_was_trained_spread_fits_a_whole_model(folder):
    with load_arm(tiny(), folder / "sharded" / "arm") as loaded:
        assert loaded.about["training"]["steps"] == CONFIG.steps


def test_questions_are_answered_once_whatever_their_number(folder):
    "Every process has all replies, in order, and they are those of one process."
    bundle, asked = tiny(), questions()
    first, second = (json.loads((folder / f"replies-{index}.json").read_text()) for index in range(2))
    assert first == second
    for count in COUNTS:
        assert first[0][str(count)] == [reply.prediction
                                        for reply in answer(bundle, asked[:count], 2, max_new_tokens=4)]
    records, summary = parts(evaluate(bundle, asked[:9], batch_size=2, max_new_tokens=4, draws=100))
    assert first[1] == records["id"].tolist() and first[2] == summary["n"] == 9


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 7), st.randoms())
def test_shares_are_everything_once(count, batch_size, processes, chance):
    shares = [deal_batches(count, batch_size, index, processes) for index in range(processes)]
    parts = [(place, str(place)) for places in shares for place in places]
    chance.shuffle(parts)
    assert merge_replies(parts, count) == [str(place) for place in range(count)]
    batches = {tuple(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)}
    assert {tuple(places[i : i + batch_size]) for places in shares
            for i in range(0, len(places), batch_size)} == batches
    if count:
        with pytest.raises(RuntimeError, match="missing"):
            merge_replies(parts[1:], count)
        with pytest.raises(RuntimeError, match="twice"):
            merge_replies([*parts, parts[0]], count)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="process 2 of 2"):
        deal_batches(5, 2, 2, 2)
    bundle = tiny()
    with pytest.raises(RuntimeError, match="this process was started alone"):
        shard(bundle)
    assert not torch.distributed.is_initialized()
    layer = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn"})(2, 2)
    with pytest.raises(ValueError, match="layer 0 is quantised"):
        shard(replace(bundle, model=torch.nn.Sequential(layer)))
