"""Mode bits of a file that replaces another."""

import os

import pytest

from bstk.atomic import replacing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permission bits")


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o640)
    return path


def replaced(path):
    with replacing(path) as (sink, _):
        sink.write(b"new")
    assert path.read_bytes() == b"new"
    return path.stat()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o777])
def test_permissions_are_kept(old, mode):
    old.chmod(mode)
    assert replaced(old).st_mode & 0o7777 == mode


@pytest.mark.parametrize("mode", [0o640, 0o664, 0o670])
def test_another_group_gets_no_permissions(old, mode):
    groups = [12345] if os.geteuid() == 0 else [group for group in os.getgroups() if group != old.stat().st_gid]
    if not groups:
        pytest.skip("no second group")
    os.chown(old, -1, groups[0])
    old.chmod(mode)
    new = replaced(old)
    assert new.st_gid != groups[0] and new.st_mode & 0o7777 == mode & 0o707


def test_the_first_file_keeps_the_rules_of_the_system(tmp_path):
    before = os.umask(0o027)
    try:
        assert replaced(tmp_path / "first").st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_file_that_replaces_another_is_private_while_it_is_written(old):
    old.chmod(0o644)
    with replacing(old) as (_, temporary):
        assert os.stat(temporary).st_mode & 0o777 == 0o600
    assert old.stat().st_mode & 0o777 == 0o644
