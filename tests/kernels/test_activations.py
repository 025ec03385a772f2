import pytest

from flashrt_kernels.activations import FUNCTIONS, clamped_swiglu, fatrelu, parse


def test_names():
    assert [parse(name) for name in FUNCTIONS] == [(name, 0.0, 0.0) for name in FUNCTIONS]
    assert all(parse(name).gate_only for name in (*FUNCTIONS, "fatrelu:0.1"))
    for threshold in (0.01, 1e-9, 0.1 + 0.2, 3):
        assert parse(fatrelu(threshold)) == ("relu", threshold, 0.0)
    found = parse(clamped_swiglu(1.702, 7.0))
    assert found == ("clamped_swiglu", 1.702, 7.0)
    assert not found.gate_only


@pytest.mark.parametrize(
    "name",
    [
        *("tanh", "", "fatrelu", "fatrelu:", "fatrelu:0", "fatrelu:inf", "fatrelu:x", "fatrelu:1:2", None, ["relu"]),
        *("clamped_swiglu", "clamped_swiglu:", "clamped_swiglu:1", "clamped_swiglu:1:0", "clamped_swiglu:1:2:3"),
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^activation: expected one of silu, .*; found"):
        parse(name)
