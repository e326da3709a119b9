"""``groupdetr export --output model.engine``, by the builder of TensorRT for RTX.

It has TensorRT's Python interface and its parser of ONNX, and needs no GPU.
"""

import json
import sys
import types

import pytest
from small_checkpoint import write_checkpoint

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.engines import EngineSettings, build_engine


def export(*arguments):
    cli.main(["export", *map(str, arguments)])


@pytest.fixture
def tensorrt(monkeypatch):
    """TensorRT for RTX in TensorRT's place; keeps the networks and the configurations that it builds."""
    rtx = pytest.importorskip("tensorrt_rtx_bindings")

    class Builder(rtx.Builder):
        def build_serialized_network(self, network, config):
            module.built.append((network, config))
            return super().build_serialized_network(network, config)

    module = types.ModuleType("tensorrt")
    module.__dict__.update({**vars(rtx), "Builder": Builder, "built": []})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def types_of(network):
    """The types of what the layers of a network compute, by the kind of layer."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {(layer.type.name, layer.get_output(0).dtype.name) for layer in layers}


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["conditional_detr_r50", "dino_4scale_r50"])
def test_an_engine_is_built_for_images_of_many_sizes(name, half, tensorrt, tmp_path, capsys):
    levels = {"num_levels": 2, "backbone_levels": 2} if name == "dino_4scale_r50" else {}
    checkpoint, path = write_checkpoint(tmp_path, name, **levels), tmp_path / "new" / "model.engine"
    flags = ["--half"] if half else []
    export(checkpoint, "--output", path, "--max-shape", 4, 96, 128, "--min-shape", 1, 32, 32, "--masks", *flags)
    assert capsys.readouterr().out.startswith(f"{path}: ")
    assert path.stat().st_size > 10_000
    assert json.loads(path.with_suffix(".json").read_text())["class_names"] == ["cat", "dog", "bird"]
    [(network, _)] = tensorrt.built
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    assert {each.name: tuple(each.shape) for each in inputs} == {"images": (-1, 3, -1, -1), "masks": (-1, -1, -1)}
    products = {kind for layer, kind in types_of(network) if layer in ("MATRIX_MULTIPLY", "CONVOLUTION")}
    assert products == ({"HALF"} if half else {"FLOAT"})


@pytest.mark.slow
def test_an_engine_of_one_size(tensorrt, tmp_path):
    detector = gd.Detector.from_pretrained(write_checkpoint(tmp_path), device="cpu")
    settings = EngineSettings(max_shape=(3, 40, 52))
    assert detector.export(tmp_path / "a.engine", (40, 52), half=True, engine=settings).stat().st_size > 10_000
    [(network, config)] = tensorrt.built
    assert tuple(network.get_input(0).shape) == (-1, 3, 40, 52)
    assert config.num_optimization_profiles == 1


@pytest.fixture
def pooling(tmp_path):
    """An ONNX file with the inputs of a detector of one height."""
    onnx = pytest.importorskip("onnx")
    images, masks = ("images", 1, ["batch", 3, 32, "width"]), ("masks", 9, ["batch", 32, "width"])
    inputs = [onnx.helper.make_tensor_value_info(*each) for each in (images, masks)]
    output = onnx.helper.make_tensor_value_info("logits", 1, None)
    nodes = [
        onnx.helper.make_node("Unsqueeze", ["masks", "axis"], ["channel"]),
        onnx.helper.make_node("Where", ["channel", "zero", "images"], ["shown"]),
        onnx.helper.make_node("GlobalAveragePool", ["shown"], ["logits"]),
    ]
    constants = [onnx.helper.make_tensor("axis", 7, [1], [1]), onnx.helper.make_tensor("zero", 1, [1], [0.0])]
    graph = onnx.helper.make_graph(nodes, "pooling", inputs, [output], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.ir_version = 10  # that of exported files
    path = tmp_path / "pooling.onnx"
    onnx.save(model, path)
    return path


def test_an_engine_has_its_shapes_and_its_limit_of_memory(tensorrt, pooling, tmp_path):
    path = tmp_path / "pooling.engine"
    build_engine(pooling, path, ((1, 32, 32), (2, 32, 48), (4, 32, 64)), workspace=0.5)
    assert path.stat().st_size > 1000
    [(_, config)] = tensorrt.built
    assert config.get_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE) == 2**29
    assert config.num_optimization_profiles == 1


def test_what_tensorrt_refuses_is_said_in_one_sentence(tensorrt, pooling, tmp_path):
    path = tmp_path / "pooling.engine"
    with pytest.raises(ValueError, match=r"images of this graph have shape \[-1, 3, 32, -1\] .* \[1, 3, 48, 48\]"):
        build_engine(pooling, path, ((1, 48, 48),) * 3)
    pooling.write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"TensorRT .* does not take the graph: .*Failed to parse the ONNX model"):
        build_engine(pooling, path, ((1, 32, 32),) * 3)
    assert not path.exists()


def test_shapes_follow_from_how_images_are_resized():
    assert EngineSettings().profile(800, 1333) == ((1, 400, 400), (1, 800, 1066), (1, 1333, 1333))
    assert EngineSettings().profile(640, None, square=True) == ((1, 640, 640),) * 3
    assert EngineSettings(max_shape=(8, 48, 64)).profile(0, None, image_size=(48, 64)) == (
        (1, 48, 64),
        (1, 48, 64),
        (8, 48, 64),
    )
    assert EngineSettings(opt_shape=(4, 300, 2000)).profile(800, 1333) == (
        (1, 300, 400),
        (4, 300, 2000),
        (4, 1333, 2000),
    )
    with pytest.raises(ValueError, match=r"max_shape must not exceed one another, got .*, \(1, 320, 320\)"):
        EngineSettings(max_shape=(1, 320, 320)).profile(800, 1333)
    with pytest.raises(ValueError, match=r"opt_shape must be .* from 1 on; got \(0, 640, 640\)"):
        EngineSettings(opt_shape=(0, 640, 640))
    with pytest.raises(ValueError, match="workspace must be more than 0 GiB and finite, got 0"):
        EngineSettings(workspace=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "a.onnx", "--workspace", 4], "workspace is for .engine, got a.onnx"),
        (["--output", "a.pt2", "--max-shape", 4, 640, 640], "max_shape is for .engine, got a.pt2"),
        (["--output", "a.pt2", "--half"], "half is for .onnx and .engine, got a.pt2"),
        (["--output", "a.engine"], r"engines need TensorRT .*: pip install 'groupdetr_fast\[tensorrt\]', on a machine"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_checkpoint_is_read(flags, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(SystemExit, match=message):
        export("nowhere", *flags)


def stand_in(**names):
    """A package of TensorRT's name that has little of it."""
    return types.SimpleNamespace(__version__="10.13.3.9", **names)


STRONG = types.SimpleNamespace(STRONGLY_TYPED=1)


def test_an_old_tensorrt_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(NetworkDefinitionCreationFlag=object()))
    with pytest.raises(SystemExit, match="engines need TensorRT 10 or newer, got 10"):
        export("nowhere", "--output", "a.engine")


def test_a_machine_without_a_gpu_is_named(monkeypatch, tmp_path):
    """TensorRT logs an error, and then its bindings complain of what they got."""

    class Logger:
        Severity = types.SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def builder(log):
        log.log(2, "ignored")
        log.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setitem(
        sys.modules, "tensorrt", stand_in(NetworkDefinitionCreationFlag=STRONG, ILogger=Logger, Builder=builder)
    )
    with pytest.raises(
        ValueError, match=r"cannot start here \(CUDA initialization failure with error: 35\): engines are"
    ):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", ((1, 32, 32),) * 3)
