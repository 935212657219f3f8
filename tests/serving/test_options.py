"""What an operator may set, and what is said of anything else."""

import pytest

from gr_platform.errors import UserError
from serving.options import FILE, ServingOptions, read


def test_no_file_means_the_defaults_and_a_file_replaces_some(tmp_path):
    assert read(tmp_path) == ServingOptions()
    (tmp_path / FILE).write_text('cache_bytes = 1024\ncompute = "onnx"\nlog_seconds = 5\nshadow_share = 0.25\n')
    assert read(tmp_path) == ServingOptions(cache_bytes=1024, compute="onnx", log_seconds=5, shadow_share=0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache_bytes = ", "no valid TOML"),
        ("cache_byte = 5", "sets cache_byte, which is no option; there are cache_bytes, num_threads"),
        ('cache_bytes = "5"', "sets cache_bytes to '5', it must be of type int"),
        ("num_threads = true", "must be of type int"),
        ("cache_bytes = -1", "cache_bytes is -1, must be at least 0"),
        ("max_batch_size = 0", "max_batch_size is 0, must be at least 1"),
        ("retrieval_depth = 10001", "retrieval_depth is 10001, must be at most 10000"),
        ("shadow_share = 1.5", "shadow_share is 1.5, must be from 0 to 1"),
        ('compute = "gpu"', "compute is 'gpu', must be one of auto, torch, onnx"),
        ('cache_dtype = "int8"', "must be one of fp32, fp16, bf16"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path)
