"""From weights to folders and repositories that others load with one line.

convert: any form of weights to a native folder. card: its config.json and model card. push: to the Hub. training_data:
what weights were trained on.
"""

from .card import CardInfo, model_card, save_folder, timm_config
from .push import check_push, push_to_hub

__all__ = ["CardInfo", "check_push", "model_card", "push_to_hub", "save_folder", "timm_config"]
