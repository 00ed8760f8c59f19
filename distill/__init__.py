"""Distillation: losses, trainer, data, validation, report."""
