"""Sends an exported folder to the Hugging Face hub, or says what would be sent."""

from pathlib import Path

from lost.utils.errors import LostError


def require_token() -> None:
    """Checks that there is something to log in with.

    Raises:
        LostError: there is no token of the hub here.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise LostError("push needs a token of the hub with write access: run `hf auth login`, or set HF_TOKEN")


def files_to_send(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of every file of the folder, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]


def describe_push(folder: Path, hub_id: str, *, private: bool) -> str:
    """What `push_folder` would send, in words."""
    files = files_to_send(folder)
    lines = [f"  {name} ({size:,} bytes)" for name, size in files]
    kind = "private" if private else "public"
    head = (
        f"would send {len(files)} files, {sum(size for _, size in files):,} bytes, to {hub_id} ({kind} if it is new):"
    )
    return "\n".join([head, *lines, "Nothing was sent: this was a dry run; dry_run=false sends it."])


def push_folder(folder: Path, hub_id: str, *, private: bool) -> str:
    """Sends every file in one commit; returns its address.

    Raises:
        LostError: the hub refused it or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Exported by lost")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise LostError(
            f"push = {hub_id}: the hub did not take it: {reason}. {folder} is written and whole; send it later with"
            f" `hf upload {hub_id} {folder}`"
        ) from error
    return str(commit.commit_url)
