"""What the hub says about a repository, through huggingface_hub, with its errors as ours; and who may see the token."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from modules.download.plan import MAX_FILES, RepoFile
from modules.errors import ConfigError, DownloadError, InvalidParameter
from modules.reach import LINK_LOCAL, LOOPBACK, PUBLIC, reach_of

if TYPE_CHECKING:
    from collections.abc import Callable

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./+-]{0,199}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_INFO_TIMEOUT_S = 30.0
_MAX_REVISIONS = 500
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub: where it is, the token for it, which no other host ever gets, and a proxy other than the environment's."""

    endpoint: str
    token: str | None = field(default=None, repr=False)
    proxy: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, endpoint: str | None = None) -> Hub:
        """$HF_ENDPOINT (a mirror) or the public hub; the token of $HF_TOKEN or of `hf auth login`. Raises ConfigError."""
        from huggingface_hub import constants, get_token

        chosen = check_endpoint(endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
        return cls(chosen, get_token())

    def file_url(self, repo: str, commit: str, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint))

    def headers_for(self, url: str) -> dict[str, str]:
        """Request headers for `url`: the token only when scheme, host and port are the hub's own."""
        headers = {"User-Agent": "switchyard", "Accept-Encoding": "identity"}
        if self.token and origin(url) == origin(self.endpoint):
            headers["Authorization"] = f"Bearer {self.token}"
        return headers

    def check_redirect(self, url: str) -> None:
        """Raise DownloadError for a redirect to a place a download has no business at. Resolves names: call it in a thread."""
        parts = split_url(url)
        if parts is None or parts.scheme not in _PORTS or not parts.hostname:
            raise _bad_redirect("to what is no web address")
        if parts.scheme == "http" and urlsplit(self.endpoint).scheme == "https":
            raise _bad_redirect("from https to http")
        try:
            self._check_reach(_reach(parts.hostname, proxied=self.proxy is not None))
        except OSError as error:
            raise DownloadError(
                f"The hub redirects to {parts.hostname[:100]}, which can't be found.", hint="Check the network, then try again."
            ) from error

    def check_address(self, address: str) -> None:
        """The same for the address that a redirect's name led to in the end."""
        self._check_reach(reach_of(ipaddress.ip_address(address.partition("%")[0])))

    def _check_reach(self, target: int) -> None:
        home = _reach(str(urlsplit(self.endpoint).hostname), proxied=self.proxy is not None)
        if target > home or target == LINK_LOCAL:
            raise _bad_redirect("into this computer or its network")


def check_endpoint(address: str) -> str:
    """A hub's address without its last slash. Raises ConfigError for what is none, or when downloads are switched off."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise ConfigError("Downloads are switched off by HF_HUB_OFFLINE.", hint="Unset that variable.")
    chosen = address.strip().rstrip("/")
    parts = split_url(chosen)
    if (
        parts is None
        or parts.scheme not in _PORTS
        or not parts.hostname
        or parts.username is not None
        or parts.query
        or parts.fragment
    ):
        raise ConfigError(f"The hub's address {chosen[:200]!r} is no web address.", hint="It looks like https://hub.example.org.")
    return chosen


def _reach(host: str, *, proxied: bool = False) -> int:
    """The innermost place `host` resolves to. Behind a proxy that alone resolves names, a name counts as public."""
    try:
        addresses = [ipaddress.ip_address(host)]
    except ValueError:
        if host.lower() == "localhost":
            return LOOPBACK
        try:
            addresses = [ipaddress.ip_address(row[4][0]) for row in socket.getaddrinfo(host, None)]
        except OSError:
            if proxied or any(
                os.environ.get(name)
                for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")
            ):
                return PUBLIC
            raise
    return max(map(reach_of, addresses), default=PUBLIC)


def split_url(url: str) -> SplitResult | None:
    """The parts of an address whose host and port make sense, else None."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError:
        return None
    return parts


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: who a token belongs to."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


def _bad_redirect(where: str) -> DownloadError:
    return DownloadError(
        f"The hub redirected the download {where}, which is not followed.", hint="Check the hub's address; try another mirror."
    )


