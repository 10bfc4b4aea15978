"""Window: neighbouring layers go as one, those across which the direction of the residual stream changes least."""

from __future__ import annotations

from typing import Literal

from adasearch.documents import value
from adasearch.pruning.depth import DepthContext, DepthOptions, layer_of, paths_of
from adasearch.registry import DEPTH


@value
class WindowOptions(DepthOptions):
    """Settings.

    Args:
        distance: ``cosine`` takes the highest mean cosine across the window (LLM-Streamline), ``angular`` the lowest
            mean angle.
    """

    distance: Literal["cosine", "angular"] = "cosine"


@DEPTH.register(options=WindowOptions, needs=lambda _: frozenset({"boundaries"}), uses_loss=False)
def choose(context: DepthContext, options: WindowOptions) -> tuple[str, ...]:
    """Return n neighbouring layers i, ..., i + n - 1, n the most that fit.

    i maximises E_t cos(h_i, h_{i+n}), h_i the residual stream before layer i (LLM-Streamline, arXiv 2403.19135), or
    minimises E_t arccos(cos(h_i, h_{i+n})) / pi (Gromov et al., arXiv 2403.17887). Of equal windows the
    one nearest the input goes.
    """
    items = context.items("layer")
    far = context.known.boundaries()
    measure = far.cosine if options.distance == "cosine" else -far.angle
    for size in range(len(items), 0, -1):
        windows = [items[i : i + size] for i in range(len(items) - size + 1)]
        fit = [w for w in windows if context.fits(frozenset(paths_of(w)))]
        if fit:
            starts = [layer_of(window[0][0]) for window in fit]
            best = max(range(len(fit)), key=lambda k: (float(measure[starts[k], starts[k] + size]), -k))
            return paths_of(fit[best])
    return ()
