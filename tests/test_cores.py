"""Cores: what affinity and a container's quota leave."""

import pytest

from etastar import cores as room


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_a_containers_share_of_the_cores_is_read(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert room.cgroup_cores(tmp_path) == cores


def test_an_older_container_too_and_none_at_all(tmp_path):
    assert room.cgroup_cores(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert room.cgroup_cores(tmp_path) == 0.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert room.cgroup_cores(tmp_path) is None


@pytest.mark.parametrize(("allowed", "quota", "left"), [(8, None, 8), (8, 2.5, 2), (1, 4.0, 1), (4, 0.5, 1)])
def test_workers_never_outnumber_the_cores_left(monkeypatch, allowed, quota, left):
    monkeypatch.setattr(room, "affinity_cores", lambda: allowed)
    monkeypatch.setattr(room, "cgroup_cores", lambda: quota)
    assert room.cores() == left
