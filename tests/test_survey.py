"""What a group of machines consists of and how fast it is, measured before it generates an image."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import ranks
import surveyed
import tiny

from mlx_zimage import GroupError, RequestError
from mlx_zimage.distributed import Group
from mlx_zimage.survey import Survey, Timer, survey, survey_table

MACHINE = {"host": "one", "device": "Apple M4", "mlx_zimage": "1.0", "mlx": "0.32.4", "dtype": "bfloat16"}
MACHINE |= {"memory_budget": 12 * 10**9, "speed": 1.0}


def surveys(model: Path, folder: Path) -> list[tuple[int, str]]:
    return ranks.finish(ranks.start(2, folder, [sys.executable, surveyed.__file__, str(model)]))


def test_two_ranks_are_compared_and_timed(tiny_folder, tmp_path):
    (code, text), (other, _) = surveys(tiny_folder, tmp_path)
    assert code == other == 0, text
    assert re.search(r"^0 .*\n1 ", text, re.MULTILINE), "a line for each machine"
    assert re.search(r"^the same on all: mlx-zimage \S+, MLX \S+, float32, weights$", text, re.MULTILINE)
    assert re.search(r"^ring: an exchange takes at least [\d.]+ ms; each machine receives [\d.]+ GB/s$", text, re.M)
    assert re.search(r"^128x96: predicted \S+ s per step together, .*: [\d.]+ times as fast$", text, re.MULTILINE)


def test_different_weights_are_refused_by_checksum(tmp_path):
    for rank in range(2):
        tiny.write_checkpoint(tmp_path / f"model{rank}", seed=rank)
    for code, text in surveys(tmp_path / "model{rank}", tmp_path):
        assert code != 0
        assert re.search(
            r"GroupError: rank 1 \(.*\) has a different model from rank 0 \(.*\); all machines need the same one", text
        )


@pytest.mark.parametrize("name", ["version of mlx-zimage", "version of MLX", "default dtype"])
def test_different_versions_and_default_dtypes_are_refused(name, monkeypatch):
    def exchange(own: dict) -> list[dict]:
        return [own | {"host": "one"}, {"host": "two", "values": own["values"] | {name: "another"}}]

    group = Group.__new__(Group)
    monkeypatch.setattr(group, "exchange", exchange)
    with pytest.raises(GroupError, match=rf"rank 1 \(two: another\) has a different {name} from rank 0 \(one: \w"):
        survey(group, 128, 96)


def test_a_step_is_predicted_from_a_few_layers():
    """Every layer takes equally long: 2 s for each of 30 layers and for a second noise refiner, plus 3 s for everything
    else."""
    timer = Timer.__new__(Timer)
    timer.config = surveyed.TransformerConfig()
    timer._step = lambda depth, group: 3 + 2 * depth
    assert timer.step(None) == 3 + 2 * 30 + 2


def test_a_group_that_is_slower_than_its_fastest_machine_is_reported():
    machines = [MACHINE | {"alone_s": 2.0}, MACHINE | {"host": "two", "alone_s": 1.0}]
    found = Survey("ring", machines, 1e-3, 2e9, 1.25)
    assert found.speed_up == 0.8
    lines = survey_table(found, 512, 512).splitlines()
    assert lines[1].endswith("0.50") and lines[2].endswith("1.00")
    assert lines[-1] == "at this size, one machine alone is faster"


def test_how_unequal_machines_share_rows_is_printed():
    machines = [MACHINE | {"alone_s": 1.0, "speed": 2.4}, MACHINE | {"alone_s": 2.3}]
    unequal, equal = (Survey("ring", each, 1e-3, 2e9, 0.7) for each in (machines, [machines[1]] * 2))
    assert "rows are split 2.4 : 1 between the machines" in survey_table(unequal, 512, 512)
    assert "rows are split" not in survey_table(equal, 512, 512)


def test_a_survey_needs_other_machines(run):
    result = run("distributed", "check")
    assert result.returncode == RequestError.exit_code
    assert "this is the only machine; start the command on all of them with `mlx.launch" in result.stderr
