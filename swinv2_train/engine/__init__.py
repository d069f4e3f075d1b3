"""One protocol behind which training runs: DeepSpeed's ZeRO stages, or plain torch as the numerical reference.

deepspeed and fairscale are known to this package alone, and imported only when an engine is built.  It knows no
model and no task.
"""

from swinv2_train.engine.build import build_engine
from swinv2_train.engine.checks import NonFiniteError
from swinv2_train.engine.deepspeed.startup import forget_process_group
from swinv2_train.engine.protocol import Engine

__all__ = ["Engine", "NonFiniteError", "build_engine", "forget_process_group"]
