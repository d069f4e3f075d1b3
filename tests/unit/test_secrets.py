"""A whole run directory is searched for secrets, after a run that went well and after one that failed."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from swinv2_train.monitoring.console import open_console
from tests.support.commands import OWN_SESSION, command
from tests.support.processes import finished, forked, forked_command
from tests.support.shard_files import ten_class_shards
from tests.support.shard_server import ShardServer, serve

pytestmark = pytest.mark.slow

SECRETS = ("pa55w0rd", "s1gnature", "t0ken-value", "envir0nment-key", "s3gment")
KEY = {"MY_API_KEY": "envir0nment-key"}


def address(server: ShardServer, name: str) -> str:
    host = server.url.removeprefix("http://")
    return f"http://me:pa55w0rd@{host}/token/s3gment/{name}?X-Amz-Signature=s1gnature&token=t0ken-value&k=${{oc.env:MY_API_KEY}}"


def train(folder: Path, server: ShardServer, *overrides: str) -> tuple[int, str]:
    arguments = command(
        folder / "run", f"data.shards='{address(server, 'train-{000000..000002}.tar')}'",
        f"data.eval_shards='{address(server, 'test-000000.tar')}'", f"data.cache_dir={folder / 'cache'}",
        "train.max_steps=3", "engine=local", "engine.precision=fp32", "data.num_workers=0",
        "optim.schedule.warmup_steps=1",
        "data.fetch_give_up_sec=1", *overrides,
    )  # fmt: skip
    process = forked_command("swinv2_train.train", *arguments, environment=KEY, **OWN_SESSION)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def leaks(folder: Path, *texts: str) -> list[str]:
    """Files below a folder, and texts, that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 4
    found = [f"{path}: {secret}" for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]
    return found + [f"text: {secret}" for text in texts for secret in SECRETS if secret in text]


@pytest.fixture
def server(tmp_path):
    ten_class_shards(tmp_path / "served" / "token" / "s3gment")
    with serve(tmp_path / "served") as running:
        yield running


def test_a_run_directory_and_the_console_hold_no_secret(tmp_path, server):
    """Also when it is resumed from the same command line, read by evaluate, and broken by a server that forbids."""
    code, output = train(tmp_path, server)
    assert code == EXIT_DONE, output
    assert leaks(tmp_path / "run", output) == []
    assert "?REDACTED" in (tmp_path / "run" / "config.yaml").read_text()
    argv = json.loads((tmp_path / "run" / "environment.json").read_text())[-1]["argv"]
    assert any("/token/REDACTED/train-{000000..000002}.tar?REDACTED" in argument for argument in argv)

    code, output = train(tmp_path, server, "train.max_steps=4")
    assert code == EXIT_DONE and "resuming from" in output, output
    assert leaks(tmp_path / "run", output) == []

    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    run = f"run_dir={tmp_path / 'run'}"
    done = finished(forked_command("swinv2_train.evaluate", run, environment=KEY, **pipes))
    assert done.returncode == EXIT_USER_ERROR
    assert (
        "data.eval_shards 'http://REDACTED@" in done.stderr
        and "give the whole of it on the command line" in done.stderr
    )
    given = f"data.eval_shards='{address(server, 'test-000000.tar')}'"
    out = f"out={tmp_path / 'run' / 'scores'}"
    done = finished(forked_command("swinv2_train.evaluate", run, given, out, environment=KEY, **pipes))
    assert done.returncode == EXIT_DONE, done.stderr
    assert leaks(tmp_path / "run", done.stdout, done.stderr) == []


def test_a_run_that_fails_tells_no_secret(tmp_path, server):
    """Clients name the whole address in their errors, and tracebacks repeat them."""
    for number in range(3):
        server.faults[f"train-{number:06d}.tar"] = ["always 403"]
    code, output = train(tmp_path, server, "data.num_workers=1")
    assert code == EXIT_USER_ERROR and "the server forbids it" in output, output
    assert leaks(tmp_path / "run", output) == []


def test_a_command_that_says_its_address_tells_no_secret(tmp_path, server):
    """wget does; the log has its other words."""
    shard = tmp_path / "train-000000.tar"
    shutil.copy(tmp_path / "served" / "token" / "s3gment" / shard.name, shard)
    words = "echo fetching https://me:pa55w0rd@host/x?token=t0ken-value >&2"
    pipe = f"pipe:{words}; cat {shard}; exit 3"
    code, output = train(
        tmp_path,
        server,
        f"data.shards='{pipe}'",
        "data.eval_shards=null",
        "data.shuffle_buffer_images=1",
        "train.max_steps=99",
    )
    assert code == EXIT_USER_ERROR and "the command failed (exit status 3" in output, output
    assert leaks(tmp_path / "run", output) == []
    (log,) = (tmp_path / "run" / "logs").iterdir()
    assert "fetching https://REDACTED@host/x?REDACTED" in log.read_text()


def test_a_traceback_or_a_warning_of_anybody_tells_no_secret(tmp_path):
    """An error of a client has the address of the one that it was raised from."""
    said = "https://me:pa55w0rd@host/x?token=t0ken-value"

    def body() -> None:
        with open_console(tmp_path, 0) as console:
            warnings.warn(f"slow: {said}", stacklevel=1)
            logging.getLogger("asyncio").error("never retrieved: %s", said)
            print("fetched", said)
            try:
                try:
                    raise OSError(said)
                except OSError as error:
                    raise RuntimeError("broken") from error
            except RuntimeError as error:
                console.fail(error)
            console.say(f"gone: {said}")

    output, _ = forked(body, **OWN_SESSION).communicate(timeout=240)
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert log.count("https://REDACTED@host/x?REDACTED") == 4 and "gone: https://REDACTED@host" in output
    assert not [secret for secret in SECRETS if secret in log + output]


def test_wandbs_files_hold_no_secret(tmp_path, server):
    """Its own record of the command line among them."""
    code, output = train(tmp_path, server, "log.wandb=offline")
    assert code == EXIT_DONE and list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")), output
    assert leaks(tmp_path / "run", output) == []
