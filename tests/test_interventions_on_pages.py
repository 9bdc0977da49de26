"""Redistribution and reinforced heads are right on pages of every family, tiled or not: every image token is known,
and a batch is its pages one by one."""
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
from PIL import Image

from sfa_core.models.answers import answer
from sfa_core.documents.samples import Sample
from sfa_core.core.families import FAMILIES
from sfa_core.interventions.heads import VHRConfig
from sfa_core.models.images import image_batch
from sfa_core.models.miniatures import miniature
from sfa_core.interventions.redistribution import VARConfig, visual_redistribution
from sfa_core.interventions.sinks import planted_sinks

# half of the energy: the planted ones alone
SINKS = VARConfig((5,), moved=1.0, ratio=0.0, mass=0.0, share=0.5, layers=(0,))
QUESTIONS = ("What is the value of red in 2015?", "List all values.", "elm 9, cat 31")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def small(request):
    return miniature(request.param, spread=0.3)


@pytest.fixture(scope="module")
def pages():
    draw = np.random.default_rng(3)
    return [Sample(f"{i}", f"page {i}", "", question, ("1",),
                   Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)))
            for i, (question, (width, height)) in enumerate(zip(QUESTIONS, [(196, 84), (60, 60), (84, 168)],
                                                                strict=True))]


def test_some_pages_are_tiled_where_a_family_tiles(small, pages):
    views = image_batch(small, [page.image for page in pages]).views
    assert (max(views) > 1) == (small.family.views in ("tiles", "anyres")) and (
        small.family.views != "tiles" or len(set(views)) > 1
    )


def test_every_image_token_of_every_tile_is_known_to_the_rule(small, pages):
    image = small.model.config.image_token_id
    for page in pages:
        expected, seen = image_batch(small, [page.image]).tokens[0].count(image), []
        with planted_sinks(small, 5, (0, expected - 1),
                           start=False), visual_redistribution(small, SINKS) as edits, ExitStack() as stack:
            look = partial(lambda found, *_: found.append(edits[0].columns), seen)
            stack.callback(small.model.lm_head.register_forward_pre_hook(look).remove)
            answer(small, [page], max_new_tokens=1)
        takers, images, moved = (float(part[0].sum()) for part in (seen[0].takers, seen[0].image, seen[0].moved))
        assert (takers, images) == (expected - 2, expected), "the last token of the last tile is one of the two sinks"
        assert moved == pytest.approx(2 * SINKS.moved)


@pytest.mark.parametrize("config", [SINKS, VHRConfig(8.0)], ids=lambda config: type(config).__name__)
def test_a_batch_of_pages_is_its_pages_one_by_one(small, pages, config):
    with planted_sinks(small, 5, (0, 3)):
        plain = answer(small, pages, max_new_tokens=6)
        with config.attach(small):
            together, alone = (answer(small, pages, batch_size=size, max_new_tokens=6) for size in (3, 1))
        again = answer(small, pages, max_new_tokens=6)
    tokens = lambda answers: [found.tokens for found in answers]
    assert tokens(together) == tokens(alone) != tokens(plain) == tokens(again)
