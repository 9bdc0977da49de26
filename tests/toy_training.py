"""A network that trains in milliseconds, for the runs that are killed, cut short and compared; `main` is the
process that gets killed."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from sfa_core.training.loop import train
from sfa_core.training.schedule import LoopConfig

DEFAULT = dict(steps=9, learning_rate=0.05, accumulation=2, checkpoint_every=2, weight_decay=0.1,
               group_rates=(("3", 0.01),))


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(6, 3))


def batch_at(step, micro):
    draw = torch.Generator().manual_seed(1000 * step + micro)
    return dict(x=torch.randn(8, 4, generator=draw), y=torch.randint(3, (8,), generator=draw))


def noisy(net, wait=0.0):
    "Losses in which every random generator takes part."

    def losses(batch):
        if wait:
            time.sleep(wait)
        noise = random.random() + np.random.rand()
        answer = cross_entropy(net(batch["x"]) + noise * batch["x"][:, :3], batch["y"])
        return {"answer": answer, "small": net[0].weight.square().mean()}, len(batch["y"])

    return losses


def quiet(net):
    "Losses without chance."
    return lambda batch: ({"answer": cross_entropy(net.eval()(batch["x"]), batch["y"])}, len(batch["y"]))


def run(folder, net=None, losses=noisy, batches=batch_at, identity=None, resume="latest", until=None, accelerator=None,
        **changes):
    "Train the toy in a folder."
    net = net or model()
    config = LoopConfig(**DEFAULT | changes)
    return net, train(dict(net.named_parameters()), batches, losses(net), config, folder, identity, resume, until,
                      accelerator=accelerator, progress=False)


def killed_child(folder, at=None):
    """Train in a child process that kills itself at its n-th touch of the folder; give its exit status, and write
    how often it touched it."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    touches = []

    def touch(event):
        touches.append(event)
        if len(touches) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event.split(".")[0] in ("open", "os",
                                   "shutil") and any(isinstance(a, str | os.PathLike) and str(a).startswith(folder)
                                                     for a in arguments):
            touch(event)

    sys.addaudithook(hook)
    os.fsync = lambda handle: touch("fsync")  # a kill does not lose what the system holds, a power cut would
    run(folder, steps=3, checkpoint_every=1)
    Path(folder, "..", "touches").write_text(str(len(touches)))
    os._exit(0)


def main(what, folder, **environment):
    "Be the process that is killed, or one of two; with more environment variables where a launcher would set them."
    os.environ.update(environment, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    if what == "slow":
        run(folder, losses=lambda net: noisy(net, 0.05))
    elif what == "processes":  # one of several
        for until in (4, None):
            run(folder, losses=quiet, accelerator=Accelerator(cpu=True), until=until)
        torch.distributed.destroy_process_group()
    elif what == "kills":
        run(f"{folder}/whole", steps=3, checkpoint_every=1)
        assert killed_child(f"{folder}/count") == 0
        touches = int(Path(folder, "touches").read_text())
        for at in range(1, touches + 1):
            assert os.WIFSIGNALED(killed_child(f"{folder}/{at}", at))
            if at % 3 == 0:
                killed_child(f"{folder}/{at}", 1 + 7 * at % 20)  # once more while it goes on
            run(f"{folder}/{at}", steps=3, checkpoint_every=1)
        Path(folder, "touches").write_text(str(touches))
