"""What was not prepared, or cannot be blended, is named."""

from __future__ import annotations

import pytest

from minitron_nemo.config.data import DataConfig
from minitron_nemo.text.blend import open_blend


def test_data_that_was_not_prepared_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"data.prepared is not set. Run prepare-data"):
        open_blend(DataConfig())
    with pytest.raises(FileNotFoundError, match=r"data.prepared=.* does not exist"):
        open_blend(DataConfig(prepared=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"must be {path: ..., weight: ...} when several are blended"):
        open_blend(DataConfig(prepared=["a", "b"]))
