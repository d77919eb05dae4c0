"""What a stream gives: activations of some tokens, with what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from workbench.corpus.corpus import STRATA
from workbench.model import LanguageModel
from workbench.sites import Site
from workbench.streaming.batches import Tokens

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatch(Mapping[str, Tensor]):
    """Activations of some tokens: `batch["resid_post.3"]` is `[token, d_model]`, real tokens alone, row after row."""

    model: LanguageModel
    index: int
    """Of the batch in the stream; parts of one that was halved have the same."""
    tensors: dict[str, Tensor]
    tokens: Tokens
    """Id, document, offset, row, position and stratum of each token."""
    documents: dict[int, str]
    """The documents' own names, by ordinal."""

    def __getitem__(self, site: str) -> Tensor:
        return self.tensors[site if site in self.tensors else str(Site.parse(site, self.model.n_layers))]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"TokenBatch({self.tokens.n} tokens, {', '.join(self.tensors)})"

    @property
    def table(self) -> pd.DataFrame:
        """A row a token: document_id, document, offset, row, pos, token_id, token, stratum."""
        import pandas as pd

        own = self.tokens
        return pd.DataFrame(
            {
                "document_id": [self.documents[i] for i in own.document.tolist()], "document": own.document,
                "offset": own.offset, "row": own.row, "pos": own.pos, "token_id": own.token_id,
                "token": [self.model.token_strings[i] for i in own.token_id.tolist()],
                "stratum": pd.Categorical.from_codes(own.stratum, categories=list(STRATA)),
            }
        )  # fmt: skip
