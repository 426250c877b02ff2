"""Fetch a model from the hub: chosen, resumed, checked, and only then given its name.

account.py   which hub, by which proxy, with whose token
plan.py      which files of a repository, and why the others not
hub.py       what huggingface_hub says about a repository; its errors as ours; where a token may go
transfer.py  one file: resume, size and hash, the rename at the end; wire.py: one GET of it
fetch.py     download(request, on_progress): a whole repository
jobs.py      the server's downloads, several at once
cli.py       server.py download
"""

from __future__ import annotations

from modules.download.cli import add_parser, run
from modules.download.fetch import Downloaded, DownloadProgress, DownloadRequest, download, plan_download

__all__ = ["DownloadProgress", "DownloadRequest", "Downloaded", "add_parser", "download", "plan_download", "run"]
