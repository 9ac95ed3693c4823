"""Draws the figures of docs/essays: `python docs/figures/draw_kernels.py` (standard library only).

cpu_tile.svg       what the two products of a CPU tile read, and the registers between
cpu_mask.svg       which path of the CPU forward computes which part of a causal tile
cuda_pipeline.svg  what the threads of an sm_80 block wait for
cuda_fragment.svg  where a lane's part of S lies, and why it is the left operand of P V
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent

# Okabe-Ito tints: input, scratch that lives in the cache, state carried by the loop, output.
INPUT, SCRATCH, STATE, OUTPUT, MARK = "#CDE7F7", "#F2F2F2", "#FBE3B5", "#CFEBDD", "#F3C6B4"


class Drawing:
    """A few shapes as SVG, on white so that dark pages show them too."""

    def __init__(self, width: int, height: int) -> None:
        self.size, self.parts = (
            (width, height),
            [f'<rect width="{width}" height="{height}" fill="#fff"/>'],
        )

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, text: str = "", size: int = 11
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="#333" '
            'stroke-width="0.8"/>'
        )
        if text:
            lines = text.split("\n")
            for n, line in enumerate(lines):
                self.text(
                    x + w / 2, y + h / 2 + (n - (len(lines) - 1) / 2) * 1.2 * size, line, size
                )

    def text(self, x: float, y: float, text: str, size: int = 11, anchor: str = "middle") -> None:
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size}" text-anchor="{anchor}">'
            f"{safe}</text>"
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.parts.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="#333" '
            'marker-end="url(#head)"/>'
        )

    def save(self, name: str) -> None:
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#333"/></marker>'
        )
        body = "\n".join(self.parts)
        (HERE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif"><defs>{head}</defs>\n{body}\n</svg>\n'
        )


def cpu_tile() -> None:
    d = Drawing(720, 256)
    d.box(20, 110, 110, 96, INPUT, "packed Q\n48 rows\n[8 groups][64][6]")
    d.box(160, 20, 200, 70, INPUT, "packed K, a block: 64 KiB\n16 panels [64][16 keys]")
    d.box(160, 110, 200, 96, SCRATCH, "S, then P in its place\n48 x 256, fp32\nin L2 (rows in L1)")
    d.box(390, 20, 150, 70, INPUT, "packed V, a block: 64 KiB\n4 panels [256][16]")
    d.box(390, 110, 150, 96, OUTPUT, "O  48 x 64, fp32\nm, l: 48 each")
    for n in range(16):
        d.box(160 + 12.5 * n, 82, 12.5, 8, MARK if n == 0 else INPUT)
    for n in range(8):
        d.box(20, 110 + 12 * n, 8, 12, MARK if n == 0 else INPUT)
    d.arrow(130, 158, 160, 158)
    d.arrow(260, 90, 260, 110)
    d.arrow(360, 158, 390, 158)
    d.arrow(465, 90, 465, 110)
    d.text(145, 222, "S = Q K^T", 11)
    d.text(260, 222, "online softmax by rows", 11)
    d.text(375, 240, "O = a O + P V", 11)
    d.box(575, 60, 130, 160, STATE)
    d.text(640, 72, "registers (AVX2)", 11)
    for r in range(6):
        d.box(590, 84 + 16 * r, 50, 14, OUTPUT, f"x{r}", 9)
        d.box(642, 84 + 16 * r, 50, 14, OUTPUT, f"y{r}", 9)
    d.box(590, 182, 50, 14, INPUT, "b0", 9)
    d.box(642, 182, 50, 14, INPUT, "b1", 9)
    d.box(590, 199, 50, 14, INPUT, "splat a", 9)
    d.text(640, 234, "6 rows x 16 columns: 12 FMAs", 10)
    d.text(640, 247, "for 2 loads and 6 broadcasts", 10)
    d.save("cpu_tile.svg")


def cpu_mask() -> None:
    """Rows 912 to 959 of a causal call: blocks 0 to 2 whole, the rest in one span."""
    d = Drawing(720, 184)
    x0, scale = 30.0, 0.62
    for n in range(3):
        d.box(
            x0 + 256 * scale * n,
            60,
            256 * scale,
            96,
            OUTPUT,
            f"block {n}\nwhole: one product,\nno mask",
        )
    first, rows = 768, 912
    for g in range(8):
        seen = rows + 6 * (g + 1)
        columns = -(-(seen - first) // 16) * 16
        d.box(x0 + first * scale, 60 + 12 * g, columns * scale, 12, STATE)
    d.box(x0 + first * scale, 60, 256 * scale, 96, "none")
    d.text(x0 + (first + 96) * scale, 170, "one span: rows in groups of 6", 10)
    d.text(x0, 48, "key 0", 10, "start")
    d.text(x0 + first * scale, 48, "768", 10)
    d.text(x0 + 960 * scale, 48, "960", 10)
    d.text(x0 + 1024 * scale, 48, "1024", 10)
    d.text(12, 66, "912", 9)
    d.text(12, 150, "959", 9)
    d.text(360, 22, "A causal tile of the CPU forward", 13)
    d.save("cpu_mask.svg")


def cuda_pipeline() -> None:
    d = Drawing(720, 204)
    d.text(
        360, 18, "Two stages of shared memory, one cp.async group and one barrier per key tile", 13
    )
    for n, name in enumerate(("stage 0", "stage 1", "tensor cores")):
        d.text(70, 62 + 46 * n, name, 11, "end")
    step = 150
    copies = ((0, 0, "copy 0"), (1, 1, "copy 1"), (0, 2, "copy 2"), (1, 3, "copy 3"))
    for stage, at, text in copies:
        d.box(85 + step * at + (20 if at else 0), 45 + 46 * stage, 118, 34, INPUT, text)
    for j in range(3):
        x = 85 + step * (j + 1) + 14
        d.box(x + 6, 137, 52, 34, OUTPUT, f"Q K{j}")
        d.box(x + 60, 137, 30, 34, STATE, "2^x")
        d.box(x + 92, 137, 42, 34, OUTPUT, f"P V{j}")
        d.parts.append(f'<line x1="{x}" y1="38" x2="{x}" y2="178" stroke="#b00" stroke-width="2"/>')
        d.text(x, 190, f"wait, barrier {j}", 10)
    d.save("cuda_pipeline.svg")


def cuda_fragment() -> None:
    d = Drawing(720, 246)
    d.text(180, 18, "C fragment of mma.m16n8: 16 rows x 8 keys", 12)
    d.text(540, 18, "A fragment of mma.m16n8k16: 16 rows x 16 keys", 12)
    cell = 18
    for x0, columns in ((100, 8), (400, 16)):
        for row in range(16):
            for column in range(columns):
                lane = row % 8 * 4 + column % 8 // 2
                d.box(
                    x0 + cell * column, 30 + 13 * row, cell, 13,
                    MARK if lane == 5 else (INPUT if column < 8 else SCRATCH),
                    str(lane), 8,
                )  # fmt: skip
    d.arrow(250, 134, 395, 134)
    d.text(322, 122, "pack to 16 bit", 10)
    d.save("cuda_fragment.svg")


if __name__ == "__main__":
    cpu_tile()
    cpu_mask()
    cuda_pipeline()
    cuda_fragment()
