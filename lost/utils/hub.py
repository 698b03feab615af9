"""Whether the Hugging Face hub answers: known within seconds, before anything that would retry for minutes.

Standard library first, so that the command line asks before torch and transformers are imported.
"""

import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

from lost.utils.errors import DataError

# For everything together: looking up the name, connecting, redirects, the answer.
SECONDS_TO_ANSWER = 5.0
INSTEAD_OF_C4 = (
    "use data=stdlib (always there), data=text_files data.train_files=[...], or a local copy:"
    " data.dataset=<folder with en/c4-train.*.json.gz and en/c4-validation.*.json.gz>"
)
ADVICE_FOR_DOCUMENTS = f"; for the documents, {INSTEAD_OF_C4}"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(text: str) -> bool:
    """Whether `text` can only name something on the hub: an id, and not the path of something here."""
    path = Path(text).expanduser()
    is_path = path.exists() or text.startswith((".", "/", "~")) or Path(path.parts[0]).is_dir()
    return not is_path and _HUB_ID.fullmatch(text) is not None


def may_be_cached(hub_id: str, kind: Literal["model", "dataset"]) -> bool:
    """Whether the local hub cache has anything of a repository; it need not be whole."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}s--{hub_id.replace('/', '--')}" / "snapshots").is_dir()


def require_hub_for_tokenizer(name: str, more_advice: str = "") -> None:
    """`require_hub` for a tokenizer that is neither a folder nor in the local hub cache."""
    require_hub(
        f"data.tokenizer = {name}: no folder of this name, and not in the local hub cache",
        "use data.tokenizer=train (trains one on the data) or data.tokenizer=<folder with tokenizer.json>"
        + more_advice,
    )


def require_hub_for_c4(dataset: str) -> None:
    """`require_hub` for documents that are to be streamed."""
    require_hub(f"data=c4 streams {dataset} from it", INSTEAD_OF_C4)


def require_hub_for_source(hub_id: str) -> None:
    """`require_hub` for a model that is neither a folder nor in the local hub cache."""
    require_hub(
        f"source = {hub_id}: there is no folder of this name, and no model of this id in the local hub cache",
        "give a folder: a run directory, a checkpoint or an export",
    )


def require_hub(why: str, instead: str) -> None:
    """Checks that the hub answers; takes SECONDS_TO_ANSWER at most, less where `ask_ahead` came before.

    Raises:
        DataError: it does not, or HF_HUB_OFFLINE is set.
    """
    endpoint = _endpoint()
    problem = "is not asked, because HF_HUB_OFFLINE is set"
    if not _is_offline():
        problem = (_asked.pop(endpoint, None) or _Question(endpoint)).problem()
    if problem:
        raise DataError(f"the Hugging Face hub ({endpoint}) {problem}: {why}. Instead, {instead}")


def ask_ahead() -> None:
    """Asks the hub in the background, so that the next `require_hub` waits less or not at all."""
    if not _is_offline():
        _asked[_endpoint()] = _Question(_endpoint())


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


class _Question:
    """One request to the endpoint, in a thread: looking up a name has no time limit of its own."""

    def __init__(self, endpoint: str):
        self._endpoint = endpoint
        self._end = time.monotonic() + SECONDS_TO_ANSWER
        self._problem = f"did not answer within {SECONDS_TO_ANSWER:g} s"
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def problem(self) -> str:
        """Why the endpoint gives no answer, or nothing; waits until the time is over."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        return self._problem

    def _ask(self) -> None:
        try:
            request = urllib.request.Request(self._endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()
            self._problem = ""
        except urllib.error.HTTPError:
            # An answer all the same, from the hub or from something in between that speaks HTTP.
            self._problem = ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            # A socket that timed out keeps the words that say so.
            if not isinstance(getattr(error, "reason", error), TimeoutError):
                self._problem = f"cannot be reached ({getattr(error, 'reason', error)})"


# Questions asked ahead by endpoint; each answer is used once, because a network comes and goes.
_asked: dict[str, _Question] = {}
