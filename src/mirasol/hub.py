"""Repositories of the Hugging Face hub by name, `org/name` or `org/name@REVISION`: their files, from the cache or over
the network.

A local path of the same name comes first, and so does a name below a local folder (`runs/mine` where `runs` exists),
which is a path with a slip in it rather than a repository; with @REVISION only the exact path does.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mirasol.console import make_console, print_line
from mirasol.errors import UserError

# What is downloaded of a repository. Weights are read from safetensors only: a pickle can run code.
MODEL = ("*.json", "model*.safetensors", "*.txt", "*.model")
OPEN_CLIP = ("*.json", "open_clip*.safetensors")
TOKENIZER = ("*.json", "*.txt", "*.model")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository and what of it is meant: a branch, a tag or a commit; None is its main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(name: str | Path) -> HubName | None:
    """The repository that a name means; None for a local path, and for what cannot be a repository's name."""
    match = _NAME.fullmatch(str(name))
    if match is None or Path(name).exists():
        return None
    if match["revision"] is None and Path(match["repository"]).parent.exists():
        return None
    return HubName(match["repository"], match["revision"])


def find_on_hub(name: str | Path, files: tuple[str, ...]) -> Path | None:
    """The folder with the `files` (patterns) of the repository that a name means; None if it means none.

    What the cache has of a commit is not asked for again. Of a branch or tag the newest commit is taken, or without a
    network (`HF_HUB_OFFLINE=1`) the one in the cache.

    Raises:
        UserError: unknown, not open to this user, without safetensors, or neither to be reached nor in the cache.
    """
    found = parse_hub_name(name)
    return None if found is None else _fetch(found, files)


def name_commit(name: str | Path, files: tuple[str, ...]) -> str:
    """The name with the commit that it means now, `org/name@COMMIT`; local paths as they are. Raises UserError as
    `find_on_hub`."""
    found, folder = parse_hub_name(name), find_on_hub(name, files)
    return str(name) if found is None or folder is None else f"{found.repository}@{folder.name}"


def describe_folder_before_hub(name: str | Path) -> str | None:
    """A remark where a local folder was taken although the hub's cache has a repository of the same name."""
    match = _NAME.fullmatch(str(name))
    if match is None or not Path(name).exists():
        return None
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{match['repository'].replace('/', '--')}").exists():
        return None
    return (
        f"{name}: the folder of this name here, not the repository of the hub ({match['repository']}@main means that)"
    )


@functools.cache
def _fetch(name: HubName, files: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(logging.CRITICAL)  # its lines about retries; what comes of them is said once, below
    load = functools.partial(snapshot_download, name.repository, revision=name.revision, allow_patterns=list(files))
    is_offline = constants.HF_HUB_OFFLINE
    if is_offline or _COMMIT.fullmatch(name.revision or ""):
        try:
            return _check_weights(name, Path(load(local_files_only=True)), files)
        except UserError:
            raise
        except Exception as error:
            if is_offline:
                raise UserError(
                    f"{name}: no such file or folder, nor in the cache of the hub ({constants.HF_HUB_CACHE}), and "
                    "HF_HUB_OFFLINE forbids asking the hub: unset it, or give a folder"
                ) from error
    print_line(make_console(), f"{name}: from {constants.ENDPOINT}; a first download may take minutes")
    return _check_weights(name, Path(_explain_errors(name, load)), files)


def _explain_errors(name: HubName, load: Callable[[], str]) -> str:
    """What `load` returns. Raises UserError for everything that can go wrong on the way."""
    from huggingface_hub import constants, errors

    place = f"{constants.ENDPOINT}/{name.repository}"
    try:
        return load()
    except errors.GatedRepoError as error:
        why = f"open only to those whom its authors admit: accept their terms at {place}, then log in: hf auth login"
        raise UserError(f"{name}: {why}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: {name.repository} has no revision {name.revision!r}: see {place}/commits") from error
    except errors.RepositoryNotFoundError as error:
        why = f"nor a repository at {constants.ENDPOINT}, unless it is private (hf auth login): check the name"
        raise UserError(f"{name}: neither a file or folder here {why}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        cause = error.__cause__ or error
        reason = _shorten(cause)
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(
                f"{name}: {constants.ENDPOINT} answers with an error ({reason}): try again later"
            ) from error
        raise UserError(
            f"{name}: no such file or folder, not in the cache of the hub, and {constants.ENDPOINT} cannot be reached "
            f"({reason}): connect, or give a folder"
        ) from error
    except Exception as error:  # of the network library, or of the disk
        raise UserError(f"{name}: the download from {place} failed ({_shorten(error)}): try again") from error


def _check_weights(name: HubName, folder: Path, files: tuple[str, ...]) -> Path:
    """Returns the folder. Raises UserError if weights were asked for and the repository has none as safetensors."""
    if any(pattern.endswith(".safetensors") for pattern in files) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: no {files[1]} at this revision{_describe_pickles(name, folder.name)}: choose one that has, name "
            "another repository, or convert the weights and give their folder"
        )
    return folder


def _describe_pickles(name: HubName, commit: str) -> str:
    """Which weights in other formats a repository has, as far as the hub tells."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name.repository, revision=commit)
    except Exception:
        return ""
    others = [file for file in files if file.endswith(PICKLED)]
    return f", only {others[0]}, and a pickle can run code when it is opened" if others else ""


def _shorten(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")
