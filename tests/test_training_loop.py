"""A training run can be killed, starved and cheated, and still ends exactly where it should or says why not."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
import toy_training
from toy_training import batch_at, model, noisy, quiet, run

import sfa_core.training.checkpoints
from sfa_core.core.identity import read_digest
from sfa_core.training.checkpoints import TIMING, checkpoints, read_folder, read_log, read_sums
from sfa_core.training.loop import split_batch, train
from sfa_core.training.state import first_difference
from sfa_core.training.schedule import DECAYS, LoopConfig, rate_share

LAST = "step-00000009"
FORKS = multiprocessing.get_context("forkserver")


def weights(folder):
    return load_file(Path(folder) / "checkpoints" / LAST / "weights.safetensors")


def curve(folder):
    return read_log(folder).drop(columns=list(TIMING))


def assert_same_run(a, b):
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())
    assert curve(a).equals(curve(b))


def start(*arguments, **environment):
    "Start the toy as a process of its own, forked from one that has the imports behind it."
    process = FORKS.Process(target=toy_training.main, args=tuple(map(str, arguments)), kwargs=environment)
    process.start()
    return process


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


# Killed and resumed


def test_a_run_killed_from_outside_ends_as_if_it_never_was(tmp_path, unbroken, forkserver):
    process = start("slow", tmp_path)
    log = tmp_path / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "checkpoints" / LAST).exists()
    run(tmp_path)
    assert_same_run(tmp_path, unbroken)


def test_a_run_killed_at_any_touch_of_the_disk_ends_as_if_it_never_was(tmp_path, forkserver):
    process = start("kills", tmp_path)
    process.join(1500)
    assert process.exitcode == 0
    touches = int((tmp_path / "touches").read_text())
    assert touches > 40
    for at in range(1, touches + 1):
        assert sorted(path.name
                      for path in (tmp_path / str(at) / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
        assert all(
            path.read_bytes() == (tmp_path / str(at) / path.relative_to(tmp_path / "whole")).read_bytes()
            for path in (tmp_path / "whole").rglob("step*/*")
        )
        assert curve(tmp_path / "whole").equals(curve(tmp_path / str(at)))


def test_stopping_at_any_step_changes_nothing(tmp_path, unbroken):
    for until in range(1, 9):
        run(tmp_path / str(until), until=until)
        run(tmp_path / str(until))
        assert_same_run(tmp_path / str(until), unbroken)


def test_a_finished_run_is_not_trained_again(tmp_path):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    net, result = run(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    assert (
        result.position.step == 9
        and len(result.log) == 9
        and all(torch.equal(p, weights(tmp_path)[n]) for n, p in net.named_parameters())
    )


def test_no_steps_change_nothing(tmp_path):
    net, result = run(tmp_path, until=0)
    assert result.log.empty and all(torch.equal(p, q) for p, q in zip(net.parameters(), model().parameters()))
    assert torch.equal(read_folder(result.checkpoint)[0]["weights"]["0.weight"], net[0].weight)


def test_time_adds_up_over_restarts_and_steps_are_logged_once(tmp_path):
    run(tmp_path, until=5, losses=lambda net: noisy(net, 0.01))
    (tmp_path / "log.jsonl").open("a").write('{"step": 6, "loss"')  # a line that a kill cut short
    run(tmp_path, losses=lambda net: noisy(net, 0.01))
    log = read_log(tmp_path)
    assert (
        log.step.tolist() == list(range(1, 10))
        and log.seconds.is_monotonic_increasing
        and log.seconds.iloc[-1] > 9 * 2 * 0.01
    )
    assert (log.memory_gib > 0).all() and (log.tokens_per_second > 0).all()


def test_how_often_things_are_written_may_change_on_resume(tmp_path, unbroken):
    run(tmp_path, until=4, log_every=1)
    run(tmp_path, checkpoint_every=0, keep=1, log_every=5)
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in weights(tmp_path).items())
    assert read_log(tmp_path).step.tolist() == [1, 2, 3, 4, 5, 9] and len(checkpoints(tmp_path / "checkpoints")) == 1


def test_the_caller_keeps_its_random_state(tmp_path):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    run(tmp_path, until=2)
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected


# Damaged and foreign checkpoints

FILES = ["weights.safetensors", "optimizer.safetensors", "random.json", "position.json", "run.json", "SHA256SUMS"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used_when_asked_for(tmp_path, unbroken, name, damage):
    run(tmp_path, until=6)
    path = tmp_path / "checkpoints" / "step-00000006" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flipped" else path.read_bytes()[: len(data) // 2])
    with pytest.raises(ValueError,
                       match=r"step-00000006 is refused: .*resume='previous' goes on from step-00000004") as refusal:
        run(tmp_path)
    assert "\n" not in str(refusal.value)
    run(tmp_path, resume="previous")
    assert_same_run(tmp_path, unbroken)


def edited(name, change):
    "Change what a file of a checkpoint holds."
    def edit(checkpoint):
        path = checkpoint / name
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content if (made := change(content)) is None else made))
        else:
            weights = load_file(path)
            made = change(weights)
            save_file(weights if made is None else made, path)
    return edit


def less(name):
    return lambda named: {other: value for other, value in named.items() if other != name}


def state(name, at, value):
    return edited("random.json", lambda states: states[0][name].__setitem__(at, value))


POSITIONS = dict(step=[5, -1, 6.0, True, "6", None, 10**12], skipped=[7, -1, 0.5], skipped_in_row=[1], parts=[0, "1"])
CHANGES = {
    **{f"{name} {value!r}": edited("position.json", lambda at, name=name, value=value: at | {name: value})
       for name, values in POSITIONS.items() for value in values},
    "a further field": edited("position.json", lambda at: at | {"evil": 1}),
    "a missing field": edited("position.json", lambda at: {"step": 6}),
    "a place behind the memory": state("numpy", 2, 10**6), "a place before it": state("numpy", 2, -1),
    "another generator": state("numpy", 0, "PCG64"), "a word too long": edited(
        "random.json", lambda states: states[0]["numpy"][1].__setitem__(0, 2**32)),
    "words too few": edited("random.json", lambda states: states[0]["numpy"][1].pop()),
    "another version": state("python", 0, 2), "words of text": state("python", 1, ["1"] * 625),
    "no bytes": edited("random.json", lambda states: states[0].update(torch="xyz")),
    "bytes cut off": edited("random.json", lambda states: states[0].update(torch=states[0]["torch"][:-2])),
    "bytes of nothing": edited("random.json", lambda states: states[0].update(torch="00" * 5056)),
    "cards of no bytes": edited("random.json", lambda states: states[0].update(cuda=["0"])),
    "no processes": edited("random.json", lambda states: []), "two": edited("random.json", lambda states: states * 2),
    "a weight of one number": edited("weights.safetensors", lambda weights: weights.update(
        {"0.weight": torch.ones(1)})),
    "a weight more": edited("weights.safetensors", lambda weights: weights.update({"evil": torch.ones(1)})),
    "a weight less": edited("weights.safetensors", less("0.bias")),
    "a weight that is no number": edited("weights.safetensors", lambda weights: weights.update(
        {"0.bias": torch.full((6,), math.nan)})),
    "whole numbers": edited("weights.safetensors", lambda weights: {name: w.int() for name, w in weights.items()}),
    "no averages": edited("optimizer.safetensors", lambda averages: {}),
    "an average more": edited("optimizer.safetensors", lambda averages: averages.update(
        {"evil/0.bias": torch.ones(6)})),
    "an average less": edited("optimizer.safetensors", less("exp_avg/0.bias")),
    "an average of nobody": edited("optimizer.safetensors", lambda averages: averages.update(
        {"exp_avg/evil": torch.ones(6)})),
    "squares below zero": edited("optimizer.safetensors", lambda averages: averages.update(
        {"exp_avg_sq/0.bias": -torch.ones(6)})),
    "steps below zero": edited("optimizer.safetensors", lambda averages: averages.update(
        {"step/0.bias": torch.tensor(-1.0)})),
    "another step's folder": lambda checkpoint: None,
    "a file more": lambda checkpoint: (checkpoint / "more.json").write_text("{}"),
}


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    "A training that stopped behind its sixth step."
    folder = tmp_path_factory.mktemp("six")
    run(folder, until=6)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_sound_checksums_that_says_something_else_changes_nothing(tmp_path, six_steps, change):
    folder = tmp_path / "run"
    shutil.copytree(six_steps, folder)
    checkpoint = folder / "checkpoints" / "step-00000006"
    CHANGES[change](checkpoint)
    listed = sorted(path for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    (checkpoint / "SHA256SUMS").write_text("".join(f"{read_digest(path)}  {path.name}\n" for path in listed))
    if change == "another step's folder":
        checkpoint = checkpoint.rename(checkpoint.with_name("step-00000008"))
    net = model()
    before = weights_of(net)
    with pytest.raises(ValueError, match=f"{checkpoint.name} is refused: ") as error:
        run(folder, net=net)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1500
    assert all(before[name].equal(value) for name, value in weights_of(net).items())


def weights_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("content", [
    "", "\n", "x", "0" * 64, f"{'0' * 63}  a\n", f"{'0' * 64} a\n", f"{'0' * 64}  ../a\n", f"{'0' * 64}  ..\n",
    f"{'0' * 64}  \n", f"{'0' * 64}  a\n{'1' * 64}  a\n", f"{'0' * 64}  a\r\n", f"{'0' * 64}  a", f"{'G' * 64}  a\n",
    f"{'0' * 64}  SHA256SUMS\n", f"{'0' * 64}  {'a' * 300}\n", f"{'0' * 64}  a\x1b[2J\n", f"{'0' * 64}  a\n\n"],
    ids=repr)
def test_a_list_of_checksums_is_one_of_files_beside_it(tmp_path, content):
    path = tmp_path / "SHA256SUMS"
    path.write_bytes(content.encode())
    with pytest.raises(ValueError, match=str(path)) as error:
        read_sums(path)
    assert len(str(error.value).splitlines()) == 1 and "\x1b" not in str(error.value)
    path.write_text(f"{'0' * 64}  a b.json\n{'1' * 64}  c\n")
    assert read_sums(path) == {"a b.json": "0" * 64, "c": "1" * 64}


def test_previous_needs_one_and_keeps_the_newest_when_it_is_refused_too(tmp_path):
    run(tmp_path, until=2)
    with pytest.raises(ValueError, match="needs two"):
        run(tmp_path, resume="previous")
    run(tmp_path, until=4)
    (tmp_path / "checkpoints/step-00000002/weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="step-00000002 is refused"):
        run(tmp_path, resume="previous")
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(learning_rate=0.06), "config.learning_rate is 0.05 there and 0.06 here"),
        (dict(steps=10), "config.steps is 9 there and 10 here"),
        (dict(identity=dict(arm="control")), "identity.arm is 'sfa' there and 'control' here"),
        (
            dict(net=torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Dropout(0.2),
                                         torch.nn.Linear(7, 3))),
            r"parameters.0.bias is 'torch.float32 \(6,\)' there",
        ),
        (dict(net=torch.nn.Sequential(torch.nn.Linear(4, 6))), "parameters.3.bias is .* 'absent' here"),
        (dict(net=model().double()), "parameters.0.bias is .*torch.float64"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, change, said):
    run(tmp_path, until=2, identity=dict(arm="sfa"))
    with pytest.raises(ValueError, match=f"belongs to another run, {said}"):
        run(tmp_path, **dict(identity=dict(arm="sfa")) | change)


def test_a_folder_with_a_run_is_refused_to_a_new_one(tmp_path):
    run(tmp_path, resume="never", until=2)
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path, resume="never")
    with pytest.raises(ValueError, match="one of latest, previous, never"):
        run(tmp_path, resume="newest")


# The window and its loss


def uneven(net):
    "Loss over a different number of targets in each row, none in some."

    def losses(batch):
        counted = batch["wanted"]
        errors = (net(batch["x"]).square().sum(-1) * counted).sum()
        return {"answer": errors / max(int(counted.sum()), 1)}, int(counted.sum())

    return losses


def rows(step, lo, hi):
    draw = torch.Generator().manual_seed(step)
    x, wanted = torch.randn(8, 4, generator=draw), torch.randint(0, 5, (8,), generator=draw)
    return dict(x=x[lo:hi], wanted=wanted[lo:hi])


def without_dropout():
    return model().eval()


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_the_window_is_one_mean_over_its_targets(tmp_path, accumulation):
    size = 8 // accumulation
    whole, _ = run(tmp_path / "a", without_dropout(), uneven, lambda step, micro: rows(step, 0, 8), accumulation=1)
    parts, _ = run(tmp_path / "b", without_dropout(), uneven,
                   lambda step, micro: rows(step, micro * size, (micro + 1) * size), accumulation=accumulation)
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(whole.parameters(), parts.parameters()))
    np.testing.assert_allclose(read_log(tmp_path / "a").loss, read_log(tmp_path / "b").loss, rtol=1e-5)
    assert read_log(tmp_path / "a").targets.equals(read_log(tmp_path / "b").targets)


def test_two_processes_train_as_one(tmp_path, forkserver):
    "With what torchrun tells its processes; test_processes has a launcher."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(free.getsockname()[1]))
    processes = [start("processes", tmp_path / "two", **shared, RANK=str(rank), LOCAL_RANK=str(rank))
                 for rank in range(2)]
    for process in processes:
        process.join(900)
    assert [process.exitcode for process in processes] == [0, 0]
    run(tmp_path / "one", losses=quiet)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one)
    np.testing.assert_allclose(read_log(tmp_path / "one").loss, read_log(tmp_path / "two").loss, rtol=1e-4)
    with pytest.raises(ValueError, match="processes is 2 there and 1 here"):
        run(tmp_path / "two", losses=quiet)


def test_rates_of_groups_reach_the_weights(tmp_path):
    net, _ = run(tmp_path, steps=1, warmup=0.0, weight_decay=0.0, clip_norm=float("inf"), learning_rate=1e-3,
                 group_rates=(("3.", 1e-2),), accumulation=1)
    moved = [(p - q).abs().max().item() for p, q in zip(net.parameters(), model().parameters())]
    assert moved == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2], rel=1e-3)  # Adam's first step moves each weight by its rate


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from(DECAYS), st.floats(0, 1))
def test_the_rate_rises_then_falls_between_its_bounds(steps, warmup, decay, final):
    config = LoopConfig(steps, warmup=warmup, decay=decay, final_rate=final)
    shares = [rate_share(step, config) for step in range(steps)]
    peak = round(warmup * steps)
    assert all(0 < s <= 1 + 1e-12 for s in shares[: peak + 1]) and all(
        a < b for a, b in zip(shares[:peak], shares[1:peak])
    )
    assert all(final - 1e-9 <= s <= 1 for s in shares[peak:]) and all(
        a >= b for a, b in zip(shares[peak:], shares[peak + 1 :])
    )


# Losses that are not finite


def breaking(steps_broken, how):
    def losses(net):
        def loss(batch):
            answer = net(batch["x"]).square().mean()
            if batch["step"] in steps_broken:
                answer = answer * float("nan") if how == "loss" else answer + (net[0].weight[0, 0] * 0).sqrt()
            return {"answer": answer}, len(batch["y"]) if not (how == "targets"
                                                               and batch["step"] in steps_broken) else 0

        return loss

    return losses


def numbered(step, micro):
    return batch_at(step, micro) | dict(step=step)


@pytest.mark.parametrize("how, reason",
                         [("loss", "loss answer is not finite"), ("gradient", "gradient is not finite"),
                          ("targets", "no target tokens")])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(tmp_path, how, reason):
    net, result = run(tmp_path, losses=breaking({3, 4}, how), batches=numbered, max_bad_steps=3)
    assert result.position.skipped == 2 and result.position.skipped_in_row == 0
    assert result.log.skipped.tolist() == [""] * 3 + [reason] * 2 + [""] * 4
    assert all(p.isfinite().all() for p in net.parameters())
    before, _ = run(tmp_path / "before", losses=breaking({3, 4}, how), batches=numbered, until=3)
    after, _ = run(tmp_path / "after", losses=breaking({3, 4}, how), batches=numbered, until=5)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))
    assert all(json.loads(line, parse_constant=pytest.fail)
               for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_too_many_such_steps_in_a_row_end_the_run_with_its_last_good_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match=r"3 steps in a row were skipped, step 7 because: loss answer is not finite; "
                                           r"last good checkpoint: .*step-00000006"):
        run(tmp_path, losses=breaking({4, 5, 6}, "loss"), batches=numbered, max_bad_steps=3)
    tensors, notes = read_folder(tmp_path / "checkpoints/step-00000006")
    assert notes["position"]["skipped_in_row"] == 2 and all(
        value.isfinite().all() for value in tensors["weights"].values()
    )
    assert read_log(tmp_path).step.iloc[-1] == 7


# Memory and disk that run out


def hungry(largest, error):
    def losses(net):
        def loss(batch):
            answer = uneven(net)(batch)
            if len(batch["x"]) > largest:
                raise error
            return answer

        return loss

    return losses


def real_shortage():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    return error.value


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
SHORTAGES = [(CUDA, 4, 2), (torch.OutOfMemoryError("short"), 3, 4), (real_shortage(), 1, 8)]


@pytest.mark.parametrize("error, largest, parts", SHORTAGES, ids=["cuda", "torch", "cpu"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_one(tmp_path, capsys, error, largest, parts):
    batches = lambda step, micro: rows(10 * step + micro, 0, 8)
    plenty, _ = run(tmp_path / "a", without_dropout(), uneven, batches)
    little, result = run(tmp_path / "b", without_dropout(), hungry(largest, error), batches)
    assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in zip(plenty.parameters(), little.parameters()))
    assert (result.log.parts == parts).all() and result.log.targets.equals(read_log(tmp_path / "a").targets)
    assert (
        f"out of memory, each micro-batch is now cut into {parts} pieces; the effective batch stays"
        in capsys.readouterr().out
    )
    run(tmp_path / "c", without_dropout(), hungry(largest, error), batches, until=5)
    run(tmp_path / "c", without_dropout(), hungry(largest, error), batches)
    assert_same_run(tmp_path / "b", tmp_path / "c")


def test_what_cannot_be_halved_and_other_errors_end_the_run(tmp_path):
    batches = lambda step, micro: rows(step, 0, 8)
    with pytest.raises(MemoryError, match="nothing left to halve"):
        run(tmp_path / "a", losses=hungry(0, CUDA), batches=batches)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(tmp_path / "b", losses=hungry(0, RuntimeError("shapes cannot be multiplied")), batches=batches)
    with pytest.raises(ValueError, match="without `split`"):
        run(tmp_path / "c", losses=hungry(0, CUDA), batches=lambda *_: rows(0, 0, 8) | dict(more=torch.ones(3)))


@given(st.integers(1, 40), st.integers(0, 6))
def test_pieces_are_the_batch(size, power):
    parts = 2**power
    if parts >= 2 * size:
        with pytest.raises(MemoryError):
            split_batch(list(range(size)), parts)
    else:
        pieces = split_batch(list(range(size)), parts)
        assert (
            sum(pieces, []) == list(range(size))
            and max(map(len, pieces)) - min(map(len, pieces)) <= 1
            and len(pieces) == min(parts, size)
        )


def full_disk(monkeypatch, where):
    error = OSError(28, "No space left on device")

    real = getattr(sfa_core.core.files, where, None) or os.replace

    def fail(path, *rest, **options):
        if where in ("flush_to_disk", "replace") and "step-" not in str(path):
            return real(path, *rest, **options)
        raise (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            if where == "save_file"
            else error
        )

    if where == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif where == "flush_to_disk":
        monkeypatch.setattr(sfa_core.core.files, where, fail)
    elif where == "limit":
        # less than the states take
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        monkeypatch.setattr(sfa_core.training.checkpoints, where, fail)


@pytest.mark.parametrize("where", ["save_file", "flush_to_disk", "replace", "limit"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_nothing_that_looks_finished(tmp_path, unbroken, monkeypatch,
                                                                                     where):
    run(tmp_path, until=4, log_every=100)
    kept = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            full_disk(patch, where)
            with pytest.raises(OSError, match=r"step-00000006 could not be written \(.*the last good checkpoint is "
                                              r".*step-00000004") as error:
                run(tmp_path, log_every=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    run(tmp_path)
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in weights(tmp_path).items())


# What is refused before it starts


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(steps=0), "steps is 0"),
        (dict(steps=-3), "steps is -3"),
        (dict(steps=1.5), "steps is 1.5"),
        (dict(accumulation=0), "accumulation is 0"),
        (dict(keep=0), "keep is 0"),
        (dict(learning_rate=0.0), "learning_rate is 0.0"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(group_rates=(("bias", -1.0),)), "bias is -1.0"),
        (dict(warmup=1.5), "warmup is 1.5"),
        (dict(decay="step"), "one of cosine, linear, constant"),
        (dict(max_bad_steps=0), "max_bad_steps is 0"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoopConfig(**dict(steps=3) | wrong)


def test_parameters_that_cannot_be_trained_are_refused(tmp_path):
    weight, frozen = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1), requires_grad=False)
    for parameters, said in [
        ({}, "no parameters"),
        (dict(a=weight, b=frozen), "1 parameters do not require a gradient, b first"),
        (dict(a=weight, b=weight), "under two names"),
    ]:
        with pytest.raises(ValueError, match=said):
            train(parameters, batch_at, None, LoopConfig(steps=1), tmp_path)


@given(st.dictionaries(st.text(max_size=2), st.integers(), max_size=4),
       st.dictionaries(st.text(max_size=2), st.integers(), max_size=4))
def test_a_difference_is_found_exactly_when_there_is_one(a, b):
    assert (first_difference(a, b) == "") == (a == b)
