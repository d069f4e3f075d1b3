"""What was exported, sent to a repository of the Hugging Face hub in one commit.

Who sends it is known to huggingface_hub alone (HF_TOKEN, or `hf auth login`): no token is ever a key of ours.
"""

from __future__ import annotations

from pathlib import Path

from swinv2_train.config import ConfigError
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.weights.hub_errors import hub_errors


def push(folder: Path, repo: str, private: bool = False, revision: str | None = None) -> dict[str, str]:
    """Commit a folder's files to a repository, which is made where there is none; returns where they are.

    private: the repository is, or is refused.  revision: the branch, which is made too; None = main.  Raises
    ConfigError for what the hub refuses and OutageError where it does not answer; the folder stays as it is.
    """
    what = f"hub ({repo})"
    try:
        with hub_errors(what):
            from huggingface_hub import CommitOperationAdd, HfApi

            api = HfApi()
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise ConfigError(f"{what} is there and public; make it private on its page, or name another")
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
            message = "Weights written by swinv2_train"
            commit = api.create_commit(repo, files, commit_message=message, revision=revision)
    except ConfigError as error:
        raise type(error)(f"{error}. {folder} is whole: `hf upload {repo} {folder}` sends it") from error
    return {"hub": without_secrets(str(url)), "commit": commit.oid, "address": f"hf://{repo}@{commit.oid}"}