def check_names(repo: str, revision: str | None) -> None:
    """Raise InvalidParameter unless these are names a hub could have given."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise InvalidParameter(f"{repo[:100]!r} is no repository name.", hint="It looks like OWNER/NAME.", param="repository")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidParameter(f"{revision[:100]!r} is no branch, tag or commit.", param="revision")


def folder_of(repo: str) -> str:
    """The folder below the model folder that a repository is fetched into."""
    return repo.replace("/", "_")


async def list_repository(hub: Hub, repo: str, revision: str | None) -> tuple[str, list[RepoFile]]:
    """(commit, files) of a repository. Raises DownloadError, InvalidParameter."""
    check_names(repo, revision)
    info = await _call(repo, revision, lambda: _model_info(hub, repo, revision))
    commit = str(getattr(info, "sha", "") or "")
    siblings = getattr(info, "siblings", None) or []
    if not _SHA1.fullmatch(commit):
        raise _no_answer("it names no commit")
    if len(siblings) > MAX_FILES:
        raise _no_answer(f"it lists {len(siblings):,} files")
    return commit, [_file(sibling) for sibling in siblings]


def _model_info(hub: Hub, repo: str, revision: str | None) -> Any:
    return _api(hub).model_info(repo, revision=revision, files_metadata=True, timeout=_INFO_TIMEOUT_S)


async def list_revisions(hub: Hub, repo: str) -> list[str]:
    """Branches, then tags, as the hub orders them. Raises DownloadError, InvalidParameter."""
    check_names(repo, None)
    refs = await _call(repo, None, lambda: _api(hub).list_repo_refs(repo))
    names = [str(ref.name) for ref in (*refs.branches, *refs.tags)]
    return [name for name in names if _REVISION.fullmatch(name) and ".." not in name][:_MAX_REVISIONS]


def _api(hub: Hub) -> Any:
    from huggingface_hub import HfApi

    _use_client_for(hub)
    return HfApi(endpoint=hub.endpoint, token=hub.token or False, library_name="switchyard")


_client_of: list[Hub | None] = [None]
_client_mutex = threading.Lock()


def _use_client_for(hub: Hub) -> None:
    """huggingface_hub has one HTTP client for the whole process: made anew for another hub or proxy, with a time limit and our
    rules for redirects."""
    with _client_mutex:
        if _client_of[0] == hub:
            return
        import httpx2
        from huggingface_hub import set_client_factory

        def check(request: httpx2.Request) -> None:
            if origin(str(request.url)) != origin(hub.endpoint):
                hub.check_redirect(str(request.url))

        set_client_factory(
            lambda: httpx2.Client(
                proxy=hub.proxy, event_hooks={"request": [check]}, follow_redirects=True, timeout=_INFO_TIMEOUT_S
            )
        )
        _client_of[0] = hub


def _file(sibling: Any) -> RepoFile:
    path, size = sibling.rfilename, sibling.size
    if not isinstance(path, str) or type(size) is not int or size < 0:
        raise _no_answer("a file has no name or size")
    sha256 = getattr(sibling.lfs, "sha256", None) if sibling.lfs else None
    sha1 = sibling.blob_id if sha256 is None else None
    return RepoFile(
        path,
        size,
        sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
        sha1 if isinstance(sha1, str) and _SHA1.fullmatch(sha1) else None,
    )


async def _call(repo: str, revision: str | None, ask: Callable[[], Any]) -> Any:
    """Ask the hub in a thread. huggingface_hub's errors become ours, each with what to do."""
    from huggingface_hub import errors

    try:
        return await asyncio.to_thread(ask)
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: its publisher asks for consent first.",
            hint="Accept the terms on the model's page, then give a token of that account (HF_TOKEN, or Models → Hub).",
            detail={"gated": True},
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {revision!r}.", hint="Check the branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"There is no model {repo} on the hub, or it is private.",
            hint="Check the spelling (OWNER/NAME); a private one needs a token (HF_TOKEN, or Models → Hub).",
        ) from error
    except errors.HFValidationError as error:
        raise InvalidParameter(
            f"{repo!r} is no repository name.", hint="It looks like OWNER/NAME.", param="repository"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise DownloadError(f"The hub refused the request (HTTP {status}).", hint="Try again later.") from error
    except OSError as error:
        raise _unreachable(error) from error
    except Exception as error:
        # The library's transport errors share no base class with OSError, and an answer of the wrong shape ends in a ValueError,
        # KeyError, TypeError or AttributeError inside it.
        if type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests")):
            raise _unreachable(error) from error
        if isinstance(error, (ValueError, KeyError, TypeError, AttributeError)):
            raise _no_answer("it is a web page or no JSON") from error
        raise


def _unreachable(error: BaseException) -> DownloadError:
    return DownloadError(
        "The hub can't be reached.",
        hint="Check the network and the proxy; HF_ENDPOINT or --hub-endpoint names a mirror.",
        detail={"reason": f"{type(error).__name__}: {error}"[:500]},
    )


def _no_answer(why: str) -> DownloadError:
    return DownloadError(
        f"The hub's answer makes no sense: {why}.",
        hint="A login page or proxy may answer for it: open the hub in a browser, check its address.",
    )
