"""The text that `print(inlay.anatomy(model))` and `inlay inspect` show."""

from __future__ import annotations

from inlay.anatomy.base import Anatomy, Attention, Block, Port


def show(anatomy: Anatomy) -> str:
    """One line a fact, equal blocks folded into one entry."""
    lines = [anatomy.model]
    if anatomy.problem:
        lines.append(f"  problem  {anatomy.problem}")
    lines.append(f"  embed    {', '.join(anatomy.embed) or '-'}")
    previous: tuple[str, list[Block]] | None = None
    groups: list[tuple[str, list[Block]]] = []
    for block in anatomy.blocks:
        text = "\n".join(_block(block, anatomy))
        if previous is not None and previous[0] == text and _follows(block, previous[1][-1]):
            previous[1].append(block)
        else:
            previous = (text, [block])
            groups.append(previous)
    for text, blocks in groups:
        first, last = blocks[0], blocks[-1]
        span = f"{first.path or 'the model'}" if first is last else f"{first.path} ... {last.layer}"
        label = (first.stack + " " if first.stack else "") + ("block" if first is last else f"{len(blocks)} blocks")
        lines.append(f"  {label}: {span}")
        if text:
            lines.append(text)
    new = " (new: trained with each adapter)" if anatomy.new_head else ""
    lines.append(f"  head     {', '.join(anatomy.head) or '-'}{new}")
    if anatomy.output:
        lines.append(f"  output   {anatomy.output}")
    lines += [f"  note     {note}" for note in anatomy.notes]
    return "\n".join(lines)


def _follows(block: Block, before: Block) -> bool:
    return block.stack == before.stack and block.path.rpartition(".")[0] == before.path.rpartition(".")[0]


def _short(path: str, block: Block) -> str:
    return path.removeprefix(block.path + ".") if block.path else path


def _port(ports: tuple[Port, ...], block: Block) -> str:
    out = []
    for port in ports:
        name = _short(port.leaf, block)
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
        f"of {heads.key_size}" + (f" and {heads.value_size}" if heads.value_size != heads.key_size else ""),
    ]
    words += ["causal" if heads.causal else "", f"window {heads.window}" if heads.window else ""]
    words += {"interface": [], "softmax": ["computes its own softmax"], "other": ["no softmax over all keys"]}[a.form]
    o = _short(a.o, block) if a.o else "-"
    parts = f"q={_port(a.q, block)}  k={_port(a.k, block)}  v={_port(a.v, block)}  o={o}"
    return f"    {'cross' if a.cross else 'attn':<6} {parts}  ({', '.join(w for w in words if w)})"


def _block(block: Block, anatomy: Anatomy) -> list[str]:
    lines = [_attention(a, block) for a in block.attentions]
    lines += [f"    attn   module={_short(m.path, block)}  (mixes tokens without keys)" for m in block.mixers]
    for f in block.ffns:
        parts = [("up", f.up), ("gate", f.gate), ("down", f.down)] if not f.whole else [("module", f.up)]
        first = anatomy.leaf(f.up)
        text = "  ".join(f"{n}={_short(p, block)}" for n, p in parts if p)
        lines.append(f"    ffn    {text}  ({first.in_features} -> {first.out_features})")
    return lines
