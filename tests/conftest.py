"""Every test starts from one seed, and reads NaN where it reads memory that nobody wrote."""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from efficient_densenet.kernels import whole

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# Triton runs on a GPU, or in its interpreter, which is there from the start of a process or not.
runs_triton = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if runs_triton else ["kernels/triton"]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """One way to write types, layouts and dimensions; ``None`` leaves the rest to pytest."""
    if isinstance(val, (torch.dtype, torch.memory_format)):
        return str(val).removeprefix("torch.")
    if argname == "dims":
        return f"{val}d"
    if argname == "capability":
        return f"sm_{val}"
    if isinstance(val, (list, tuple)):
        return ",".join(map(str, val))
    return None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def slabs() -> Iterator[None]:
    """The tests' small maps stand for large ones: they run slab by slab, unless marked."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whole, "MOST_BYTES", 0)
        yield


@pytest.fixture(autouse=True)
def most_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size up to which maps run whole, in tests that are marked."""
    if hasattr(request, "param"):
        monkeypatch.setattr(whole, "MOST_BYTES", request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty`` and its kin are filled with NaN (integers: their maximum)."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def clause(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """What benchmarks/outcomes.py keeps of a test marked with a clause."""
    marker = request.node.get_closest_marker("clause")
    if marker is not None:
        record_property("clause", marker.args[0])
        record_property("mode", request.node.callspec.params["mode"])


@pytest.fixture
def took(record_property: Callable[[str, object], None]) -> Callable[[str | None], None]:
    """Records the path that was taken, for the matrix: ``None`` is the efficient one."""

    def record(reason: str | None) -> None:
        record_property("path", reason or "efficient")

    return record


@pytest.fixture(autouse=True)
def capability(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """What benchmarks/outcomes.py keeps of a test marked with a capability."""
    marker = request.node.get_closest_marker("capability")
    if marker is not None:
        record_property("capability", marker.args[0])
        params = request.node.callspec.params
        record_property("library", (params.get("network") or params["wild"]).library)
