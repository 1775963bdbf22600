"""Facts about a program, changing nothing: symmetries, calibration, execution."""

from fxopt.analysis.picture import coupling_graph, mermaid
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries

__all__ = ["Kind", "Symmetries", "Symmetry", "Unit", "coupling_graph", "mermaid", "symmetries"]
