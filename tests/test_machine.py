"""This machine's memory, limits and speed."""

import os
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_zimage import GenerateRequest, ZImagePipeline, machine
from mlx_zimage.machine import MEMORY_SHARE, Shared, cgroup_limits, limits, machine_budget, wired

REQUEST = GenerateRequest("a red circle", 16, 16, seed=1, steps=2)


def cache_limit() -> int:
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def group(folder, name: str, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{limit}\n")


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """Where Linux lists this process's control groups, and the folder of all of them."""
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    monkeypatch.setattr(machine, "MEMBERSHIP", membership)
    monkeypatch.setattr(machine, "CGROUPS", root)
    return membership, root


def test_control_group_limits_are_found_at_every_level(control_groups):
    membership, root = control_groups
    membership.write_text("0::/user.slice/job.scope\n")
    group(root / "user.slice/job.scope", "memory.max", "max")
    group(root / "user.slice", "memory.max", "3000000")
    assert list(cgroup_limits()) == [3000000]
    group(root, "memory.max", "2000000")  # as in a container, whose own group is mounted at the top
    assert sorted(cgroup_limits()) == [2000000, 3000000]


def test_control_group_v1_limits_are_found(control_groups):
    membership, root = control_groups
    membership.write_text("9:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n")
    group(root / "memory/docker/1", "memory.limit_in_bytes", "1000000")
    group(root / "cpu,cpuacct/docker/1", "memory.limit_in_bytes", "7")
    assert list(cgroup_limits()) == [1000000]


def test_without_control_groups_there_are_no_limits(control_groups):
    assert list(cgroup_limits()) == []


def test_the_budget_is_a_share_of_what_the_process_may_use(monkeypatch, on_cpu):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "cpu"})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(machine, "cgroup_limits", lambda: iter([10**20, 10**9]))
    assert machine_budget() == int(MEMORY_SHARE * 10**9)
    monkeypatch.setattr(machine, "cgroup_limits", lambda: iter([2**63]))
    assert machine_budget() == int(MEMORY_SHARE * memory)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10**9, "memory_size": 9})
    assert machine_budget() == 9 * 10**8, "a GPU's own recommendation, less what draws the screen"


def test_the_cache_limit_is_restored_however_a_request_ends():
    before = cache_limit()
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", memory="60MB")
    for event in pipe.stream(REQUEST):
        during = cache_limit()
        assert 0 <= during < 60 * 10**6
        if event.index == 1:
            break
    assert cache_limit() == before
    with pytest.raises(ZeroDivisionError):
        for _ in pipe.stream(REQUEST):
            _ = 1 / 0
    assert cache_limit() == before


def test_limits_that_overlap_in_any_order_restore_the_original():
    before = cache_limit()
    first, second = limits(10**6), limits(2 * 10**6)
    first.__enter__()
    change = second.__enter__()
    assert cache_limit() == 2 * 10**6
    first.__exit__(None, None, None)
    assert cache_limit() == 2 * 10**6
    change(3 * 10**6)
    assert cache_limit() == 3 * 10**6
    second.__exit__(None, None, None)
    assert cache_limit() == before


def test_overlapping_wired_limits_restore_the_original(monkeypatch):
    limit = [7]

    def set_limit(nbytes: int) -> int:
        before, limit[0] = limit[0], nbytes
        return before

    monkeypatch.setattr(machine, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda device: {"max_recommended_working_set_size": 10**9})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    first, second = wired(100), wired(200)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert limit == [200], "the limit of the request that is still running"
    second.__exit__(None, None, None)
    assert limit == [7]


@pytest.mark.parametrize("asked", [False, True])
def test_memory_is_wired_only_on_request(monkeypatch, asked):
    limits = []

    def set_limit(nbytes: int) -> int:
        limits.append(nbytes)
        return 7

    gpu = {"max_recommended_working_set_size": 10**9}
    monkeypatch.setattr(machine, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda device=mx.cpu: gpu if device == mx.gpu else {"device_name": "x"})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", wired=asked)
    list(pipe.stream(REQUEST))
    assert limits == ([pipe.networks._resident(), 7] if asked else [])
    assert not asked or limits[0] > 10**6


