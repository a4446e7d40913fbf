"""One request to the Hugging Face hub, whose own clients try again for a minute where there is no network."""

from __future__ import annotations

SECONDS = 5.0  # that it may take to answer


def answers() -> bool:
    """Whether it can be reached; without, only what is kept on this machine can be had."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of several libraries, and where the user has set HF_HUB_OFFLINE
        return False
    return True
