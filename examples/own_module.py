"""Optimize a module that fxopt has never seen; the example's sizes are not frozen in."""

import torch

import fxopt


class Block(torch.nn.Module):
    """A gated feed-forward block with a residual."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.gate = torch.nn.Linear(width, 4 * width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x [batch, length, width], and the result too."""
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


model = torch.nn.Sequential(Block(), Block()).eval()
recipe = {
    "name": "all-but-the-first-gate",
    "passes": [
        "canonicalize",
        {"quantize": {"activations": {"granularity": "token"}, "exclude": ["0.gate"]}},
    ],
    "expect": {"quantize": {"min_sites": 5}},
    "floor": {"sqnr_db": 20},
}
optimized = fxopt.optimize(model, recipe, example_inputs=(torch.randn(2, 7, 64),))

print(fxopt.diff(fxopt.capture(model, (torch.randn(2, 7, 64),)), optimized))
print(optimized.explain("0.gate"))
print(optimized(torch.randn(5, 13, 64)).shape)
