"""What to train: flat YAML with TRL's and Transformers' own key names, read, checked and translated."""

from trainer.recipe.model import DataSource, Mixture, Recipe, TinyModel
from trainer.recipe.reader import Loaded, default_run_id, load
from trainer.recipe.yaml_file import names

__all__ = ["DataSource", "Loaded", "Mixture", "Recipe", "TinyModel", "default_run_id", "load", "names"]
