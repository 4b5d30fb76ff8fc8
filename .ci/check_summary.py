"""Check a demo's summary.json: every documented key is there and says something possible."""

import json
import math
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
first, last = summary["iterations"][0], summary["iterations"][-1]
assert first["iteration"] == 0
assert last["iteration"] == len(summary["iterations"]) - 1 >= 1, summary["iterations"]
for row in summary["iterations"]:
    for metrics in row["metrics"].values():
        for name, estimate in metrics.items():
            assert estimate["low"] <= estimate["value"] <= estimate["high"], (row["iteration"], name, estimate)
assert 0 <= last["metrics"]["test"]["win_rate"]["value"] <= 1
assert abs(last["training"]["first_loss"] - math.log(2)) < 1e-6, "a player equal to its opponent has loss ln 2"
assert last["training"]["final_loss"] != last["training"]["first_loss"]
assert summary["registry"]["alias"] == "challenger"
assert int(summary["registry"]["version"]) >= 1
digests = summary["digests"]
assert len(set(digests.values())) == len(digests)
assert all(len(digest) == 64 for digest in digests.values())
for phase in ("prepare", "generate", "train", "score"):
    assert summary["phases"][phase]["seconds"] > 0, phase
    assert summary["phases"][phase]["items"] > 0, phase
assert Path(summary["contact_sheet"]).read_bytes().startswith(b"\x89PNG")
print(f"{sys.argv[1]} is in order: {summary['seconds']['total']:.0f} s")
