"""Where a training's figures go besides its own log, and figures of its gradients and weights."""

from neural_layers.distill.tracking.reporting import TRACKERS, tracker_names, tracking_arguments
from neural_layers.distill.tracking.statistics import StatisticsCallback, add_statistics

__all__ = ["TRACKERS", "StatisticsCallback", "add_statistics", "tracker_names", "tracking_arguments"]
