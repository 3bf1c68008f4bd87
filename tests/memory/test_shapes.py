"""What is made up of shapes seen before is what PyTorch would return."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map, tree_map_only

from efficient_densenet.memory.shapes import Operators, tensors_of
from support.marks import slabs_and_whole
from support.operators import NETWORKS, network, operators_of

aten = torch.ops.aten
# Not called on tensors without values.
WITHOUT_SHAPES = (aten.batch_norm_update_stats.default,)


def empty(*shape: int, dtype=torch.float32, memory_format=torch.contiguous_format) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, memory_format=memory_format)


def form(result):
    if isinstance(result, torch.Tensor):
        return result.shape, result.stride(), result.dtype, result.untyped_storage().nbytes()
    if isinstance(result, (list, tuple)):
        return type(result), [form(part) for part in result]
    return result


def storages(result) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors_of((result,))}


MAPS = empty(4, 6, 5, 5, memory_format=torch.channels_last)
GEOMETRY = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
CALLS = {
    "broadcast": (aten.mul.Tensor, (MAPS, empty(6, 1, 1))),
    "promoted": (aten.add.Tensor, (MAPS, empty(6, 1, 1, dtype=torch.float64))),
    "reduced": (aten.sum.dim_IntList, (MAPS, [0, 2, 3])),
    "list of tensors": (aten.cat.default, ([MAPS, MAPS], 1)),
    "several results": (aten.var_mean.correction, (MAPS, [0, 2, 3])),
    "declined results": (
        aten.convolution_backward.default,
        (*(MAPS, MAPS, empty(6, 6, 1, 1), None), *GEOMETRY, [True, False, False]),
    ),
}


@pytest.mark.parametrize(("func", "args"), CALLS.values(), ids=CALLS)
def test_repeated_call_returns_equal_tensors_in_new_storage(func, args) -> None:
    operators = Operators()
    expected = func(*args)
    first, again = (operators.run(func, args, {})[0] for _ in range(2))
    assert form(again) == form(first) == form(expected)
    assert not storages(first) & storages(again)


@pytest.mark.parametrize(("func", "args"), CALLS.values(), ids=CALLS)
def test_repeated_call_on_fake_tensors_returns_fake_ones_on_same_device(func, args) -> None:
    operators = Operators()
    with FakeTensorMode() as mode:
        args = tree_map_only(torch.Tensor, fake, args)
        expected = func(*args)
        (first, _), (again, own) = (operators.run(func, args, {}) for _ in range(2))
    assert own and form(again) == form(first) == form(expected)
    assert not storages(first) & storages(again)
    for tensor in tensors_of((again,)):
        assert (type(tensor), tensor.device.type) == (FakeTensor, "cpu")
        assert tensor.fake_mode is mode


def fake(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def test_numbers_that_are_equal_but_of_another_type_are_kept_apart() -> None:
    operators, x = Operators(), empty(3, dtype=torch.int64)
    made = [operators.run(aten.add.Tensor, (x, number), {})[0].dtype for number in (1, 1.0, 1, 1.0)]
    assert made == [torch.int64, torch.float32] * 2


def test_undeclared_view_stays_view() -> None:
    operators, x = Operators(), empty(6)
    for _ in range(2):
        y, own = operators.run(aten._unsafe_view.default, (x, [2, 3]), {})
        assert not own
        assert y.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_values_are_computed_every_time() -> None:
    operators = Operators()
    for value in (1.0, 2.0):
        x = torch.full((3,), value)
        assert operators.run(aten.mul.Tensor, (x, x), {})[0].tolist() == [value**2] * 3
        assert operators.run(aten._local_scalar_dense.default, (x[0],), {}) == (value, False)


VECTORS, COLUMN = empty(6), empty(1, 6, 1, 1)
OPERANDS = {
    "maps": (MAPS, MAPS),
    "vectors": (VECTORS, VECTORS),
    "a number": (MAPS, 0.5),
    "whole numbers and a fraction": (empty(6, dtype=torch.int64), 0.5),
    "single and double": (VECTORS, empty(6, dtype=torch.float64)),
    "two layouts": (empty(4, 6, 5, 5), MAPS),
    "every other channel": (empty(4, 12, 5, 5)[:, ::2], empty(4, 12, 5, 5)[:, ::2]),
    "column": (MAPS, COLUMN),
}


@pytest.mark.parametrize("func", [aten.add.Tensor, aten.mul.Tensor], ids=str)
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_elementwise_results_are_those_of_torch(func, operands) -> None:
    assert form(Operators().run(func, operands, {})[0]) == form(func(*operands))


@pytest.mark.parametrize("x", [MAPS, VECTORS, empty(4, 12, 5, 5)[:, ::2]], ids=["maps", "v", "cut"])
def test_elementwise_results_of_one_and_of_three_operands_are_those_of_torch(x) -> None:
    calls = (
        (aten.addcmul.default, (x, x, x), {"value": -1}),
        (aten.addcmul.default, (x[:1], x, x), {}),
        (aten.threshold_backward.default, (x, x, 0), {}),
        (aten.zeros_like.default, (x,), {"pin_memory": False}),
        (aten.ones_like.default, (x,), {"dtype": torch.float64}),
    )
    for func, args, kwargs in calls:
        assert form(Operators().run(func, args, kwargs)[0]) == form(func(*args, **kwargs))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True)], ids=["all", "vectors"])
def test_batch_norm_has_shapes_of_real_one(affine: bool, mask) -> None:
    def forms(device: str):
        x = torch.ones(4, 6, 5, 5, device=device).to(memory_format=torch.channels_last)
        weight = torch.ones(6, device=device) if affine else None
        operators = Operators()
        norm = (x, weight, weight, None, None, True, 0.1, 1e-5)
        result, _ = operators.run(aten.native_batch_norm.default, norm, {})
        gradients, _ = operators.run(
            aten.native_batch_norm_backward.default,
            (x, x, weight, None, None, *result[1:], True, 1e-5, mask),
            {},
        )
        return form(result), form([g for g in gradients if g is not None])

    assert forms("meta") == forms("cpu")


@slabs_and_whole
@pytest.mark.parametrize("name", NETWORKS)
def test_results_of_a_step_lie_in_memory_as_they_do_with_values(name: str) -> None:
    def hollow(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    checked = set()
    for func, args, kwargs in operators_of(*network(name)):
        if func in WITHOUT_SHAPES:
            continue
        expected = tensors_of((func(*args, **kwargs),))
        found, _ = Operators().run(func, *tree_map(hollow, (args, kwargs)))
        for made, told in zip(expected, tensors_of((found,)), strict=True):
            if made.dim() < 2:  # vectors that evaluation leaves empty
                continue
            assert (made.shape, made.dtype) == (told.shape, told.dtype), func
            steps = zip(made.shape, made.stride(), told.stride(), strict=True)
            assert all(size == 1 or a == b for size, a, b in steps), (func, made.stride())
        checked.add(func)
    assert {aten.convolution.default, aten.native_batch_norm_backward.default} & checked
