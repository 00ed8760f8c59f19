"""Search for the best options of a recipe: hyperparameters and architectures, by Optuna."""

from neural_layers.distill.search.recipe import Option, SearchedRecipe
from neural_layers.distill.search.search import Search, SearchFailed, SearchOptions

__all__ = ["Option", "Search", "SearchFailed", "SearchOptions", "SearchedRecipe"]
