"""A cell of an ablation is trained once, also by two processes that want it at the same time."""
import os
import subprocess
import sys

CELL = """
import os
import sfa_core.runs.ablation as ablation
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.load import load_model
from sfa_core.training.finetune import FinetuneConfig
from sfa_core.training.stream import DocumentSet

finetune = ablation.finetune
def counted(*arguments, **options):
    with open(os.environ["TRAINED"], "a") as stream: print(os.getpid(), file=stream)
    return finetune(*arguments, **options)
ablation.finetune = counted
bundle, asked = load_model("embedded", placement="cpu"), samples(documents(2, seed=3))[:4]
print("ready", flush=True)
input()
config = FinetuneConfig("control", steps=8, batch_size=2, questions=2, checkpoint_every=1)
records, log = ablation.run_cell(bundle, DocumentSet(documents(4, 1)), asked, config, max_new_tokens=4)
print("rows", len(log), "answers", " ".join(records["prediction"]))
"""


def test_two_processes_with_the_same_cell_train_once(tmp_path):
    environment = dict(os.environ) | {"SFA_EXPORTS": str(tmp_path / "exports"), "TRAINED": str(tmp_path / "trained")}
    command = [sys.executable, "-c", CELL]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], [errors[-2000:] for _, errors in ended]
    assert len((tmp_path / "trained").read_text().splitlines()) == 1
    assert ended[0][0] == ended[1][0] and ended[0][0].startswith("rows 8 "), (
        "both see the whole training and the same answers"
    )
