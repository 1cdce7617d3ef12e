"""NeMo 2.x: models, trainer, optimizer, callbacks, context. Nothing else imports nemo or lightning."""

import logging

from minitron_nemo.quiet import imports_held_back

with imports_held_back():
    import nemo.collections.llm  # noqa: F401  (what it prints while it is imported is held back here, once for all)
    from nemo.utils import logging as _nemo_logging

_nemo_logging.setLevel(logging.ERROR)
