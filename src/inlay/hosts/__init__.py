"""How a piece gets in: the only code that changes a model. One host class for each kind of place."""

from __future__ import annotations

from torch import nn

from inlay.anatomy.base import Site
from inlay.errors import SiteError
from inlay.hosts.base import Hosted, Placed, Span, adopt, place
from inlay.hosts.leaf import LeafHost
from inlay.methods.base import Delta, ExtraKV, HeadDelta, Piece, Replacement, VirtualTokens

__all__ = ["insert"]


def insert(modules: dict[str, nn.Module], adapter: str, key: str, piece: Piece, site: Site) -> dict[str, nn.Module]:
    """Puts one piece at its site and returns the modules that now host something, by path.

    Raises:
        SiteError: the piece cannot work at this kind of site.
    """
    if isinstance(piece, Delta | Replacement):
        return _leaf(modules, adapter, key, piece, site)
    if isinstance(piece, ExtraKV | HeadDelta):
        from inlay.hosts.attention import host_for

        adopt(modules[site.leave], host_for(modules[site.leave]), site.leave)
    elif isinstance(piece, VirtualTokens):
        from inlay.hosts.embedding import EmbeddingHost

        adopt(modules[site.leave], EmbeddingHost, site.leave)
    else:
        raise SiteError(f"{type(piece).__name__} obeys none of the contracts in inlay.methods.base.")
    place(modules[site.leave], adapter, key, Placed(piece, site))
    return {site.leave: modules[site.leave]}


def _leaf(modules: dict[str, nn.Module], adapter: str, key: str, piece: Piece, site: Site) -> dict[str, nn.Module]:
    touched = {site.leave: modules[site.leave]}
    adopt(modules[site.leave], leaf_host(modules[site.leave]), site.leave)
    span = None
    if site.enter != site.leave:
        state: Hosted = adopt(modules[site.enter], leaf_host(modules[site.enter]), site.enter)
        span = Span(site)
        state.opens.setdefault(adapter, []).append(span)
        touched[site.enter] = modules[site.enter]
    place(modules[site.leave], adapter, key, Placed(piece, site, span))
    return touched


def leaf_host(module: nn.Module) -> type[LeafHost]:
    """The host for a module with one tensor in and one out; embeddings also serve virtual tokens."""
    if isinstance(module, nn.Embedding):
        from inlay.hosts.embedding import EmbeddingHost

        return EmbeddingHost
    return LeafHost
