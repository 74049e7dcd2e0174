"""The text that `print(inlay.anatomy(model))` and `inlay inspect` show."""

from __future__ import annotations

from inlay.anatomy.base import Anatomy, Attention, Block, Port


def show(anatomy: Anatomy) -> str:
    """One line a fact, equal blocks folded into one entry."""
    lines = [anatomy.model]
    if anatomy.problem:
        lines.append(f"  problem: {anatomy.problem}")
    lines.append(f"  embed    {', '.join(anatomy.embed) or '-'}")
    previous: tuple[str, list[Block]] | None = None
    groups: list[tuple[str, list[Block]]] = []
    for block in anatomy.blocks:
        text = "\n".join(_block(block, anatomy))
        if previous is not None and previous[0] == text and previous[1][0].stack == block.stack:
            previous[1].append(block)
        else:
            previous = (text, [block])
            groups.append(previous)
    for text, blocks in groups:
        first, last = blocks[0], blocks[-1]
        span = f"{first.path}" if first is last else f"{first.path} ... {last.layer}"
        label = (first.stack + " " if first.stack else "") + ("block" if first is last else f"{len(blocks)} blocks")
        lines.append(f"  {label}: {span}")
        lines.append(text)
    lines.append(
        f"  head     {', '.join(anatomy.head) or '-'}"
        + (" (new: trained with each adapter)" if anatomy.new_head else "")
    )
    if anatomy.output:
        lines.append(f"  output   {anatomy.output}")
    return "\n".join(lines)


def _port(ports: tuple[Port, ...], block: Block) -> str:
    out = []
    for port in ports:
        name = port.leaf.removeprefix(block.path + ".")
        if port.columns is not None:
            lo, hi = port.columns[0][0], port.columns[-1][1]
            name += f"[{lo}:{hi}]" if len(port.columns) == 1 else f"[{len(port.columns)} ranges]"
        out.append(name)
    return " + ".join(out) or "-"


def _attention(a: Attention, block: Block) -> str:
    heads = a.heads
    words = [
        f"{heads.query} heads",
        f"{heads.kv} key/value" if heads.kv != heads.query else "",
        f"of {heads.key_size}",
    ]
    words += ["causal" if heads.causal else "", f"window {heads.window}" if heads.window else ""]
    o = a.o.removeprefix(block.path + ".") if a.o else "-"
    return (
        f"    {'cross' if a.cross else 'attn ':<6} q={_port(a.q, block)}  k={_port(a.k, block)}  v={_port(a.v, block)}  o={o}"
        f"  ({', '.join(w for w in words if w)})"
    )


def _block(block: Block, anatomy: Anatomy) -> list[str]:
    lines = [_attention(a, block) for a in block.attentions]
    if block.ffn is not None:
        f = block.ffn
        parts = [("up", f.up), ("gate", f.gate), ("down", f.down)] if not f.whole else [("module", f.up)]
        sizes = anatomy.leaves[f.up]
        text = "  ".join(f"{n}={p.removeprefix(block.path + '.')}" for n, p in parts if p)
        lines.append(f"    ffn    {text}  ({sizes.in_features} -> {sizes.out_features})")
    return lines
