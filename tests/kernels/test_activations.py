import pytest

from flashrt_kernels.activations import FUNCTIONS, fatrelu, parse


def test_names():
    assert [parse(name) for name in FUNCTIONS] == [(name, 0.0) for name in FUNCTIONS]
    for threshold in (0.01, 1e-9, 0.1 + 0.2, 3):
        assert parse(fatrelu(threshold)) == ("relu", threshold)


@pytest.mark.parametrize(
    "name", ["tanh", "", "fatrelu", "fatrelu:", "fatrelu:0", "fatrelu:inf", "fatrelu:x", None, ["relu"]]
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^activation: expected one of silu, .*; found"):
        parse(name)
