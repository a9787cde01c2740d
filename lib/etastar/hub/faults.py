"""What can go wrong with the hub, each told in one sentence with its mend."""

import contextlib
import errno
import json


class CheckpointNotFetched(RuntimeError):
    """A checkpoint that is not (wholly) on this machine, and why; what has arrived is kept and the same command goes on."""


class CheckpointRefused(ValueError):
    """Files that are not what they should be, or that the kit does not open."""


@contextlib.contextmanager
def explained(repo: str, revision: str, endpoint: str, file: str = ""):
    """What the hub's client raises inside comes out as CheckpointNotFetched, saying what failed, why and what to do."""
    from huggingface_hub.errors import HTTPError  # the client's transport, whichever library this version is built on

    try:
        yield
    except (HTTPError, OSError, json.JSONDecodeError) as error:
        what = f"{file} of {repo}" if file else repo
        raise CheckpointNotFetched(f"{what} at {revision[:12]} was not fetched: {_why(error, repo, revision, endpoint)}") from error


def _why(error: Exception, repo: str, revision: str, endpoint: str) -> str:
    from huggingface_hub import errors

    page = f"{endpoint}/{repo}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to download"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated; accept its terms at {page} and set HF_TOKEN to a token of that account{_token_state()}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; see {page}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no such repository, or it is private; check the name, or set HF_TOKEN if it is yours{_token_state()}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the host lists this file and does not have it; try again later or another revision"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return _why_status(status, error.response, _host(error, endpoint))
    if isinstance(error, errors.HTTPError):
        return f"{_host(error, endpoint)} did not answer, or the connection was cut ({_first_line(error)}); run the same command again " \
               "(check the network and HF_ENDPOINT)"
    if isinstance(error, json.JSONDecodeError):
        return f"{endpoint} does not speak the hub's protocol; check HF_ENDPOINT, and whether the network asks for a login"
    return _why_local(error)


def _why_status(status: int, response, host: str) -> str:
    if status == 429:
        wait = response.headers.get("Retry-After")
        return (f"{host} limits the rate of requests (429){f' and asks to wait {wait} s' if wait else ''}; run the same command again "
                f"then; a token (HF_TOKEN) raises the limit{_token_state()}")
    if status in (401, 403):
        return f"{host} refuses access ({status}); run the same command again, or set HF_TOKEN to a token that may read it{_token_state()}"
    if status >= 500:
        return f"{host} has a fault of its own ({status}); run the same command again later"
    return f"{host} answered {status}; check HF_ENDPOINT"


def _host(error: Exception, endpoint: str) -> str:
    """Who was asked: the hub, or the storage host that it redirects to."""
    try:
        url = error.request.url
    except (AttributeError, RuntimeError):  # the transport's errors need not know their request, and say so by raising
        return endpoint
    return f"{url.scheme}://{url.netloc.decode()}" if url.host else endpoint


def _why_local(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and run the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return f"{error.filename} cannot be written ({error.strerror}); name another folder, or set HF_HOME to one that you may write to"
    if "Consistency check failed" in str(error):
        return "the host sent another number of bytes than it lists; run the same command again"
    return f"{_first_line(error)}; run the same command again"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _token_state() -> str:
    from huggingface_hub import get_token

    return "" if get_token() else " (no token is set now)"
