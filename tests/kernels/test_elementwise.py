import numpy as np
import pytest
import torch

from flashrt_kernels.activations import FUNCTIONS, clamped_swiglu

from .helpers import cpu, empty, normal, reference, rms_ratio, same

SHAPES = pytest.mark.parametrize(("n", "k"), [(1, 48), (3, 63), (123, 640), (17, 1536)])


@SHAPES
def test_rms_norm(isa, n, k):
    wide, weight, out, expected = normal(1, n, 2 * k), normal(2, k), empty(n, k), torch.empty(n, k)
    x = wide[:, k:]
    cpu.rms_norm(x, weight, 1e-6, out)
    reference.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-6, expected)
    assert rms_ratio(out, expected) < 1e-6
    cpu.rms_norm(x, weight, 1e-6, x)
    assert same(x.copy(), out)


@SHAPES
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(isa, n, k, biased):
    x, weight, out, expected = normal(1, n, k) + 3, normal(2, k), empty(n, k), torch.empty(n, k)
    bias = normal(3, k) if biased else None
    cpu.layer_norm(x, weight, bias, 1e-5, out)
    reference.layer_norm(
        torch.from_numpy(x), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias), 1e-5, expected
    )
    assert rms_ratio(out, expected) < 1e-6
    cpu.layer_norm(x, weight, bias, 1e-5, x)
    assert same(x, out)


@pytest.mark.parametrize("dim", [10, 48, 128])
def test_rope(isa, dim):
    fused = normal(1, 5, 7, dim)
    expected = torch.from_numpy(fused.copy())
    angles = normal(2, 5, dim // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    untouched = fused[:, 4:].copy()
    cpu.rope(fused[:, :4], cos, sin)
    reference.rope(expected[:, :4], torch.from_numpy(cos), torch.from_numpy(sin))
    assert rms_ratio(fused, expected) < 1e-6
    assert same(fused[:, 4:].copy(), untouched)


def test_rope_of_a_part_of_each_head(isa):
    fused = normal(1, 5, 7, 20)
    rotated, angles = np.ascontiguousarray(fused[..., :12]), normal(2, 5, 6)
    rest = fused[..., 12:].copy()
    for x in (fused[:, :, :12], rotated):
        cpu.rope(x, np.cos(angles), np.sin(angles))
    assert same(fused[..., :12].copy(), rotated)
    assert same(fused[..., 12:].copy(), rest)


def test_softcap():
    x = 4 * normal(1, 3, 131)
    found, expected = x.copy(), torch.from_numpy(x.copy())
    cpu.softcap(found, 2.5)
    reference.softcap(expected, 2.5)
    assert rms_ratio(found, expected) < 1e-6
    assert np.abs(found).max() <= 2.5
    assert np.abs(found - x).max() > 1
    for first, end in ((0, 1), (1, 2), (1, 3)):  # the bits of a row, whoever shares its pass
        part = x[first:end, 3:].copy()
        cpu.softcap(part, 2.5)
        assert same(part, found[first:end, 3:].copy())


@pytest.mark.parametrize("activation", [*FUNCTIONS, clamped_swiglu(1.7, 0.9)])
@pytest.mark.parametrize(("n", "k"), [(1, 48), (3, 63), (123, 130)])
def test_activate(isa, activation, n, k):
    gate, up = normal(1, n, 2 * k)[:, k:], normal(2, n, 2 * k)[:, :k]
    before, expected = gate.copy(), torch.from_numpy(gate.copy())
    cpu.activate(gate, up, activation)
    reference.activate(expected, torch.from_numpy(up), activation)
    assert rms_ratio(gate, expected) < 1e-6
    alone = before[n - 1 :]
    cpu.activate(alone, up[n - 1 :], activation)
    assert same(alone, gate[n - 1 :].copy())  # whoever shares its pass


def test_wrong_arguments_are_named():
    x, weight = normal(1, 3, 64), normal(2, 64)
    with pytest.raises(ValueError, match="^weight"):
        cpu.rms_norm(x, normal(2, 63), 1e-6, empty(3, 64))
    with pytest.raises(ValueError, match="^out"):
        cpu.rms_norm(x, weight, 1e-6, empty(3, 65))
    with pytest.raises(ValueError, match="^bias"):
        cpu.layer_norm(x, weight, normal(1, 2), 1e-6, empty(3, 64))
    with pytest.raises(ValueError, match="^x"):
        cpu.rope(normal(1, 2, 3, 7), normal(1, 2, 3), normal(1, 2, 3))
    with pytest.raises(ValueError, match="^sin"):
        cpu.rope(normal(1, 2, 3, 8), normal(1, 2, 4), normal(1, 2, 3))
    with pytest.raises(ValueError, match="^up"):
        cpu.activate(normal(1, 2, 3), normal(1, 2, 4), "silu")
    with pytest.raises(ValueError, match="^activation"):
        cpu.activate(normal(1, 2, 3), normal(1, 2, 3), "mish")


def test_threads_and_instruction_sets():
    with pytest.raises(ValueError, match="^n"):
        cpu.set_threads(0)
    cpu.set_threads(3)
    assert cpu.threads() == 3
    with pytest.raises(ValueError, match="^name"):
        cpu.force_isa("mmx")
    assert cpu.available_isas()[0] == "scalar"
    assert cpu.isa() == cpu.available_isas()[-1]
    assert cpu.reserve(4096) >= 16 * 4096 * 6
