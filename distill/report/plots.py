"""Every plot of a report by one import."""

from neural_layers.distill.report.analysis_plots import length_plot, reliability_plot
from neural_layers.distill.report.costs import compression_plot, cost_plot
from neural_layers.distill.report.curves import loss_plot, quality_plot, score_plot
from neural_layers.distill.report.drawing import styled_figure

__all__ = [
    "compression_plot",
    "cost_plot",
    "length_plot",
    "loss_plot",
    "quality_plot",
    "reliability_plot",
    "score_plot",
    "styled_figure",
]
