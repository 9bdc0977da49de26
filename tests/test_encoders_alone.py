"""An encoder without a language model is a bundle like any other: structure, probes, tokens and dense binding work on
pages of any size, and whatever asks for an answer is refused in one line."""
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, ViTConfig, ViTForImageClassification

import sfa_core as sfa
from sfa_core.core.families import ENCODERS, head_count
from sfa_core.documents.generate import documents
from sfa_core.models.encoders import load_encoder
from sfa_core.models.images import image_batch, image_features
from sfa_core.models.load import load_model
from sfa_core.models.miniatures import miniature, miniature_encoder
from sfa_core.models.parts import describe
from sfa_core.models.resolution import at_resolution
from sfa_core.pretraining.dense import DenseHeads, dense_binding
from sfa_core.pretraining.recipe import decode_documents, pixel_values, targets_at
from sfa_core.structure.inject import eject, inject, set_blocks, set_geometry, structures_of, use_attention
from sfa_core.structure.geometry import uniform_geometry
from sfa_core.structure.store import load_structure, save_structure
from sfa_core.tokens.adaptive import attach_tokens, detach_tokens
from sfa_core.tokens.patches import PatchConfig

each = pytest.mark.parametrize("name", ENCODERS)


def pixels(count, height, width, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def states(bundle, page):
    return bundle.model(pixel_values=page).last_hidden_state


def attached(name, factor=20.0, dtype=torch.float32, **options):
    bundle = miniature_encoder(name, spread=0.3, seed=3, **options)
    with torch.no_grad():
        for bias in inject(bundle, blocks=4):
            for weight in bias.parameters():
                weight.mul_(factor)
    bundle.model.to(dtype)
    return bundle


@each
@pytest.mark.parametrize("size", [(56, 56), (28, 84), (112, 84)])
def test_structural_attention_equals_the_dense_form_on_pages_of_any_size(name, size):
    bundle = attached(name, dtype=torch.float64)
    page = pixels(2, *size, dtype=torch.float64)
    found = {}
    for way in ("sfa", "sfa_dense", "sfa_eager"):
        use_attention(bundle.model, way)
        bundle.model.zero_grad()
        output = bundle.model(pixel_values=page).last_hidden_state  # with gradients: factors, no cached mask
        output.square().mean().backward()
        found[way] = output.detach(), {n: p.grad.clone() for n, p in bundle.model.named_parameters()
                                       if p.grad is not None}
    for way in ("sfa_dense", "sfa_eager"):
        assert (found["sfa"][0] - found[way][0]).abs().max() < 1e-10
        assert found["sfa"][1].keys() == found[way][1].keys()
        assert all((found["sfa"][1][n] - g).abs().max() < 1e-10 for n, g in found[way][1].items())
    use_attention(bundle.model, "sfa")
    assert (states(bundle, page) - found["sfa"][0]).abs().max() < 1e-10  # without gradients: the cached mask
    plain = states(eject(bundle), page)
    assert (plain - found["sfa"][0]).abs().max() > 1e-3, "the bias changes nothing, so equality would show nothing"


@each
def test_eject_gives_the_encoder_back(name):
    bundle = miniature_encoder(name)
    page, names = pixels(2, 28, 70), {n for n, _ in bundle.model.named_parameters()}
    before, hooks = states(bundle, page), len(bundle.model._forward_pre_hooks)
    key = bundle.identity
    inject(bundle)
    assert states(bundle, page).shape == before.shape and bundle.identity != key
    eject(bundle)
    assert torch.equal(states(bundle, page), before) and bundle.identity == key
    assert {n for n, _ in bundle.model.named_parameters()} == names
    assert len(bundle.model._forward_pre_hooks) == hooks


@each
def test_a_copy_places_its_own_tokens(name):
    bundle = attached(name)
    twin = copy.deepcopy(bundle)
    small, wide = pixels(1, 28, 28), pixels(1, 56, 84)
    expected = states(bundle, small)
    states(twin, wide)
    assert structures_of(twin)[0].geometry.size == (4, 6) and structures_of(bundle)[0].geometry.size == (2, 2)
    assert torch.equal(states(bundle, small), expected) and torch.equal(states(twin, small), expected)


@each
def test_positions_of_another_size_are_those_of_the_class(name):
    "Dinov2 and InternViT interpolate without being asked; the others are asked, and give their own table at its size."
    bundle = miniature_encoder(name)
    embeddings = bundle.model.embeddings
    asked = {} if name in ("dinov2", "internvit") else {"interpolate_pos_encoding": True}
    caught = {}
    embeddings.register_forward_hook(lambda module, args, output: caught.update(out=output))
    for size in ((56, 56), (28, 84)):
        page = pixels(1, *size)
        states(bundle, page)
        with torch.no_grad():
            assert torch.equal(caught["out"], embeddings.forward(page, **asked))
    if asked:
        with torch.no_grad():
            assert torch.equal(embeddings.forward(pixels(1, 56, 56)),
                               embeddings.forward(pixels(1, 56, 56), **asked))


def test_a_geometry_set_on_purpose_belongs_to_its_size():
    bundle = attached("dinov2")
    set_blocks(bundle, torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="the encoder sees 19 tokens, the geometry places 17 on a grid of 4 x 4"):
        states(bundle, pixels(1, 42, 84))
    set_blocks(bundle, None)
    assert states(bundle, pixels(1, 42, 84)).shape[1] == 19
    moved = uniform_geometry(3, 6, 1)
    set_geometry(bundle, type(moved)(moved.row.flip(0), moved.column, moved.special))  # places in another order
    with pytest.raises(ValueError, match="the encoder sees 17 tokens, the geometry places 19"):
        states(bundle, pixels(1, 56, 56))


def test_another_tile_of_a_whole_model_is_followed_too():
    bundle = miniature("internvl")
    tower = bundle.family.tower_of(bundle.model)
    with torch.no_grad():
        for bias in inject(bundle):
            bias.row.fill_(3.0)
        mine = tower(pixel_values=pixels(1, 84, 84)).last_hidden_state
        use_attention(bundle.model, "sfa_dense")
        assert torch.allclose(mine, tower(pixel_values=pixels(1, 84, 84)).last_hidden_state, atol=1e-5)


# loading

@each
def test_a_folder_is_loaded_as_it_was_saved(name, tmp_path):
    bundle = miniature_encoder(name, spread=0.3)
    bundle.model.save_pretrained(tmp_path)
    bundle.processor.image_processor.save_pretrained(tmp_path)
    loaded = sfa.load_encoder(tmp_path, placement="cpu")
    page = pixels(1, 56, 56)
    assert torch.equal(states(loaded, page), states(bundle, page)) and loaded.identity == bundle.identity
    wide = load_encoder(tmp_path, (28, 84), placement="cpu", precision="bfloat16")
    assert wide.model.dtype == torch.bfloat16 and (wide.grid.height, wide.grid.width) == (2, 6)
    assert wide.identity != loaded.identity and repr(wide).count("\n") == 0
    with pytest.raises(ValueError, match="of type .*; expected one of internvl, .*; load_encoder loads it"):
        load_model(tmp_path)


def small_clip():
    sides = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(**sides, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return text, dict(**sides, image_size=56, patch_size=14)


def checkpoint(kind):
    "A checkpoint that holds more than the encoder, and its encoder."
    text, vision = small_clip()
    if kind == "clip":
        whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        return whole, whole.vision_model
    if kind == "siglip":
        whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision | dict(vision_use_head=True)))
        return whole, whole.vision_model
    whole = ViTForImageClassification(ViTConfig(**vision, num_labels=3))
    return whole, whole.vit


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_the_encoder_of_a_larger_checkpoint_is_read(kind, tmp_path):
    torch.manual_seed(0)
    whole, tower = checkpoint(kind)
    whole.eval().save_pretrained(tmp_path)
    miniature_encoder("dinov2").processor.image_processor.save_pretrained(tmp_path)
    loaded, page = load_encoder(tmp_path, placement="cpu"), pixels(1, 56, 56)
    with torch.no_grad():
        assert torch.equal(states(loaded, page), tower(pixel_values=page).last_hidden_state)


