import pytest
from click.testing import CliRunner

from mlx_zimage import battery, cli
from mlx_zimage.battery import parse_pmset, read_power_supplies

BATTERY = "Now drawing from '{}'\n -InternalBattery-0 (id=4653155)\t{}; 2:10 remaining present: true\n"


@pytest.mark.parametrize(
    ("output", "percent"),
    [
        (BATTERY.format("Battery Power", "9%; discharging"), 9),
        (BATTERY.format("AC Power", "95%; charging"), None),
        (BATTERY.format("AC Power", "100%; charged"), None),
        ("Now drawing from 'AC Power'\n", None),
        ("", None),
    ],
)
def test_a_macs_battery_counts_only_while_discharging(output, percent):
    assert parse_pmset(output) == percent


def test_linux_batteries_are_read_from_files(tmp_path):
    assert read_power_supplies(tmp_path / "none") is None
    for name, status, capacity in (("BAT0", "Discharging", "12\n"), ("BAT1", "Charging", "99\n"), ("BAT2", "?", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status").write_text(status)
        (tmp_path / name / "capacity").write_text(capacity)
    assert read_power_supplies(tmp_path) == 12


def test_a_low_battery_stops_before_the_next_image(tmp_path, monkeypatch):
    charges = iter([50, 20, 10])
    monkeypatch.setattr(battery, "charge", lambda: next(charges))
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a", "-m", "pocket", "--size", "32x32", "--steps", "1", "--count", "9", "-B", "10"]
    result = CliRunner().invoke(cli.main, command)
    assert (result.exit_code, result.stdout) == (1, "image.png\nimage-1.png\n")
    assert "the battery is at 10%, and --battery-limit is 10" in result.stderr
