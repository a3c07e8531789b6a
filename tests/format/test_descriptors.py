"""Permissions of a file that replaces another: who could not read the one cannot read the other."""

import errno
import os
import struct

import pytest

from bstk.files import replacing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permission bits")
ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
ACL, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


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


def test_the_first_file_keeps_the_rules_of_the_system(tmp_path):
    before = os.umask(0o027)
    try:
        assert replaced(tmp_path / "first").st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@ROOT
def test_owner_and_group_are_kept(old):
    os.chown(old, 3000, 3001)
    found = replaced(old)
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (3000, 3001, 0o640)


@ROOT
@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_another_group_gets_nothing(old, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    os.chown(old, -1, 3001)
    monkeypatch.setattr(os, "fchown", refuse)
    assert replaced(old).st_mode & 0o777 == 0o600


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, mode, who) for tag, mode, who in entries)


# The owner reads and writes, user 2000 reads, the group and others do nothing.
ONE_MORE = acl((1, 6, 2**32 - 1), (2, 4, 2000), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1))


def set_acl(path, name, value):
    try:
        os.setxattr(path, name, value)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no access control lists here: {error}")


def test_an_access_control_list_is_kept(old):
    set_acl(old, ACL, ONE_MORE)
    mode = old.stat().st_mode
    assert replaced(old).st_mode == mode and os.getxattr(old, ACL) == ONE_MORE


def test_an_access_control_list_of_the_folder_gives_nobody_the_new_file(old, tmp_path):
    set_acl(tmp_path, DEFAULT, ONE_MORE)
    assert replaced(old).st_mode & 0o777 == 0o640
    with pytest.raises(OSError):
        os.getxattr(old, ACL)


def test_an_access_control_list_that_cannot_be_given_shuts_the_group_out(old, monkeypatch):
    set_acl(old, ACL, ONE_MORE)

    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", refuse)
    assert replaced(old).st_mode & 0o777 == 0o600
