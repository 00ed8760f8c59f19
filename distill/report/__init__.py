"""The report of a distillation run: one page to read, one JSON file to compute with, and the plots on the page."""

from neural_layers.distill.report.costs import cost_plot
from neural_layers.distill.report.curves import loss_plot, quality_plot
from neural_layers.distill.report.page import render_report
from neural_layers.distill.report.write import write_report

__all__ = ["cost_plot", "loss_plot", "quality_plot", "render_report", "write_report"]
