"""The two arms of a comparison train in every family, from a folder as a checkpoint is loaded: same documents in the
same order, each learns, they differ, and the model is given back as it was."""
import numpy as np
import pytest
from test_families import each_family

import sfa_core as sfa
from sfa_core.models.load import save_model
from sfa_core.models.miniatures import miniature
from sfa_core.models.sequences import document_losses


@pytest.fixture(scope="module")
def pages():
    return sfa.generate(4, seed=7_201), sfa.generate(2, seed=7_300)


@each_family
def test_control_and_structure_learn_and_differ(name, pages, tmp_path):
    learn, fresh = pages
    texts = [text for row in learn for part in row["questions"] for text in (part["question"], *part["answers"])]
    path = save_model(miniature(name, texts, seed=0, width=64, tile=112), tmp_path / "model")
    bundle = sfa.load_model(path)
    before, losses, answered = bundle.identity, {"baseline": document_losses(bundle, fresh)}, {}
    for arm in ("control", "vision"):
        config = sfa.FinetuneConfig(arm, 4, 2, questions=2, learning_rate=2e-3, structure_rate=2e-2)
        trained = sfa.finetune(bundle, learn, config, tmp_path / arm, progress=False)
        assert bundle.identity == before
        with sfa.load_arm(bundle, trained.arm):
            losses[arm] = document_losses(bundle, fresh)
            answered[arm] = sfa.evaluate(bundle, sfa.samples(fresh)[:4], batch_size=4, max_new_tokens=2).records
    mean = {arm: np.mean(list(values.values())) for arm, values in losses.items()}
    assert mean["control"] < mean["baseline"] and mean["vision"] < mean["baseline"]
    assert losses["control"] != losses["vision"] and set(losses["control"]) == set(losses["baseline"])
    assert list(answered["control"]["id"]) == list(answered["vision"]["id"]) and len(answered["control"]) == 4
    assert document_losses(bundle, fresh) == pytest.approx(losses["baseline"])
