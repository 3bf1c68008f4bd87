"""Two processes train as one does. ``support/processes.py`` is what each of them runs."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from support.commands import ENVIRONMENT
from support.marks import ALL_MODES, every_mode, recomputing

TRAIN = ["-m", "support.train_on_random_data"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux",
    reason="needs torch.distributed with gloo",
)


def start(*commands):
    """Run Python with each of these arguments at once, and let a failure show."""
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for command in commands
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, by scenario and mode."""
    out = tmp_path_factory.mktemp("processes")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    start([*torchrun, "-m", "support.processes", out])
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_trains_as_one(results, scenario, mode):
    for rank, result in enumerate(results):
        found = result[scenario][mode]
        assert "error" not in found, f"process {rank}: {found}"
        assert found["difference"] < 1e-10, f"process {rank}: {found}"


def path(results, mode, kind="plain"):
    (first, second) = (result["paths"][mode][kind] for result in results)
    assert first == second
    return first


# DDP exchanges no statistics: compared is one process that takes the shares one after the other.
SHARES = {
    "ddp": "DDP",
    "static_graph": "DDP, static_graph",
    "find_unused_parameters": "DDP, find_unused_parameters",
    "no_sync": "DDP, accumulation with no_sync",
    "two forwards": "DDP, two forwards a step",
    "two forwards, buffers broadcast": "DDP, two forwards a step, buffers broadcast",
    "frozen norms": "DDP, frozen norms: the joined batch",
}


@pytest.mark.parametrize(
    ("scenario", "mode"),
    [
        pytest.param(name, mode, marks=pytest.mark.clause(f"3 · {text}"), id=f"{name}-{mode}")
        for name, text in SHARES.items()
        for mode in ALL_MODES
    ],
)
def test_two_processes_train_as_one(results, scenario, mode, took):
    took(path(results, mode))
    assert_trains_as_one(results, scenario, mode)


@recomputing
@pytest.mark.parametrize(
    "scenario",
    [
        "any layers",
        "any layers, two forwards",
        "any layers, FSDP2",
        "half-known layers, SyncBatchNorm",
    ],
)
def test_layers_of_any_kind_train_in_two_processes_as_in_one(results, scenario, mode):
    assert_trains_as_one(results, scenario, mode)


@pytest.mark.clause("3 · FSDP2 at block level and above")
@every_mode
def test_sharded_network_trains_as_one_process(results, mode, took):
    took(path(results, mode, "sharded"))
    assert_trains_as_one(results, "FSDP2", mode)


@pytest.mark.clause("3 · SyncBatchNorm: the joined batch")
@recomputing
def test_synchronised_norms_train_as_one_process_on_joined_batch(results, mode, took):
    """Batches of unlike size; outputs, gradients, and the state of every process."""
    took(path(results, mode, "synchronised"))
    assert_trains_as_one(results, "SyncBatchNorm", mode)


@pytest.mark.clause("3 · SyncBatchNorm: the joined batch")
@pytest.mark.parametrize("mode", ["none"])
def test_pytorch_refuses_to_synchronise_norms_on_cpu(results, mode, took):
    errors = [result["SyncBatchNorm"][mode]["error"] for result in results]
    assert all("on GPU" in error for error in errors)
    took(f"refused: on a CPU, by PyTorch: {errors[0]}")


@pytest.mark.clause("3 · FSDP2 with SyncBatchNorm")
@recomputing
def test_sharded_network_may_synchronise_its_norms(results, mode, took):
    took(path(results, mode, "sharded"))
    assert_trains_as_one(results, "FSDP2 with SyncBatchNorm", mode)


@pytest.mark.clause("3 · SyncBatchNorm: traffic")
@recomputing
def test_synchronising_sends_every_map_once_in_each_pass(results, mode, took):
    """Two vectors and a count for each map, in one collective; recomputing sends nothing.

    The network has a stem of 6 channels and two blocks of growth 3, of which the first has three
    layers and starts with 6 channels, the second two and 7; bottlenecks have 6.
    """
    took(path(results, mode, "synchronised"))
    for result in results:
        found = result["traffic"][mode]
        maps = [6, 6] + 3 * [6, 3] + [7] + 2 * [6, 3]
        per_map = [2 * channels + 1 for channels in maps]
        counts = [1, 1, 1]  # for the running variances of the stem and of each block
        assert found["forward"] == {"all_gather": per_map, "all_reduce": counts}
        backward = found["backward"]
        assert backward["all_gather"] == []
        assert sorted(backward["all_reduce"]) == sorted(per_map)


@recomputing
def test_norms_of_different_groups_take_naive_path(results, mode):
    for result in results:
        assert "other processes" in result["mixed groups"][mode]["reason"]


@every_mode
def test_estimate_of_one_process_is_what_its_step_took(results, mode):
    """In DDP, whose buckets hold every gradient, and after ``fully_shard``."""
    for result in results:
        assert "error" not in result["memory"][mode], result["memory"][mode]
        for wrapper, (took, estimated) in result["memory"][mode].items():
            assert 0.99 * took <= estimated <= 1.03 * took, f"{wrapper}: {estimated} for {took}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What training left: on two devices by the command's own means, on two nodes by torchrun."""
    devices, nodes = (tmp_path_factory.mktemp(name) for name in ("devices", "nodes"))
    start([*TRAIN, devices, "--devices", 2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
    script = [*TRAIN, nodes, "--num-nodes", 2]
    start(*([*torchrun, "--node-rank", node, *script] for node in (0, 1)))
    return [
        torch.load(out / "run" / "last.ckpt", weights_only=True)["state_dict"]
        for out in (devices, nodes)
    ]


@pytest.mark.slow
@pytest.mark.clause("3 · training command: --devices, and --num-nodes by torchrun")
@pytest.mark.parametrize("mode", ["bottleneck"])
def test_training_command_runs_on_two_devices_and_on_two_nodes(runs, mode, took):
    pytest.importorskip("lightning")
    took(None)
    on_devices, on_nodes = runs
    for name, weight in on_devices.items():
        assert weight.double().isfinite().all(), name
        assert torch.equal(on_nodes[name], weight), name
