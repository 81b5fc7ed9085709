"""What of main memory is left, from files as Linux has them."""

import sys
from pathlib import Path

import pytest

from rushes.engines.wan import main_memory
from rushes.errors import EngineError

MIB = 2**20
MEMINFO = "MemTotal:       16777216 kB\nMemFree:          524288 kB\nMemAvailable:    8388608 kB\n"
UNLIMITED_V1 = "9223372036854771712\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root with these files."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_kernel_s_estimate_counts(tmp_path):
    assert 8192 * MIB == main_memory.available(machine(tmp_path, {"proc/meminfo": MEMINFO}))


@pytest.mark.parametrize("text", ["", "MemTotal:  9 kB\n", "MemAvailable: much kB\n"])
def test_where_nothing_is_told_nothing_is_known(tmp_path, text):
    assert main_memory.available(machine(tmp_path, {"proc/meminfo": text})) is None
    assert main_memory.available(tmp_path / "no such folder") is None


def container(root: Path, limit: str, current: int, *, cached: int = 0) -> Path:
    """As a container of Docker has it: its own group is the root of what it sees."""
    return machine(
        root,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": limit,
            "sys/fs/cgroup/memory.current": f"{current}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\nfile 9\ninactive_file {cached}\nactive_file 0\n",
        },
    )


def test_a_container_s_limit_counts_where_it_is_less(tmp_path):
    assert 3072 * MIB == main_memory.available(container(tmp_path, f"{4096 * MIB}\n", 1024 * MIB))


def test_a_limit_above_what_the_machine_has_does_not(tmp_path):
    assert 8192 * MIB == main_memory.available(container(tmp_path, f"{2**40}\n", 1024 * MIB))
    assert 8192 * MIB == main_memory.available(container(tmp_path, "max\n", 1024 * MIB))


def test_pages_of_files_that_were_read_are_no_loss(tmp_path):
    """A container that has just downloaded weights is full of them, and can take as much as before."""
    full = container(tmp_path, f"{4096 * MIB}\n", 4095 * MIB, cached=4000 * MIB)
    assert 4001 * MIB == main_memory.available(full)


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path):
    assert 0 == main_memory.available(container(tmp_path, "10\n", 20))


def test_the_groups_around_a_service_count_too(tmp_path):
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/memory.max": f"{500 * MIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{100 * MIB}\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": f"{90 * MIB}\n",
        },
    )
    assert 400 * MIB == main_memory.available(root)


@pytest.mark.parametrize("path", ["/docker/0a1b", "/"])
def test_the_older_control_groups_are_read(tmp_path, path):
    """Where the path is the host's, the group itself is what is mounted."""
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": f"5:cpuset:/other\n4:cpu,memory:{path}\n1:name=systemd:/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{700 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{300 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MIB}\n",
        },
    )
    assert 450 * MIB == main_memory.available(root)


def test_the_older_groups_without_a_limit_count_for_nothing(tmp_path):
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n",
        },
    )
    assert 8192 * MIB == main_memory.available(root)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_this_machine_tells():
    available = main_memory.available()
    assert available is not None
    assert MIB < available < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_does_not_fit_ends_the_process_with_words_for_it():
    with pytest.raises(EngineError, match="1073741824 GiB of main memory besides the card's") as caught:
        main_memory.check(2**60)
    assert ("out_of_memory", True, False) == (caught.value.reason, caught.value.replace, caught.value.retryable)
    main_memory.check(1)
