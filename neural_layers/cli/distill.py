"""`neural-layers distill RECIPE`: a smaller model out of a larger one, and a report of what was kept."""

from typing import Any

from neural_layers.cli import distill_cvm, distill_lm, distill_ntmm


def add(subcommands: Any) -> None:
    """Declare `distill` and its recipes."""
    parser = subcommands.add_parser("distill", help="distil a student from a teacher")
    recipes = parser.add_subparsers(required=True, metavar="RECIPE")
    for recipe in (distill_cvm, distill_ntmm, distill_lm):
        recipe.add(recipes)
