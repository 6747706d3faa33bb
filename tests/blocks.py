"""The block that the files which users copy share: `python tests/blocks.py` copies SDXL's to the others."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST, OTHERS = "sdxl_comfy_pipeline.py", ("flux_comfy_pipeline.py", "scheduling_k_diffusion.py")
BEGIN, LAST, END = "# --- shared block", "# --- the block's last part", "# --- end of the shared block"


def parts(name: str) -> tuple[str, str, str]:
    """The file's text before the block, the block, and the text after."""
    text = (ROOT / name).read_text()
    begin, end = text.index(BEGIN), text.index(END)
    return text[:begin], text[begin:end], text[end:]


def expected(name: str) -> str:
    """The block that a file should have: the last part, which runs a sampler, is the pipelines' alone."""
    block = parts(FIRST)[1]
    return block if "pipeline" in name else block[: block.index(LAST)]


if __name__ == "__main__":
    for other in OTHERS:
        before, _, after = parts(other)
        (ROOT / other).write_text(before + expected(other) + after)
