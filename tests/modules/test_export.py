"""A trained network leaves for a server: ``torch.export`` and ONNX, run by onnxruntime.

What is exported is the naive path of the same parameters: a server keeps nothing for a backward
pass.
"""

import pytest
import torch

from efficient_densenet import DenseNet
from support.compare import assert_close, randomise_
from support.marks import clause, every_mode

BATCH = ({0: torch.export.Dim("batch")},)


@pytest.fixture(autouse=True)
def without_poison(poisoned_memory):
    """Deterministic algorithms change the exported graph."""
    torch.use_deterministic_algorithms(False)


def network(mode):
    model = DenseNet(3, (2, 1), 4, 2, num_classes=3, recompute=mode).eval()
    randomise_(model)
    return model


def images(batch):
    return torch.randn(batch, 3, 32, 32)


@clause("5 · torch.export of the eval model, dynamic batch")
@every_mode
def test_exported_network_matches(mode, took):
    model = network(mode)
    took("exported: nothing is kept for a backward pass")
    exported = torch.export.export(model, (images(3),), dynamic_shapes=BATCH)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert not any("efficient_densenet" in target for target in targets)
    for batch in (2, 5):
        x = images(batch)
        assert_close("logits", exported.module()(x), model(x), 1e-5)


@clause("5 · ONNX of the eval model, checked with onnxruntime")
@every_mode
def test_onnxruntime_computes_same_logits(mode, took, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = network(mode)
    took("exported: nothing is kept for a backward pass")
    file = tmp_path / "network.onnx"
    program = torch.onnx.export(
        model, (images(3),), dynamo=True, dynamic_shapes=BATCH, verbose=False
    )
    program.save(file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    for batch in (2, 5):
        x = images(batch)
        (logits,) = session.run(None, {wanted.name: x.numpy()})
        assert_close("logits", torch.from_numpy(logits), model(x), 1e-5)
