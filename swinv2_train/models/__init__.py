"""SwinV2 and its heads.  This package knows torch and nothing else, so every model works in a notebook."""

from swinv2_train.models.counts import count_parameters, multiply_adds
from swinv2_train.models.simmim import SimMIM, encoder_of
from swinv2_train.models.sizes import SIZES, swin_v2
from swinv2_train.models.swin_v2 import SwinTransformerV2

__all__ = ["SIZES", "SimMIM", "SwinTransformerV2", "count_parameters", "encoder_of", "multiply_adds", "swin_v2"]
