"""An arm that begins with another one has its weights, says so, and is another training than one from scratch."""
import pytest
from safetensors.torch import load_file

from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.load import load_model
from sfa_core.runs.ablation import PUBLISHED, ROWS, mixture_of, row_cell, run_rows
from sfa_core.training.arms import FinetuneConfig, read_arm
from sfa_core.training.finetune import finetune


def test_a_second_stage_goes_on_from_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    bundle, asked, data = load_model("embedded"), samples(documents(2, seed=3))[:4], mixture_of("line:1", 2, seed=1)
    base = FinetuneConfig("control", steps=1, batch_size=2, questions=2, checkpoint_every=0, structure_rate=1e-4)
    run_rows(bundle, data, asked, base, {"sfa_then_blocks": PUBLISHED["sfa_then_blocks"]}, [0], max_new_tokens=4)
    other = FinetuneConfig("sfa_blocks", steps=1, batch_size=2, questions=2, checkpoint_every=0, structure_rate=1e-4,
                           seed=5)
    scratch = finetune(bundle, data, other, tmp_path / "scratch", progress=False).arm
    first, second = (row_cell(bundle, data, base, ROWS, name, 0) / "arm" for name in ("sfa", "sfa_then_blocks"))
    weights = {name: load_file(folder / "structure.safetensors")
               for name, folder in (("first", first), ("second", second), ("scratch", scratch))}
    apart = {name: max(float((weights[name][key] - weights["first"][key]).abs().max()) for key in weights["first"])
             for name in ("second", "scratch")}
    assert 0 < apart["second"] <= 1.1e-4 < apart["scratch"], "one step of the first rate away from where it began"
    assert read_arm(second)[0]["training"]["start"] and "start" not in read_arm(first)[0]["training"]
    with pytest.raises(ValueError, match="start is"):
        finetune(bundle, data, other, tmp_path / "scratch", progress=False, start=first)
    with pytest.raises(ValueError, match="trains structure; control trains tower, projector"):
        finetune(bundle, data, base, tmp_path / "wrong", progress=False, start=first)
    with pytest.raises(FileNotFoundError, match="no trained arm"):
        finetune(bundle, data, other, tmp_path / "none", progress=False, start=tmp_path / "nothing")