def test_a_mac_that_computes_on_its_cpu_wires_no_memory(monkeypatch, on_cpu):
    """Metal is available all the same, but the default device's info has no working set size."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": "Apple M1", "architecture": "arm64"})
    monkeypatch.setattr(mx, "set_wired_limit", lambda nbytes: pytest.fail("wired"))
    assert machine_budget() > 0
    list(ZImagePipeline.from_pretrained("pocket", wired=True).stream(REQUEST))


def test_finalizing_a_generator_while_another_sets_a_limit_does_not_deadlock():
    """As Python's garbage collector may do at any point."""
    limit, doomed = [7], []

    def put(nbytes: int) -> int:
        while doomed:
            doomed.pop().close()
        before, limit[0] = limit[0], nbytes
        return before

    shared = Shared(put)

    def holder():
        with shared.asked(1):
            yield

    doomed_one = holder()
    next(doomed_one)
    doomed.append(doomed_one)
    with shared.asked(2):
        assert limit == [2]
    assert limit == [7]


def test_cuda_keeps_freed_memory_while_a_request_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "backend", lambda: "cuda")
    library = SimpleNamespace(mallopt=lambda *option: calls.append(option), malloc_trim=lambda n: calls.append("trim"))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: library)
    keep = [(machine.M_ARENA_MAX, 1), (machine.M_MMAP_MAX, 0), (machine.M_TRIM_THRESHOLD, 2**31 - 1)]
    with limits(10**9):
        assert calls == keep
        with limits(10**9):
            pass
        assert "trim" not in calls
    assert calls[-4:] == [*machine.ALLOCATOR_DEFAULTS.items(), "trim"]


def on_metal(monkeypatch, folder, name: str) -> None:
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(folder))
    monkeypatch.setattr(machine, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": name})


def test_kernels_on_a_cpu_are_not_limited(on_cpu):
    assert machine.product_rate() == machine.kernel_flops() == float("inf")


def test_the_product_rate_is_measured_or_estimated_from_the_chips_name(tmp_path, monkeypatch):
    on_metal(monkeypatch, tmp_path / "new", "Apple M2 Max")
    assert machine.product_rate() == machine.rate_of("Apple M2 Max") == pytest.approx(4.8e12, rel=0.01)
    machine.remember_product_rate(9e12)
    assert machine.product_rate() == 9e12 and machine.kernel_flops() == 4.5e12
    on_metal(monkeypatch, tmp_path / "new", "Apple M1")
    machine.remember_product_rate(2e12)
    assert machine.product_rate() == 2e12
    on_metal(monkeypatch, tmp_path / "new", "Apple M2 Max")
    assert machine.product_rate() == 9e12, "each GPU has its own"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"Apple M1": "fast"}', '{"Apple M1": 0}', '{"Apple M1": [1]}'])
def test_damaged_rates_are_ignored(tmp_path, monkeypatch, content):
    on_metal(monkeypatch, tmp_path, "Apple M1")
    (tmp_path / machine.RATES).write_text(content)
    assert machine.product_rate() == machine.rate_of("Apple M1")


def test_a_rate_that_cannot_be_saved_is_dropped(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    on_metal(monkeypatch, tmp_path / "file", "Apple M1")
    machine.remember_product_rate(2e12)
    assert machine.product_rate() == machine.rate_of("Apple M1")


def test_unknown_chips_count_as_the_slowest_similar_one():
    assert machine.rate_of("Apple M9 Max") == machine.rate_of("Apple M4 Max")
    slowest = machine.rate_of("Apple Paravirtual device")
    assert slowest == machine.rate_of("Apple A18 Pro") < machine.rate_of("Apple M1") < machine.rate_of("Apple M1 Pro")


def test_kernels_on_cuda_are_not_limited(tmp_path, monkeypatch):
    on_metal(monkeypatch, tmp_path, "NVIDIA H100")
    machine.remember_product_rate(5e14)
    monkeypatch.setattr(machine, "backend", lambda: "cuda")
    assert machine.product_rate() == float("inf")
