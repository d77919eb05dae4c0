"""Lenses as other packages make them, for a tiny model whose weights a formula gives: what lies in tests/files/.

`python tests/foreign_lenses.py` makes the files anew, with tuned-lens 0.2.0 and transformer-lens 3.9.0 installed: a tuned lens
of random translators, a Jacobian lens that TransformerLens fitted, and the logits that each package reads through its own.
"""

import tempfile
from pathlib import Path

import torch
from families import tiny_hf, tiny_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

FILES = Path(__file__).parent / "files"
NAME, TEXT = "tests/tiny", "a dog and a cat in"


def formula_model(family: str = "gpt_neox") -> PreTrainedModel:
    """A tiny model that is the same wherever it is made: a random one depends on the versions of torch and transformers."""
    hf = tiny_hf(family)
    hf.config.name_or_path = NAME
    for number, parameter in enumerate(hf.parameters()):
        count = torch.arange(parameter.numel())
        scattered = (count * (count + number) * 2_654_435_761 % 2**32) / 2**32 - 0.5
        parameter.data = (scattered + (parameter.dim() == 1)).view_as(parameter)
    return hf


def tokens() -> Tensor:
    """`[1, pos]`"""
    return torch.tensor([tiny_tokenizer().encode(TEXT)[:8]])


@torch.no_grad()
def tuned(hf: PreTrainedModel, ids: Tensor, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Make and save a lens with tuned-lens; its logits `[pos, d_vocab]` by the number of the state."""
    from tuned_lens.nn.lenses import TunedLens  # pyright: ignore[reportMissingImports]

    lens = TunedLens.from_model(hf)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lens.layer_translators.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    lens.save(folder)
    states = hf(ids, output_hidden_states=True).hidden_states
    return {str(number): lens(states[number], number)[0].float() for number in range(len(lens))}


def jacobian(hf: PreTrainedModel, ids: Tensor, file: Path) -> dict[str, Tensor]:
    """Fit and save a lens with TransformerLens; its logits `[pos, d_vocab]` by the block whose output is read."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens
    from transformers import AutoTokenizer

    folder = tempfile.TemporaryDirectory()  # the bridge reads the tokenizer's files again
    tiny_tokenizer().save_pretrained(folder.name)
    tokenizer = AutoTokenizer.from_pretrained(folder.name)
    hf.config.architectures = [type(hf).__name__]  # the bridge goes by it; a model made from a config has none
    bridge = TransformerBridge.boot_transformers(hf.config.name_or_path, hf_model=hf, tokenizer=tokenizer)
    fitted = JacobianLens.fit(bridge, [TEXT], corpus="one line", skip_first_positions=2, show_progress=False)
    fitted.save(str(file))
    read = JacobianLens.load(str(file)).readout(bridge, ids, return_full_logits=True)
    return {str(layer): logits for layer, logits in (read.lens_logits or {}).items() if layer in fitted.source_layers}


if __name__ == "__main__":
    expected = {f"tuned/{number}": logits for number, logits in tuned(formula_model(), tokens(), FILES / "tuned_lens").items()}
    made = jacobian(formula_model(), tokens(), FILES / "jacobian_lens.pt")
    expected |= {f"jacobian/{layer}": logits for layer, logits in made.items()}
    save_file({name: logits[-2:].contiguous() for name, logits in expected.items()}, FILES / "foreign_lens_logits.safetensors")
