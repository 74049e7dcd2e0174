"""What part each module plays in its block, whatever selector found it: "attn.q", "ffn.up", "ffn.norm", ..."""

from __future__ import annotations

from inlay.anatomy.base import Anatomy, Attention, Block, Columns, Site

Place = tuple[str, Columns | None]


def roles(anatomy: Anatomy) -> dict[Place, str]:
    """The semantic name of every projection and norm in the blocks, by module path and features.

    A fused projection has one entry for each of its parts and one for the whole, for example "attn.qkv". A norm is
    named after the span that it stands before (pre-LN) or after (post-LN).
    """
    found: dict[Place, str] = {}
    for block in anatomy.blocks:
        for attention in block.attentions:
            found |= _attention(attention)
        found |= _ffn(block)
    return found


def role_of(site: Site, known: dict[Place, str]) -> str:
    """The role of one site; the last part of its module path where it has none."""
    return known.get((site.leave, site.columns)) or known.get((site.leave, None)) or site.leave.rsplit(".", 1)[-1]


def _attention(a: Attention) -> dict[Place, str]:
    part = "cross" if a.cross else "attn"
    found: dict[Place, str] = {}
    shared: dict[str, str] = {}
    for letter, ports in (("q", a.q), ("k", a.k), ("v", a.v)):
        for port in ports:
            found[port.leaf, port.columns] = f"{part}.{letter}"
            if port.columns is not None:
                shared[port.leaf] = shared.get(port.leaf, "") + letter
    found |= {(leaf, None): f"{part}.{letters}" for leaf, letters in shared.items()}
    if a.o is not None:
        found[a.o, None] = f"{part}.o"
    return found | {(norm, None): f"{part}.norm" for norm in (a.pre_norm, a.post_norm) if norm is not None}


def _ffn(block: Block) -> dict[Place, str]:
    f = block.ffn
    if f is None:
        return {}
    found: dict[Place, str] = {(f.up, None): "ffn.up", (f.down, None): "ffn.down"}
    if f.gate is not None:
        found[f.gate, None] = "ffn.gate"
    return found | {(norm, None): "ffn.norm" for norm in (f.pre_norm, f.post_norm) if norm is not None}
