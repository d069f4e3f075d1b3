"""What torchrun's report says of a rank that has ended with an error."""

from __future__ import annotations

import contextlib
import json
import os
import time


def tell_torchrun(text: str, exit_code: int) -> None:
    """Under torchrun, text ends its report in place of the address of a page about tracebacks.

    In the form of torch's own handler of errors (torch/distributed/elastic/multiprocessing/errors): of any other
    torchrun complains as well.  It reads the file once the rank has ended, and leaves it where it is.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    message = {"message": text, "errorCode": exit_code, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        whole = f"{path}.{os.getpid()}"  # half a file would end torchrun with an error of its own
        with open(whole, "w") as file:
            json.dump({"message": message}, file)
        os.replace(whole, path)
