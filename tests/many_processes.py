"""What every process does that accelerate launch starts: train an arm with whole weights and with spread ones, and
answer questions together."""

import json
import sys
from operator import attrgetter
from pathlib import Path

import torch
from accelerate import Accelerator
from test_finetune_arms import QUICK, tiny

from sfa_core.documents.generate import documents
from sfa_core.models.evaluate import answer_together, evaluate
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import FinetuneConfig

CONFIG = FinetuneConfig("vision", **QUICK | dict(accumulation=2, terms=("row", "column", "distance", "block")))
COUNTS = (1, 2, 5, 9)  # questions, with batches of 2: fewer than processes, as many, an odd rest

parts = attrgetter("records", "summary")  # of an evaluation


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator, charts = Accelerator(cpu=True), documents(11, seed=5)
    assert accelerator.num_processes == 2
    finetune(tiny(), charts, CONFIG, folder / "whole", accelerator=accelerator, progress=False)
    for until in (3, None):  # stopped, and taken up again by a model that knows nothing of it
        finetune(tiny(), charts, CONFIG, folder / "sharded", until=until, accelerator=accelerator, progress=False,
                 sharded=True)
    asked, bundle = questions(), tiny()
    replies = {count: [reply.prediction
                       for reply in answer_together(bundle, asked[:count], 2, accelerator, max_new_tokens=4)]
                       for count in COUNTS}
    records, summary = parts(evaluate(bundle, asked[:9], batch_size=2, max_new_tokens=4, draws=100,
                                      accelerator=accelerator))
    (folder / f"replies-{accelerator.process_index}.json").write_text(json.dumps([replies, records["id"].tolist(),
                                                                                  summary["n"]]))
    torch.distributed.destroy_process_group()


def questions():
    from sfa_core.documents.samples import samples

    return samples(documents(3, seed=6))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
