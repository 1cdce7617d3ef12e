"""NeMo 2.x: models, trainer, optimizer, callbacks, context. Nothing else imports nemo or lightning."""

import logging

from minitron_nemo.nemo.core_016 import tensorstore_named
from minitron_nemo.quiet import imports_held_back

with imports_held_back(), tensorstore_named():
    import nemo.collections.llm  # noqa: F401  (what it prints while it is imported is held back here, once for all)
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.lightning import io
    from nemo.lightning.io.artifact import DirOrStringArtifact, FileArtifact
    from nemo.utils import logging as _nemo_logging

_nemo_logging.setLevel(logging.ERROR)

if not hasattr(AutoTokenizer, "__io_artifacts__"):
    # NeMo 2.7.3 registers how its tokenizers are saved in one go with a module that transformers 5 no longer has.
    io.track_io(
        AutoTokenizer,
        artifacts=[
            FileArtifact("vocab_file", required=False),
            FileArtifact("merges_file", required=False),
            DirOrStringArtifact("pretrained_model_name", required=False),
        ],
    )
