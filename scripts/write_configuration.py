"""Write docs/configuration.md, the reference of all keys, from the schema and conf/.

python scripts/write_configuration.py [OUT]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from swinv2_train.config.command_line import key_reference
from swinv2_train.config.reference import markdown

OUT = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    out = Path(given[0]) if given else OUT
    out.write_text(markdown(key_reference()))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
