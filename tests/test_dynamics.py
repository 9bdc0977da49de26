"""Encoders from nothing on fresh pages: arms of a seed see the same pages, a training cut off ends the same, and
what it leaves can be read."""
import numpy as np
import pandas as pd
import pytest
import torch

import sfa_core.pretraining.dynamics as dynamics
from sfa_core.pretraining.dense import HEADS, PAGE_HEADS
from sfa_core.documents.generate import PRESET_KINDS, documents
from sfa_core.pretraining.dynamics import (
    DenseConfig,
    FreshPages,
    classes_of,
    draw_batch,
    learn_dense,
    read_dense_encoder,
    measure_dense,
)
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.pretraining.recipe import decode_documents

TINY = EmbeddedConfig(image_size=224, vision_width=32, vision_layers=1, vision_heads=2, vision_hidden=32,
                      language_width=32, language_layers=1,
                      language_heads=2, language_kv_heads=1, head_dim=16, language_hidden=32)
CONFIG = DenseConfig(("row", "column"), steps=5, batch_size=3, every=2, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is the value of oak? 12"])


@pytest.fixture(scope="module")
def held_out():
    return {"": decode_documents(documents(6, 3, preset="page"), (16, 16)),
            "page_large": decode_documents(documents(2, 3, preset="page_large"), (16, 16))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, held_out):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *learn_dense(FreshPages(), held_out, tokenizer, CONFIG, folder, TINY)


def test_a_training_that_is_cut_off_between_and_within_measurements_ends_the_same(trained, tmp_path, tokenizer,
                                                                                  held_out, monkeypatch):
    folder, curve, weights = trained
    drawn = dynamics.draw_batch
    for last in (1, 3):
        def failing(data, seed, step, count, last=last, **options):
            if step == last:
                raise KeyboardInterrupt
            return drawn(data, seed, step, count, **options)

        monkeypatch.setattr(dynamics, "draw_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            learn_dense(FreshPages(), held_out, tokenizer, CONFIG, tmp_path, TINY)
    monkeypatch.setattr(dynamics, "draw_batch", drawn)
    again, same = learn_dense(FreshPages(), held_out, tokenizer, CONFIG, tmp_path, TINY)
    pd.testing.assert_frame_equal(again, curve)
    pd.testing.assert_frame_equal(same, weights)
    assert (tmp_path / "encoder.safetensors").read_bytes() == (folder / "encoder.safetensors").read_bytes()
    assert sorted(curve["step"].unique()) == [2, 4, 5]
    assert {"digits", "label_colour", "value_binding", "page_large row_binding",
            "page_large column_binding"} <= set(curve["measure"])


def test_the_encoder_that_is_kept_measures_as_it_did(trained, tokenizer, held_out):
    folder, curve, _ = trained
    bundle, heads, about = read_dense_encoder(folder / "encoder.safetensors", tokenizer)
    last = curve[curve["step"] == 5].set_index("measure")
    for name, part in held_out.items():
        for measure, found in measure_dense(bundle, heads, part).items():
            assert last.loc[f"{name} {measure}".strip(), ["rate", "n"]].tolist() == [found["rate"], found["n"]]
    assert about["dense"]["terms"] == ["row", "column"] and heads.classes == PAGE_HEADS
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_dense_encoder(folder / "nothing.safetensors", tokenizer)


def test_arms_of_a_seed_see_the_same_pages_and_no_page_twice(tokenizer, held_out, tmp_path, monkeypatch):
    seen, drawn = {}, dynamics.draw_batch

    def noted(*given, **options):
        batch = drawn(*given, **options)
        seen[arm].append(batch["pixels"])
        return batch

    monkeypatch.setattr(dynamics, "draw_batch", noted)
    for arm, terms in (("control", ()), ("structure", ("row",))):
        seen[arm] = []
        learn_dense(FreshPages(), held_out[""], tokenizer, DenseConfig(terms, steps=3, batch_size=4, every=3),
                    tmp_path / arm, TINY)
    pages = [np.concatenate(batches) for batches in seen.values()]
    assert len(pages[0]) == 12 and (pages[0] == pages[1]).all()
    assert len({page.tobytes() for page in pages[0]} | {page.tobytes() for page in held_out[""].pixels}) == 12 + 6


def test_fresh_pages_are_a_function_of_seed_and_step():
    data = FreshPages(kinds=("bar", "table"))
    one, two = draw_batch(data, 0, 7, 4), draw_batch(data, 0, 7, 4)
    assert (one["pixels"] == two["pixels"]).all() and all(
        torch.equal(one[name], two[name]) for name in one if name != "pixels"
    )
    for other in (draw_batch(data, 1, 7, 4), draw_batch(data, 0, 8, 4),
                  draw_batch(FreshPages(kinds=("bar", "table"), seed=1), 0, 7, 4)):
        assert (one["pixels"] != other["pixels"]).any((1, 2, 3)).all(), "every page is another one"
    assert one["pixels"].shape == (4, 224, 224, 3) and one["colour"].shape == (4, 16, 16)
    assert FreshPages().kinds == PRESET_KINDS["page"] and classes_of(data) == PAGE_HEADS
    assert classes_of(FreshPages("embedded")) == HEADS == classes_of(decode_documents(documents(6, 3), (8, 8)))


@pytest.mark.parametrize("given, message", [
    (dict(preset="plain"), "unknown preset 'plain'; expected one of embedded"),
    (dict(size=225), "pages of 225 px; expected a multiple of the patch, 14 px"),
])
def test_fresh_pages_that_cannot_be_drawn_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FreshPages(**given)
