from swinv2_train.inference import load as load
from swinv2_train.train import train_here as train

__version__: str
__all__ = ["load", "train"]
