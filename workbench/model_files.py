"""Models on disk: the folder that a name means, what its files hold, and which can be named."""

import json
import logging
import struct
from dataclasses import dataclass
from pathlib import Path

from workbench.artifacts import read_json
from workbench.embedded import EMBEDDED, pull
from workbench.errors import BadArtifact, BrokenModel, UnknownModel

log = logging.getLogger("workbench")

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
"""What a model needs of a hub repository: never pickled weights, never code."""
SECOND_COPIES = ["original/*", "consolidated*"]
"""Weights that some repositories hold once more in another format."""


@dataclass(frozen=True)
class Listing:
    """A model that can be named: one line of `workbench models`."""

    name: str
    kind: str
    """`embedded` or `cached` (by Hugging Face)."""
    state: str
    """`ready`, `not pulled`, or why it cannot be loaded."""
    bytes: int
    licence: str


def models() -> list[Listing]:
    """The embedded models and those in Hugging Face's cache."""
    found = []
    for embedded in EMBEDDED.values():
        state = "ready" if embedded.is_pulled else "not pulled"
        size = weight_bytes(embedded.folder) if embedded.is_pulled else embedded.bytes
        found.append(Listing(embedded.name, "embedded", state, size, embedded.licence))
    return found + [_listing(name, folder) for name, folder in sorted(_cached().items())]


def find(name: str, revision: str | None) -> Path:
    """The folder that a name means."""
    if not name.strip():
        raise UnknownModel(f"An empty model name was given. {_known()}")
    folder = Path(name).expanduser()
    if revision is not None and (name in EMBEDDED or folder.is_dir()):
        raise UnknownModel(f"revision={revision!r} was asked for, but {name!r} is no hub model: it has one revision.")
    if name in EMBEDDED:
        if not EMBEDDED[name].is_pulled:
            log.warning("%s is not here yet: pulling it (%.0f MB, once).", name, EMBEDDED[name].bytes / 1e6)
        return pull(name)
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownModel(f"Folder {name!r} does not exist. {_known()}")
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = _snapshot(name, revision, local_files_only=True)
        check_weights(folder)
        return folder
    except HFValidationError:
        raise UnknownModel(f"{name!r} is no model name. {_known()}") from None
    except (LocalEntryNotFoundError, BrokenModel):
        log.warning("%s is not in the cache, or not whole: asking the hub for it.", name)
    try:
        return _snapshot(name, revision, local_files_only=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(
            f"Model {name!r} is not embedded, is no folder, is not cached, and could not be had from the hub ({reason}). "
            f"{_known()}"
        ) from None


def _snapshot(name: str, revision: str | None, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_FILES,
            ignore_patterns=SECOND_COPIES,
            local_files_only=local_files_only,
        )
    )


def _known() -> str:
    cached = ", ".join(_cached()) or "none"
    return f"Embedded: {', '.join(EMBEDDED)}; cached: {cached}. Name one of these or a folder (see `workbench models`)."


def check_weights(folder: Path) -> None:
    """Look at the weight files of a folder without loading them.

    Raises:
        BrokenModel: if there is no config, no safetensors file, a shard is missing, or a file is shorter than its header says.
    """
    if not (folder / "config.json").exists():
        what = "it is no Hugging Face model folder."
        if (folder / "adapter_config.json").exists():
            what = "it is an adapter. Load its base model, put the adapter on it with peft, and pass the live model."
        raise BrokenModel(f"Folder {str(folder)!r} holds no config.json: {what}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        advice = (
            f"{', '.join(pickled)} is pickled, which can run code when it is read. Convert it with save_pretrained in an "
            "environment that you can afford to lose."
            if pickled
            else "Was the download cut short, or does the repository hold pickled weights alone?"
        )
        raise BrokenModel(f"Folder {str(folder)!r} holds no *.safetensors weights. {advice}")
    for file in files:
        if not file.exists():
            raise BrokenModel(f"{str(folder)!r} lacks {file.name}, which its index names. Fetch the model again.")
        if (promised := _promised_bytes(file)) != file.stat().st_size:
            raise BrokenModel(
                f"{str(file)!r} has {file.stat().st_size:,} bytes where its header promises {promised:,}: it is truncated "
                "or damaged. Fetch it again."
            )


def _promised_bytes(file: Path) -> int:
    """Length of a safetensors file by its own header: 8 bytes, the header, the tensors."""
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
            return (
                8
                + length
                + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            )
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise BrokenModel(f"{str(file)!r} has no readable safetensors header. Fetch it again.") from None


def revision_of(folder: Path) -> str:
    """The commit of a hub model, what the embedded one says of itself, else `local`."""
    if (own := folder / "workbench.json").exists():
        return read_json(own)["revision"]
    return folder.name if folder.parent.name == "snapshots" else "local"


def _cached() -> dict[str, Path]:
    """Models in Hugging Face's cache: id and newest snapshot."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model" and repo.revisions]
    except CacheNotFound:
        return {}
    return {repo.repo_id: max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path for repo in repos}


def _listing(name: str, folder: Path) -> Listing:
    state = "ready"
    try:
        check_weights(folder)
    except (BrokenModel, BadArtifact) as error:
        state = str(error)
    return Listing(name, "cached", state, weight_bytes(folder), _card_licence(folder))


def _card_licence(folder: Path) -> str:
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), "see its card")


def weight_bytes(folder: Path) -> int:
    """Size of all weight files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
