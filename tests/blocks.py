"""The block that the files which users copy share: `python tests/blocks.py` copies FLUX's to the others."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST, OTHERS = "flux_comfy_pipeline.py", ("sdxl_comfy_pipeline.py", "scheduling_k_diffusion.py")
BEGIN, FLOW, LAST, END = (
    "# --- shared block",
    "# --- the block's part for flow",
    "# --- the block's last part",
    "# --- end of the",
)


def parts(name: str) -> tuple[str, str, str]:
    """The file's text before the block, the block, and the text after."""
    text = (ROOT / name).read_text()
    begin, end = text.index(BEGIN), text.index(END)
    return text[:begin], text[begin:end], text[end:]


def expected(name: str, block: str = "") -> str:
    """The block that a file should have: SDXL needs no flow, and the scheduler does not run a sampler by itself."""
    block = block or parts(FIRST)[1]
    flow, last = block.index(FLOW), block.index(LAST)
    if name.startswith("sdxl"):
        return block[:flow] + block[last:]
    return block if name.startswith("flux") else block[:last]


if __name__ == "__main__":
    for other in OTHERS:
        before, _, after = parts(other)
        (ROOT / other).write_text(before + expected(other) + after)
