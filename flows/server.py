"""What goes wrong between a command and the Prefect server that is configured, as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.settings import get_current_settings

from mllmsrec_core.errors import UsageError

REFUSED = (401, 403)
START = "run `prefect server start`, and set PREFECT_API_URL=http://127.0.0.1:4200/api"


@contextmanager
def reached() -> Iterator[None]:
    """Raises UsageError where the server does not answer, or wants another login."""
    url = get_current_settings().api.url
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in REFUSED:
            raise
        raise UsageError(
            f"the Prefect server at {url} refuses the login, or there is none: set PREFECT_API_AUTH_STRING=user:password; "
            "that of docker-compose.yml stands in docker/secrets/prefect_login"
        ) from error
    except httpx.TransportError as error:
        raise _silent(url, error) from error
    except RuntimeError as error:
        if "Failed to reach API" not in str(error):  # Prefect's own words for it, as a run begins
            raise
        raise _silent(url, error.__cause__ or error) from error


def _silent(url: str | None, error: BaseException) -> UsageError:
    return UsageError(f"no Prefect server answers at {url} ({error}): {START}, or unset it to run without a server")
