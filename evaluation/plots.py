"""The pictures of a run."""

from predict import draw_curves, draw_error_by_rank, draw_matrices, draw_sheet

__all__ = ["draw_curves", "draw_error_by_rank", "draw_matrices", "draw_sheet"]
