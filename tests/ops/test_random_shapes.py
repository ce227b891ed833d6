"""The loss and its gradient on shapes, layouts, dtypes, temperatures and weights that nobody thought of.

Apart from test_dino_loss.py, which must run on a machine without hypothesis.
"""

import pytest
import torch
from dino_loss_checks import check, logits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# numpy warns of what PyTorch computes in silence, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HALF_AND_SINGLE = st.sampled_from([torch.float32, torch.bfloat16])
NEAR_TILES = st.sampled_from([511, 513, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097])


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a failure through the interpreter takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.integers(1, 70) | NEAR_TILES),
    st.tuples(HALF_AND_SINGLE, HALF_AND_SINGLE),
    st.sampled_from([0.03, 1.0, 30.0]),
    st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)),
    st.sampled_from([0.0, 1.0, 0.37, -3.0, 1024.0]),
    st.booleans(),
    st.integers(0, 3),
)
def test_random_shapes_dtypes_and_weights(
    impl,
    shape,
    dtypes,
    scale,
    temps,
    upstream,
    weighted,
    padding,
):
    v, g, b, k = shape
    torch.manual_seed(v + 10 * g + 100 * b + 1000 * k)
    s, t, c = logits(v, g, b, k + padding, scale, *dtypes)
    weights = None
    if weighted or (v, g) == (1, 1):
        weights = torch.rand(v, g) * (torch.rand(v, g) > 0.3)
        weights[-1, -1] = 1.0
    s, t, c = (x[..., padding:] for x in (s, t, c))  # rows that start anywhere in memory
    check(impl, s, t, c, *temps, weights=weights, upstream=upstream, few=True)
