"""The kernel that measures what the ring can read must have read every stage (checksums, emulated GPU)."""

import pytest
import torch
from emulated import SCHEDULES, run_once

from bench.gpu.ring import checksums  # noqa: E402

FIELDS = ("bytes", "stage_bytes", "copy_bytes", "stages", "blocks_per_sm")


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    "case",
    [(50000, 1024, 1024, 3, 1), (99200, 9216, 9216, 4, 2), (130064, 16384, 1024, 2, 1), (16, 16, 16, 1, 1)],
)
def test_every_stage_is_read(case, schedule):
    fields = dict(zip(FIELDS, case, strict=True))
    data = torch.randint(0, 256, (fields["bytes"],), dtype=torch.uint8)
    blocks = schedule[1][0] * fields["blocks_per_sm"]
    outputs = {"checksums": ((blocks,), torch.int32)}
    got = run_once("read_ring", schedule, outputs, {"data": data} | fields)["checksums"]
    assert got.tolist() == checksums(data, fields["stage_bytes"], blocks)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"bytes": 17}, "bytes is 17, expected a positive multiple of 16"),
        ({"stages": 25}, "stages is 25, expected 1 to 24"),
        ({"stage_bytes": 1 << 17, "stages": 4}, "stages \\* stage_bytes is 524288, expected at most"),
        ({"blocks_per_sm": 3}, "blocks_per_sm is 3, expected 1 or 2"),
    ],
)
def test_refusals(changed, message):
    fields = dict(zip(FIELDS, (64, 16, 16, 1, 1), strict=True)) | changed
    schedule = next(iter(SCHEDULES.values()))
    with pytest.raises(RuntimeError, match=f"read_ring: {message}"):
        run_once("read_ring", schedule, {"checksums": ((64,), torch.int32)}, {"data": None} | fields)
