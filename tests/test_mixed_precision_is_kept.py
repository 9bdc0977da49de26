"""Training computes in the precision that accelerate is told; a model in bfloat16 computes in bfloat16."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import BitsAndBytesConfig

from sfa_core.documents.generate import documents
from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.models.miniatures import miniature
from sfa_core.models.quantization import stored_as
from sfa_core.training.arms import FinetuneConfig
from sfa_core.training.finetune import finetune
from sfa_core.training.placement import LanguageSide, encode

PRECISIONS = [
    (torch.float32, "no", None),
    (torch.float32, "bf16", torch.bfloat16),
    (torch.bfloat16, "no", torch.bfloat16),
]


@pytest.fixture(scope="module")
def charts():
    return documents(2, seed=5)


def accelerator(precision):
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate takes its precision once per process
    return Accelerator(mixed_precision=precision, cpu=True)


@pytest.fixture(autouse=True)
def as_before():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_use():
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@pytest.mark.parametrize("arm", ["sfa", "control"])  # with the encoder as stored, and in float32 while it learns
@pytest.mark.parametrize("stored, mixed, expected", PRECISIONS)
def test_training_computes_as_accelerate_says(charts, tmp_path, stored, mixed, expected, arm):
    bundle, seen = miniature("internvl"), []
    bundle.model.to(stored)

    def loss(model, batch):
        seen.append(in_use())
        return answer_loss(model, batch)

    config = FinetuneConfig(arm, steps=1, batch_size=2, warmup=0)
    finetune(bundle, charts, config, tmp_path, accelerator=accelerator(mixed), loss=loss, progress=False)
    assert seen == [expected]


@pytest.mark.parametrize("stored, mixed, expected", PRECISIONS)
def test_the_language_side_of_a_cut_computes_as_accelerate_says(charts, monkeypatch, stored, mixed, expected):
    bundle, seen = miniature("internvl"), []
    bundle.model.to(stored)
    batch, side = training_batch(bundle, list(charts)[:1], tiles=1), LanguageSide(bundle)
    hook = bundle.family.language_of(bundle.model).register_forward_pre_hook(lambda *_: seen.append(in_use()))
    with accelerator(mixed).autocast():
        features, pattern = encode(bundle.model, batch)
        side.loss({name: value for name, value in batch.items() if name != "pixel_values"}, features, pattern)
    hook.remove()
    assert seen == [expected]


@pytest.mark.parametrize(
    "config, name",
    [
        (None, None),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "fp4"),
        (BitsAndBytesConfig(load_in_8bit=True), "int8"),
        (BitsAndBytesConfig(load_in_8bit=True).to_dict(), "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_the_format_of_quantised_weights_has_its_name(config, name):
    assert stored_as(config) == name
