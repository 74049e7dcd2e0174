"""The paper draws LoRA's A from a Gaussian, its code kaiming-uniform; the surveys follow the paper. Does it matter?"""

from __future__ import annotations

from common import Claim, arguments, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "LoRA: Gaussian or Kaiming A",
    "A is Gaussian in the paper and kaiming-uniform in its code; neither says that it matters",
    "arXiv:2106.09685, section 4.1, and loralib",
    "the two are equal",
)

if __name__ == "__main__":
    variants = [Variant(init, {"name": "lora", "init": init}) for init in ("kaiming", "gaussian")]
    reproduce(CLAIM, variants, lambda o: o.equal(*o.labels), arguments("lora_init", __doc__ or "", seeds=3))
