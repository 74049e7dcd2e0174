"""The host on a token embedding: a leaf that also serves the rows of virtual vocabularies."""

from __future__ import annotations

from inlay.hosts.leaf import LeafHost


class EmbeddingHost(LeafHost):
    """Serves `Delta`, `Replacement` and `VirtualTokens` pieces."""
