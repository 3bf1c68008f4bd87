"""The comparison fails where it must, and says where."""

import copy

import pytest
import torch

from efficient_densenet.modules.naive import DenseBlock
from support.compare import assert_close, assert_same_training, image, norms


def update_twice(block):
    def hook(norm, args, out):
        norm.running_mean.data.lerp_(args[0].detach().mean((0, 2, 3)), 0.1)

    norms(block)[1].register_forward_hook(hook)


def count_twice(block):
    def hook(norm, args, out):
        norm.num_batches_tracked.add_(1)

    norms(block)[0].register_forward_hook(hook)


def scale_one_gradient(block):
    block["denselayer2"].norm2.bias.register_hook(lambda grad: grad * (1 + 1e-8))


def freeze_one_parameter(block):
    block["denselayer1"].conv2.weight.requires_grad_(False)


def scale_input_gradient(block):
    block.register_forward_pre_hook(lambda module, args: args[0] + 1e-8 * (args[0] - args[0].data))


def shift_output(block):
    block.register_forward_hook(lambda module, args, out: out + 1e-8)


def overwrite_input(block):
    def hook(module, args):
        args[0].detach().add_(1e-12)

    block.register_forward_pre_hook(hook)


def overwrite_upstream(block):
    def hook(module, gradients):
        gradients[0].mul_(2)

    block.register_full_backward_pre_hook(hook)


DEFECTS = {
    "running_mean": update_twice,
    "num_batches_tracked": count_twice,
    "gradient of denselayer2.norm2.bias": scale_one_gradient,
    "gradient of denselayer1.conv2.weight": freeze_one_parameter,
    "gradient of the input": scale_input_gradient,
    "output": shift_output,
    "the input was modified": overwrite_input,
    "the upstream gradient was modified": overwrite_upstream,
}


@pytest.mark.parametrize(("named", "defect"), DEFECTS.items(), ids=DEFECTS)
def test_defect_is_found_and_named(named, defect):
    right = DenseBlock(2, 5, 2, 3).double()
    wrong = copy.deepcopy(right)
    assert_same_training(copy.deepcopy(wrong), copy.deepcopy(right), image())
    defect(wrong)
    with pytest.raises(AssertionError, match=named):
        assert_same_training(wrong, right, image())


def test_failure_names_tensor_index_and_values():
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[1, 2] = 4.5
    message = r"weight: worst at \(1, 2\): got 4.5, expected 0.0"
    with pytest.raises(AssertionError, match=message):
        assert_close("weight", actual, expected, 1e-3)


@pytest.mark.parametrize(
    "actual",
    [None, torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, torch.nan])],
    ids=["missing", "other-shape", "other-dtype", "nan"],
)
def test_unlike_tensors_are_not_close(actual):
    with pytest.raises(AssertionError, match="weight: "):
        assert_close("weight", actual, torch.zeros(2), 1.0)
