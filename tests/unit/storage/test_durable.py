"""What is flushed to the disk, on file systems that cannot flush everything."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from swinv2_train.storage.durable import checksum_of, sync_folder, write_durably


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_that_flushes_no_folders_is_no_reason_to_stop(number, tmp_path, monkeypatch):
    """CIFS and many FUSE ones answer EINVAL: the first checkpoint ended the run.  Files are flushed all the same."""
    flushed, fsync = [], os.fsync

    def refuses_folders(descriptor: int) -> None:  # such a file system cannot be mounted by a test
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flushed.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    assert write_durably(tmp_path / "file", [b"abc"]) == checksum_of(tmp_path / "file") and flushed
    sync_folder(tmp_path)


def test_a_disk_that_fails_is_one(tmp_path, monkeypatch):
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")
