"""Fetching named files from the Hugging Face Hub; progress, resumption, cache, offline mode are its client's."""

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from .catalogue import CATALOGUE, Entry
from .errors import ChecksumError, DiskFullError, GatedError, HubError, MissingFileError, NotOnHubError, OfflineError
from .files import sha256


def is_repo(name: str) -> bool:
    """Whether a name has the form of a repository's: owner/name."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII))


def fetch(repo: str, files: Sequence[str], *, revision: str | None = None, checksum: str | None = None) -> Path:
    """The first of `files` that a repository has, and its config.json beside it; from the cache where it is there.

    `checksum` is the published sha256.  A file that comes from the network is compared with it, and with the
    digest under which the Hub keeps large files.
    Raises OfflineError, GatedError, NotOnHubError, DiskFullError, ChecksumError.
    """
    from huggingface_hub import try_to_load_from_cache

    unreached: OfflineError | None = None
    for file in files:
        cached = isinstance(try_to_load_from_cache(repo, file, revision=revision), str)
        if unreached and not cached:
            continue  # asking again would only wait for the client's retries again
        try:
            path = download(repo, file, revision)
        except OfflineError as e:
            unreached = unreached or e
            continue
        if path is None:
            continue
        if checksum and not cached:
            verify(path, checksum)
        folder = file.rpartition("/")[0]
        download(repo, f"{folder}/config.json" if folder else "config.json", revision)
        return path
    if unreached:
        raise unreached
    what = files[0] if len(files) == 1 else f"weight file ({', '.join(files)}); name one with file="
    raise NotOnHubError(f"{repo} has no {what}: see https://huggingface.co/{repo}/tree/{revision or 'main'}")


def fetch_entry(entry: Entry) -> Path:
    """The file of a catalogue entry.  Raises MissingFileError for one that is to be downloaded by hand."""
    if entry.variant:
        raise MissingFileError(f"{entry.name} is a folder of parts: diaphane.weights.pipeline.load takes it")
    if entry.repo and "*" in entry.file:
        raise MissingFileError(f"the file's name in {entry.repo} is not known: look it up there and give file=")
    if entry.repo:
        return fetch(entry.repo, [entry.file], checksum=entry.sha256)
    mirror = CATALOGUE.get(entry.mirror or "")
    if mirror and mirror.repo:
        cure = f"use {mirror.name}"
    else:
        cure = f"no copy on the Hub is known{'' if entry.status == 'dead' else f'; download it from {entry.url}'}"
    dead = "is gone from its address" if entry.status == "dead" else "is not on the Hub"
    raise MissingFileError(f"{entry.name} ({entry.file}) {dead}: {cure}, or give the path of a copy")


def verify(path: Path, checksum: str | None = None) -> None:
    """Raises ChecksumError if a file's sha256 is neither the published one nor the one the Hub's cache names it by."""
    blob = path.resolve().name
    wanted = checksum or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None)
    if wanted and (found := sha256(path)) != wanted:
        raise ChecksumError(f"{path} has sha256 {found[:12]}…, not {wanted[:12]}…: delete it and fetch it again")


def download(repo: str, file: str, revision: str | None) -> Path | None:
    """One file through huggingface_hub, or None if the repository does not have it.

    What comes from the network is compared with the digest under which the Hub keeps large files.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{repo}"
    try:
        cached = isinstance(try_to_load_from_cache(repo, file, revision=revision), str)
        path = Path(hf_hub_download(repo, file, revision=revision))
    except GatedRepoError as e:
        raise GatedError(
            f"{repo} is gated: accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
        ) from e
    except RepositoryNotFoundError as e:
        raise NotOnHubError(f"there is no {repo} on the Hub, or it is private: check the name, or set HF_TOKEN") from e
    except RevisionNotFoundError as e:
        raise NotOnHubError(f"{repo} has no revision {revision}: see {page}/commits") from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        if try_to_load_from_cache(repo, file, revision=revision) is _CACHED_NO_EXIST:
            return None
        cure = "connect, unset HF_HUB_OFFLINE, or give a local path"
        raise OfflineError(f"{file} of {repo} is not in the cache and the Hub cannot be reached: {cure}") from e
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError) as e:
        raise HubError(f"the Hub refused {file} of {repo} ({first_line(e)}): try again later") from e
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise DiskFullError(f"no room for {file} of {repo}: free some, or set HF_HOME to another disk") from e
        raise OfflineError(f"cannot fetch {file} of {repo} ({first_line(e)}): connect, or give a local path") from e
    except Exception as e:  # whatever else its client or the network below it raises
        why = f"{type(e).__name__}: {first_line(e)}"
        raise HubError(f"cannot fetch {file} of {repo} ({why}): try again, or give a local path") from e
    if not cached:
        verify(path)
    return path


def first_line(e: Exception) -> str:
    """The first line of what an exception says."""
    return (str(e).splitlines() or [""])[0]