def saved(folder, **settings):
    bundle = miniature_encoder("dinov2")
    bundle.model.save_pretrained(folder)
    bundle.processor.image_processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("settings, size, words", [
    ({}, 50, "pages of 50 x 50 px for patches of 14 x 14 px; expected multiples of the patch"),
    ({}, (14, 0), "pages of 14 x 0 px"),
    ({"image_mean": [0.5]}, None, r"image_mean \[0.5\]"),
    ({"image_std": [0.2, 0.0, 0.2]}, None, "deviations above 0"),
])
def test_wrong_folders_and_sizes_are_one_clear_line(settings, size, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        load_encoder(saved(tmp_path, **settings), size)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path):
    (saved(tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json; expected one with image_mean"):
        load_encoder(tmp_path)
    miniature("internvl").model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="of type 'internvl'; expected one of dinov2, .*; load_model loads it"):
        load_encoder(tmp_path / "whole")
    with pytest.raises(ValueError, match="no encoder 'resnet'; expected one of dinov2, "):
        miniature_encoder("resnet")


def test_structural_weights_fit_pages_of_any_size(tmp_path):
    bundle = attached("vit", size=(28, 84))
    page = pixels(1, 28, 84)
    save_structure(bundle, tmp_path / "weights")
    folder = tmp_path / "encoder"
    plain = eject(copy.deepcopy(bundle))
    plain.model.save_pretrained(folder)
    plain.processor.image_processor.save_pretrained(folder)
    loaded = load_encoder(folder, 56, structure=tmp_path / "weights", placement="cpu")
    assert torch.equal(states(loaded, page), states(bundle, page)) and "+" in loaded.revision
    with pytest.raises(ValueError, match="encoder family is vit, expected dinov2"):
        load_structure(miniature_encoder("dinov2"), tmp_path / "weights")


# what the workbook does with encoders

@pytest.fixture(scope="module")
def pages():
    return documents(3, 5, size=112)


@each
def test_attention_is_measured_as_the_softmax_says(name, pages):
    bundle = miniature_encoder(name, (56, 84), spread=0.3)
    seen = sfa.record(bundle, pages, queries="all", batch_size=2)
    attentions, caught = bundle.family.attentions_of(bundle.model), []
    use_attention(bundle.model, "eager")
    handles = [module.register_forward_hook(lambda m, a, out: caught.append(out[1])) for module in attentions]
    batch = image_batch(bundle, [sample.image for sample in sfa.samples(pages)])
    features = image_features(bundle, batch)
    for handle in handles:
        handle.remove()
    assert seen.maps.shape[1:3] == (2, head_count(attentions[0])) and len(features.images) == len(seen.sample)
    assert features.images[0].shape == (24, 32)
    for layer, weights in enumerate(caught):
        assert np.allclose(seen.maps[:, layer], weights.detach().numpy(), atol=1e-5)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
        assert np.allclose(seen.entropy[:, layer], entropy.detach().numpy(), atol=1e-4)
    maps = {sample.id: sfa.text_map(sample) for sample in sfa.samples(pages)}
    table = sfa.paired_contrast(sfa.by_region(seen, maps, threshold=0.05), by=("layer",))
    assert len(table) == 2 and table["n"].min() >= 2


@each
def test_merged_patches_run_in_encoders_alone(name):
    bundle = miniature_encoder(name, (84, 84), spread=0.3)
    page = torch.zeros(2, 3, 84, 84)
    page[:, :, 30:60, 30:60] = pixels(2, 30, 30)
    plain = states(bundle, page)
    control = attach_tokens(bundle, PatchConfig((14, 28), random=3, budget=21))
    merged = states(bundle, page)
    assert merged.shape == plain.shape and not torch.allclose(merged, plain, atol=1e-2)
    assert all(len(plan) == 21 for plan in control.last)
    detach_tokens(bundle)
    assert torch.equal(states(bundle, page), plain)
    attach_tokens(bundle, PatchConfig((14, 28), random=3, budget=36))  # as many leaves as cells
    assert torch.allclose(states(bundle, page), plain, atol=1e-4)


@each
def test_dense_binding_counts_patches_of_encoders_alone(name, pages):
    bundle = miniature_encoder(name, 112)
    known = decode_documents(pages, (8, 8))
    batch = pixel_values(bundle, known.pixels), targets_at(known, np.arange(len(pages)))
    found = dense_binding(bundle.model, DenseHeads(32), [batch])
    assert found["colour"]["n"] == int((batch[1]["colour"] > 0).sum()) > 0
    assert all(0 <= measure["rate"] <= 1 for measure in found.values())


@each
def test_answers_are_refused_in_one_line(name, pages):
    bundle = miniature_encoder(name, 112)
    asked = [lambda: sfa.answer(bundle, pages), lambda: sfa.evaluate(bundle, pages),
             lambda: sfa.record(bundle, pages, tower="language"), lambda: describe(bundle),
             lambda: sfa.finetune(bundle, pages, sfa.FinetuneConfig(arm="control", steps=1), "unused")]
    for ask in asked:
        with pytest.raises(ValueError, match="is an encoder without a language model and answers no questions") as why:
            ask()
        assert "\n" not in str(why.value)


def test_pages_are_shown_whole_at_the_size_that_is_asked_for(pages):
    bundle = miniature_encoder("siglip_vision", (28, 84))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 300, 3), dtype=np.uint8))
    batch = image_batch(bundle, [wide, wide.resize((70, 70))])
    assert batch.inputs["pixel_values"].shape == (2, 3, 28, 84) and batch.views == [1, 1]
    larger = at_resolution(bundle, 70)
    assert image_batch(larger, [wide]).inputs["pixel_values"].shape == (1, 3, 70, 70)
    assert larger.model is bundle.model and len(larger.grid) == 25
    with pytest.raises(ValueError, match="a tile of 71 px; expected a multiple of 14 px"):
        at_resolution(bundle, 71)
    cut = image_features(bundle, image_batch(bundle, [wide], tiles=4))
    assert cut.images[0].shape[0] > 12 and cut.images[0].shape[0] % 12 == 0  # several tiles and a thumbnail
    assert sfa.record(larger, pages).boxes.shape[1] == 25
