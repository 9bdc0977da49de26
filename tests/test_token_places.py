"""Which pixels a token shows agrees with what the real model does with those pixels."""
import numpy as np
import pytest
import torch
from tiny_internvl import tiny_internvl
from transformers import InternVLConfig

from sfa_core.core.families import FAMILIES, family_of, uniform_grid

INTERNVL = FAMILIES["internvl"]


@torch.no_grad()
@pytest.mark.parametrize("token", [0, 5, 10, 15])
def test_patch_tokens_show_the_pixels_of_their_box(token):
    "Changing the pixels of one box changes the embedding of exactly that token."
    model = tiny_internvl()
    x0, y0, x1, y1 = INTERNVL.grid(model).boxes((0, 0, 56, 56))[1 + token].astype(int)
    blank, marked = torch.zeros(2, 1, 3, 56, 56)
    marked[:, :, y0:y1, x0:x1] = 1
    embed = model.model.vision_tower.embeddings
    changed = (embed(marked) - embed(blank)).abs().amax(-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == [1 + token]


@torch.no_grad()
@pytest.mark.parametrize("image", [56, 84])
def test_language_tokens_show_the_pixels_of_their_box(image):
    "Features of the patches inside a language token's box, and of no others, reach it through the pixel shuffle."
    model = tiny_internvl(image=image)
    patches, words = INTERNVL.grid(model), INTERNVL.language_grid(model)
    side, region = image // 14, (10, 20, 210, 120)
    small, large = patches.boxes(region)[1:], words.boxes(region)
    assert len(words) == model.config.image_seq_length
    for patch in range(side * side):
        features = torch.zeros(1, side, side, 4)
        features[0, patch // side, patch % side] = 1
        reached = model.model.pixel_shuffle(features, model.config.downsample_ratio).reshape(len(words), -1).any(-1)
        x, y = small[patch].reshape(2, 2).mean(0)
        inside = (large[:, 0] < x) & (x < large[:, 2]) & (large[:, 1] < y) & (y < large[:, 3])
        assert inside.tolist() == reached.tolist()


def test_boxes_tile_the_region_and_special_tokens_have_none():
    boxes = uniform_grid(4, 8, special=2).boxes((10, 20, 90, 60))
    assert np.isnan(boxes[:2]).all() and boxes.dtype == np.float32
    area = np.prod(boxes[2:, 2:] - boxes[2:, :2], axis=1)
    assert np.allclose(area.sum(), 80 * 40) and boxes[2:].min() == 10 and boxes[-1].tolist() == [80, 50, 90, 60]


def test_only_layers_that_reach_the_projector_are_counted():
    model = tiny_internvl(layers=3)
    counts = {}
    for layer in (-1, -2, 2, [1, -2]):
        model.config.vision_feature_layer = layer
        counts[str(layer)] = len(INTERNVL.attentions_of(model))
    assert counts == {"-1": 3, "-2": 2, "2": 2, "[1, -2]": 2}


@pytest.mark.parametrize("act, words", [
    (lambda: uniform_grid(2, 2).boxes((5, 0, 5, 9)), r"region is \(5, 0, 5, 9\), expected"),
    (lambda: uniform_grid(3, 4).merged(2), "3 x 4 tokens cannot be merged by 2"),
    (lambda: uniform_grid(0, 4), "expected sides of at least 1"),
    (lambda: INTERNVL.grid(InternVLConfig(vision_config={"image_size": [60, 56]})), "60 x 56 px is not divisible into "
                                                                                    "patches of 14 x 14 px"),
    (lambda: INTERNVL.language_grid(InternVLConfig(downsample_ratio=0.7)), "downsample_ratio is 0.7, expected 1 / n"),
    (lambda: family_of(object()), "model type 'object' is not supported, expected one of: .*internvl"),
])
def test_wrong_input_is_one_clear_line(act, words):
    with pytest.raises(ValueError, match=words):
        act()
