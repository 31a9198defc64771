"""BlockSwapWrapperWanVideo and the wrapper's own torch.compile. The compiler makes the server slower, so this comes last."""

import pytest

from .test_wanvideo import assert_streamed, by, swap
from .wanvideo import Sampler, compile_settings

pytestmark = pytest.mark.host


@pytest.mark.parametrize("way", ["between", "swap"])
def test_compiled_blocks_stream(sampler: Sampler, way: str) -> None:
    """Without our node the blocks are compiled as well: compiled code computes in another order."""
    scene = {"compiled": compile_settings()}
    assert_streamed(sampler.sample("plain", **by(way, swap()), **scene), sampler.reference("plain", **scene))
