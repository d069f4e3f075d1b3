"""What is a secret in a text, and what is none."""

from __future__ import annotations

import pytest

from swinv2_train.config import secret_texts
from swinv2_train.config.load import config_yaml
from swinv2_train.config.secret_texts import is_redacted, public, secret_values, without_secrets
from tests.support.configs import composed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:p@w@h/a-{0..3}.tar?X-Amz-Signature=s&x=1::https://h2/b.tar#t",
         "https://REDACTED@h/a-{0..3}.tar?REDACTED::https://h2/b.tar?REDACTED"),
        ("pipe:curl -u me:pw -H 'Authorization: Bearer a.b' https://h/x?sig=1 | tar x",
         "pipe:curl -u REDACTED -H 'Authorization: Bearer REDACTED' https://h/x?REDACTED | tar x"),
        ("AWS_SECRET_ACCESS_KEY=zzz aws s3 cp s3://b/k -", "AWS_SECRET_ACCESS_KEY=REDACTED aws s3 cp s3://b/k -"),
        ("fetch --token abc --out x", "fetch --token REDACTED --out x"),
        ("-H X-Api-Key:abc", "-H X-Api-Key:REDACTED"),
        ("403, message='Forbidden', url='http://h:80/x?token=s'", "403, message='Forbidden', url='http://h:80/x?REDACTED'"),
        ("got https://h/v2/token/a.b-c/t-{0..3}.tar, ok", "got https://h/v2/token/REDACTED/t-{0..3}.tar, ok"),
        ("http://h:8/x/SAS/s3cr3t/api-key/k/a.tar::https://h2/sig/s", "http://h:8/x/SAS/REDACTED/api-key/REDACTED/a.tar::"
         "https://h2/sig/REDACTED"),
        ("'https://h/download/access_token/eyJhbGci.eyJzdWIi.dBjftJeZ4CVP'", "'https://h/download/access_token/REDACTED'"),
        ("data.shards='https://h/t-*.tar?sv=1&sig=abc'", "data.shards='https://h/t-*.tar?REDACTED'"),
    ],
)  # fmt: skip
def test_secrets_are_left_out_of_addresses_and_commands(text, shown):
    assert without_secrets(text) == shown and is_redacted(shown)
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a/t-*.tar", "https://host:8080/a@b/c.tar", "window: 3 tokens: 49", "mask_token: x", "python -u x.py",
     "https://h/key/train-{0..3}.tar", "https://h/tokens/a/b.tar", "https://h/monkey/a/b.tar", "s3://bucket/key/a/b.tar",
     "https://h/" + "aZ09" * 10 + "/b.tar", "step 3 of 10", "data.record_keys=true", "/data/what?.tar"],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text and not is_redacted(text)


def test_keys_of_the_environment_are_left_out_wherever_they_come(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", "abc/DEF+12345")
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("SSH_KEY_PATH", "not-a-secret-by-name")
    monkeypatch.setenv("MONKEY_BUSINESS", "twelve-monkeys")
    monkeypatch.setenv("SORT_KEY", "training")
    monkeypatch.setenv("DB_PASSWORD", "correcthorse")
    monkeypatch.setenv("SIGNING_KEY", str(tmp_path))
    secret_values.cache_clear()
    try:
        assert without_secrets("got abc/DEF+12345!") == "got REDACTED!"
        assert without_secrets("training with correcthorse") == "training with REDACTED"
        assert "short" not in secret_values() and "twelve-monkeys" not in secret_values()
        assert str(tmp_path) not in secret_values(), "the place of a key is none"
        config = composed(["task=simmim", "run_dir=x", "data.shards='https://h/t.tar?k=${oc.env:MY_API_KEY}'"])
        assert "abc/DEF" in config.data.shards and "abc/DEF" not in config_yaml(config)
    finally:
        secret_values.cache_clear()


def test_values_that_are_written_down_keep_their_shape():
    values = {"a": [1, None, "https://h/x?y"], "b": {"c": True, "d": "token=abc"}}
    assert public(values) == {"a": [1, None, "https://h/x?REDACTED"], "b": {"c": True, "d": "token=abc"}}
    assert secret_texts.REDACTED == "REDACTED"
