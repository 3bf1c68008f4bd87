"""Models that are wrapped for training in several processes are not taken for what they wrap."""

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from efficient_densenet import estimate, measure, meter

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed with gloo"
)


@pytest.fixture
def group() -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped() -> nn.Module:
    return nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(4, 2)))


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wrapped, "model must be the module that a DistributedDataParallel wraps, got the wrapper"),
        (sharded, "model must be whole, got one whose parameters are shards"),
    ],
    ids=["DDP", "FSDP2"],
)
def test_wrapped_model_is_refused_in_sentence(make, said, group) -> None:
    model = make()
    for instrument in (estimate, measure, meter):
        with pytest.raises(TypeError, match=said):
            instrument(model, torch.randn(3, 4))
