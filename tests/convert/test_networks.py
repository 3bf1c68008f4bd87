"""Dense blocks, transitions and stems of other libraries' networks, in one recording of each."""

import pytest
import torch

from efficient_densenet.convert.recognition.dense import match_dense
from efficient_densenet.convert.recognition.match import match_transition
from efficient_densenet.convert.recording.record import record
from efficient_densenet.modules.reading import Unsupported
from support.libraries import NETWORKS

both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def found(match, recording):
    """What ``match`` makes of every call, by path; of calls inside each other the outermost."""
    results = {}
    for call in recording.calls():
        inside = any(f"{call.path}.".startswith(f"{path}.") for path in results)
        try:
            results |= {} if inside else {call.path: match(recording, call)}
        except Unsupported:
            continue
    return results


@both_modes
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_block_of_a_network_is_recognised(network, training):
    model = network.make()
    recording = record(model, (torch.zeros(network.image),), training=training)
    assert recording.error is None
    blocks = found(match_dense, recording)
    assert len(blocks) == network.blocks
    for path, block in blocks.items():
        assert all(layer.units for layer in block.layers), path
        modules = dict(model.get_submodule(path).named_modules())
        channels = block.input_channels
        for layer in block.layers:
            assert modules[layer.units[0].norm].num_features == channels
            channels += layer.growth


TRANSITIONS = {
    "torchvision": ["features.transition1"],
    "timm": ["features.transition1"],
    "monai-1d": ["features.transition1"],
    "monai-2d": ["features.transition1"],
    "monai-3d": ["features.transition1"],
    "torchxrayvision": ["features.transition1"],
    "torchreid": ["features.transition1"],
    "segmentation-encoder": [],  # it calls their parts one by one
    "pytorchcv": ["features.stage2.trans2"],
}


@both_modes
@pytest.mark.parametrize("name", TRANSITIONS)
def test_every_transition_of_a_network_is_recognised(name, training):
    network = NETWORKS[name]
    recording = record(network.make(), (torch.zeros(network.image),), training=training)
    transitions = {
        path: match for path, match in found(match_transition, recording).items() if match.pool
    }
    assert list(transitions) == TRANSITIONS[name]
    for match in transitions.values():
        dims = len(network.image) - 2
        assert match.activation.name == "relu"
        assert match.pool[:3] == ("average", (2,) * dims, (2,) * dims)
        assert not match.pools_first
