"""What a worker process is started with."""

from etastar.engine.environment import one_thread_environment


def test_a_worker_has_one_thread_and_keeps_its_memory(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    environment = one_thread_environment()
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and environment["MALLOC_MMAP_MAX_"] == "0"


def test_what_the_user_set_for_the_allocator_stands(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "5")
    environment = one_thread_environment()
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1" and environment["MALLOC_TOP_PAD_"] == "5"
